//! Keys of the API: their digests, never the keys themselves.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, pk_uuid, string_uniq, text};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .create_table(
                Table::create()
                    .table("api_keys")
                    .col(pk_uuid("id"))
                    .col(text("name"))
                    .col(string_uniq("sha256"))
                    .col(text("hint")) // the key's first characters, for people to tell keys apart
                    .col(text("scopes")) // words with spaces between
                    .col(big_integer("created_at_ms"))
                    .col(big_integer_null("last_used_at_ms"))
                    .col(big_integer_null("revoked_at_ms"))
                    .to_owned(),
            )
            .await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table("api_keys").to_owned())
            .await
    }
}
