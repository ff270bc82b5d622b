//! Rows of runs: the state and its lease, events, metrics and samples. Which changes are allowed is `runs`' business;
//! here every change of a state is conditional on the states it may come from.

mod captioning;
mod claims;
mod deletion;
mod models;
mod provenance;
mod queue;
mod records;
#[cfg(test)]
mod tests;

use sea_orm::sea_query::Expr;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, DatabaseTransaction, EntityTrait as _,
    IdenStatic as _, Iterable as _, QueryFilter as _, QueryOrder as _, QuerySelect as _, Select,
    Set,
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::rows::{run, run_event};
use super::{Store, StoreError, now_ms, time_of, webhooks};

pub use captioning::{CaptionCounts, CaptionOutcome, CaptionResult, JobProgress, JobResult};
pub use claims::{Claim, Lease, NewLora, Progress, WorkerReport};
pub use deletion::StillNeeded;
pub use provenance::Attempt;
pub use queue::{Room, Turns};
pub use records::{Event, Metric, NewSample, Sample, Told};

/// Where a run is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Waits for a worker.
    Queued,
    /// A worker loads the model and encodes pictures.
    Preparing,
    /// Optimizer steps are done.
    Running,
    /// The last LoRA is written, measured and shown.
    Saving,
    /// Was asked to pause, and its worker is about to leave.
    Pausing,
    /// Rests without a worker until somebody resumes it.
    Paused,
    /// Was asked to end, and its worker is about to.
    Cancelling,
    /// Its worker is gone.
    Interrupted,
    /// Done, with a LoRA.
    Succeeded,
    /// Ended with an error.
    Failed,
    /// Ended as it was asked to.
    Cancelled,
}

impl RunState {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Queued,
        Self::Preparing,
        Self::Running,
        Self::Saving,
        Self::Pausing,
        Self::Paused,
        Self::Cancelling,
        Self::Interrupted,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The word in rows and on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Saving => "saving",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Cancelling => "cancelling",
            Self::Interrupted => "interrupted",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of a word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

/// A run as its row has it, but for the images: they can be many, and only its worker needs them.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Its id.
    pub id: Uuid,
    /// What its owner calls it.
    pub name: String,
    /// Where it is.
    pub state: RunState,
    /// What was asked for; JSON that `runs` wrote.
    pub spec: String,
    /// The dataset.
    pub dataset_id: Uuid,
    /// The base model.
    pub base_model_id: String,
    /// Why it failed: a stable word.
    pub error_code: Option<String>,
    /// Why it failed: a sentence.
    pub error_message: Option<String>,
    /// Whether somebody has asked for its end.
    pub cancel_requested: bool,
    /// How many workers have begun it.
    pub attempt: u32,
    /// Whether somebody has asked for its rest.
    pub pause_requested: bool,
    /// The worker that holds it: its name, its process, its machine, and a number that changes with each sign of life.
    pub lease: Option<HeldBy>,
    /// The optimizer step of its newest resume point.
    pub kept_step: Option<u64>,
    /// The furthest step that any worker of it has come to.
    pub furthest_step: u64,
    /// How many of its workers in a row were lost without having come further than the one before.
    pub stalls: u32,
    /// What it waits for while it is interrupted.
    pub wait: Option<Wait>,
    /// The run whose end was its beginning.
    pub continued_from: Option<Uuid>,
    /// Higher goes first.
    pub priority: i32,
    /// The API key that has made it; `None` for the key of the settings, and where nobody needs one.
    pub api_key_id: Option<Uuid>,
    /// The id of the device that it waits for; a worker may open another one for `auto`.
    pub wanted_device: Option<String>,
    /// Counts runs in the order of making, whatever clocks say.
    pub number: u64,
    /// Whether it goes first again among those of its priority: its worker was lost.
    pub keeps_turn: bool,
    /// What its validations say.
    pub verdict: Option<String>,
    /// Why it ends, or has ended, before its last step.
    pub early_stop: Option<String>,
    /// That its numbers were no longer finite, and where it went on; JSON that `runs` wrote.
    pub rolled_back: Option<String>,
    /// Digest of the record of where its file comes from; a blob.
    pub provenance_sha256: Option<String>,
    /// The run that it repeats.
    pub reproduction_of: Option<Uuid>,
    /// How that went; JSON that `runs` wrote.
    pub reproduction: Option<String>,
    /// The run whose LoRA files it draws: then it is a grid, and no run to its users.
    pub grid_of: Option<Uuid>,
    /// What captions its dataset's images: then it is a captioning job, and no run to its users.
    pub captioner: Option<String>,
    /// What the worker does.
    pub phase: Option<String>,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run, once known.
    pub total_steps: Option<u64>,
    /// Epoch, from 1; 0 before the first.
    pub epoch: u64,
    /// Epochs of the whole run, once known.
    pub total_epochs: Option<u64>,
    /// Mean loss of the last epoch.
    pub loss_average: Option<f64>,
    /// Optimizer steps per second.
    pub steps_per_s: Option<f64>,
    /// Expected time to the end.
    pub eta_s: Option<f64>,
    /// Memory of the worker's process.
    pub memory_bytes: Option<u64>,
    /// The device it is trained on.
    pub device: Option<String>,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When a worker first began it.
    pub started_at: Option<OffsetDateTime>,
    /// When it ended.
    pub finished_at: Option<OffsetDateTime>,
}

