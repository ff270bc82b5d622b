//! Datasets, their subsets and images.
//!
//! Times are Unix milliseconds: both databases compare integers alike, which they do not do with their date types.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, boolean, integer, pk_uuid, string, text, text_null, uuid,
};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(datasets()).await?;
        manager.create_table(subsets()).await?;
        manager.create_table(images()).await?;
        for index in [
            Index::create()
                .name("subsets_by_name")
                .table("subsets")
                .col("dataset_id")
                .col("name")
                .unique()
                .to_owned(),
            // The same picture twice in one subset is a mistake; in two subsets it may be meant.
            Index::create()
                .name("images_by_content")
                .table("images")
                .col("subset_id")
                .col("sha256")
                .unique()
                .to_owned(),
            Index::create()
                .name("images_of_dataset")
                .table("images")
                .col("dataset_id")
                .col("id")
                .to_owned(),
        ] {
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["images", "subsets", "datasets"] {
            manager
                .drop_table(Table::drop().table(table).to_owned())
                .await?;
        }
        Ok(())
    }
}

fn datasets() -> TableCreateStatement {
    Table::create()
        .table("datasets")
        .col(pk_uuid("id"))
        .col(text("name"))
        .col(big_integer("revision"))
        .col(big_integer("created_at_ms"))
        .col(big_integer("updated_at_ms"))
        .to_owned()
}

fn subsets() -> TableCreateStatement {
    Table::create()
        .table("subsets")
        .col(pk_uuid("id"))
        .col(uuid("dataset_id"))
        .col(text("name"))
        .col(integer("repeats"))
        .col(boolean("is_reg"))
        .col(text_null("instance_prompt"))
        .col(text_null("class_prompt"))
        .col(big_integer("revision"))
        .col(big_integer("created_at_ms"))
        .foreign_key(
            ForeignKey::create()
                .from("subsets", "dataset_id")
                .to("datasets", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .to_owned()
}

fn images() -> TableCreateStatement {
    Table::create()
        .table("images")
        .col(pk_uuid("id"))
        .col(uuid("dataset_id"))
        .col(uuid("subset_id"))
        .col(text("file_name"))
        .col(string("sha256"))
        .col(string("media_type"))
        .col(big_integer("size_bytes"))
        .col(integer("width_px"))
        .col(integer("height_px"))
        .col(text_null("caption"))
        .col(big_integer("revision"))
        .col(big_integer("created_at_ms"))
        .col(big_integer("updated_at_ms"))
        .foreign_key(
            ForeignKey::create()
                .from("images", "dataset_id")
                .to("datasets", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .foreign_key(
            ForeignKey::create()
                .from("images", "subset_id")
                .to("subsets", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .to_owned()
}
