//! Where a run's files come from: one record of everything that produced them. It is told of every run; of one that has
//! succeeded it is kept as a blob and never changes again.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use super::origin::{Environment, Facts, Materials, ModelRecord, PluginRecord, VaeRecord};
use super::spec::{RunSpec, SnapshotImage};
use crate::dataloader::ColorCorrection;
use crate::store::datasets::SubsetTraining;
use crate::store::runs::{Attempt, Metric, Run};
use crate::store::{Store, StoreError};

/// The form of the record; another number means other fields.
pub const FORMAT: u32 = 1;
/// Steps that are read at once.
const STEPS_AT_ONCE: u64 = 10_000;

/// Everything that produced a run's files.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// [`FORMAT`].
    pub format: u32,
    /// The run.
    pub run_id: Uuid,
    /// What its owner calls it.
    pub name: String,
    /// When it was asked for.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// The run whose end was its beginning.
    pub continued_from: Option<Uuid>,
    /// The run that it repeats.
    pub reproduction_of: Option<Uuid>,
    /// Whether the run has succeeded: then the record never changes again.
    pub complete: bool,
    /// SHA-256 of `inputs` as JSON without spaces; the LoRA files name it. `None` before a worker has begun.
    pub inputs_sha256: Option<String>,
    /// What decides the result.
    pub inputs: Inputs,
    /// The dataset that the images were taken from.
    pub dataset_id: Uuid,
    /// The images' ids there, in the order of `inputs.images`.
    pub image_ids: Vec<String>,
    /// The workers, in their order: more than one after a pause or a crash.
    pub attempts: Vec<AttemptRecord>,
    /// What has happened: states, and whatever may have changed the numbers.
    pub history: Vec<HistoryEvent>,
    /// What came of it.
    pub result: RunResult,
}

/// What decides a result. It names no time but that of the request and nothing of this service: the same inputs have the
/// same digest everywhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// What was asked for, every default filled in: a [`RunSpec`], its fields in the order of their names.
    pub settings: Value,
    /// The images as they were when the run was made.
    pub images: Vec<PinnedImage>,
    /// The base model; `None` before a worker has begun.
    pub base_model: Option<ModelRecord>,
    /// The VAE in place of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae: Option<VaeRecord>,
    /// The plugins; none before a worker has begun.
    pub plugins: Vec<PluginRecord>,
}

/// An image as it was when the run was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedImage {
    /// Digest of its file.
    pub sha256: String,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// What the text encoder is told of it.
    pub caption: String,
    /// Name of its subset.
    pub subset: String,
    /// How often it appears in an epoch.
    pub repeats: u32,
    /// Whether it shows the class in general.
    pub regularization: bool,
    /// What it is laid on where it is transparent: `#rrggbb`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<String>,
    /// Digest of its mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_sha256: Option<String>,
    /// What is done to its colours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color_correction: Option<ColorCorrection>,
    /// Where its subset differs from the settings.
    #[serde(default, skip_serializing_if = "SubsetTraining::is_default")]
    pub training: SubsetTraining,
}

/// One worker of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttemptRecord {
    /// Its number, from 1.
    pub attempt: u32,
    /// When it began.
    #[serde(with = "time::serde::rfc3339")]
    pub begun_at: OffsetDateTime,
    /// The resume point that it went on from.
    pub from_step: Option<u64>,
    /// What it computed with.
    pub environment: Environment,
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryEvent {
    /// Its number among the run's events.
    pub id: u64,
    /// What kind of event.
    pub event: String,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// What it says.
    pub data: Value,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunResult {
    /// Optimizer steps done.
    pub steps: u64,
    /// Updates that were left out, as gradients were not finite in the compute precision.
    pub skipped_steps: Option<u64>,
    /// SHA-256 over step and loss of every step, each as 8 bytes, little-endian; `None` before the end.
    pub losses_sha256: Option<String>,
    /// What its validations say.
    pub verdict: Option<String>,
    /// Why it has ended before its last step.
    pub early_stop: Option<String>,
    /// Its LoRA files, in the order of saving.
    pub files: Vec<ResultFile>,
}

/// A LoRA file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResultFile {
    /// Its id.
    pub lora_id: Uuid,
    /// The name it is downloaded under.
    pub file_name: String,
    /// Optimizer steps behind it.
    pub step: u64,
    /// Whether it is the run's result.
    #[serde(rename = "final")]
    pub is_final: bool,
    /// Digest of its content.
    pub sha256: String,
    /// Its size.
    pub size_bytes: u64,
}

