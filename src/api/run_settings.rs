//! The settings of a run on the wire: what `POST /v1/runs` takes and, with defaults filled in, what a run shows.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use uuid::Uuid;

use super::problem::FieldError;
use super::run_judging::{EarlyStopping, Ema, OnNonFinite, Validation};
use crate::runs::settings::{
    self as domain, BucketSettings, NetworkSettings, PredictionType, SamplerKind, SavePrecision,
};
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
    /// γ of min-SNR weighting, 5 in its paper; off when absent.
    #[serde(default)]
    #[schema(exclusive_minimum = 0)]
    pub min_snr_gamma: Option<f64>,
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
    /// Size of the pictures; with buckets their area.
    #[serde(default)]
    pub resolution: Resolution,
    /// Sizes for other aspect ratios.
    #[serde(default)]
    pub buckets: Buckets,
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

/// Kind and size of the adapters.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// What the adapters are.
    pub kind: NetworkKind,
    /// Rank of linear layers and 1×1 convolutions.
    #[schema(minimum = 1, maximum = 1024)]
    pub rank: usize,
    /// Their strength is alpha / rank; 0 means "as the rank".
    #[schema(minimum = 0)]
    pub alpha: f64,
    /// Rank of 3×3 convolutions; they have no adapters without it.
    #[schema(minimum = 1, maximum = 1024)]
    pub conv_rank: Option<usize>,
    /// Alpha of 3×3 convolutions; 1 when only `conv_rank` is given.
    #[schema(minimum = 0)]
    pub conv_alpha: Option<f64>,
}

/// Kinds of adapters.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// Low-rank matrices, on convolutions too when `conv_rank` is given (LoCon).
    #[default]
    Lora,
}

/// A plugin's component and its settings.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PluginChoice)] // `Plugin` is what `GET /v1/plugins` lists
pub struct Plugin {
    /// Its id.
    pub id: String,
    /// Its settings, by the schema that it is listed with; defaults for what is absent.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub settings: Map<String, Value>,
}

/// Targets of the UNet.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity.
    VPrediction,
}

/// Width and height.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Resolution {
    /// A multiple of 8.
    #[schema(minimum = 8)]
    pub width_px: u32,
    /// A multiple of 8.
    #[schema(minimum = 8)]
    pub height_px: u32,
}

/// Sizes for other aspect ratios, by sd-scripts' rule.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Buckets {
    /// Off, every picture is cropped to `resolution`.
    pub enabled: bool,
    /// Shortest side.
    pub min_px: u32,
    /// Longest side.
    pub max_px: u32,
    /// Sides are multiples of this.
    pub step_px: u32,
    /// Leave small pictures as they are.
    pub no_upscale: bool,
}

/// When LoRA files are saved on the way, and how.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Save {
    /// Every so many optimizer steps.
    #[schema(minimum = 1)]
    pub every_n_steps: Option<u64>,
    /// After every so many epochs.
    #[schema(minimum = 1)]
    pub every_n_epochs: Option<u64>,
    /// Number format of the files.
    pub precision: Precision,
}

/// What the model multiplies in.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ComputePrecision {
    /// 24 significant bits.
    #[default]
    Fp32,
    /// 11 significant bits.
    Fp16,
    /// 8 significant bits, the range of fp32.
    Bf16,
}

/// When the run is kept so that it can go on exactly after a crash, besides at each saved LoRA. What it computes does
/// not depend on this. The last two points are kept, each about three times the size of the LoRA in fp32.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Resume {
    /// After every so many optimizer steps.
    #[schema(minimum = 1)]
    pub every_n_steps: Option<u64>,
    /// After so many minutes.
    #[schema(exclusive_minimum = 0, maximum = 1440)]
    pub every_minutes: f64,
}

impl Default for Resume {
    fn default() -> Self {
        domain::ResumeSettings::default().into()
    }
}

/// Number formats of a LoRA file.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As trained.
    #[default]
    Fp32,
    /// Half the size, read by everything.
    Fp16,
    /// Half the size, with the range of fp32.
    Bf16,
}

/// Preview pictures.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Samples {
    /// What to draw, at most 64.
    #[schema(max_items = 64)]
    pub prompts: Vec<Prompt>,
    /// Every so many optimizer steps, besides the end.
    #[schema(minimum = 1)]
    pub every_n_steps: Option<u64>,
    /// Also before the first step.
    pub at_first: bool,
}

