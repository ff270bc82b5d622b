//! The lease: who works on a run, and until when that is believed without another sign of life.

use std::time::Duration;

use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, EntityTrait as _, IdenStatic as _, QueryFilter as _,
    QuerySelect as _, Set,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::queue::{self, Room};
use super::records::{Metric, NewSample, metric_row, sample_row};
use super::{Run, RunFailure, RunState, Wait, Wish, append, move_in, read, signed};
use crate::store::rows::{lora, run, run_metric, run_sample};
use crate::store::{Store, StoreError, now_ms};

/// How far a run has come; what lists and details show of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: Option<u64>,
    /// Epoch, from 1.
    pub epoch: u64,
    /// Epochs of the whole run.
    pub total_epochs: Option<u64>,
    /// Mean loss of the last epoch.
    pub loss_average: Option<f64>,
    /// Optimizer steps per second.
    pub steps_per_s: Option<f64>,
    /// Expected time to the end.
    pub eta_s: Option<f64>,
    /// Memory of the worker's process.
    pub memory_bytes: Option<u64>,
}

/// What a worker reports at once; written in one transaction.
#[derive(Clone, Debug, Default)]
pub struct WorkerReport {
    /// The new progress, if there is any.
    pub progress: Option<Progress>,
    /// What the worker does now.
    pub phase: Option<String>,
    /// Steps and validations.
    pub metrics: Vec<Metric>,
    /// Previews, already stored as blobs.
    pub samples: Vec<NewSample>,
    /// LoRA files, already stored as blobs.
    pub loras: Vec<NewLora>,
    /// What subscribers hear: kind and data.
    pub events: Vec<(String, Value)>,
    /// What validation says, and why the run ends early if it does.
    pub verdict: Option<(String, Option<String>)>,
    /// JSON about a run that has gone back.
    pub rolled_back: Option<String>,
    /// The step of a new resume point.
    pub kept_step: Option<u64>,
    /// Wishes that were fulfilled.
    pub fulfilled: Vec<Wish>,
}

/// A LoRA file to be listed.
#[derive(Clone, Debug)]
pub struct NewLora {
    /// Its id.
    pub id: Uuid,
    /// The name it is downloaded under.
    pub file_name: String,
    /// Optimizer steps behind it.
    pub step: u64,
    /// Epoch it was saved in.
    pub epoch: u64,
    /// Whether it is the run's result.
    pub is_final: bool,
    /// Digest of its content.
    pub sha256: String,
    /// Its size.
    pub size_bytes: u64,
    /// Loss on the held-out images, and its standard error.
    pub validation: Option<(f64, f64)>,
    /// JSON: what was seen when it was read again.
    pub self_check: Option<String>,
}

/// What a worker learns when it renews its lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lease {
    /// The run is still its own.
    Held {
        /// What somebody wants of the run.
        wishes: Vec<Wish>,
    },
    /// Somebody else has the run, or it has ended.
    Lost,
}

/// What has come of the wish to take a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Claim {
    /// The worker has it.
    Taken(Box<Run>),
    /// It is not queued (any more).
    NotQueued,
    /// As many runs as may are held, or use its device.
    NoRoom,
}

