//! The process of one run: `lorasmith worker --run ID`.
//!
//! It needs the settings, the database, the blobs and the run's id, and nothing from whoever started it. It takes the
//! run, trains it on this thread, and writes what happens from another one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::attempt::{self, BeginError, Begun};
use super::beginning;
use super::captioning;
use super::folders;
use super::grid_drawing;
use super::liveness::{self, Alive};
use super::memory::MemoryPlan;
use super::origin::Facts;
use super::reporter::{Reporter, Stop};
use super::spec::{RESUME, RunSpec, SnapshotImage, augment_of, captions_of};
use super::state;
use crate::dataloader::{TensorCache, TrainingImage};
use crate::diffusion::devices::{self, ComputeDevice};
use crate::diffusion::{LoadOptions, StableDiffusion};
use crate::models::{ModelCatalog, Vae};
use crate::networks::{LoraNetwork, NetworkError, TrainParts};
use crate::plugin_host::{ComponentInfo, PluginHost};
use crate::selfcheck::{self, Remembered, SelfCheck};
use crate::store::runs::{Claim, Room, Run, RunFailure, RunState, Wait};
use crate::store::{Store, StoreError, is_storage_full};
use crate::training::{
    Control, Phase, ProgressSink as _, Report, ResumeError, ResumeFolder, RunPlace, TrainError,
    TrainLength, TrainOutcome, TrainSettings, TrainingSet, train,
};

/// How long a worker is believed to be alive after its last sign of life.
pub const LEASE: Duration = Duration::from_secs(20);

/// Room that there must be before a run goes on that had none.
const NEEDED_BYTES: u64 = 64 << 20;

/// What a worker needs besides the run's id.
pub struct WorkerParts {
    /// Rows and blobs.
    pub store: Store,
    /// Base models.
    pub models: ModelCatalog,
    /// Optimizers and schedulers.
    pub plugins: PluginHost,
    /// Where latents and states of captions outlive a run, if they do.
    pub cache: Option<CacheFolder>,
    /// What is known of devices.
    pub self_checks: Remembered,
    /// Whether devices are used unchecked.
    pub force_devices: bool,
    /// How many runs may be held at the same time.
    pub room: Room,
}

/// The folder of the cache.
#[derive(Clone, Debug)]
pub struct CacheFolder {
    /// Where it is.
    pub path: PathBuf,
    /// The most that it takes when a run begins.
    pub max_bytes: u64,
}

impl CacheFolder {
    /// A run does without a cache that cannot be used.
    fn open(&self) -> Option<TensorCache> {
        let opened = TensorCache::open(&self.path, self.max_bytes);
        opened
            .inspect_err(|error| tracing::warn!(%error, "this run goes without the cache"))
            .ok()
    }
}

/// How a worker has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerEnd {
    /// The LoRA is there.
    Succeeded,
    /// The run has failed; its row says why.
    Failed,
    /// Somebody asked for it.
    Cancelled,
    /// The run was not queued, somebody else has taken it, or others use its device.
    NotOurs,
    /// The process was asked to leave; another will go on with the run.
    Released,
    /// Somebody asked for the run's rest.
    Paused,
    /// There is no room left to write to; the run goes on when there is.
    StorageFull,
}

/// Why there is no result.
pub(super) enum Ending {
    /// The training was asked to stop.
    Stopped,
    /// There is no room left to write to.
    StorageFull(String),
    /// It has failed.
    Failed(RunFailure),
}

impl From<RunFailure> for Ending {
    fn from(failure: RunFailure) -> Self {
        Self::Failed(failure)
    }
}

impl From<TrainError> for Ending {
    fn from(error: TrainError) -> Self {
        match &error {
            TrainError::Stopped { .. } => Self::Stopped,
            TrainError::Network(NetworkError::Io { source, .. })
            | TrainError::Resume(ResumeError::Io { source, .. })
                if is_storage_full(source) =>
            {
                Self::StorageFull(error.to_string())
            }
            _ => Self::Failed(error.into()),
        }
    }
}

impl From<BeginError> for Ending {
    fn from(error: BeginError) -> Self {
        match error {
            BeginError::Store(error) => store_failed(error),
            BeginError::Failed(failure) => Self::Failed(failure),
        }
    }
}

/// Words of an error of rows or files.
pub(super) fn store_failed(error: StoreError) -> Ending {
    if error.is_storage_full() {
        Ending::StorageFull(error.to_string())
    } else {
        Ending::Failed(RunFailure::new("store_failed", error))
    }
}

