//! Runs as the API knows them: made, listed, ended early.

use std::collections::HashMap;
use std::sync::Arc;

use time::OffsetDateTime;
use tokio::sync::{Notify, OnceCell};
use uuid::Uuid;

use super::queue::{self, Place};
use super::reproduction::Mismatch;
use super::spec::{RESUME, RunSpec, SnapshotImage};
use super::state;
use crate::dataloader::BucketSettings;
use crate::diffusion::devices::{self, DeviceSpec};
use crate::models::{BaseModel, ModelCatalog, ModelFolderError};
use crate::plugin_host::PluginHost;
use crate::store::runs::{NewRun, Room, Run, RunFilter, RunState, StillNeeded, Wish};
use crate::store::{Store, StoreError};
use crate::training::{
    PluginChoice, ResumeError, ResumeFolder, TrainError, TrainLength, TrainSettings, planned_steps,
};

/// Longest name of a run, in characters.
const MAX_NAME_CHARS: usize = 128;
/// How far from 0 a priority may be.
const MAX_PRIORITY: i32 = 100;

/// What a client asks for. Types are right, values are not checked yet.
#[derive(Clone, Debug)]
pub struct NewRunRequest {
    /// What its owner calls it.
    pub name: String,
    /// The pictures.
    pub dataset_id: Uuid,
    /// Id or name of the base model.
    pub base_model: String,
    /// Device; the service's own when absent.
    pub device: Option<String>,
    /// How it is trained.
    pub settings: TrainSettings,
    /// Sizes of the pictures.
    pub buckets: BucketSettings,
    /// Its place in the queue: higher goes first.
    pub priority: i32,
    /// The API key that asks for it.
    pub api_key_id: Option<Uuid>,
}

/// How much longer a run is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// By optimizer steps.
    Steps(u64),
    /// By epochs.
    Epochs(u64),
}

impl Extension {
    fn pointer(self) -> &'static str {
        match self {
            Self::Steps(_) => "/steps",
            Self::Epochs(_) => "/epochs",
        }
    }
}

/// One wrong value of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunProblem {
    /// Where: a pointer into [`TrainSettings`], [`BucketSettings`] (below `/buckets`), or a field of the request.
    pub pointer: String,
    /// `out_of_range`, `invalid_value`, `unknown_field`, `wrong_type` or `not_found`.
    pub code: &'static str,
    /// What was found and what was expected.
    pub message: String,
}

