//! The settings of a run on the wire: what `POST /v1/runs` takes and, with defaults filled in, what a run shows.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::captioning::{Augment, CaptionSettings};
use super::problem::FieldError;
use super::run_judging::{EarlyStopping, Ema, OnNonFinite, Validation};
use super::run_network::Network;
use super::run_objective::{Loss, Noise, Timesteps};
use super::run_outputs::{Resume, Samples, Save};
use super::run_training::{
    Buckets, ComputePrecision, Crop, GradientCheckpointing, Plugin, Prediction, Resolution,
};
use crate::runs::settings as domain;
use crate::runs::{NewRunRequest, RunSpec};
use crate::store::runs::Run;

/// What a run is to do. The `settings` of a run have this form too: sent again, they start the same run.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "name": "lumo", "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11", "base_model": "v1-5-pruned-emaonly",
    "network": {"kind": "lora", "rank": 32, "alpha": 16.0}, "unet_lr": 1e-4, "text_encoder_lr": 5e-5,
    "optimizer": {"id": "adamw", "settings": {"weight_decay": 0.01}},
    "scheduler": {"id": "cosine", "settings": {}}, "lr_warmup_steps": 100,
    "max_train_epochs": 10, "batch_size": 2, "resolution": {"width_px": 512, "height_px": 512},
    "samples": {"prompts": [{"prompt": "lumo, blue background", "seed": 1}], "every_n_steps": 200, "at_first": true}
}))]
pub struct CreateRun {
    /// 1 to 128 characters; also the stem of the LoRA's file name.
    #[schema(min_length = 1, max_length = 128)]
    pub name: String,
    /// The pictures; a run keeps the captions of the moment in which it was made.
    pub dataset_id: Uuid,
    /// Id or name of a base model, as `GET /v1/models` lists them.
    pub base_model: String,
    /// Id or name of a VAE in place of the base model's own, as `GET /v1/vaes` lists them. It makes the latents and the
    /// preview pictures; latents are scaled as the base model expects them.
    #[serde(default)]
    pub vae: Option<String>,
    /// `auto`, `cpu`, or an id of `GET /v1/devices`; the service's own device when absent.
    #[serde(default)]
    pub device: Option<String>,
    /// The adapters.
    #[serde(default)]
    pub network: Network,
    /// Learning rate of the UNet; 0 leaves the UNet without adapters.
    #[serde(default = "defaults::unet_lr")]
    #[schema(default = 1e-4, minimum = 0)]
    pub unet_lr: f64,
    /// Learning rate of the text encoder; 0 leaves it without adapters, and captions are then encoded only once.
    #[serde(default = "defaults::text_encoder_lr")]
    #[schema(default = 5e-5, minimum = 0)]
    pub text_encoder_lr: f64,
    /// What changes the weights: an id of `GET /v1/optimizers` and its settings.
    #[serde(default = "defaults::optimizer")]
    pub optimizer: Plugin,
    /// How the learning rates change: an id of `GET /v1/schedulers` and its settings.
    #[serde(default = "defaults::scheduler")]
    pub scheduler: Plugin,
    /// Optimizer steps over which the learning rates rise from 0, for schedulers that know a warm-up.
    #[serde(default)]
    pub lr_warmup_steps: u64,
    /// Length in optimizer steps; 1600 when neither this nor `max_train_epochs` is given.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 10000000)]
    pub max_train_steps: Option<u64>,
    /// Length in epochs, instead of `max_train_steps`.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 1000000)]
    pub max_train_epochs: Option<u64>,
    /// Images per batch.
    #[serde(default = "defaults::one")]
    #[schema(default = 1, minimum = 1, maximum = 1024)]
    pub batch_size: usize,
    /// Batches per optimizer step.
    #[serde(default = "defaults::one")]
    #[schema(default = 1, minimum = 1, maximum = 65536)]
    pub gradient_accumulation_steps: usize,
    /// What is kept between forward and backward: everything, or only what goes into each block. `blocks` takes a
    /// fraction of the memory and about a third more time; the gradients are the same.
    #[serde(default)]
    pub gradient_checkpointing: GradientCheckpointing,
    /// What the model multiplies in. Adapters, optimizer, norms and sums are fp32 in any case. `fp16` scales the loss
    /// by itself and leaves steps out whose gradients overflow; a device that cannot refuses the run. On the CPU
    /// `bf16` rounds what is multiplied to 8 significant bits, `fp16` to 16; it is faster where the processor
    /// multiplies bf16 (AMX, AVX-512 BF16), and as fp32 elsewhere.
    #[serde(default)]
    pub precision: ComputePrecision,
    /// Gradients longer than this (L2 norm of all together) are scaled down to it; 0 switches this off.
    #[serde(default = "defaults::unit")]
    #[schema(default = 1.0, minimum = 0)]
    pub max_grad_norm: f64,
    /// What the UNet predicts; the base model's own target when absent.
    #[serde(default)]
    pub prediction_type: Option<Prediction>,
    /// Whether the noise schedule is shifted so that nothing of the picture is left at its last timestep, as some
    /// v-prediction models need; as the base model has it when absent.
    #[serde(default)]
    pub zero_terminal_snr: Option<bool>,
    /// γ of min-SNR weighting, 5 in its paper; off when absent.
    #[serde(default)]
    #[schema(exclusive_minimum = 0)]
    pub min_snr_gamma: Option<f64>,
    /// How far off a prediction is, and what that counts.
    #[serde(default)]
    pub loss: Loss,
    /// The noise that is added.
    #[serde(default)]
    pub noise: Noise,
    /// Which timesteps are trained on.
    #[serde(default)]
    pub timesteps: Timesteps,
    /// Weight of the loss on regularization images.
    #[serde(default = "defaults::unit")]
    #[schema(default = 1.0, minimum = 0)]
    pub prior_loss_weight: f64,
    /// Which hidden state of the text encoder is used, counted from the end; 1 is the last.
    #[serde(default = "defaults::one")]
    #[schema(default = 1, minimum = 1, maximum = 48)]
    pub clip_skip: usize,
    /// Length of captions in tokens: 75, 150 or 225.
    #[serde(default = "defaults::max_token_length")]
    #[schema(default = 75)]
    pub max_token_length: usize,
    /// What becomes of captions in training.
    #[serde(default)]
    pub captions: CaptionSettings,
    /// Random changes of pictures.
    #[serde(default)]
    pub augment: Augment,
    /// Size of the pictures; with buckets their area.
    #[serde(default)]
    pub resolution: Resolution,
    /// Sizes for other aspect ratios.
    #[serde(default)]
    pub buckets: Buckets,
    /// Where pictures are cut to the size of their bucket.
    #[serde(default)]
    pub crop: Crop,
    /// Seed of everything random: the same seed trains the same LoRA.
    #[serde(default)]
    pub seed: u64,
    /// LoRA files on the way; the last one is always saved.
    #[serde(default)]
    pub save: Save,
    /// When the run is kept so that it can go on exactly after a crash.
    #[serde(default)]
    pub resume: Resume,
    /// Preview pictures.
    #[serde(default)]
    pub samples: Samples,
    /// Loss on held-out images.
    #[serde(default)]
    pub validation: Validation,
    /// Ends the run when its validation loss no longer falls; off when absent.
    #[serde(default)]
    pub early_stopping: Option<EarlyStopping>,
    /// What to do when its numbers are no longer finite.
    #[serde(default)]
    pub on_non_finite: OnNonFinite,
    /// An average of the adapters, which is then what is measured and saved; off when absent.
    #[serde(default)]
    pub ema: Option<Ema>,
    /// Its place in the queue: runs of a higher number go first, of the same number the older one.
    #[serde(default)]
    #[schema(minimum = -100, maximum = 100)]
    pub priority: i32,
}

