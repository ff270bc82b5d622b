//! What is asked of a new run, and what can be found wrong with it without training.

use uuid::Uuid;

use super::{RunError, RunProblem, RunService, recorded_at};
use crate::dataloader::BucketSettings;
use crate::diffusion::devices::{self, DeviceSpec};
use crate::models::{BaseModel, Family, Vae};
use crate::plugin_host::SettingError;
use crate::preparation::color_correction;
use crate::runs::spec::{RunSpec, SnapshotDataset, SnapshotImage, SnapshotSubset};
use crate::store::StoreError;
use crate::store::datasets::{Correction, Image, Subset};
use crate::training::{PluginChoice, TrainSettings};

/// Longest name of a run, in characters.
const MAX_NAME_CHARS: usize = 128;
/// Channels of the latents of all generations that are supported.
const LATENT_CHANNELS: usize = 4;
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
    /// Id or name of a VAE in place of its own.
    pub vae: Option<String>,
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

/// A request that was found right.
pub(in crate::runs) struct Checked {
    pub(in crate::runs) spec: RunSpec,
    pub(in crate::runs) images: Vec<SnapshotImage>,
    pub(in crate::runs) dataset: SnapshotDataset,
    pub(in crate::runs) dataset_id: Uuid,
    pub(in crate::runs) base: BaseModel,
}