/// Why a call has failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no such run.
    #[error("there is no run {0}")]
    NotFound(Uuid),
    /// There is no such dataset.
    #[error("there is no dataset {0}")]
    DatasetNotFound(Uuid),
    /// There is no such base model.
    #[error(
        "there is no base model `{0}` in the model folder; GET /v1/models lists those that are there"
    )]
    ModelNotFound(String),
    /// Values are wrong.
    #[error("{} values are wrong", .0.len())]
    Invalid(Vec<RunProblem>),
    /// The run's state does not allow it.
    #[error("a run that is {from} cannot become {to}")]
    IllegalTransition {
        /// Where it is.
        from: &'static str,
        /// Where it should go.
        to: &'static str,
    },
    /// Only a run that trains can do this.
    #[error("the run is {0}, expected preparing or running")]
    NotTraining(&'static str),
    /// There is nothing to draw.
    #[error("the run has no prompts to draw")]
    NoPrompts,
    /// The run cannot be made longer.
    #[error("the run cannot be extended: {0}")]
    NotExtendable(String),
    /// The run cannot be repeated.
    #[error("the run cannot be repeated: {0}")]
    NotReproducible(String),
    /// What it was made with has changed.
    #[error("{} of what the run was made with is not what it was", .0.len())]
    InputsChanged(Vec<Mismatch>),
    /// There is no such grid.
    #[error("the run has no grid {0}")]
    GridNotFound(Uuid),
    /// It cannot be deleted yet.
    #[error("{}", why(.0))]
    StillNeeded(StillNeeded),
    /// A resume point cannot be copied.
    #[error(transparent)]
    Resume(ResumeError),
    /// The model folder cannot be read.
    #[error(transparent)]
    Models(#[from] ModelFolderError),
    /// A background task has failed.
    #[error("a background task has failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// What was asked for cannot be written down.
    #[error("writing down the run: {0}")]
    Spec(#[from] serde_json::Error),
    /// Rows or files.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A request that was found right.
pub(super) struct Checked {
    pub(super) spec: RunSpec,
    pub(super) images: Vec<SnapshotImage>,
    pub(super) dataset_id: Uuid,
    pub(super) base: BaseModel,
}

/// Makes and ends runs. Cloning is cheap.
#[derive(Clone)]
pub struct RunService {
    store: Store,
    models: ModelCatalog,
    plugins: Arc<PluginHost>,
    default_device: String,
    room: Room,
    /// What `auto` means; drivers are asked once.
    auto: Arc<OnceCell<String>>,
    wake: Arc<Notify>,
}

impl RunService {
    /// `room` is how many runs may train at once, `wake` what the supervisor waits for.
    pub fn new(
        store: Store,
        models: ModelCatalog,
        plugins: Arc<PluginHost>,
        default_device: String,
        room: Room,
        wake: Arc<Notify>,
    ) -> Self {
        Self {
            store,
            models,
            plugins,
            default_device,
            room,
            auto: Arc::default(),
            wake,
        }
    }

    /// Checks everything that can be checked without training, and queues the run.
    ///
    /// # Errors
    /// [`RunError::Invalid`] with every wrong value, [`RunError::DatasetNotFound`], [`RunError::ModelNotFound`].
    pub async fn create(&self, request: NewRunRequest) -> Result<Run, RunError> {
        let (name, priority) = (request.name.clone(), request.priority);
        let api_key_id = request.api_key_id;
        let Checked {
            spec,
            images,
            dataset_id,
            base,
        } = self.check(request).await?;
        let total_steps = self.total_steps(&spec, images.clone()).ok();
        let run = self
            .store
            .create_run(NewRun {
                id: Uuid::now_v7(),
                priority,
                api_key_id,
                wanted_device: self.wanted_device(&spec.device).await?,
                continued_from: None,
                reproduction_of: None,
                grid_of: None,
                total_steps,
                name,
                spec: serde_json::to_string(&spec)?,
                images: serde_json::to_string(&images)?,
                dataset_id,
                base_model_id: base.id,
            })
            .await?;
        self.wake.notify_one();
        Ok(run)
    }

    /// Checks everything that can be checked without training.
    pub(super) async fn check(&self, mut request: NewRunRequest) -> Result<Checked, RunError> {
        self.own_names(&mut request.settings);
        let mut problems = self.check_values(&request);
        let base = self.find_model(&request.base_model).await?;
        if let Some(problem) = base.problem() {
            problems.push(RunProblem {
                pointer: "/base_model".to_owned(),
                code: "invalid_value",
                message: format!("cannot be trained: {problem}"),
            });
        }
        let device = request.device.as_deref().unwrap_or(&self.default_device);
        let device = device.to_owned();
        problems.extend(check_device(device.clone()).await?);
        let images = self.snapshot(&request).await?;
        problems.extend(check_images(&images, &request));
        if !problems.is_empty() {
            return Err(RunError::Invalid(problems));
        }
        let spec = RunSpec {
            device,
            base_model_id: base.id.clone(),
            settings: request.settings,
            buckets: request.buckets,
            recorded_at: recorded_at(),
        };
        Ok(Checked {
            spec,
            images,
            dataset_id: request.dataset_id,
            base,
        })
    }

    /// The id of the device that a checked name means, as the queue counts by devices.
    pub(super) async fn wanted_device(&self, name: &str) -> Result<Option<String>, RunError> {
        let Ok(spec) = name.parse::<DeviceSpec>() else {
            return Ok(None);
        };
        if spec != DeviceSpec::Auto {
            return Ok(Some(spec.to_string())); // `vulkan` is `vulkan:0`
        }
        let ask = async || {
            let known = tokio::task::spawn_blocking(devices::list).await?;
            let default = known.into_iter().find(|device| device.is_default);
            let id = default.map_or_else(|| DeviceSpec::Cpu.to_string(), |device| device.id);
            Ok::<_, RunError>(id)
        };
        Ok(Some(self.auto.get_or_try_init(ask).await?.clone()))
    }

    pub(super) fn models(&self) -> &ModelCatalog {
        &self.models
    }

    pub(super) fn plugins(&self) -> &PluginHost {
        &self.plugins
    }

    /// Tells the supervisor that there is something to do.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// The place of every waiting run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn places(&self) -> Result<HashMap<Uuid, Place>, RunError> {
        Ok(queue::places(&self.store, self.room).await?)
    }

    /// One run.
    ///
    /// # Errors
    /// [`RunError::NotFound`].
    pub async fn get(&self, id: Uuid) -> Result<Run, RunError> {
        let row = self.row(id).await?;
        match row.grid_of {
            None => Ok(row),
            Some(_) => Err(RunError::NotFound(id)),
        }
    }

    /// One run, or one grid.
    pub(super) async fn row(&self, id: Uuid) -> Result<Run, RunError> {
        self.store.run(id).await.map_err(|error| match error {
            StoreError::NotFound => RunError::NotFound(id),
            other => other.into(),
        })
    }

    /// Runs in the order in which they were made.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(
        &self,
        filter: RunFilter,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Run>, RunError> {
        Ok(self.store.runs(filter, after, limit).await?)
    }

    /// Ends a run early: at once when it waits, after the current step when it trains. Asking twice is no mistake.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::IllegalTransition`] when it has succeeded or failed.
    pub async fn cancel(&self, id: Uuid) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        self.cancel_row(run).await
    }

    pub(super) async fn cancel_row(&self, run: Run) -> Result<Run, RunError> {
        let id = run.id;
        if run.state == RunState::Cancelled {
            return Ok(run);
        }
        if state::has_ended(run.state) {
            return Err(illegal(&run, RunState::Cancelled));
        }
        self.store.request(id, Wish::Cancel).await?;
        let at_once = [RunState::Queued, RunState::Paused, RunState::Interrupted];
        if !self
            .store
            .move_run(id, &at_once, RunState::Cancelled, None)
            .await?
        {
            let from = state::before(RunState::Cancelling);
            self.store
                .move_run(id, from, RunState::Cancelling, None)
                .await?;
        }
        self.wake.notify_one();
        let run = self.row(id).await?;
        match run.state {
            RunState::Succeeded | RunState::Failed => Err(illegal(&run, RunState::Cancelled)),
            _ => Ok(run),
        }
    }

    /// Lets a run rest: at once when it waits, after the current step when it trains. Its worker leaves a resume point
    /// behind, and the device. Asking twice is no mistake.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::IllegalTransition`] when it is about to end, or has ended.
    pub async fn pause(&self, id: Uuid) -> Result<Run, RunError> {
        let at_once = [RunState::Queued, RunState::Interrupted];
        let mut run = self.get(id).await?;
        // Its worker may take it, or leave it, between the two.
        for _ in 0..3 {
            if matches!(run.state, RunState::Pausing | RunState::Paused) {
                return Ok(run);
            }
            let waits = at_once.contains(&run.state);
            let to = if waits {
                RunState::Paused
            } else {
                RunState::Pausing
            };
            let from = if waits { &at_once } else { state::before(to) };
            if !from.contains(&run.state) {
                return Err(illegal(&run, RunState::Pausing));
            }
            if !waits {
                self.store.request(id, Wish::Pause).await?;
            }
            self.store.move_run(id, from, to, None).await?;
            run = self.get(id).await?;
        }
        match run.state {
            RunState::Pausing | RunState::Paused => Ok(run),
            _ => Err(illegal(&run, RunState::Pausing)),
        }
    }

    /// Deletes a run that has ended, with everything that it has on disk; with its LoRA files when that is wanted.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::StillNeeded`].
    pub async fn delete(&self, id: Uuid, with_loras: bool) -> Result<(), RunError> {
        let deleted = self.store.delete_run(id, &state::ENDED, with_loras).await;
        match deleted {
            Err(StoreError::NotFound) => return Err(RunError::NotFound(id)),
            Err(error) => return Err(error.into()),
            Ok(Some(needed)) => return Err(RunError::StillNeeded(needed)),
            Ok(None) => {}
        }
        let folder = self.store.run_folder(id);
        let log = self.store.data_dir().join("logs");
        let log = log.join(format!("run-{id}.log"));
        tokio::task::spawn_blocking(move || {
            super::folders::remove(&folder);
            let _ = std::fs::remove_file(log); // a run that no worker has begun has none
        })
        .await?;
        Ok(())
    }

    /// Deletes a LoRA file.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`RunError::StillNeeded`].
    pub async fn delete_lora(&self, id: Uuid) -> Result<(), RunError> {
        match self.store.delete_lora(id, &state::ENDED).await? {
            Some(needed) => Err(RunError::StillNeeded(needed)),
            None => Ok(()),
        }
    }

    /// Queues a run that rests; it goes on where it was.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::IllegalTransition`] when it does not rest.
    pub async fn resume(&self, id: Uuid) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        let from = [RunState::Paused];
        if !self
            .store
            .move_run(id, &from, RunState::Queued, None)
            .await?
        {
            return Err(illegal(&run, RunState::Queued));
        }
        self.wake.notify_one();
        self.get(id).await
    }

    /// Has a LoRA file written after the current step.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::NotTraining`] when no worker is at it.
    pub async fn save(&self, id: Uuid) -> Result<Run, RunError> {
        self.wish(id, Wish::Save).await
    }

    /// Has the run's prompts drawn after the current step.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::NotTraining`] when no worker is at it; [`RunError::NoPrompts`].
    pub async fn sample(&self, id: Uuid) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        let spec: RunSpec = serde_json::from_str(&run.spec)?;
        if spec.settings.samples.prompts.is_empty() {
            return Err(RunError::NoPrompts);
        }
        self.wish(id, Wish::Sample).await
    }

    async fn wish(&self, id: Uuid, wish: Wish) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        if !matches!(run.state, RunState::Preparing | RunState::Running) {
            return Err(RunError::NotTraining(run.state.as_str()));
        }
        self.store.request(id, wish).await?;
        Ok(run)
    }

    /// Makes a run that goes on where a succeeded one has ended, which itself stays as it is. `api_key_id` asks for it.
    ///
    /// # Errors
    /// [`RunError::NotFound`]; [`RunError::NotExtendable`] when it has not succeeded, or its last resume point is gone.
    pub async fn extend(
        &self,
        id: Uuid,
        extension: Extension,
        api_key_id: Option<Uuid>,
    ) -> Result<Run, RunError> {
        let run = self.get(id).await?;
        let refused = |why: String| RunError::NotExtendable(why);
        if run.state != RunState::Succeeded {
            let found = run.state.as_str();
            return Err(refused(format!("it is {found}, expected succeeded")));
        }
        if let Some(why) = &run.early_stop {
            let message = format!("it was {why}; a longer run would stop there, too");
            return Err(refused(message));
        }
        let mut spec: RunSpec = serde_json::from_str(&run.spec)?;
        let images = self.store.run_images(id).await?;
        spec.settings.length = self.longer(&spec, &images, &extension)?;
        spec.recorded_at = recorded_at();
        if let Some(problem) = spec.settings.problems().into_iter().next() {
            return Err(RunError::Invalid(vec![RunProblem {
                pointer: extension.pointer().to_owned(),
                code: "out_of_range",
                message: problem.message,
            }]));
        }
        let total_steps = self.total_steps(&spec, serde_json::from_str(&images)?).ok();
        let new = Uuid::now_v7();
        let (from, to) = (self.store.run_folder(id), self.store.run_folder(new));
        let copied = tokio::task::spawn_blocking(move || {
            let from = ResumeFolder::open(&from.join(RESUME))?;
            from.copy_newest_to(&ResumeFolder::open(&to.join(RESUME))?)
        });
        match copied.await? {
            Ok(true) => {}
            Ok(false) => {
                let _ = std::fs::remove_dir_all(self.store.run_folder(new)); // an empty one
                return Err(refused("its last resume point is gone".to_owned()));
            }
            Err(error) => return Err(RunError::Resume(error)),
        }
        let run = self
            .store
            .create_run(NewRun {
                id: new,
                name: run.name,
                spec: serde_json::to_string(&spec)?,
                images,
                dataset_id: run.dataset_id,
                base_model_id: run.base_model_id,
                continued_from: Some(id),
                reproduction_of: None,
                grid_of: None,
                priority: run.priority,
                api_key_id,
                wanted_device: self.wanted_device(&spec.device).await?,
                total_steps,
            })
            .await?;
        self.wake.notify_one();
        Ok(run)
    }

    /// Optimizer steps of a run.
    fn total_steps(&self, spec: &RunSpec, images: Vec<SnapshotImage>) -> Result<u64, TrainError> {
        let base = std::path::Path::new("");
        let data = super::worker::training_set(&self.store, images, spec, base, None);
        planned_steps(&data, &spec.settings)
    }

    /// The length of a run that is to be longer, in its own unit where that is possible.
    fn longer(
        &self,
        spec: &RunSpec,
        images: &str,
        extension: &Extension,
    ) -> Result<TrainLength, RunError> {
        let in_steps = |length| -> Result<u64, RunError> {
            let settings = TrainSettings {
                length,
                ..spec.settings.clone()
            };
            let spec = RunSpec {
                settings,
                ..spec.clone()
            };
            let planned = self.total_steps(&spec, serde_json::from_str(images)?);
            planned.map_err(|error| RunError::NotExtendable(error.to_string()))
        };
        Ok(match (spec.settings.length, extension) {
            (TrainLength::Steps(n), Extension::Steps(more)) => {
                TrainLength::Steps(n.saturating_add(*more))
            }
            (TrainLength::Epochs(n), Extension::Epochs(more)) => {
                TrainLength::Epochs(n.saturating_add(*more))
            }
            (TrainLength::Steps(n), Extension::Epochs(more)) => {
                let more = in_steps(TrainLength::Epochs(*more))?;
                TrainLength::Steps(n.saturating_add(more))
            }
            (length @ TrainLength::Epochs(_), Extension::Steps(more)) => {
                TrainLength::Steps(in_steps(length)?.saturating_add(*more))
            }
        })
    }

    /// Optimizer and schedule under their own ids; a name that means none stays, to be refused.
    fn own_names(&self, settings: &mut TrainSettings) {
        if let Some(id) = self.plugins.optimizer_id(&settings.optimizer.id) {
            settings.optimizer.id = id.to_owned();
        }
        if let Some(id) = self.plugins.scheduler_id(&settings.scheduler.id) {
            settings.scheduler.id = id.to_owned();
        }
    }

    fn check_values(&self, request: &NewRunRequest) -> Vec<RunProblem> {
        let mut problems = Vec::new();
        let mut report = |pointer: String, code, message| {
            problems.push(RunProblem {
                pointer,
                code,
                message,
            });
        };
        let name = request.name.trim();
        if name.is_empty() || name.chars().count() > MAX_NAME_CHARS {
            let message = format!(
                "has {} characters, expected 1 to {MAX_NAME_CHARS}",
                name.chars().count()
            );
            report("/name".to_owned(), "out_of_range", message);
        }
        if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(&request.priority) {
            let found = request.priority;
            let message = format!("is {found}, expected -{MAX_PRIORITY} to {MAX_PRIORITY}");
            report("/priority".to_owned(), "out_of_range", message);
        }
        for problem in request.settings.problems() {
            report(problem.pointer, "out_of_range", problem.message);
        }
        for (field, message) in request.buckets.problems() {
            report(format!("/buckets/{field}"), "out_of_range", message);
        }
        let settings = &request.settings;
        let plugin = |kind: &str, choice: &PluginChoice, problems: Result<(), _>| {
            let errors: Vec<crate::plugin_host::SettingError> = problems.err().unwrap_or_default();
            errors
                .into_iter()
                .map(|error| match error.pointer {
                    None => RunProblem {
                        pointer: format!("/{kind}/id"),
                        code: "not_found",
                        message: format!("found `{}`: {}", choice.id, error.message),
                    },
                    Some(pointer) => RunProblem {
                        pointer: format!("/{kind}/settings{pointer}"),
                        code: "invalid_value",
                        message: error.message,
                    },
                })
                .collect::<Vec<_>>()
        };
        let (optimizer, scheduler) = (&settings.optimizer, &settings.scheduler);
        let host = &self.plugins;
        problems.extend(plugin(
            "optimizer",
            optimizer,
            host.check_optimizer_settings(&optimizer.id, &optimizer.settings),
        ));
        problems.extend(plugin(
            "scheduler",
            scheduler,
            host.check_scheduler_settings(&scheduler.id, &scheduler.settings),
        ));
        problems
    }

    async fn find_model(&self, id_or_name: &str) -> Result<BaseModel, RunError> {
        let (models, wanted) = (self.models.clone(), id_or_name.to_owned());
        let found = tokio::task::spawn_blocking(move || models.find(&wanted)).await??;
        found.ok_or_else(|| RunError::ModelNotFound(id_or_name.to_owned()))
    }

    /// The images of the dataset as they are now.
    async fn snapshot(&self, request: &NewRunRequest) -> Result<Vec<SnapshotImage>, RunError> {
        let id = request.dataset_id;
        self.store.dataset(id).await.map_err(|error| match error {
            StoreError::NotFound => RunError::DatasetNotFound(id),
            other => other.into(),
        })?;
        let images = self.store.all_images(id).await?;
        Ok(images
            .into_iter()
            .map(|(image, subset)| {
                // kohya's rule: an image without a caption is described by its folder's words.
                let prompt = if subset.is_reg {
                    subset.class_prompt
                } else {
                    subset.instance_prompt
                };
                SnapshotImage {
                    id: image.id.to_string(),
                    sha256: image.sha256,
                    width_px: image.width_px,
                    height_px: image.height_px,
                    caption: image.caption.or(prompt).unwrap_or_default(),
                    subset: subset.name,
                    repeats: subset.repeats,
                    regularization: subset.is_reg,
                }
            })
            .collect())
    }
}

