//! Webhooks and their deliveries: what is still to be sent, and what has become of the rest.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, big_integer_null, boolean, integer, integer_null, pk_uuid, string, text,
    text_null, uuid, uuid_null,
};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(webhooks()).await?;
        manager.create_table(deliveries()).await?;
        for index in [
            Index::create()
                .name("deliveries_due")
                .table("webhook_deliveries")
                .col("state")
                .col("next_attempt_at_ms")
                .to_owned(),
            Index::create()
                .name("deliveries_in_order")
                .table("webhook_deliveries")
                .col("webhook_id")
                .col("run_id")
                .col("state")
                .col("seq")
                .to_owned(),
        ] {
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["webhook_deliveries", "webhooks"] {
            manager
                .drop_table(Table::drop().table(table).to_owned())
                .await?;
        }
        Ok(())
    }
}

fn webhooks() -> TableCreateStatement {
    Table::create()
        .table("webhooks")
        .col(pk_uuid("id"))
        .col(text("url"))
        .col(text("description"))
        .col(text("events")) // words with spaces between
        .col(boolean("enabled"))
        .col(text_null("disabled_reason"))
        // Signing needs the secret itself; a digest would not do.
        .col(text("secret"))
        .col(text_null("previous_secret"))
        .col(big_integer_null("previous_secret_until_ms"))
        .col(big_integer("revision"))
        .col(big_integer("created_at_ms"))
        .col(big_integer("updated_at_ms"))
        .to_owned()
}

fn deliveries() -> TableCreateStatement {
    Table::create()
        .table("webhook_deliveries")
        .col(pk_uuid("id"))
        .col(uuid("webhook_id"))
        .col(uuid_null("run_id")) // a test has none; a run may be gone before its last message
        .col(big_integer("seq")) // the event's number within its run
        .col(string("event_type"))
        .col(text("payload"))
        .col(string("state"))
        .col(integer("attempts"))
        .col(big_integer("next_attempt_at_ms"))
        .col(integer_null("last_status"))
        .col(text_null("last_error"))
        .col(big_integer("created_at_ms"))
        .col(big_integer_null("finished_at_ms"))
        .foreign_key(
            ForeignKey::create()
                .from("webhook_deliveries", "webhook_id")
                .to("webhooks", "id")
                .on_delete(ForeignKeyAction::Cascade),
        )
        .to_owned()
}
