//! What a run tells about itself in its LoRA files.

use std::collections::BTreeMap;

use serde_json::Value;
use time::OffsetDateTime;

use crate::dataloader::{Augment, EpochPlan, TrainingImage};
use crate::diffusion::{Family, PredictionType};
use crate::networks::metadata::{
    BaseModelRecord, BucketRecord, SubsetRecord, TrainingRecord, float, tag_frequency,
};
use crate::training::data::TrainingSet;
use crate::training::loss::{HuberSchedule, LossKind};
use crate::training::settings::{
    ComputePrecision, GradientCheckpointing, PluginChoice, TrainSettings,
};
use crate::training::timesteps::TimestepSettings;

/// What the loop knows besides its settings.
pub struct RunFacts<'a> {
    /// The images.
    pub set: &'a TrainingSet,
    /// Those that are trained on.
    pub train: &'a [TrainingImage],
    /// How many are held out.
    pub held_out: usize,
    /// Their order.
    pub plan: &'a EpochPlan,
    /// Generation of the base model.
    pub family: Family,
    /// What the UNet learns to predict.
    pub prediction: PredictionType,
    /// Whether nothing of the picture is left at the last timestep.
    pub zero_terminal_snr: bool,
    /// Optimizer steps of the run.
    pub total_steps: u64,
    /// Epochs of the run.
    pub total_epochs: u64,
    /// The base model.
    pub base_model: BaseModelRecord,
    /// When the run was made.
    pub recorded_at: OffsetDateTime,
    /// Digest of all that decides the result.
    pub inputs_sha256: Option<String>,
    /// A number that tells runs apart.
    pub session_id: u32,
}

/// The record of a run at its start. It reads no clock: a run that was interrupted writes the same file as one that was
/// not.
pub fn training_record(settings: &TrainSettings, facts: RunFacts<'_>) -> TrainingRecord {
    let trained = |lr: f64| (lr != 0.0).then_some(lr);
    let buckets = &facts.set.buckets;
    let any = |changed: fn(Augment) -> bool| {
        let mut images = facts.train.iter();
        images.any(|image| changed(image.augment))
    };
    TrainingRecord {
        output_name: settings.output_name.clone(),
        session_id: facts.session_id,
        data_options: [data_options(settings), objective_options(settings)].concat(),
        recorded_at: facts.recorded_at,
        inputs_sha256: facts.inputs_sha256,
        network: settings.network.clone(),
        unet_lr: trained(settings.unet_lr),
        text_encoder_lr: trained(settings.text_encoder_lr),
        optimizer: describe(&settings.optimizer),
        lr_scheduler: settings.scheduler.id.clone(),
        lr_warmup_steps: settings.lr_warmup_steps,
        max_train_steps: facts.total_steps,
        steps: 0,
        num_epochs: facts.total_epochs,
        epoch: 0,
        num_batches_per_epoch: facts.plan.batches_per_epoch(),
        batch_size: settings.batch_size,
        gradient_accumulation_steps: settings.gradient_accumulation_steps,
        gradient_checkpointing: settings.gradient_checkpointing == GradientCheckpointing::Blocks,
        flip_aug: any(|augment| augment.flip),
        color_aug: any(|augment| augment.color),
        random_crop: any(|augment| augment.random_crop),
        mixed_precision: match settings.precision {
            ComputePrecision::Fp32 => "no",
            ComputePrecision::Fp16 => "fp16",
            ComputePrecision::Bf16 => "bf16",
        },
        max_grad_norm: settings.max_grad_norm,
        family: facts.family,
        zero_terminal_snr: facts.zero_terminal_snr,
        v_prediction: facts.prediction == PredictionType::VPrediction,
        min_snr_gamma: settings.min_snr_gamma,
        timestep_range: (settings.timesteps != TimestepSettings::default())
            .then_some((settings.timesteps.min, settings.timesteps.max)),
        prior_loss_weight: settings.prior_loss_weight,
        clip_skip: settings.clip_skip,
        max_token_length: settings.max_token_length,
        seed: settings.seed,
        resolution_px: (buckets.width_px, buckets.height_px),
        buckets: BucketRecord {
            enabled: buckets.enabled,
            no_upscale: buckets.no_upscale,
            min_px: buckets.min_px,
            max_px: buckets.max_px,
            counts: bucket_counts(facts.plan),
        },
        subsets: subsets(facts.set, facts.train, false),
        reg_subsets: subsets(facts.set, facts.train, true),
        num_validation_images: facts.held_out,
        validation_split: settings.validation.fraction,
        validate_every_n_steps: settings.validation.every_n_steps,
        judgement: None,
        rolled_back: None,
        ema_decay: settings.ema.as_ref().map(|ema| ema.decay),
        base_model: facts.base_model,
    }
}