/// One preview picture.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Prompt {
    /// What to draw.
    #[schema(required = true)]
    pub prompt: String,
    /// What to move away from.
    pub negative_prompt: String,
    /// Width; rounded down to what the model can draw.
    #[schema(minimum = 8, maximum = 4096)]
    pub width_px: u32,
    /// Height; rounded down to what the model can draw.
    #[schema(minimum = 8, maximum = 4096)]
    pub height_px: u32,
    /// Seed of the picture's noise.
    pub seed: u64,
    /// Steps of the sampler.
    #[schema(minimum = 1, maximum = 1000)]
    pub steps: usize,
    /// Strength of classifier-free guidance; 1 is none.
    #[schema(minimum = 0)]
    pub cfg_scale: f64,
    /// The sampler.
    pub sampler: Sampler,
}

/// What is kept between forward and backward.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GradientCheckpointing {
    /// Every activation that a gradient needs.
    #[default]
    None,
    /// The inputs of each block, which runs again in the backward.
    Blocks,
}

/// Samplers of previews.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// DDIM as Stable Diffusion 1.5 is configured.
    #[default]
    Ddim,
    /// DDIM as sd-scripts' previews use it.
    DdimKohya,
    /// Euler.
    Euler,
}

mod defaults {
    use super::Plugin;
    use crate::runs::settings::{PluginChoice, TrainSettings};

    pub fn unet_lr() -> f64 {
        TrainSettings::default().unet_lr
    }
    pub fn text_encoder_lr() -> f64 {
        TrainSettings::default().text_encoder_lr
    }
    pub fn optimizer() -> Plugin {
        plugin(TrainSettings::default().optimizer)
    }
    pub fn scheduler() -> Plugin {
        plugin(TrainSettings::default().scheduler)
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
    fn plugin(choice: PluginChoice) -> Plugin {
        choice.into()
    }
}

impl Default for Network {
    fn default() -> Self {
        NetworkSettings::default().into()
    }
}

impl Default for Resolution {
    fn default() -> Self {
        let BucketSettings {
            width_px,
            height_px,
            ..
        } = BucketSettings::default();
        Self {
            width_px,
            height_px,
        }
    }
}

impl Default for Buckets {
    fn default() -> Self {
        BucketSettings::default().into()
    }
}

impl Default for Prompt {
    fn default() -> Self {
        domain::SamplePrompt::default().into()
    }
}

impl TryFrom<CreateRun> for NewRunRequest {
    type Error = FieldError;

