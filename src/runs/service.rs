//! Runs as the API knows them: made and found here; checked, extended and ended beside it.

mod check;
mod check_network;
mod error;
mod extend;
mod lifecycle;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use time::OffsetDateTime;
use tokio::sync::{Notify, OnceCell};
use uuid::Uuid;

use super::queue::{self, Place};
use super::spec::{RunSpec, SnapshotImage};
use super::worker::training_set;
use crate::diffusion::devices::{self, DeviceSpec};
use crate::models::ModelCatalog;
use crate::plugin_host::PluginHost;
use crate::store::runs::{NewRun, Room, Run, RunFilter};
use crate::store::{Store, StoreError};
use crate::training::{TrainError, planned_steps};

pub use self::check::NewRunRequest;
pub(super) use self::check::{Checked, check_device};
pub use self::error::{RunError, RunProblem};
pub use self::extend::Extension;

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
            dataset,
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
                captioner: None,
                total_steps,
                name,
                spec: serde_json::to_string(&spec)?,
                images: serde_json::to_string(&images)?,
                dataset: Some(serde_json::to_string(&dataset)?),
                dataset_id,
                base_model_id: base.id,
            })
            .await?;
        self.wake.notify_one();
        Ok(run)
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

    /// The device of those who name none.
    pub(super) fn default_device(&self) -> &str {
        &self.default_device
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
        match row.trains() {
            true => Ok(row),
            false => Err(RunError::NotFound(id)),
        }
    }

    /// One run, one grid, or one captioning job.
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

    /// Optimizer steps of a run.
    fn total_steps(&self, spec: &RunSpec, images: Vec<SnapshotImage>) -> Result<u64, TrainError> {
        let base = Path::new("");
        let data = training_set(&self.store, images, spec, base, None);
        planned_steps(&data, &spec.settings)
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