impl Run {
    /// Whether it trains: it is neither a grid nor a captioning job.
    pub fn trains(&self) -> bool {
        self.grid_of.is_none() && self.captioner.is_none()
    }
}

/// A worker, as the row of its run has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBy {
    /// The worker's own name.
    pub owner: String,
    /// Its process.
    pub pid: Option<u32>,
    /// Its machine since that was started.
    pub host: Option<String>,
    /// Changes with each sign of life. It is a time of the worker's clock, which need not be ours.
    pub beat: i64,
}

/// What an interrupted run waits for before it is queued again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// A stable word: `storage_full`.
    pub code: String,
    /// A sentence.
    pub message: String,
    /// How much room it needs.
    pub needed_bytes: u64,
}

/// A run to be made.
#[derive(Clone, Debug, Default)]
pub struct NewRun {
    /// Its id; a resume point can then be there before the run.
    pub id: Uuid,
    /// See [`Run::name`].
    pub name: String,
    /// See [`Run::spec`].
    pub spec: String,
    /// The images as they are now; JSON that `runs` wrote.
    pub images: String,
    /// The dataset and its subsets as they are now; JSON that `runs` wrote.
    pub dataset: Option<String>,
    /// See [`Run::dataset_id`].
    pub dataset_id: Uuid,
    /// See [`Run::base_model_id`].
    pub base_model_id: String,
    /// See [`Run::continued_from`].
    pub continued_from: Option<Uuid>,
    /// See [`Run::reproduction_of`].
    pub reproduction_of: Option<Uuid>,
    /// See [`Run::grid_of`].
    pub grid_of: Option<Uuid>,
    /// See [`Run::captioner`].
    pub captioner: Option<String>,
    /// See [`Run::priority`].
    pub priority: i32,
    /// See [`Run::api_key_id`].
    pub api_key_id: Option<Uuid>,
    /// See [`Run::wanted_device`].
    pub wanted_device: Option<String>,
    /// See [`Run::total_steps`].
    pub total_steps: Option<u64>,
}

/// Why a run ended badly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFailure {
    /// A stable word.
    pub code: String,
    /// A sentence.
    pub message: String,
}

impl RunFailure {
    /// The word, and what an error says.
    pub fn new(code: &str, message: impl ToString) -> Self {
        Self {
            code: code.to_owned(),
            message: message.to_string(),
        }
    }
}

/// Which runs a list is about.
#[derive(Clone, Debug, Default)]
pub struct RunFilter {
    /// Only runs in this state.
    pub state: Option<RunState>,
    /// Only runs on this dataset.
    pub dataset_id: Option<Uuid>,
    /// Only runs on this base model.
    pub base_model_id: Option<String>,
}

impl RunFilter {
    fn apply(self, query: Select<run::Entity>) -> Select<run::Entity> {
        let mut query = trainings(query);
        if let Some(state) = self.state {
            query = query.filter(run::Column::State.eq(state.as_str()));
        }
        if let Some(dataset) = self.dataset_id {
            query = query.filter(run::Column::DatasetId.eq(dataset));
        }
        if let Some(base_model) = self.base_model_id {
            query = query.filter(run::Column::BaseModelId.eq(base_model));
        }
        query
    }
}

