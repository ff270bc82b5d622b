//! Runs that go on: what is wanted of a worker, how far a run was kept, what it waits for, its place in the queue.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, big_integer_null, boolean, integer, string_null, text_null, uuid_null,
};

use crate::columns;

#[derive(DeriveMigrationName)]
pub struct Migration;

fn columns() -> Vec<ColumnDef> {
    let no = |name: &'static str| boolean(name).default(false).take();
    let zero = |name: &'static str| integer(name).default(0).take();
    vec![
        no("pause_requested"),
        no("save_requested"),
        no("sample_requested"),
        no("leave_requested"),
        // The newest resume point, and the furthest step that any worker has come to.
        big_integer_null("kept_step"),
        big_integer("furthest_step").default(0).take(),
        // Both as they were when the last worker was lost, and how many in a row have not moved them.
        big_integer_null("judged_kept_step"),
        big_integer("judged_furthest_step").default(0).take(),
        zero("stalls"),
        // What an interrupted run waits for.
        string_null("wait_code"),
        text_null("wait_message"),
        big_integer_null("wait_bytes"),
        // The machine of the worker, as long as it is up.
        string_null("worker_host"),
        uuid_null("continued_from"),
        zero("priority"),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::add(manager, "runs", columns()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::drop(manager, "runs", columns()).await
    }
}