impl RunService {
    /// Checks everything that can be checked without training.
    pub(in crate::runs) async fn check(
        &self,
        mut request: NewRunRequest,
    ) -> Result<Checked, RunError> {
        self.own_names(&mut request.settings);
        let base = self.find_model(&request.base_model).await?;
        let of_network = self.check_network(&base, &mut request.settings).await?;
        let mut problems = self.check_values(&request);
        problems.extend(of_network);
        if let Some(problem) = base.problem() {
            let message = format!("cannot be trained: {problem}");
            problems.push(RunProblem::new("/base_model", "invalid_value", message));
        }
        problems.extend(check_clip_skip(&base, &request.settings));
        own_corrections(&base, &mut request.settings);
        let vae = match self.find_vae(request.vae.as_deref()).await? {
            Ok(vae) => vae,
            Err(problem) => {
                problems.push(problem);
                None
            }
        };
        problems.extend(check_loss(&base, &request.settings));
        let device = request.device.as_deref().unwrap_or(&self.default_device);
        let device = device.to_owned();
        problems.extend(check_device(device.clone()).await?);
        let (dataset, images) = self.snapshot(request.dataset_id).await?;
        problems.extend(check_images(&images, &request));
        if !problems.is_empty() {
            return Err(RunError::Invalid(problems));
        }
        let spec = RunSpec {
            device,
            base_model_id: base.id.clone(),
            vae_id: vae.as_ref().map(|vae| vae.id.clone()),
            settings: request.settings,
            buckets: request.buckets,
            recorded_at: recorded_at(),
        };
        Ok(Checked {
            spec,
            images,
            dataset,
            dataset_id: request.dataset_id,
            base,
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

    /// Wrong values that are seen without looking at anything but the plugins.
    fn check_values(&self, request: &NewRunRequest) -> Vec<RunProblem> {
        let mut problems = Vec::new();
        let mut report = |pointer: &str, message: String| {
            problems.push(RunProblem::new(pointer, "out_of_range", message));
        };
        let chars = request.name.trim().chars().count();
        if !(1..=MAX_NAME_CHARS).contains(&chars) {
            let message = format!("has {chars} characters, expected 1 to {MAX_NAME_CHARS}");
            report("/name", message);
        }
        if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(&request.priority) {
            let found = request.priority;
            let message = format!("is {found}, expected -{MAX_PRIORITY} to {MAX_PRIORITY}");
            report("/priority", message);
        }
        for problem in request.settings.problems() {
            report(&problem.pointer, problem.message);
        }
        for (field, message) in request.buckets.problems() {
            report(&format!("/buckets/{field}"), message);
        }
        let (optimizer, scheduler) = (&request.settings.optimizer, &request.settings.scheduler);
        let host = &self.plugins;
        problems.extend(of_plugin(
            "optimizer",
            optimizer,
            host.check_optimizer_settings(&optimizer.id, &optimizer.settings),
        ));
        problems.extend(of_plugin(
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

    /// The VAE that is asked for; or what is wrong with it.
    async fn find_vae(
        &self,
        id_or_name: Option<&str>,
    ) -> Result<Result<Option<Vae>, RunProblem>, RunError> {
        let Some(wanted) = id_or_name.map(str::to_owned) else {
            return Ok(Ok(None));
        };
        let models = self.models.clone();
        let problem = |code, message| Err(RunProblem::new("/vae", code, message));
        let name = wanted.clone();
        let found = tokio::task::spawn_blocking(move || models.find_vae(&wanted)).await??;
        Ok(match found {
            None => problem(
                "not_found",
                format!(
                    "there is no VAE `{name}` in the folder `vae` of the model folder; GET /v1/vaes lists those that are there"
                ),
            ),
            Some(Vae {
                info: Err(message), ..
            }) => problem("invalid_value", format!("cannot be used: {message}")),
            Some(Vae { info: Ok(info), .. }) if info.latent_channels != LATENT_CHANNELS => problem(
                "invalid_value",
                format!(
                    "has latents of {} channels (of a newer model?), Stable Diffusion 1.x, 2.x and XL have {LATENT_CHANNELS}",
                    info.latent_channels
                ),
            ),
            Some(vae) => Ok(Some(vae)),
        })
    }

    /// The dataset as it is now.
    ///
    /// # Errors
    /// [`RunError::DatasetNotFound`].
    pub async fn snapshot(
        &self,
        id: Uuid,
    ) -> Result<(SnapshotDataset, Vec<SnapshotImage>), RunError> {
        let dataset = self.store.dataset(id).await.map_err(|error| match error {
            StoreError::NotFound => RunError::DatasetNotFound(id),
            other => other.into(),
        })?;
        let images = self.store.all_images(id).await?;
        let correction = dataset.color_correction;
        let images = images
            .into_iter()
            .map(|(image, subset)| snapshot_image(image, subset, correction))
            .collect();
        let subsets = self.store.list_subsets(id).await?;
        let dataset = SnapshotDataset {
            name: dataset.name,
            revision: dataset.revision,
            subsets: subsets.into_iter().map(snapshot_subset).collect(),
        };
        Ok((dataset, images))
    }
}

/// What was corrected of a model holds for runs that say nothing else; it is written down, so that later corrections
/// change no run.
fn own_corrections(base: &BaseModel, settings: &mut TrainSettings) {
    let record = &base.record;
    settings.prediction = settings.prediction.or(record.prediction_type);
    settings.zero_terminal_snr = settings.zero_terminal_snr.or(record.zero_terminal_snr);
}

fn snapshot_subset(subset: Subset) -> SnapshotSubset {
    SnapshotSubset {
        id: Some(subset.id),
        name: subset.name,
        repeats: subset.repeats,
        is_reg: subset.is_reg,
        instance_prompt: subset.instance_prompt,
        class_prompt: subset.class_prompt,
        training: subset.training,
    }
}

fn snapshot_image(image: Image, subset: Subset, correction: Option<Correction>) -> SnapshotImage {
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
        captioned_by_prompt: image.caption.is_none(),
        caption: image.caption.or(prompt).unwrap_or_default(),
        subset: subset.name,
        repeats: subset.repeats,
        regularization: subset.is_reg,
        background: image.background,
        mask_sha256: image.mask_sha256,
        color_correction: color_correction(image.color_correction.or(correction)),
        training: subset.training,
        file_name: Some(image.file_name),
    }
}

/// What a plugin finds wrong with its settings.
fn of_plugin(
    kind: &str,
    choice: &PluginChoice,
    checked: Result<(), Vec<SettingError>>,
) -> Vec<RunProblem> {
    let problem = |error: SettingError| match error.pointer {
        None => {
            let message = format!("found `{}`: {}", choice.id, error.message);
            RunProblem::new(format!("/{kind}/id"), "not_found", message)
        }
        Some(pointer) => {
            let pointer = format!("/{kind}/settings{pointer}");
            RunProblem::new(pointer, "invalid_value", error.message)
        }
    };
    let errors = checked.err().unwrap_or_default();
    errors.into_iter().map(problem).collect()
}

/// SDXL was trained on the states before the last of both text encoders: there is nothing to choose.
fn check_clip_skip(base: &BaseModel, settings: &TrainSettings) -> Option<RunProblem> {
    let family = base.info.as_ref().ok()?.family;
    let found = settings.clip_skip;
    (family == Family::Sdxl && found != 1).then(|| {
        let message = format!(
            "is {found}, expected 1: SDXL takes the states before the last of its text encoders in any case"
        );
        RunProblem::new("/clip_skip", "invalid_value", message)
    })
}

/// Weights that are made for the other target.
fn check_loss(base: &BaseModel, settings: &TrainSettings) -> Option<RunProblem> {
    let of_model = base.info.as_ref().ok()?.prediction;
    let prediction = settings.prediction.unwrap_or(of_model);
    let (field, message) = settings.loss.problem_with(prediction)?;
    Some(RunProblem::new(
        format!("/loss/{field}"),
        "invalid_value",
        message,
    ))
}

fn check_images(images: &[SnapshotImage], request: &NewRunRequest) -> Vec<RunProblem> {
    let held_out = &request.settings.validation.image_ids;
    let mut problems = Vec::new();
    for (index, id) in held_out.iter().enumerate() {
        if !images.iter().any(|image| image.id == *id) {
            let pointer = format!("/validation/image_ids/{index}");
            let message = format!("the dataset has no image {id}");
            problems.push(RunProblem::new(pointer, "not_found", message));
        }
    }
    let left = images
        .iter()
        .filter(|image| !image.regularization && !held_out.contains(&image.id))
        .count();
    if left == 1 && request.settings.validation.fraction.is_some() {
        let message = "the dataset has 1 image besides regularization, expected 2 or more: one to hold out, one to \
                       train on";
        problems.push(RunProblem::new(
            "/validation/fraction",
            "invalid_value",
            message,
        ));
    }
    if left == 0 {
        let message =
            "the dataset has no image to train on besides regularization and held-out images";
        problems.push(RunProblem::new("/dataset_id", "invalid_value", message));
    }
    problems
}

/// Whether the device exists now; asking drivers takes a moment.
pub(in crate::runs) async fn check_device(device: String) -> Result<Option<RunProblem>, RunError> {
    let problem = |message: String| RunProblem::new("/device", "invalid_value", message);
    let spec: DeviceSpec = match device.parse() {
        Ok(spec) => spec,
        Err(error) => return Ok(Some(problem(format!("found `{device}`: {error}")))),
    };
    if matches!(spec, DeviceSpec::Auto | DeviceSpec::Cpu) {
        return Ok(None);
    }
    if let Err(error) = devices::check_built_in(spec) {
        return Ok(Some(problem(error.to_string())));
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