impl Store {
    /// Makes a run in state `queued`.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when the dataset does not exist.
    pub async fn create_run(&self, new: NewRun) -> Result<Run, StoreError> {
        let now = now_ms();
        let mut row = run::ActiveModel {
            id: Set(new.id),
            name: Set(new.name),
            state: Set(RunState::Queued.as_str().to_owned()),
            spec: Set(new.spec),
            images: Set(new.images),
            dataset: Set(new.dataset),
            dataset_id: Set(new.dataset_id),
            base_model_id: Set(new.base_model_id),
            cancel_requested: Set(false),
            attempt: Set(0),
            step: Set(0),
            epoch: Set(0),
            created_at_ms: Set(now),
            updated_at_ms: Set(now),
            pause_requested: Set(false),
            save_requested: Set(false),
            sample_requested: Set(false),
            leave_requested: Set(false),
            furthest_step: Set(0),
            judged_furthest_step: Set(0),
            stalls: Set(0),
            continued_from: Set(new.continued_from),
            reproduction_of: Set(new.reproduction_of),
            grid_of: Set(new.grid_of),
            captioner: Set(new.captioner),
            priority: Set(new.priority),
            total_steps: Set(new.total_steps.map(signed)),
            api_key_id: Set(new.api_key_id),
            wanted_device: Set(new.wanted_device),
            turn: Set(0),
            keeps_turn: Set(false),
            ..Default::default()
        };
        let transaction = self.begin().await?;
        queue::lock(&transaction).await?;
        row.number = Set(queue::next(&transaction, run::Column::Number).await?);
        let row = row.insert(&transaction).await?;
        let data = json!({"state": row.state, "previous": Value::Null});
        append(&transaction, row.id, "state", &data).await?;
        transaction.commit().await?;
        read(row)
    }

    /// One run.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn run(&self, id: Uuid) -> Result<Run, StoreError> {
        let row = find().filter(run::Column::Id.eq(id)).one(&self.db).await?;
        read(row.ok_or(StoreError::NotFound)?)
    }

    /// Where a run is: what those ask who ask often.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn run_state(&self, id: Uuid) -> Result<RunState, StoreError> {
        let word: Option<String> = run::Entity::find_by_id(id)
            .select_only()
            .column(run::Column::State)
            .into_tuple()
            .one(&self.db)
            .await?;
        state_of(id, &word.ok_or(StoreError::NotFound)?)
    }

    /// The dataset and its subsets as they were when the run was made; JSON that `runs` wrote. `None` of a run that was
    /// made before that was kept, and of a grid.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or when the database fails.
    pub async fn run_dataset(&self, id: Uuid) -> Result<Option<String>, StoreError> {
        let dataset: Option<Option<String>> = run::Entity::find_by_id(id)
            .select_only()
            .column(run::Column::Dataset)
            .into_tuple()
            .one(&self.db)
            .await?;
        dataset.ok_or(StoreError::NotFound)
    }

    /// The images as they were when the run was made; JSON that `runs` wrote.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn run_images(&self, id: Uuid) -> Result<String, StoreError> {
        let images: Option<String> = run::Entity::find_by_id(id)
            .select_only()
            .column(run::Column::Images)
            .into_tuple()
            .one(&self.db)
            .await?;
        images.ok_or(StoreError::NotFound)
    }

    /// Runs in the order in which they were made, after `after`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn runs(
        &self,
        filter: RunFilter,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Run>, StoreError> {
        let mut query = filter
            .apply(find())
            .order_by_asc(run::Column::Id)
            .limit(limit);
        if let Some(after) = after {
            query = query.filter(run::Column::Id.gt(after));
        }
        query.all(&self.db).await?.into_iter().map(read).collect()
    }

    /// The grids of a run in the order in which they were made, after `after`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn grids(
        &self,
        of: Uuid,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Run>, StoreError> {
        let mut query = find()
            .filter(run::Column::GridOf.eq(of))
            .order_by_asc(run::Column::Id)
            .limit(limit);
        if let Some(after) = after {
            query = query.filter(run::Column::Id.gt(after));
        }
        query.all(&self.db).await?.into_iter().map(read).collect()
    }

    /// The newest runs that a worker has begun, the newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn newest_runs(&self, filter: RunFilter, limit: u64) -> Result<Vec<Run>, StoreError> {
        let begun = filter
            .apply(find())
            .filter(run::Column::Device.is_not_null());
        let rows = begun.order_by_desc(run::Column::Id).limit(limit);
        rows.all(&self.db).await?.into_iter().map(read).collect()
    }

    /// Every run in one of these states, the oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn runs_in(&self, states: &[RunState]) -> Result<Vec<Run>, StoreError> {
        let rows = find()
            .filter(run::Column::State.is_in(words(states)))
            .order_by_asc(run::Column::Id)
            .all(&self.db)
            .await?;
        rows.into_iter().map(read).collect()
    }

    /// Moves a run from one of the states `from` to `to` and tells so in an event; `false` when it is in another state.
    ///
    /// A state that ends the run also takes the worker's lease from it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn move_run(
        &self,
        id: Uuid,
        from: &[RunState],
        to: RunState,
        failure: Option<&RunFailure>,
    ) -> Result<bool, StoreError> {
        let transaction = self.begin().await?;
        let moved = move_in(&transaction, id, from, to, failure, None).await?;
        transaction.commit().await?;
        Ok(moved)
    }

    /// Notes what somebody wants of the run; its worker looks at this. Wanted twice is wanted once.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn request(&self, id: Uuid, wish: Wish) -> Result<(), StoreError> {
        run::Entity::update_many()
            .col_expr(wish.column(), Expr::value(true))
            .filter(run::Column::Id.eq(id))
            .exec(&self.db)
            .await?;
        Ok(())
    }
}

