//! How a subset's images are trained on, what a run's dataset was, and every change of a caption.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, boolean, pk_uuid, text, text_null, uuid, uuid_null};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

fn columns() -> Vec<(&'static str, ColumnDef)> {
    vec![
        // JSON: where it differs from the run's settings.
        ("subsets", text_null("training")),
        // JSON: the dataset and its subsets as they were when the run was made. The images are in a column of their own.
        ("runs", text_null("dataset")),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, column) in columns() {
            columns::add(manager, table, [column]).await?;
        }
        manager.create_table(caption_changes()).await?;
        for (name, first) in [
            ("caption_changes_of_image", "image_id"),
            ("caption_changes_of_dataset", "dataset_id"),
        ] {
            let index = Index::create()
                .name(name)
                .table("caption_changes")
                .col(first)
                .col("revision")
                .to_owned();
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table("caption_changes").to_owned())
            .await?;
        for (table, column) in columns() {
            columns::drop(manager, table, [column]).await?;
        }
        Ok(())
    }
}

fn caption_changes() -> TableCreateStatement {
    Table::create()
        .table("caption_changes")
        .col(pk_uuid("id"))
        .col(uuid("dataset_id"))
        .col(uuid("image_id"))
        // The dataset's revision that the change has made; all changes of one call have the same.
        .col(big_integer("revision"))
        // `edit`, `upload`, `batch`, `undo`, `import`.
        .col(text("kind"))
        .col(text_null("before"))
        .col(text_null("after"))
        .col(uuid_null("api_key_id"))
        // Whether a later call has undone it.
        .col(boolean("undone"))
        .col(big_integer("changed_at_ms"))
        .foreign_key(
            ForeignKey::create()
                .from("caption_changes", "dataset_id")
                .to("datasets", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .foreign_key(
            ForeignKey::create()
                .from("caption_changes", "image_id")
                .to("images", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .to_owned()
}
