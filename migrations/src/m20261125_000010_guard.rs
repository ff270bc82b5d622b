//! That a run has gone back to where its numbers were finite; gradient norms by part, images per second and memory of
//! the device in the series.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer_null, double_null, text_null};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

fn columns() -> Vec<(&'static str, ColumnDef)> {
    vec![
        // JSON: from where, to where, why.
        ("runs", text_null("rolled_back")),
        ("run_metrics", double_null("grad_norm_unet")),
        ("run_metrics", double_null("grad_norm_text_encoder")),
        ("run_metrics", double_null("images_per_s")),
        ("run_metrics", double_null("eta_s")),
        ("run_metrics", big_integer_null("device_memory_bytes")),
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