impl Store {
    /// Takes a queued run for the worker `owner`, if there is room for it.
    ///
    /// What an earlier worker has left stays: this one goes on.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_run(
        &self,
        id: Uuid,
        owner: &str,
        pid: u32,
        host: Option<&str>,
        lease: Duration,
        room: Room,
    ) -> Result<Claim, StoreError> {
        let transaction = self.begin().await?;
        queue::lock(&transaction).await?; // two claims must not find the same room
        let row = run::Entity::find_by_id(id).lock_exclusive();
        let row = row.one(&transaction).await?;
        let Some(row) = row.filter(|row| row.state == RunState::Queued.as_str()) else {
            return Ok(Claim::NotQueued);
        };
        if !queue::has_room(&transaction, room, row.wanted_device.as_deref()).await? {
            return Ok(Claim::NoRoom);
        }
        let turn = queue::next(&transaction, run::Column::Turn).await?;
        let now = now_ms();
        let (previous, attempt) = (row.state.clone(), row.attempt + 1);
        let started = row.started_at_ms.unwrap_or(now);
        let change = run::ActiveModel {
            id: Set(id),
            state: Set(RunState::Preparing.as_str().to_owned()),
            attempt: Set(attempt),
            lease_owner: Set(Some(owner.to_owned())),
            lease_until_ms: Set(Some(now + millis(lease))),
            worker_pid: Set(i32::try_from(pid).ok()),
            leave_requested: Set(false),
            worker_host: Set(host.map(str::to_owned)),
            steps_per_s: Set(None),
            eta_s: Set(None),
            started_at_ms: Set(Some(started)),
            updated_at_ms: Set(now),
            turn: Set(turn),
            keeps_turn: Set(false),
            ..Default::default()
        };
        let row = change.update(&transaction).await?;
        let data = json!({"state": row.state, "previous": previous, "attempt": attempt});
        append(&transaction, id, "state", &data).await?;
        transaction.commit().await?;
        Ok(Claim::Taken(Box::new(read(row)?)))
    }

    /// Renews the lease.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn renew_lease(
        &self,
        id: Uuid,
        owner: &str,
        lease: Duration,
    ) -> Result<Lease, StoreError> {
        let renewed = run::Entity::update_many()
            .col_expr(
                run::Column::LeaseUntilMs,
                Expr::value(Some(now_ms() + millis(lease))),
            )
            .filter(run::Column::Id.eq(id))
            .filter(run::Column::LeaseOwner.eq(owner))
            .exec(&self.db)
            .await?;
        if renewed.rows_affected == 0 {
            return Ok(Lease::Lost);
        }
        let flags: Option<(bool, bool, bool, bool, bool)> = run::Entity::find_by_id(id)
            .select_only()
            .columns(Wish::ALL.map(Wish::column))
            .into_tuple()
            .one(&self.db)
            .await?;
        let (cancel, pause, save, sample, leave) = flags.ok_or(StoreError::NotFound)?;
        let wishes = [cancel, pause, save, sample, leave]
            .into_iter()
            .zip(Wish::ALL);
        let wanted = wishes.filter(|(wanted, _)| *wanted);
        Ok(Lease::Held {
            wishes: wanted.map(|(_, wish)| wish).collect(),
        })
    }

    /// Moves a run that `owner` works on; `false` when it has lost the run or the state is another.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn move_own_run(
        &self,
        id: Uuid,
        owner: &str,
        from: &[RunState],
        to: RunState,
        failure: Option<&RunFailure>,
    ) -> Result<bool, StoreError> {
        let transaction = self.begin().await?;
        let moved = move_in(&transaction, id, from, to, failure, Some(owner)).await?;
        transaction.commit().await?;
        Ok(moved)
    }

    /// Notes what an interrupted run waits for.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn set_wait(&self, id: Uuid, wait: &Wait) -> Result<(), StoreError> {
        run::Entity::update_many()
            .set(run::ActiveModel {
                wait_code: Set(Some(wait.code.clone())),
                wait_message: Set(Some(wait.message.clone())),
                wait_bytes: Set(Some(signed(wait.needed_bytes))),
                ..Default::default()
            })
            .filter(run::Column::Id.eq(id))
            .filter(run::Column::State.eq(RunState::Interrupted.as_str()))
            .exec(&self.db)
            .await?;
        Ok(())
    }

    /// Judges a worker that was lost: whether it has come further than those before. The result is how many in a row
    /// have not; the first worker of a run has nothing to be measured by.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn judge_lost_worker(&self, id: Uuid) -> Result<u32, StoreError> {
        let transaction = self.begin().await?;
        let row = run::Entity::find_by_id(id).lock_exclusive();
        let row = row.one(&transaction).await?.ok_or(StoreError::NotFound)?;
        let further = row.furthest_step > row.judged_furthest_step
            || row.kept_step > row.judged_kept_step
            || row.attempt <= 1;
        let stalls = if further { 0 } else { row.stalls + 1 };
        run::Entity::update(run::ActiveModel {
            id: Set(id),
            judged_furthest_step: Set(row.furthest_step),
            judged_kept_step: Set(row.kept_step),
            stalls: Set(stalls),
            ..Default::default()
        })
        .exec_without_returning(&transaction)
        .await?;
        transaction.commit().await?;
        Ok(u32::try_from(stalls).unwrap_or(0))
    }

    /// Notes the device that a run is trained on.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn set_device(&self, id: Uuid, device: &str) -> Result<(), StoreError> {
        run::Entity::update_many()
            .col_expr(run::Column::Device, Expr::value(Some(device.to_owned())))
            .filter(run::Column::Id.eq(id))
            .exec(&self.db)
            .await?;
        Ok(())
    }

    /// Writes what a worker reports; `false`, and nothing is written, when the run is no longer its own.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn record(
        &self,
        id: Uuid,
        owner: &str,
        report: WorkerReport,
    ) -> Result<bool, StoreError> {
        let transaction = self.begin().await?;
        let mut change = run::ActiveModel {
            updated_at_ms: Set(now_ms()),
            ..Default::default()
        };
        let reached = report.progress.as_ref().map(|progress| progress.step);
        if let Some(progress) = report.progress {
            change.step = Set(signed(progress.step));
            change.total_steps = Set(progress.total_steps.map(signed));
            change.epoch = Set(signed(progress.epoch));
            change.total_epochs = Set(progress.total_epochs.map(signed));
            change.loss_average = Set(progress.loss_average);
            change.steps_per_s = Set(progress.steps_per_s);
            change.eta_s = Set(progress.eta_s);
            change.memory_bytes = Set(progress.memory_bytes.map(signed));
        }
        if report.phase.is_some() {
            change.phase = Set(report.phase);
        }
        if let Some((verdict, early_stop)) = report.verdict {
            change.verdict = Set(Some(verdict));
            change.early_stop = Set(early_stop);
        }
        if report.rolled_back.is_some() {
            change.rolled_back = Set(report.rolled_back);
        }
        if let Some(kept) = report.kept_step {
            change.kept_step = Set(Some(signed(kept)));
        }
        for wish in report.fulfilled {
            change.set(wish.column(), false.into());
        }
        let changed = run::Entity::update_many()
            .set(change)
            .filter(run::Column::Id.eq(id))
            .filter(run::Column::LeaseOwner.eq(owner))
            .exec(&transaction)
            .await?;
        if changed.rows_affected == 0 {
            return Ok(false);
        }
        if let Some(step) = reached {
            run::Entity::update_many()
                .col_expr(run::Column::FurthestStep, Expr::value(signed(step)))
                .filter(run::Column::Id.eq(id))
                .filter(run::Column::FurthestStep.lt(signed(step)))
                .exec(&transaction)
                .await?;
        }
        for metric in report.metrics {
            run_metric::Entity::insert(metric_row(id, metric))
                .on_conflict(metric_again())
                .exec_without_returning(&transaction)
                .await?;
        }
        for sample in report.samples {
            run_sample::Entity::insert(sample_row(id, sample))
                .on_conflict(sample_again())
                .exec_without_returning(&transaction)
                .await?;
        }
        for new in report.loras {
            let (validation_loss, validation_error) = new.validation.unzip();
            // A worker before this one may have saved it already. It keeps its id, as somebody may know that.
            let again = lora::Entity::update_many()
                .col_expr(lora::Column::Sha256, Expr::value(new.sha256.clone()))
                .col_expr(lora::Column::SizeBytes, Expr::value(signed(new.size_bytes)))
                .col_expr(lora::Column::ValidationLoss, Expr::value(validation_loss))
                .col_expr(lora::Column::ValidationError, Expr::value(validation_error))
                .col_expr(lora::Column::SelfCheck, Expr::value(new.self_check.clone()))
                .filter(lora::Column::RunId.eq(id))
                .filter(lora::Column::FileName.eq(new.file_name.clone()))
                .exec(&transaction)
                .await?;
            if again.rows_affected > 0 {
                continue;
            }
            lora::Entity::insert(lora::ActiveModel {
                id: Set(new.id),
                run_id: Set(Some(id)),
                file_name: Set(new.file_name),
                step: Set(signed(new.step)),
                epoch: Set(signed(new.epoch)),
                is_final: Set(new.is_final),
                sha256: Set(new.sha256),
                size_bytes: Set(signed(new.size_bytes)),
                created_at_ms: Set(now_ms()),
                validation_loss: Set(validation_loss),
                validation_error: Set(validation_error),
                origin: Set(None),
                self_check: Set(new.self_check),
            })
            .exec_without_returning(&transaction)
            .await?;
        }
        for (kind, data) in report.events {
            append(&transaction, id, &kind, &data).await?;
        }
        transaction.commit().await?;
        Ok(true)
    }
}

/// A step can have a loss and, a moment later, a validation loss, and a later worker may do it again: one row holds
/// the newest of each.
fn metric_again() -> OnConflict {
    use run_metric::Column as C;
    let mut conflict = OnConflict::columns([C::RunId, C::Step]);
    for column in [
        C::Loss,
        C::LossAverage,
        C::ValidationLoss,
        C::ValidationError,
        C::LrUnet,
        C::LrTextEncoder,
        C::GradNorm,
        C::GradNormUnet,
        C::GradNormTextEncoder,
        C::StepTimeS,
        C::ImagesPerS,
        C::EtaS,
        C::MemoryBytes,
        C::DeviceMemoryBytes,
    ] {
        let name = column.as_str();
        let newest = format!("coalesce(excluded.{name}, run_metrics.{name})");
        conflict.value(column, Expr::cust(newest));
    }
    conflict
}

/// A picture that is drawn again keeps its id, as somebody may know that.
fn sample_again() -> OnConflict {
    use run_sample::Column as C;
    OnConflict::columns([C::RunId, C::Step, C::PromptIndex])
        .update_columns([C::Sha256, C::SizeBytes])
        .to_owned()
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 2)
}