impl From<TrainError> for RunFailure {
    fn from(error: TrainError) -> Self {
        let code = match &error {
            TrainError::Settings(_) => "invalid_settings",
            TrainError::Data(_) | TrainError::LatentsNotFinite { .. } => "image_unusable",
            TrainError::NoImages | TrainError::UnknownImage { .. } => "no_images",
            TrainError::NotFinite(_) => "loss_not_finite",
            TrainError::SelfCheck(_) => "lora_failed_self_check",
            TrainError::Optimizer(_) => "plugin_failed",
            TrainError::BaseModel { .. } | TrainError::Model(_) => "model_unusable",
            TrainError::Resume(ResumeError::Foreign { .. }) => "resume_refused",
            TrainError::Resume(_) => "resume_failed",
            TrainError::Network(_)
            | TrainError::NothingToTrain
            | TrainError::Device(_)
            | TrainError::Stopped { .. } => "training_failed",
        };
        Self::new(code, error)
    }
}

/// Takes the run, trains it, and leaves its row in a state that says how that went.
///
/// # Errors
/// When the database or the blobs fail; the supervisor then finds the run without a worker.
pub fn work(runtime: &Runtime, parts: &WorkerParts, id: Uuid) -> Result<WorkerEnd, StoreError> {
    let owner = Uuid::new_v4().to_string();
    let pid = std::process::id();
    let store = &parts.store;
    let folder = store.run_folder(id);
    let alive = Alive::begin(&folder, &owner);
    let host = alive.as_ref().and_then(|_| liveness::host());
    let claim = store.claim_run(id, &owner, pid, host.as_deref(), LEASE, parts.room);
    let Claim::Taken(run) = runtime.block_on(claim)? else {
        return Ok(WorkerEnd::NotOurs);
    };
    if let Some(alive) = &alive {
        alive.clear_others();
    }
    let told = runtime.block_on(store.told(id))?;
    let stop = Arc::new(Stop::default());
    let mut reporter = Reporter::start(
        runtime,
        store.clone(),
        &run,
        owner.clone(),
        told,
        stop.clone(),
    );
    // A panic in a driver or a library must end as a failed run, with its message.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let trained = if run.captioner.is_some() {
            captioning::work(runtime, parts, &run, &owner, &mut reporter)
        } else if run.grid_of.is_some() {
            grid_drawing::draw(runtime, parts, &run, &mut reporter)
        } else {
            run_training(runtime, parts, &run, &mut reporter).map(|_| ())
        };
        match reporter.finish() {
            Ok(()) if trained.is_ok() && run.trains() => {
                let concluded = runtime.block_on(attempt::conclude(store, id));
                concluded.map_err(store_failed)?;
            }
            Ok(()) => {}
            Err(error) if trained.is_ok() => return Err(store_failed(error)),
            Err(error) => tracing::error!(%error, "the last reports were not written"),
        }
        trained
    }))
    .unwrap_or_else(|panic| {
        let text = panic_text(panic.as_ref());
        Err(RunFailure::new("worker_panicked", text).into())
    });
    let ending = match outcome {
        Ok(_) => None,
        Err(Ending::Stopped) => Some(match reporter.take_failure() {
            Some(error) => store_failed(error),
            None if stop.is_storage_full() => {
                Ending::StorageFull("the reports could not be written".to_owned())
            }
            None => Ending::Stopped,
        }),
        Err(ending) => Some(ending),
    };
    runtime.block_on(leave(store, &run, &owner, ending, &stop))
}

