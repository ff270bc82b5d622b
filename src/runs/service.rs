//! Runs as the API knows them: made, listed, ended early.

use std::sync::Arc;

use tokio::sync::Notify;
use uuid::Uuid;

use super::spec::{RunSpec, SnapshotImage};
use super::state;
use crate::dataloader::BucketSettings;
use crate::diffusion::devices::{self, DeviceSpec};
use crate::models::{BaseModel, ModelCatalog, ModelFolderError};
use crate::plugin_host::PluginHost;
use crate::store::runs::{NewRun, Run, RunFilter, RunState};
use crate::store::{Store, StoreError};
use crate::training::{PluginChoice, TrainSettings};

/// Longest name of a run, in characters.
const MAX_NAME_CHARS: usize = 128;

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

/// Makes and ends runs. Cloning is cheap.
#[derive(Clone)]
pub struct RunService {
    store: Store,
    models: ModelCatalog,
    plugins: Arc<PluginHost>,
    default_device: String,
    wake: Arc<Notify>,
}

impl RunService {
    /// `wake` is what the supervisor waits for.
    pub fn new(
        store: Store,
        models: ModelCatalog,
        plugins: Arc<PluginHost>,
        default_device: String,
        wake: Arc<Notify>,
    ) -> Self {
        Self {
            store,
            models,
            plugins,
            default_device,
            wake,
        }
    }

    /// Checks everything that can be checked without training, and queues the run.
    ///
    /// # Errors
    /// [`RunError::Invalid`] with every wrong value, [`RunError::DatasetNotFound`], [`RunError::ModelNotFound`].
    pub async fn create(&self, request: NewRunRequest) -> Result<Run, RunError> {
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
        problems.extend(check_device(device.to_owned()).await?);
        let images = self.snapshot(&request).await?;
        problems.extend(check_images(&images, &request));
        if !problems.is_empty() {
            return Err(RunError::Invalid(problems));
        }
        let spec = RunSpec {
            device: device.to_owned(),
            base_model_id: base.id.clone(),
            settings: request.settings,
            buckets: request.buckets,
        };
        let run = self
            .store
            .create_run(NewRun {
                name: request.name,
                spec: serde_json::to_string(&spec)?,
                images: serde_json::to_string(&images)?,
                dataset_id: request.dataset_id,
                base_model_id: base.id,
            })
            .await?;
        self.wake.notify_one();
        Ok(run)
    }

    /// One run.
    ///
    /// # Errors
    /// [`RunError::NotFound`].
    pub async fn get(&self, id: Uuid) -> Result<Run, RunError> {
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
        if run.state == RunState::Cancelled {
            return Ok(run);
        }
        let illegal = |from: RunState| RunError::IllegalTransition {
            from: from.as_str(),
            to: RunState::Cancelled.as_str(),
        };
        if state::has_ended(run.state) {
            return Err(illegal(run.state));
        }
        self.store.request_cancel(id).await?;
        let at_once = [RunState::Queued, RunState::Interrupted];
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
        let run = self.get(id).await?;
        match run.state {
            RunState::Succeeded | RunState::Failed => Err(illegal(run.state)),
            _ => Ok(run),
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
        .any(|image| !image.regularization && !held_out.contains(&image.id));
    if !left {
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
async fn check_device(device: String) -> Result<Option<RunProblem>, RunError> {
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
