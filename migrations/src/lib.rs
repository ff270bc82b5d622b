//! The database's history. Append-only: a released migration is never changed, a new one is added.

mod columns;
mod m20261101_000001_datasets;
mod m20261101_000002_runs;
mod m20261125_000001_api_keys;
mod m20261125_000002_webhooks;
mod m20261125_000003_resume;
mod m20261125_000004_judging;
mod m20261125_000005_queue;
mod m20261125_000008_provenance;
mod m20261125_000009_grids;
mod m20261125_000010_guard;
mod m20261128_000001_ingest;
mod m20261128_000004_captioning;
mod m20261128_000005_preparation;
mod m20261128_000007_captions;
mod m20261128_000021_lora_tools;
mod m20261128_000021_masks;

pub use sea_orm_migration::MigratorTrait;
use sea_orm_migration::{MigrationTrait, async_trait};

/// All migrations, in the order in which they apply.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m20261101_000001_datasets::Migration),
            Box::new(m20261101_000002_runs::Migration),
            Box::new(m20261125_000001_api_keys::Migration),
            Box::new(m20261125_000002_webhooks::Migration),
            Box::new(m20261125_000003_resume::Migration),
            Box::new(m20261125_000004_judging::Migration),
            Box::new(m20261125_000005_queue::Migration),
            Box::new(m20261125_000008_provenance::Migration),
            Box::new(m20261125_000009_grids::Migration),
            Box::new(m20261125_000010_guard::Migration),
            Box::new(m20261128_000001_ingest::Migration),
            Box::new(m20261128_000004_captioning::Migration),
            Box::new(m20261128_000005_preparation::Migration),
            Box::new(m20261128_000007_captions::Migration),
            Box::new(m20261128_000021_masks::Migration),
            Box::new(m20261128_000021_lora_tools::Migration),
        ]
    }
}