/// Moves the run to where it belongs now that its worker has done what it could.
async fn leave(
    store: &Store,
    run: &Run,
    owner: &str,
    ending: Option<Ending>,
    stop: &Stop,
) -> Result<WorkerEnd, StoreError> {
    let (to, failure, end) = match &ending {
        None => (RunState::Succeeded, None, WorkerEnd::Succeeded),
        Some(Ending::Failed(failure)) => (RunState::Failed, Some(failure), WorkerEnd::Failed),
        Some(Ending::StorageFull(_)) => (RunState::Interrupted, None, WorkerEnd::StorageFull),
        Some(_) if stop.is_lost() => return Ok(WorkerEnd::NotOurs),
        Some(Ending::Stopped) if stop.is_cancelled() => {
            (RunState::Cancelled, None, WorkerEnd::Cancelled)
        }
        Some(Ending::Stopped) if stop.is_pausing() => (RunState::Paused, None, WorkerEnd::Paused),
        Some(Ending::Stopped) => (RunState::Interrupted, None, WorkerEnd::Released),
    };
    let on_the_way = match to {
        RunState::Cancelled => Some(RunState::Cancelling),
        RunState::Paused => Some(RunState::Pausing),
        _ => None,
    };
    if let Some(between) = on_the_way {
        let from = state::before(between);
        store
            .move_own_run(run.id, owner, from, between, None)
            .await?;
    }
    let moved = store
        .move_own_run(run.id, owner, state::before(to), to, failure)
        .await;
    if let Some(Ending::StorageFull(message)) = &ending {
        tracing::error!(message, "there is no room left");
        // The database may have no room either: then the supervisor tells from how this process ends.
        if moved.is_ok() {
            let wait = storage_wait(message.clone());
            let _ = store.set_wait(run.id, &wait).await; // the same
        }
        return Ok(end);
    }
    if moved? && matches!(to, RunState::Failed | RunState::Cancelled) {
        folders::remove(&store.run_folder(run.id).join(RESUME));
    }
    Ok(end)
}

