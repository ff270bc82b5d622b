//! Grids: pictures of a run's LoRA files. They wait, are worked on and end as runs do, and are rows of the same table.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::uuid_null;

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::alter()
            .table(Alias::new("runs"))
            // The run whose LoRA files are drawn.
            .add_column(uuid_null("grid_of"))
            .to_owned();
        manager.alter_table(table).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::alter()
            .table(Alias::new("runs"))
            .drop_column(Alias::new("grid_of"))
            .to_owned();
        manager.alter_table(table).await
    }
}