impl Inputs {
    /// What the request and the worker's findings say together.
    pub fn new(spec: &RunSpec, images: &[SnapshotImage], materials: Option<Materials>) -> Self {
        let pinned = images.iter().map(|image| PinnedImage {
            sha256: image.sha256.clone(),
            width_px: image.width_px,
            height_px: image.height_px,
            caption: image.caption.clone(),
            subset: image.subset.clone(),
            repeats: image.repeats,
            regularization: image.regularization,
            background: image.background.clone(),
            mask_sha256: image.mask_sha256.clone(),
            color_correction: image.color_correction,
            training: image.training.clone(),
        });
        let (base_model, vae, plugins) = materials.map_or((None, None, Vec::new()), |found| {
            (Some(found.base_model), found.vae, found.plugins)
        });
        let mut spec = spec.clone();
        // The LoRA to begin with is told by its digest; its id is this service's.
        if let Some(from) = &mut spec.settings.network.init_from {
            from.lora_id = None;
        }
        Self {
            // Names, numbers and lists of them, all of which have a JSON.
            settings: serde_json::to_value(spec).unwrap_or_default(),
            images: pinned.collect(),
            base_model,
            vae,
            plugins,
        }
    }

    /// SHA-256 of the inputs as JSON without spaces.
    pub fn sha256(&self) -> String {
        // Structs of strings and numbers always have a JSON.
        hex::encode(Sha256::digest(serde_json::to_vec(self).unwrap_or_default()))
    }
}

impl Provenance {
    /// What is known of a run now. With `complete` it is the run's last word.
    ///
    /// # Errors
    /// When the database fails, or a row cannot be read.
    pub async fn of(store: &Store, run: &Run, complete: bool) -> Result<Self, StoreError> {
        let unreadable = |error: serde_json::Error| StoreError::Corrupt {
            what: format!("runs, {}", run.id),
            message: error.to_string(),
        };
        let spec: RunSpec = serde_json::from_str(&run.spec).map_err(unreadable)?;
        let images = store.run_images(run.id).await?;
        let images: Vec<SnapshotImage> = serde_json::from_str(&images).map_err(unreadable)?;
        let attempts = store.attempts(run.id).await?;
        let attempts: Vec<(Attempt, Facts)> = attempts
            .into_iter()
            .map(|attempt| Ok((attempt.clone(), serde_json::from_str(&attempt.facts)?)))
            .collect::<Result<_, _>>()
            .map_err(unreadable)?;
        let history = store.history(run.id).await?.into_iter();
        let last = attempts.last().map(|(_, facts)| facts.clone());
        Ok(Self {
            format: FORMAT,
            run_id: run.id,
            name: run.name.clone(),
            created_at: run.created_at,
            continued_from: run.continued_from,
            reproduction_of: run.reproduction_of,
            complete,
            inputs_sha256: last.as_ref().map(|facts| facts.inputs_sha256.clone()),
            inputs: Inputs::new(&spec, &images, last.map(|facts| facts.materials)),
            dataset_id: run.dataset_id,
            image_ids: images.into_iter().map(|image| image.id).collect(),
            attempts: attempts
                .into_iter()
                .map(|(attempt, facts)| AttemptRecord {
                    attempt: attempt.attempt,
                    begun_at: attempt.begun_at,
                    from_step: facts.from_step,
                    environment: facts.environment,
                })
                .collect(),
            history: history
                .map(|event| HistoryEvent {
                    id: event.seq,
                    event: event.kind,
                    created_at: event.created_at,
                    data: event.data,
                })
                .collect(),
            result: RunResult::of(store, run, complete).await?,
        })
    }
}

impl RunResult {
    async fn of(store: &Store, run: &Run, complete: bool) -> Result<Self, StoreError> {
        let progress = store.last_progress(run.id).await?;
        let losses_sha256 = match complete {
            true => Some(losses_sha256(store, run.id).await?),
            false => None,
        };
        let loras = store.loras(Some(run.id), None, u64::from(u32::MAX)).await?;
        Ok(Self {
            steps: run.step,
            skipped_steps: progress.and_then(|event| event.data["skipped_steps"].as_u64()),
            losses_sha256,
            verdict: run.verdict.clone(),
            early_stop: run.early_stop.clone(),
            files: loras
                .into_iter()
                .map(|lora| ResultFile {
                    lora_id: lora.id,
                    file_name: lora.file_name,
                    step: lora.step,
                    is_final: lora.is_final,
                    sha256: lora.sha256,
                    size_bytes: lora.size_bytes,
                })
                .collect(),
        })
    }
}

/// Steps of a run after `since`, in order; a loss that was not finite is NaN.
pub(super) async fn losses_after(
    store: &Store,
    run: Uuid,
    since: u64,
) -> Result<Vec<(u64, f64)>, StoreError> {
    let metrics = store
        .metrics(run, Some(since), None, STEPS_AT_ONCE)
        .await?
        .into_iter();
    let pair = |metric: Metric| (metric.step, metric.loss.unwrap_or(f64::NAN));
    Ok(metrics.map(pair).collect())
}

async fn losses_sha256(store: &Store, run: Uuid) -> Result<String, StoreError> {
    let mut digest = Sha256::new();
    let mut since = 0;
    loop {
        let losses = losses_after(store, run, since).await?;
        let Some((last, _)) = losses.last() else {
            return Ok(hex::encode(digest.finalize()));
        };
        since = *last;
        for (step, loss) in losses {
            digest.update(step.to_le_bytes());
            digest.update(loss.to_le_bytes());
        }
    }
}
