//! Transparent images and what they are laid on; uploads that come in parts.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, boolean, pk_uuid, text, text_null, uuid};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

fn columns() -> [ColumnDef; 2] {
    [
        boolean("has_alpha").default(false).take(),
        // `#rrggbb`
        text_null("background"),
    ]
}

fn uploads() -> TableCreateStatement {
    Table::create()
        .table("uploads")
        .col(pk_uuid("id"))
        .col(uuid("dataset_id"))
        .col(text("name"))
        .col(big_integer("size_bytes"))
        .col(text_null("sha256"))
        // JSON: where its files go.
        .col(text("choice"))
        .col(text("state"))
        // JSON: what became of its files.
        .col(text_null("answer"))
        .col(big_integer("created_at_ms"))
        .col(big_integer("updated_at_ms"))
        .foreign_key(
            ForeignKey::create()
                .from("uploads", "dataset_id")
                .to("datasets", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .to_owned()
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, "images", columns()).await?;
        manager.create_table(uploads()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table("uploads").to_owned())
            .await?;
        columns::drop(manager, "images", columns()).await
    }
}