mod defaults {
    use super::Plugin;
    use crate::runs::settings::TrainSettings;

    pub fn unet_lr() -> f64 {
        TrainSettings::default().unet_lr
    }
    pub fn text_encoder_lr() -> f64 {
        TrainSettings::default().text_encoder_lr
    }
    pub fn optimizer() -> Plugin {
        TrainSettings::default().optimizer.into()
    }
    pub fn scheduler() -> Plugin {
        TrainSettings::default().scheduler.into()
    }
    pub fn max_token_length() -> usize {
        TrainSettings::default().max_token_length
    }
    pub fn one() -> usize {
        1
    }
    pub fn unit() -> f64 {
        1.0
    }
}

impl TryFrom<CreateRun> for NewRunRequest {
    type Error = FieldError;

    /// # Errors
    /// When fields contradict each other. Ranges are the domain's to check.
    fn try_from(wire: CreateRun) -> Result<Self, FieldError> {
        let length = length(wire.max_train_steps, wire.max_train_epochs)?;
        Ok(Self {
            name: wire.name.clone(),
            dataset_id: wire.dataset_id,
            base_model: wire.base_model,
            vae: wire.vae,
            device: wire.device,
            priority: wire.priority,
            api_key_id: None, // the request's, not the body's
            buckets: wire.buckets.around(wire.resolution, wire.crop),
            settings: domain::TrainSettings {
                output_name: file_stem(&wire.name),
                network: wire.network.into(),
                unet_lr: wire.unet_lr,
                text_encoder_lr: wire.text_encoder_lr,
                lr_warmup_steps: wire.lr_warmup_steps,
                length,
                batch_size: wire.batch_size,
                gradient_accumulation_steps: wire.gradient_accumulation_steps,
                gradient_checkpointing: wire.gradient_checkpointing.into(),
                precision: wire.precision.into(),
                max_grad_norm: wire.max_grad_norm,
                prediction: wire.prediction_type.map(Into::into),
                zero_terminal_snr: wire.zero_terminal_snr,
                min_snr_gamma: wire.min_snr_gamma,
                loss: wire.loss.into(),
                noise: wire.noise.into(),
                timesteps: wire.timesteps.into(),
                prior_loss_weight: wire.prior_loss_weight,
                clip_skip: wire.clip_skip,
                max_token_length: wire.max_token_length,
                captions: wire.captions.into(),
                augment: wire.augment.with(wire.crop == Crop::Random),
                seed: wire.seed,
                save: wire.save.into(),
                resume: wire.resume.into(),
                samples: wire.samples.into(),
                validation: wire.validation.into(),
                early_stopping: wire.early_stopping.map(Into::into),
                on_non_finite: wire.on_non_finite.into(),
                ema: wire.ema.map(Into::into),
                optimizer: wire.optimizer.into(),
                scheduler: wire.scheduler.into(),
            },
        })
    }
}