fn why(needed: &StillNeeded) -> String {
    match needed {
        StillNeeded::NotEnded(found) => {
            let found = found.as_str();
            format!("the run is {found}, expected succeeded, failed or cancelled")
        }
        StillNeeded::ContinuedBy(run) => format!("run {run} goes on from it and has not ended"),
        StillNeeded::DrawnBy(grid) => format!("grid {grid} draws its LoRA files and has not ended"),
        StillNeeded::ReproducedBy(run) => format!("run {run} repeats it and has not ended"),
        StillNeeded::HasLoras(1) => {
            "it has a LoRA file; `with_loras=true` deletes it too".to_owned()
        }
        StillNeeded::HasLoras(n) => {
            format!("it has {n} LoRA files; `with_loras=true` deletes them too")
        }
    }
}

fn illegal(run: &Run, to: RunState) -> RunError {
    RunError::IllegalTransition {
        from: run.state.as_str(),
        to: to.as_str(),
    }
}

/// The time that files tell: now, or what `SOURCE_DATE_EPOCH` says, as reproducible-builds.org has it.
fn recorded_at() -> OffsetDateTime {
    let set = std::env::var("SOURCE_DATE_EPOCH").ok();
    let seconds = set.and_then(|text| text.trim().parse().ok());
    seconds
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .unwrap_or_else(OffsetDateTime::now_utc)
}