/// What a run waits for that had no room to write to.
pub fn storage_wait(message: String) -> Wait {
    Wait {
        code: "storage_full".to_owned(),
        message,
        needed_bytes: NEEDED_BYTES,
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("the worker has panicked").to_owned()
}

fn run_training(
    runtime: &Runtime,
    parts: &WorkerParts,
    run: &Run,
    reporter: &mut Reporter,
) -> Result<TrainOutcome, Ending> {
    let unreadable = |error: serde_json::Error| RunFailure::new("spec_unreadable", error);
    let spec: RunSpec = serde_json::from_str(&run.spec).map_err(unreadable)?;
    let images = runtime
        .block_on(parts.store.run_images(run.id))
        .map_err(store_failed)?;
    let digest = images_digest(&images, &spec);
    let images: Vec<SnapshotImage> = serde_json::from_str(&images).map_err(unreadable)?;
    let settings = &spec.settings;

    let asked = spec
        .device
        .parse()
        .map_err(|error| RunFailure::new("device_unusable", error))?;
    let device = devices::open(asked).map_err(|error| RunFailure::new("device_unusable", error))?;
    let noted = format!("{} ({})", device.info.id, device.info.name);
    runtime
        .block_on(parts.store.set_device(run.id, &noted))
        .map_err(store_failed)?;

    device
        .check(settings.precision.into())
        .map_err(|error| RunFailure::new("device_unusable", error))?;
    if !parts.force_devices {
        check_device(&parts.self_checks, &device, reporter)?;
    }

    reporter.report(Report::Phase(Phase::Loading));
    let found = parts
        .models
        .find(&spec.base_model_id)
        .map_err(|error| RunFailure::new("model_unusable", error))?;
    let Some(base) = found else {
        let message = format!("the base model `{}` is no longer there", run.base_model_id);
        return Err(RunFailure::new("model_unusable", message).into());
    };
    let vae = found_vae(&parts.models, spec.vae_id.as_deref())?;
    let vae_path = vae.as_ref().map(|vae| vae.path.clone());
    let begun = attempt::begin(
        runtime,
        parts,
        run,
        &spec,
        &images,
        (&base, vae.as_ref()),
        &device,
    );
    let Begun { facts, changes } = begun?;
    if !changes.is_empty() {
        reporter.environment_changed(&changes);
    }
    let cache = parts.cache.as_ref().and_then(CacheFolder::open);
    let data = training_set(&parts.store, images, &spec, &base.path, cache);
    let plan = MemoryPlan::new(
        &data,
        settings,
        parts
            .plugins
            .state_bytes_per_element(&settings.optimizer.id),
        &device.info,
    )?;
    reporter.memory(&plan);
    plan.check()?;
    if let Some(gauge) = devices::memory_gauge(&device.info) {
        reporter.watch(gauge);
    }

    let load = LoadOptions {
        precision: settings.precision.into(),
        vae: vae_path,
        ..LoadOptions::new(&device.device)
    };
    let mut model = StableDiffusion::load(&base.path, &load)
        .map_err(|error| RunFailure::new("model_unusable", error))?;
    let mut network = network(parts, &mut model, settings, &device)?;

    let plugin = |error| RunFailure::new("plugin_failed", error);
    let mut optimizer = parts
        .plugins
        .create_optimizer(&settings.optimizer.id, &settings.optimizer.settings)
        .map_err(plugin)?;
    let total_steps = total_steps(&data, &spec)?;
    let scheduler = parts
        .plugins
        .create_scheduler(
            &settings.scheduler.id,
            &settings.scheduler.settings,
            settings.unet_lr.max(settings.text_encoder_lr),
            settings.lr_warmup_steps,
            total_steps,
        )
        .map_err(plugin)?;
    let place = run_place(parts, run, &spec, digest, &facts)?;
    reporter.expect_steps(total_steps);
    let trained = train(
        &mut model,
        &mut network,
        &data,
        settings,
        optimizer.as_mut(),
        scheduler.as_ref(),
        reporter,
        &place,
    );
    trained.map_err(|error| match reporter.outgrown(&plan) {
        Some(failure) if matches!(error, TrainError::Stopped { .. }) => failure.into(),
        _ => error.into(),
    })
}

/// The VAE of a run in place of the base model's own.
fn found_vae(models: &ModelCatalog, id: Option<&str>) -> Result<Option<Vae>, RunFailure> {
    let Some(id) = id else {
        return Ok(None);
    };
    let found = models.find_vae(id);
    let found = found.map_err(|error| RunFailure::new("model_unusable", error))?;
    let gone = || {
        RunFailure::new(
            "model_unusable",
            format!("the VAE `{id}` is no longer there"),
        )
    };
    found.ok_or_else(gone).map(Some)
}

/// Where it is.
pub(super) fn vae_path(
    models: &ModelCatalog,
    id: Option<&str>,
) -> Result<Option<PathBuf>, RunFailure> {
    Ok(found_vae(models, id)?.map(|vae| vae.path))
}

/// The adapters: new ones, or those of the LoRA to begin with.
fn network(
    parts: &WorkerParts,
    model: &mut StableDiffusion,
    settings: &TrainSettings,
    device: &ComputeDevice,
) -> Result<LoraNetwork, RunFailure> {
    let trained = TrainParts {
        unet: settings.unet_lr != 0.0,
        text_encoder: settings.text_encoder_lr != 0.0,
    };
    let (of_run, device) = (&settings.network, &device.device);
    let made = match &of_run.init_from {
        None => LoraNetwork::create(model, of_run, trained, settings.seed, device),
        Some(from) => {
            let file = beginning::find(&parts.store, &parts.models, from)?;
            LoraNetwork::continue_from(&file, model, of_run, trained, device)
        }
    };
    made.map_err(|error| RunFailure::new("training_failed", error))
}

/// Where the run's files go, and what its resume points belong to.
fn run_place(
    parts: &WorkerParts,
    run: &Run,
    spec: &RunSpec,
    images: String,
    facts: &Facts,
) -> Result<RunPlace, Ending> {
    let folder = parts.store.run_folder(run.id);
    let points = ResumeFolder::open(&folder.join(RESUME)).map_err(TrainError::from)?;
    let settings = &spec.settings;
    let optimizers = parts.plugins.optimizers();
    let schedulers = parts.plugins.schedulers();
    let owner = [
        ("the settings", digest(&settings.deciding())),
        ("the set of pictures", images),
        (
            "the base model's files",
            facts.materials.base_model.sha256.clone(),
        ),
        (
            "the optimizer",
            version_of(&optimizers, &settings.optimizer.id),
        ),
        (
            "the scheduler",
            version_of(&schedulers, &settings.scheduler.id),
        ),
    ];
    let session = Sha256::digest(run.spec.as_bytes());
    Ok(RunPlace {
        output_dir: folder.join("out"),
        resume: Some((
            points,
            owner.map(|(name, value)| (name.to_owned(), value)).into(),
        )),
        recorded_at: spec.recorded_at,
        inputs_sha256: Some(facts.inputs_sha256.clone()),
        session_id: u32::from_le_bytes([session[0], session[1], session[2], session[3]]),
    })
}

fn version_of(known: &[ComponentInfo], id: &str) -> String {
    let found = known.iter().find(|component| component.id == id);
    found.map_or_else(
        || id.to_owned(),
        |found| format!("{id} of {} {}", found.plugin_id, found.plugin_version),
    )
}

fn images_digest(images: &str, spec: &RunSpec) -> String {
    digest(&(images, &spec.buckets))
}

/// Long enough to tell things apart, short enough for a message.
fn digest(value: &impl Serialize) -> String {
    let json = serde_json::to_vec(value).unwrap_or_default();
    hex::encode(&Sha256::digest(json)[..8])
}

/// Lets a run pass whose device computes what the CPU computes; finds that out at the device's first use.
pub(super) fn check_device(
    self_checks: &Remembered,
    device: &ComputeDevice,
    reporter: &mut Reporter,
) -> Result<(), Ending> {
    if !selfcheck::applies_to(&device.info) {
        return Ok(());
    }
    let go_on = |done, total| {
        let phase = Report::Phase(Phase::CheckingDevice { done, total });
        reporter.report(phase) == Control::Continue
    };
    let found = self_checks
        .find(&device.info)
        .or_else(|| self_checks.run(device, go_on));
    match found {
        Some(found) if found.passed() => Ok(()),
        Some(found) => Err(failed_self_check(device, &found).into()),
        None => Err(Ending::Stopped),
    }
}

fn failed_self_check(device: &ComputeDevice, found: &SelfCheck) -> RunFailure {
    let names: Vec<&str> = found.failed().map(|check| check.name.as_str()).collect();
    let message = format!(
        "device `{}` ({}, {}) computes other results than the CPU: {} of {} checks failed ({}). Choose another \
         device, or update the driver; `lorasmith doctor --device {0} --again` shows details. `force_devices = true` \
         (LORASMITH_FORCE_DEVICES) uses it nevertheless.",
        device.info.id,
        device.info.name,
        device.info.driver,
        names.len(),
        found.checks.len(),
        names.join(", "),
    );
    RunFailure::new("device_failed_self_check", message)
}

pub(super) fn training_set(
    store: &Store,
    images: Vec<SnapshotImage>,
    spec: &RunSpec,
    base_model: &Path,
    cache: Option<TensorCache>,
) -> TrainingSet {
    let subsets = images
        .iter()
        .map(|image| (image.id.clone(), image.subset.clone()))
        .collect();
    let images = images
        .into_iter()
        .map(|image| TrainingImage {
            path: store.blobs().path(&image.sha256),
            mask: (image.mask_sha256).map(|sha256| store.blobs().path(&sha256)),
            id: image.id,
            sha256: image.sha256,
            width_px: image.width_px,
            height_px: image.height_px,
            caption: image.caption,
            repeats: image.repeats,
            regularization: image.regularization,
            // Checked when the picture was uploaded.
            background: image.background.and_then(|colour| colour.parse().ok()),
            correction: image.color_correction,
            captioning: captions_of(&spec.settings.captions, &image.training.captions),
            augment: augment_of(spec.settings.augment, image.training.augment),
        })
        .collect();
    TrainingSet {
        images,
        subsets,
        buckets: spec.buckets.clone(),
        cache,
        base_model: base_model.to_owned(),
    }
}

/// The scheduler wants to know the length before the loop does.
fn total_steps(data: &TrainingSet, spec: &RunSpec) -> Result<u64, RunFailure> {
    match spec.settings.length {
        TrainLength::Steps(steps) => Ok(steps),
        TrainLength::Epochs(_) => Ok(crate::training::planned_steps(data, &spec.settings)?),
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::diffusion::devices::DeviceSpec;
    use crate::selfcheck::CheckResult;

    #[test]
    fn a_failed_self_check_names_what_failed_and_what_to_do() {
        let mut device = devices::open(DeviceSpec::Cpu).unwrap();
        device.info.id = "vulkan:1".to_owned();
        let check = |name: &str, passed| CheckResult {
            name: name.to_owned(),
            error: None,
            tolerance: 1e-4,
            passed,
            detail: String::new(),
        };
        let found = SelfCheck {
            checked_at: OffsetDateTime::UNIX_EPOCH,
            duration_s: 1.0,
            checks: vec![check("linear", true), check("lora_conv", false)],
        };
        let failure = failed_self_check(&device, &found);
        assert_eq!(failure.code, "device_failed_self_check");
        let message = failure.message;
        for part in [
            "1 of 2 checks failed (lora_conv)",
            "doctor --device vulkan:1",
            "LORASMITH_FORCE_DEVICES",
        ] {
            assert!(message.contains(part), "{message}");
        }
    }
}
