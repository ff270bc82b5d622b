//! LoRA files that no run has made: uploaded, or made of others. What was seen when a file was read again.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, boolean, double_null, pk_uuid, string, text, text_null, uuid, uuid_null,
};
use sea_orm_migration::sea_orm::DatabaseBackend;

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

/// The columns that were there before.
const KEPT: &str = "id, run_id, file_name, step, epoch, is_final, sha256, size_bytes, created_at_ms, \
     validation_loss, validation_error";

fn added() -> [ColumnDef; 2] {
    [
        // JSON: where a file comes from that no run has made.
        text_null("origin"),
        // JSON: what was seen when it was read again.
        text_null("self_check"),
    ]
}

/// SQLite cannot change a column: the table is made anew.
async fn rebuild(manager: &SchemaManager<'_>, run_id: ColumnDef) -> Result<(), DbErr> {
    let table = Table::create()
        .table("loras_anew")
        .col(pk_uuid("id"))
        .col(run_id)
        .col(text("file_name"))
        .col(big_integer("step"))
        .col(big_integer("epoch"))
        .col(boolean("is_final"))
        .col(string("sha256"))
        .col(big_integer("size_bytes"))
        .col(big_integer("created_at_ms"))
        .col(double_null("validation_loss"))
        .col(double_null("validation_error"))
        .foreign_key(
            ForeignKey::create()
                .from("loras_anew", "run_id")
                .to("runs", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .to_owned();
    manager.create_table(table).await?;
    // On one connection of the pool: another may not have heard yet that the name is free.
    let statements = format!(
        "BEGIN IMMEDIATE; \
         INSERT INTO loras_anew ({KEPT}) SELECT {KEPT} FROM loras; \
         DROP TABLE loras; \
         ALTER TABLE loras_anew RENAME TO loras; \
         CREATE INDEX loras_of_run ON loras (run_id); \
         COMMIT"
    );
    manager
        .get_connection()
        .execute_unprepared(&statements)
        .await?;
    Ok(())
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() == DatabaseBackend::Sqlite {
            rebuild(manager, uuid_null("run_id")).await?;
        } else {
            let statement = "ALTER TABLE loras ALTER COLUMN run_id DROP NOT NULL";
            manager
                .get_connection()
                .execute_unprepared(statement)
                .await?;
        }
        columns::add(manager, "loras", added()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        let statement = "DELETE FROM loras WHERE run_id IS NULL";
        connection.execute_unprepared(statement).await?;
        if manager.get_database_backend() == DatabaseBackend::Sqlite {
            return rebuild(manager, uuid("run_id")).await;
        }
        let statement = "ALTER TABLE loras ALTER COLUMN run_id SET NOT NULL";
        connection.execute_unprepared(statement).await?;
        columns::drop(manager, "loras", added()).await
    }
}
