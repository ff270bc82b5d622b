//! Runs and what they bring forth: events, metrics, samples, LoRA files; and answers kept for idempotency keys.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, big_integer_null, boolean, double_null, integer, integer_null, pk_uuid, string,
    string_null, text, text_null, uuid,
};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [
            runs(),
            run_events(),
            run_metrics(),
            run_samples(),
            loras(),
            idempotency_keys(),
        ] {
            manager.create_table(table).await?;
        }
        for index in [
            Index::create()
                .name("runs_by_state")
                .table("runs")
                .col("state")
                .to_owned(),
            Index::create()
                .name("samples_of_run")
                .table("run_samples")
                .col("run_id")
                .col("step")
                .col("prompt_index")
                .unique()
                .to_owned(),
            Index::create()
                .name("loras_of_run")
                .table("loras")
                .col("run_id")
                .to_owned(),
        ] {
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [
            "idempotency_keys",
            "loras",
            "run_samples",
            "run_metrics",
            "run_events",
            "runs",
        ] {
            manager
                .drop_table(Table::drop().table(table).to_owned())
                .await?;
        }
        Ok(())
    }
}

fn runs() -> TableCreateStatement {
    Table::create()
        .table("runs")
        .col(pk_uuid("id"))
        .col(text("name"))
        .col(string("state"))
        // What was asked for, and the images as they were at that moment; both JSON.
        .col(text("spec"))
        .col(text("images"))
        .col(uuid("dataset_id"))
        .col(string("base_model_id"))
        .col(text_null("error_code"))
        .col(text_null("error_message"))
        .col(boolean("cancel_requested"))
        .col(integer("attempt"))
        // The lease: whose process trains, and until when that is believed without another sign of life.
        .col(string_null("lease_owner"))
        .col(big_integer_null("lease_until_ms"))
        .col(integer_null("worker_pid"))
        .col(string_null("phase"))
        .col(big_integer("step"))
        .col(big_integer_null("total_steps"))
        .col(big_integer("epoch"))
        .col(big_integer_null("total_epochs"))
        .col(double_null("loss_average"))
        .col(double_null("steps_per_s"))
        .col(double_null("eta_s"))
        .col(big_integer_null("memory_bytes"))
        .col(text_null("device"))
        .col(big_integer("created_at_ms"))
        .col(big_integer_null("started_at_ms"))
        .col(big_integer_null("finished_at_ms"))
        .col(big_integer("updated_at_ms"))
        .foreign_key(
            ForeignKey::create()
                .from("runs", "dataset_id")
                .to("datasets", "id")
                .on_delete(ForeignKeyAction::Restrict),
        )
        .to_owned()
}

fn of_run(table: &'static str) -> ForeignKeyCreateStatement {
    ForeignKey::create()
        .from(table, "run_id")
        .to("runs", "id")
        .on_delete(ForeignKeyAction::Cascade)
        .to_owned()
}

fn run_events() -> TableCreateStatement {
    Table::create()
        .table("run_events")
        .col(uuid("run_id"))
        .col(big_integer("seq"))
        .col(string("kind"))
        .col(text("data"))
        .col(big_integer("created_at_ms"))
        .primary_key(Index::create().col("run_id").col("seq"))
        .foreign_key(&mut of_run("run_events"))
        .to_owned()
}

fn run_metrics() -> TableCreateStatement {
    Table::create()
        .table("run_metrics")
        .col(uuid("run_id"))
        .col(big_integer("step"))
        .col(big_integer("epoch"))
        .col(double_null("loss"))
        .col(double_null("loss_average"))
        .col(double_null("validation_loss"))
        .col(double_null("lr_unet"))
        .col(double_null("lr_text_encoder"))
        .col(double_null("grad_norm"))
        .col(double_null("step_time_s"))
        .col(big_integer_null("memory_bytes"))
        .primary_key(Index::create().col("run_id").col("step"))
        .foreign_key(&mut of_run("run_metrics"))
        .to_owned()
}

fn run_samples() -> TableCreateStatement {
    Table::create()
        .table("run_samples")
        .col(pk_uuid("id"))
        .col(uuid("run_id"))
        .col(big_integer("step"))
        .col(integer("prompt_index"))
        .col(text("prompt"))
        .col(string("seed")) // 64 bits without a sign do not fit a database's integer
        .col(integer("width_px"))
        .col(integer("height_px"))
        .col(string("sha256"))
        .col(big_integer("size_bytes"))
        .col(big_integer("created_at_ms"))
        .foreign_key(&mut of_run("run_samples"))
        .to_owned()
}

fn loras() -> TableCreateStatement {
    Table::create()
        .table("loras")
        .col(pk_uuid("id"))
        .col(uuid("run_id"))
        .col(text("file_name"))
        .col(big_integer("step"))
        .col(big_integer("epoch"))
        .col(boolean("is_final"))
        .col(string("sha256"))
        .col(big_integer("size_bytes"))
        .col(big_integer("created_at_ms"))
        .foreign_key(&mut of_run("loras"))
        .to_owned()
}

fn idempotency_keys() -> TableCreateStatement {
    Table::create()
        .table("idempotency_keys")
        .col(string("key"))
        .col(string("scope"))
        .col(string("payload_sha256"))
        .col(integer_null("status")) // absent while the first request is still running
        .col(text_null("location"))
        .col(text_null("body"))
        .col(big_integer("created_at_ms"))
        .primary_key(Index::create().col("key").col("scope"))
        .to_owned()
}