/// The run's own; what a subset has instead is in the run's record.
fn data_options(settings: &TrainSettings) -> Vec<(&'static str, String)> {
    let boolean = |value| if value { "True" } else { "False" }.to_owned();
    let captions = &settings.captions;
    vec![
        ("shuffle_caption", boolean(captions.shuffle_captions)),
        ("keep_tokens", captions.keep_tokens.to_string()),
        ("caption_dropout_rate", float(captions.caption_dropout_rate)),
        (
            "caption_dropout_every_n_epochs",
            captions.caption_dropout_every_n_epochs.to_string(),
        ),
        (
            "caption_tag_dropout_rate",
            float(captions.caption_tag_dropout_rate),
        ),
    ]
}

/// Loss and noise in the words of sd-scripts, which knows no 0 but only what is not given.
fn objective_options(settings: &TrainSettings) -> Vec<(&'static str, String)> {
    let boolean = |value| if value { "True" } else { "False" }.to_owned();
    let given = |value: f64| {
        if value == 0.0 {
            "None".to_owned()
        } else {
            float(value)
        }
    };
    let (loss, noise) = (&settings.loss, &settings.noise);
    let kind = match loss.kind {
        LossKind::L2 => "l2",
        LossKind::L1 => "l1",
        LossKind::Huber => "huber",
        LossKind::SmoothL1 => "smooth_l1",
    };
    let schedule = match loss.huber_schedule {
        HuberSchedule::Snr => "snr",
        HuberSchedule::Exponential => "exponential",
        HuberSchedule::Constant => "constant",
    };
    let levels = match noise.multires_iterations {
        0 => "None".to_owned(),
        levels => levels.to_string(),
    };
    vec![
        ("loss_type", kind.to_owned()),
        ("huber_schedule", schedule.to_owned()),
        ("huber_c", float(loss.huber_c)),
        ("huber_scale", float(loss.huber_scale)),
        ("debiased_estimation", boolean(loss.debiased_estimation)),
        ("noise_offset", given(noise.offset)),
        (
            "noise_offset_random_strength",
            boolean(noise.offset_random_strength),
        ),
        ("adaptive_noise_scale", given(noise.adaptive_scale)),
        ("multires_noise_iterations", levels),
        ("multires_noise_discount", float(noise.multires_discount)),
        ("ip_noise_gamma", given(noise.input_perturbation)),
        (
            "ip_noise_gamma_random_strength",
            boolean(noise.input_perturbation_random_strength),
        ),
    ]
}

/// `id(name=value,name=value)`, the way in which sd-scripts writes an optimizer.
fn describe(plugin: &PluginChoice) -> String {
    let settings: Vec<String> = match &plugin.settings {
        Value::Object(settings) => settings
            .iter()
            .map(|(name, value)| match value.as_f64() {
                Some(number) if value.is_f64() => format!("{name}={}", float(number)),
                _ => format!("{name}={value}"),
            })
            .collect(),
        _ => Vec::new(),
    };
    if settings.is_empty() {
        plugin.id.clone()
    } else {
        format!("{}({})", plugin.id, settings.join(","))
    }
}

fn bucket_counts(plan: &EpochPlan) -> Vec<((u32, u32), usize)> {
    let mut counts: BTreeMap<(u32, u32), usize> = BTreeMap::new();
    for batch in plan.batches(0) {
        *counts.entry(batch.bucket).or_default() += batch.images.len();
    }
    counts.into_iter().collect()
}

fn subsets(set: &TrainingSet, images: &[TrainingImage], regularization: bool) -> Vec<SubsetRecord> {
    let mut groups: BTreeMap<String, Vec<&TrainingImage>> = BTreeMap::new();
    for image in images {
        if image.regularization == regularization {
            let name = set.subsets.get(&image.id).cloned();
            let name = name.unwrap_or_else(|| format!("{}_images", image.repeats));
            groups.entry(name).or_default().push(image);
        }
    }
    groups
        .into_iter()
        .map(|(name, images)| SubsetRecord {
            name,
            repeats: images[0].repeats,
            images: images.len(),
            tags: tag_frequency(images.iter().flat_map(|image| image.caption.lines())),
        })
        .collect()
}