/// What somebody can want of a running run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Its end.
    Cancel,
    /// Its rest.
    Pause,
    /// A LoRA file of this moment.
    Save,
    /// Previews of this moment.
    Sample,
    /// That its worker leaves; another goes on with it.
    Leave,
}

impl Wish {
    const ALL: [Self; 5] = [
        Self::Cancel,
        Self::Pause,
        Self::Save,
        Self::Sample,
        Self::Leave,
    ];

    fn column(self) -> run::Column {
        match self {
            Self::Cancel => run::Column::CancelRequested,
            Self::Pause => run::Column::PauseRequested,
            Self::Save => run::Column::SaveRequested,
            Self::Sample => run::Column::SampleRequested,
            Self::Leave => run::Column::LeaveRequested,
        }
    }
}

/// Changes the state inside of a transaction. With `owner` only that worker may.
async fn move_in(
    transaction: &DatabaseTransaction,
    id: Uuid,
    from: &[RunState],
    to: RunState,
    failure: Option<&RunFailure>,
    owner: Option<&str>,
) -> Result<bool, StoreError> {
    let found: Option<(String, Option<String>, i32)> = run::Entity::find_by_id(id)
        .select_only()
        .columns([
            run::Column::State,
            run::Column::LeaseOwner,
            run::Column::Attempt,
        ])
        .lock_exclusive()
        .into_tuple()
        .one(transaction)
        .await?;
    let Some((previous, lease_owner, attempt)) = found else {
        return Ok(false);
    };
    let allowed = from.iter().any(|state| state.as_str() == previous);
    let owned = owner.is_none() || lease_owner.as_deref() == owner;
    if !(allowed && owned) {
        return Ok(false);
    }
    let now = now_ms();
    let mut change = run::ActiveModel {
        id: Set(id),
        state: Set(to.as_str().to_owned()),
        updated_at_ms: Set(now),
        keeps_turn: Set(to == RunState::Queued && previous == RunState::Interrupted.as_str()),
        ..Default::default()
    };
    let ended = matches!(
        to,
        RunState::Succeeded | RunState::Failed | RunState::Cancelled
    );
    if ended {
        change.finished_at_ms = Set(Some(now));
        change.eta_s = Set(None);
        change.phase = Set(None);
    }
    if ended
        || matches!(
            to,
            RunState::Interrupted | RunState::Queued | RunState::Paused
        )
    {
        change.lease_owner = Set(None);
        change.lease_until_ms = Set(None);
        change.worker_pid = Set(None);
        change.worker_host = Set(None);
    }
    // Wishes are for the worker that leaves; the next one begins without.
    if ended || to == RunState::Paused {
        change.pause_requested = Set(false);
        change.save_requested = Set(false);
        change.sample_requested = Set(false);
    }
    if to != RunState::Interrupted {
        change.wait_code = Set(None);
        change.wait_message = Set(None);
        change.wait_bytes = Set(None);
    }
    if let Some(failure) = failure {
        change.error_code = Set(Some(failure.code.clone()));
        change.error_message = Set(Some(failure.message.clone()));
    }
    run::Entity::update(change)
        .exec_without_returning(transaction)
        .await?;
    let mut data = json!({"state": to.as_str(), "previous": previous, "attempt": attempt});
    if let Some(failure) = failure {
        data["error"] = json!({"code": failure.code, "message": failure.message});
    }
    append(transaction, id, "state", &data).await?;
    Ok(true)
}