fn check_images(images: &[SnapshotImage], request: &NewRunRequest) -> Vec<RunProblem> {
    let held_out = &request.settings.validation.image_ids;
    let mut problems = Vec::new();
    for (index, id) in held_out.iter().enumerate() {
        if !images.iter().any(|image| image.id == *id) {
            problems.push(RunProblem {
                pointer: format!("/validation/image_ids/{index}"),
                code: "not_found",
                message: format!("the dataset has no image {id}"),
            });
        }
    }
    let left = images
        .iter()
        .filter(|image| !image.regularization && !held_out.contains(&image.id))
        .count();
    if left == 1 && request.settings.validation.fraction.is_some() {
        problems.push(RunProblem {
            pointer: "/validation/fraction".to_owned(),
            code: "invalid_value",
            message: "the dataset has 1 image besides regularization, expected 2 or more: one to hold out, one to \
                      train on"
                .to_owned(),
        });
    }
    if left == 0 {
        problems.push(RunProblem {
            pointer: "/dataset_id".to_owned(),
            code: "invalid_value",
            message:
                "the dataset has no image to train on besides regularization and held-out images"
                    .to_owned(),
        });
    }
    problems
}

/// Whether the device exists now; asking drivers takes a moment.
pub(super) async fn check_device(device: String) -> Result<Option<RunProblem>, RunError> {
    let problem = |message: String| RunProblem {
        pointer: "/device".to_owned(),
        code: "invalid_value",
        message,
    };
    let spec: DeviceSpec = match device.parse() {
        Ok(spec) => spec,
        Err(error) => return Ok(Some(problem(format!("found `{device}`: {error}")))),
    };
    if matches!(spec, DeviceSpec::Auto | DeviceSpec::Cpu) {
        return Ok(None);
    }
    let known = tokio::task::spawn_blocking(devices::list).await?;
    let wanted = spec.to_string();
    if known.iter().any(|info| info.id == wanted) {
        return Ok(None);
    }
    let ids: Vec<&str> = known.iter().map(|info| info.id.as_str()).collect();
    let message = format!("found `{wanted}`, this machine has {}", ids.join(", "));
    Ok(Some(problem(message)))
}