    /// # Errors
    /// When fields contradict each other. Ranges are the domain's to check.
    fn try_from(wire: CreateRun) -> Result<Self, FieldError> {
        let length = match (wire.max_train_steps, wire.max_train_epochs) {
            (Some(_), Some(_)) => {
                let message = "given together with max_train_steps; give one of the two";
                return Err(FieldError::new(
                    "/max_train_epochs",
                    "invalid_value",
                    message,
                ));
            }
            (Some(steps), None) => domain::TrainLength::Steps(steps),
            (None, Some(epochs)) => domain::TrainLength::Epochs(epochs),
            (None, None) => domain::TrainSettings::default().length,
        };
        let Resolution {
            width_px,
            height_px,
        } = wire.resolution;
        let Buckets {
            enabled,
            min_px,
            max_px,
            step_px,
            no_upscale,
        } = wire.buckets;
        Ok(Self {
            name: wire.name.clone(),
            dataset_id: wire.dataset_id,
            base_model: wire.base_model,
            device: wire.device,
            priority: wire.priority,
            api_key_id: None, // the request's, not the body's
            buckets: BucketSettings {
                width_px,
                height_px,
                enabled,
                min_px,
                max_px,
                step_px,
                no_upscale,
            },
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
                min_snr_gamma: wire.min_snr_gamma,
                prior_loss_weight: wire.prior_loss_weight,
                clip_skip: wire.clip_skip,
                max_token_length: wire.max_token_length,
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
            min_snr_gamma: settings.min_snr_gamma,
            prior_loss_weight: settings.prior_loss_weight,
            clip_skip: settings.clip_skip,
            max_token_length: settings.max_token_length,
            resolution: Resolution {
                width_px: buckets.width_px,
                height_px: buckets.height_px,
            },
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

/// Two types that differ in nothing but their side of the wire.
macro_rules! same_variants {
    ($wire:ty, $domain:ty: $($a:ident = $b:ident),+) => {
        impl From<$wire> for $domain {
            fn from(value: $wire) -> Self {
                match value { $(<$wire>::$a => Self::$b),+ }
            }
        }
        impl From<$domain> for $wire {
            fn from(value: $domain) -> Self {
                match value { $(<$domain>::$b => Self::$a),+ }
            }
        }
    };
}

same_variants!(Prediction, PredictionType: Epsilon = Epsilon, VPrediction = VPrediction);
same_variants!(Precision, SavePrecision: Fp32 = Fp32, Fp16 = Fp16, Bf16 = Bf16);
same_variants!(ComputePrecision, domain::ComputePrecision: Fp32 = Fp32, Fp16 = Fp16, Bf16 = Bf16);
same_variants!(GradientCheckpointing, domain::GradientCheckpointing: None = None, Blocks = Blocks);
same_variants!(Sampler, SamplerKind: Ddim = DdimSd15, DdimKohya = DdimKohya, Euler = Euler);

impl From<Network> for NetworkSettings {
    fn from(wire: Network) -> Self {
        let Network {
            kind: NetworkKind::Lora,
            rank,
            alpha,
            conv_rank,
            conv_alpha,
        } = wire;
        Self {
            rank,
            alpha,
            conv_rank,
            conv_alpha,
        }
    }
}

impl From<NetworkSettings> for Network {
    fn from(domain: NetworkSettings) -> Self {
        let NetworkSettings {
            rank,
            alpha,
            conv_rank,
            conv_alpha,
        } = domain;
        Self {
            kind: NetworkKind::Lora,
            rank,
            alpha,
            conv_rank,
            conv_alpha,
        }
    }
}

impl From<Plugin> for domain::PluginChoice {
    fn from(wire: Plugin) -> Self {
        Self {
            id: wire.id,
            settings: Value::Object(wire.settings),
        }
    }
}

impl From<domain::PluginChoice> for Plugin {
    fn from(domain: domain::PluginChoice) -> Self {
        let settings = match domain.settings {
            Value::Object(settings) => settings,
            _ => Map::new(),
        };
        Self {
            id: domain.id,
            settings,
        }
    }
}

impl From<BucketSettings> for Buckets {
    fn from(domain: BucketSettings) -> Self {
        let BucketSettings {
            enabled,
            min_px,
            max_px,
            step_px,
            no_upscale,
            ..
        } = domain;
        Self {
            enabled,
            min_px,
            max_px,
            step_px,
            no_upscale,
        }
    }
}

impl From<Save> for domain::SaveSettings {
    fn from(wire: Save) -> Self {
        Self {
            every_n_steps: wire.every_n_steps,
            every_n_epochs: wire.every_n_epochs,
            precision: wire.precision.into(),
        }
    }
}

impl From<domain::SaveSettings> for Save {
    fn from(domain: domain::SaveSettings) -> Self {
        Self {
            every_n_steps: domain.every_n_steps,
            every_n_epochs: domain.every_n_epochs,
            precision: domain.precision.into(),
        }
    }
}

impl From<Resume> for domain::ResumeSettings {
    fn from(wire: Resume) -> Self {
        Self {
            every_n_steps: wire.every_n_steps,
            every_minutes: wire.every_minutes,
        }
    }
}

impl From<domain::ResumeSettings> for Resume {
    fn from(domain: domain::ResumeSettings) -> Self {
        Self {
            every_n_steps: domain.every_n_steps,
            every_minutes: domain.every_minutes,
        }
    }
}

impl From<Samples> for domain::SampleSettings {
    fn from(wire: Samples) -> Self {
        Self {
            prompts: wire.prompts.into_iter().map(Into::into).collect(),
            every_n_steps: wire.every_n_steps,
            at_first: wire.at_first,
        }
    }
}

impl From<domain::SampleSettings> for Samples {
    fn from(domain: domain::SampleSettings) -> Self {
        Self {
            prompts: domain.prompts.into_iter().map(Into::into).collect(),
            every_n_steps: domain.every_n_steps,
            at_first: domain.at_first,
        }
    }
}

impl From<Prompt> for domain::SamplePrompt {
    fn from(wire: Prompt) -> Self {
        let Prompt {
            prompt,
            negative_prompt,
            width_px,
            height_px,
            seed,
            steps,
            cfg_scale,
            sampler,
        } = wire;
        let sampler = sampler.into();
        Self {
            prompt,
            negative_prompt,
            width_px,
            height_px,
            seed,
            steps,
            cfg_scale,
            sampler,
        }
    }
}

impl From<domain::SamplePrompt> for Prompt {
    fn from(domain: domain::SamplePrompt) -> Self {
        let domain::SamplePrompt {
            prompt,
            negative_prompt,
            width_px,
            height_px,
            seed,
            steps,
            cfg_scale,
            sampler,
        } = domain;
        let sampler = sampler.into();
        Self {
            prompt,
            negative_prompt,
            width_px,
            height_px,
            seed,
            steps,
            cfg_scale,
            sampler,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
