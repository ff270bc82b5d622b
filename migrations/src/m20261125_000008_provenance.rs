//! Where a run's file comes from: what each worker has found around it, the record of the whole, and what a run that
//! repeats another has found.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, integer, string_null, text, text_null, uuid, uuid_null,
};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

fn columns() -> Vec<ColumnDef> {
    vec![
        // Digest of the record, a blob.
        string_null("provenance_sha256"),
        // The run that this one repeats, and how that went; JSON.
        uuid_null("reproduction_of"),
        text_null("reproduction"),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::create()
            .table("run_attempts")
            .col(uuid("run_id"))
            .col(integer("attempt"))
            // What the worker found around it; JSON.
            .col(text("facts"))
            .col(big_integer("begun_at_ms"))
            .primary_key(Index::create().col("run_id").col("attempt"))
            .foreign_key(
                ForeignKey::create()
                    .from("run_attempts", "run_id")
                    .to("runs", "id")
                    .on_delete(ForeignKeyAction::Cascade),
            )
            .to_owned();
        manager.create_table(table).await?;
        columns::add(manager, "runs", columns()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::drop(manager, "runs", columns()).await?;
        let table = Table::drop().table("run_attempts").to_owned();
        manager.drop_table(table).await
    }
}
