//! A queue that is fair: who has made a run, on which device it waits, and whose turn it was last.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, boolean, string_null, uuid_null};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

fn columns() -> Vec<ColumnDef> {
    vec![
        // No foreign key: what a key has made outlives it.
        uuid_null("api_key_id"),
        string_null("wanted_device"),
        // Counts runs as they are made; a clock may be set back.
        big_integer("number").default(0).take(),
        // Counts workers as they take runs; 0 before the first.
        big_integer("turn").default(0).take(),
        boolean("keeps_turn").default(false).take(),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, "runs", columns()).await?;
        for (name, first, second) in [
            ("runs_by_turn", "api_key_id", "turn"),
            ("runs_by_number", "number", "id"),
        ] {
            let index = Index::create()
                .name(name)
                .table("runs")
                .col(first)
                .col(second)
                .to_owned();
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for name in ["runs_by_turn", "runs_by_number"] {
            let index = Index::drop().name(name).table("runs").to_owned();
            manager.drop_index(index).await?;
        }
        columns::drop(manager, "runs", columns()).await
    }
}