impl CreateRun {
    /// The settings of a run that was made, every default filled in.
    pub fn of(run: &Run, spec: RunSpec) -> Self {
        let RunSpec {
            device,
            base_model_id,
            vae_id,
            settings,
            buckets,
            recorded_at: _,
        } = spec;
        let (max_train_steps, max_train_epochs) = match settings.length {
            domain::TrainLength::Steps(steps) => (Some(steps), None),
            domain::TrainLength::Epochs(epochs) => (None, Some(epochs)),
        };
        Self {
            name: run.name.clone(),
            dataset_id: run.dataset_id,
            base_model: base_model_id,
            vae: vae_id,
            device: Some(device),
            network: settings.network.into(),
            unet_lr: settings.unet_lr,
            text_encoder_lr: settings.text_encoder_lr,
            optimizer: settings.optimizer.into(),
            scheduler: settings.scheduler.into(),
            lr_warmup_steps: settings.lr_warmup_steps,
            max_train_steps,
            max_train_epochs,
            batch_size: settings.batch_size,
            gradient_accumulation_steps: settings.gradient_accumulation_steps,
            gradient_checkpointing: settings.gradient_checkpointing.into(),
            precision: settings.precision.into(),
            max_grad_norm: settings.max_grad_norm,
            prediction_type: settings.prediction.map(Into::into),
            zero_terminal_snr: settings.zero_terminal_snr,
            min_snr_gamma: settings.min_snr_gamma,
            loss: settings.loss.into(),
            noise: settings.noise.into(),
            timesteps: settings.timesteps.into(),
            prior_loss_weight: settings.prior_loss_weight,
            clip_skip: settings.clip_skip,
            max_token_length: settings.max_token_length,
            captions: settings.captions.into(),
            augment: settings.augment.into(),
            resolution: Resolution::of(&buckets),
            crop: buckets.crop.into(),
            buckets: buckets.into(),
            seed: settings.seed,
            save: settings.save.into(),
            resume: settings.resume.into(),
            samples: settings.samples.into(),
            validation: settings.validation.into(),
            early_stopping: settings.early_stopping.map(Into::into),
            on_non_finite: settings.on_non_finite.into(),
            ema: settings.ema.map(Into::into),
            priority: run.priority,
        }
    }
}