/// Appends an event. The transaction holds the write lock (SQLite) or the run's row (Postgres), so numbers have no gaps.
async fn append(
    transaction: &DatabaseTransaction,
    run_id: Uuid,
    kind: &str,
    data: &Value,
) -> Result<(), StoreError> {
    let last: Option<Option<i64>> = run_event::Entity::find()
        .select_only()
        .column_as(run_event::Column::Seq.max(), "last")
        .filter(run_event::Column::RunId.eq(run_id))
        .into_tuple()
        .one(transaction)
        .await?;
    let seq = last.flatten().unwrap_or(0) + 1;
    let event = run_event::ActiveModel {
        run_id: Set(run_id),
        seq: Set(seq),
        kind: Set(kind.to_owned()),
        data: Set(data.to_string()),
        created_at_ms: Set(now_ms()),
    };
    run_event::Entity::insert(event)
        .exec_without_returning(transaction)
        .await?;
    webhooks::enqueue(transaction, run_id, seq, kind, data).await
}

/// Only what trains: neither grids nor captioning jobs.
pub(super) fn trainings(query: Select<run::Entity>) -> Select<run::Entity> {
    query
        .filter(run::Column::GridOf.is_null())
        .filter(run::Column::Captioner.is_null())
}

fn words(states: &[RunState]) -> Vec<&'static str> {
    states.iter().map(|state| state.as_str()).collect()
}

/// Rows for [`read`]: the images stay in the database.
fn find() -> Select<run::Entity> {
    let large = |column: &run::Column| matches!(column, run::Column::Images | run::Column::Dataset);
    let columns = run::Column::iter().filter(|column| !large(column));
    run::Entity::find()
        .select_only()
        .columns(columns)
        .expr_as(Expr::cust("''"), run::Column::Images.as_str())
        .expr_as(Expr::cust("NULL"), run::Column::Dataset.as_str())
}

fn state_of(id: Uuid, word: &str) -> Result<RunState, StoreError> {
    RunState::parse(word).ok_or_else(|| StoreError::Corrupt {
        what: format!("runs, {id}, state"),
        message: format!("found `{word}`"),
    })
}

fn read(row: run::Model) -> Result<Run, StoreError> {
    Ok(Run {
        id: row.id,
        name: row.name,
        state: state_of(row.id, &row.state)?,
        spec: row.spec,
        dataset_id: row.dataset_id,
        base_model_id: row.base_model_id,
        error_code: row.error_code,
        error_message: row.error_message,
        cancel_requested: row.cancel_requested,
        attempt: u32::try_from(row.attempt).unwrap_or(0),
        pause_requested: row.pause_requested,
        lease: row.lease_owner.map(|owner| HeldBy {
            owner,
            pid: row.worker_pid.and_then(|pid| u32::try_from(pid).ok()),
            host: row.worker_host,
            beat: row.lease_until_ms.unwrap_or(0),
        }),
        kept_step: row.kept_step.map(unsigned),
        furthest_step: unsigned(row.furthest_step),
        stalls: u32::try_from(row.stalls).unwrap_or(0),
        wait: row.wait_code.map(|code| Wait {
            code,
            message: row.wait_message.unwrap_or_default(),
            needed_bytes: row.wait_bytes.map_or(0, unsigned),
        }),
        continued_from: row.continued_from,
        priority: row.priority,
        api_key_id: row.api_key_id,
        wanted_device: row.wanted_device,
        number: unsigned(row.number),
        keeps_turn: row.keeps_turn,
        verdict: row.verdict,
        early_stop: row.early_stop,
        rolled_back: row.rolled_back,
        provenance_sha256: row.provenance_sha256,
        reproduction_of: row.reproduction_of,
        reproduction: row.reproduction,
        grid_of: row.grid_of,
        captioner: row.captioner,
        phase: row.phase,
        step: unsigned(row.step),
        total_steps: row.total_steps.map(unsigned),
        epoch: unsigned(row.epoch),
        total_epochs: row.total_epochs.map(unsigned),
        loss_average: row.loss_average,
        steps_per_s: row.steps_per_s,
        eta_s: row.eta_s,
        memory_bytes: row.memory_bytes.map(unsigned),
        device: row.device,
        created_at: time_of(row.created_at_ms),
        started_at: row.started_at_ms.map(time_of),
        finished_at: row.finished_at_ms.map(time_of),
    })
}

/// A count that was stored from an unsigned one.
pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// A count as rows hold it. Counts stay far below 2^63.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
