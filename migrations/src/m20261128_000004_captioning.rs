//! Captioning jobs: rows of the table of runs, and what they have said of each image.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, string, string_null, text, text_null, uuid};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

fn column() -> ColumnDef {
    // What captions the images of the dataset: `blip`, `wd14`, `deepdanbooru`.
    string_null("captioner")
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, "runs", [column()]).await?;
        manager.create_table(results()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::drop().table("captioning_results").to_owned();
        manager.drop_table(table).await?;
        columns::drop(manager, "runs", [column()]).await
    }
}

fn results() -> TableCreateStatement {
    Table::create()
        .table("captioning_results")
        .col(uuid("job_id"))
        .col(big_integer("position")) // in the job's list of images, from 0
        .col(uuid("image_id")) // may be gone
        .col(text("file_name"))
        .col(string("outcome"))
        .col(text_null("message"))
        .col(text_null("caption"))
        .col(text_null("tags")) // JSON: name, category, probability
        .col(big_integer("created_at_ms"))
        .primary_key(Index::create().col("job_id").col("position"))
        .foreign_key(
            ForeignKey::create()
                .from("captioning_results", "job_id")
                .to("runs", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .to_owned()
}