/// Length by either; the domain's own without both.
///
/// # Errors
/// When both are given.
fn length(steps: Option<u64>, epochs: Option<u64>) -> Result<domain::TrainLength, FieldError> {
    match (steps, epochs) {
        (Some(_), Some(_)) => Err(FieldError::new(
            "/max_train_epochs",
            "invalid_value",
            "given together with max_train_steps; give one of the two",
        )),
        (Some(steps), None) => Ok(domain::TrainLength::Steps(steps)),
        (None, Some(epochs)) => Ok(domain::TrainLength::Epochs(epochs)),
        (None, None) => Ok(domain::TrainSettings::default().length),
    }
}

/// A run's name as a file name: what file systems or shells dislike becomes `_`.
fn file_stem(name: &str) -> String {
    let stem: String = name
        .trim()
        .chars()
        .map(|c| {
            if c.is_control() || "/\\:*?\"<>|".contains(c) {
                '_'
            } else {
                c
            }
        })
        .collect();
    match stem.strip_prefix('.') {
        Some(rest) => format!("_{rest}"),
        None => stem,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::runs::settings::BucketSettings;

    fn parse(body: Value) -> Result<NewRunRequest, FieldError> {
        super::super::decode::from_json::<CreateRun>(body).and_then(TryInto::try_into)
    }

    #[test]
    fn three_fields_are_enough() {
        let body = json!({"name": "a/b", "dataset_id": Uuid::nil(), "base_model": "base"});
        let request = parse(body).expect("right");
        let expected = domain::TrainSettings {
            output_name: "a_b".to_owned(),
            ..domain::TrainSettings::default()
        };
        assert_eq!(request.settings, expected);
        assert_eq!(request.buckets, BucketSettings::default());
    }

    #[test]
    fn wrong_fields_are_named() {
        let base = json!({"name": "a", "dataset_id": Uuid::nil(), "base_model": "base"});
        for (field, value, pointer) in [
            ("unet_rate", json!(1.0), "/unet_rate"),
            ("network", json!({"rnak": 4}), "/network/rnak"),
            ("network", json!({"rank": "4"}), "/network/rank"),
            (
                "samples",
                json!({"prompts": [{"sampler": "x"}]}),
                "/samples/prompts/0/sampler",
            ),
            ("max_train_epochs", json!(3), "/max_train_epochs"),
        ] {
            let mut body = base.clone();
            body["max_train_steps"] = json!(5);
            body[field] = value;
            assert_eq!(parse(body).expect_err(field).pointer, pointer);
        }
    }
}
