//! Colour correction of datasets and images, and what was measured of pictures, by their content.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{integer, string, text, text_null};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

const CORRECTED: [&str; 2] = ["datasets", "images"];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in CORRECTED {
            columns::add(manager, table, [text_null("color_correction")]).await?;
        }
        manager
            .create_table(
                Table::create()
                    .table("picture_measures")
                    .col(string("sha256").primary_key())
                    .col(integer("format")) // another one is measured again
                    .col(text("measures")) // JSON
                    .to_owned(),
            )
            .await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table("picture_measures").to_owned())
            .await?;
        for table in CORRECTED {
            columns::drop(manager, table, [text_null("color_correction")]).await?;
        }
        Ok(())
    }
}
