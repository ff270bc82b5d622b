//! What validation says: of each measurement its standard error, of each LoRA its loss, of a run a verdict.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{double_null, text_null};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

fn columns() -> Vec<(&'static str, ColumnDef)> {
    vec![
        ("run_metrics", double_null("validation_error")),
        ("loras", double_null("validation_loss")),
        ("loras", double_null("validation_error")),
        ("runs", text_null("verdict")),
        // Why the run has ended before its last step.
        ("runs", text_null("early_stop")),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, column) in columns() {
            columns::add(manager, table, [column]).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, column) in columns() {
            columns::drop(manager, table, [column]).await?;
        }
        Ok(())
    }
}
