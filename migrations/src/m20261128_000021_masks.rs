//! Masks of images: which blob says what of a picture counts in the loss.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::text_null;

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, "images", [text_null("mask_sha256")]).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::drop(manager, "images", [text_null("mask_sha256")]).await
    }
}
