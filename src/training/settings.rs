//! Every setting of a training run that the loop itself reads, with its range.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dataloader::{Augment, CaptionSettings};
use crate::diffusion::samplers::SamplerKind;
use crate::diffusion::{Keep, Precision, PredictionType};
use crate::networks::{NetworkSettings, SavePrecision};
use crate::training::loss::LossSettings;
use crate::training::noise::NoiseSettings;
use crate::training::timesteps::TimestepSettings;

/// How a LoRA is trained. Where it differs from torch or sd-scripts, the field says so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSettings {
    /// Stem of the file names and title of the files.
    pub output_name: String,
    /// Adapters.
    pub network: NetworkSettings,
    /// Learning rate of the UNet's adapters; 0 leaves the UNet without adapters.
    pub unet_lr: f64,
    /// Learning rate of the text encoder's adapters; 0 leaves the text encoder without adapters.
    pub text_encoder_lr: f64,
    /// Optimizer steps over which the learning rate rises from 0; told in the file, applied by the scheduler.
    pub lr_warmup_steps: u64,
    /// How long to train.
    pub length: TrainLength,
    /// Images per batch.
    pub batch_size: usize,
    /// Batches per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// What is kept between forward and backward.
    pub gradient_checkpointing: GradientCheckpointing,
    /// What the model multiplies in; adapters, optimizer, norms and sums are f32 in any case.
    pub precision: ComputePrecision,
    /// Largest L2 norm of all gradients together; longer ones are scaled down to it. 0 switches this off.
    pub max_grad_norm: f64,
    /// What the UNet predicts; the base model's own target when not given.
    pub prediction: Option<PredictionType>,
    /// Whether the noise schedule is shifted so that nothing of the picture is left at its last timestep; as the base
    /// model has it when not given.
    pub zero_terminal_snr: Option<bool>,
    /// γ of min-SNR loss weighting; off when not given.
    pub min_snr_gamma: Option<f64>,
    /// How far off a prediction is, and what that counts.
    pub loss: LossSettings,
    /// The noise that is added.
    pub noise: NoiseSettings,
    /// Which timesteps are trained on.
    pub timesteps: TimestepSettings,
    /// Loss weight of regularization images.
    pub prior_loss_weight: f64,
    /// Which hidden state of the text encoder conditions the UNet, counted from the end; 1 is the last.
    pub clip_skip: usize,
    /// Caption length in tokens, without begin and end: 75, 150 or 225.
    pub max_token_length: usize,
    /// What becomes of captions, where a subset does not say otherwise.
    pub captions: CaptionSettings,
    /// What becomes of pixels, where a subset does not say otherwise.
    pub augment: Augment,
    /// Seed of everything random: adapters, order, noise, timesteps, latents, captions.
    pub seed: u64,
    /// When to save, and in which number format.
    pub save: SaveSettings,
    /// When the run is kept so that it can go on after a crash.
    pub resume: ResumeSettings,
    /// Preview pictures.
    pub samples: SampleSettings,
    /// Loss on held-out images.
    pub validation: ValidationSettings,
    /// When to end before the last step; never without.
    #[serde(default)]
    pub early_stopping: Option<EarlyStopping>,
    /// What to do when loss or adapters are no longer finite.
    pub on_non_finite: OnNonFinite,
    /// An average of the adapters; none without.
    pub ema: Option<EmaSettings>,
    /// The optimizer plugin.
    pub optimizer: PluginChoice,
    /// The learning-rate scheduler plugin.
    pub scheduler: PluginChoice,
}

/// What is kept between forward and backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientCheckpointing {
    /// Every activation that a gradient needs.
    #[default]
    None,
    /// The inputs of the UNet's and text encoder's blocks: each runs again in the backward. The gradients are the
    /// same to the bit on the CPU.
    Blocks,
}

impl From<GradientCheckpointing> for Keep {
    fn from(choice: GradientCheckpointing) -> Self {
        match choice {
            GradientCheckpointing::None => Self::Graphs,
            GradientCheckpointing::Blocks => Self::Inputs,
        }
    }
}

/// What the model multiplies in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputePrecision {
    /// f32.
    #[default]
    Fp32,
    /// f16, with dynamic loss scaling; on the CPU two parts of bf16, which need none.
    Fp16,
    /// bf16.
    Bf16,
}

impl From<ComputePrecision> for Precision {
    fn from(choice: ComputePrecision) -> Self {
        match choice {
            ComputePrecision::Fp32 => Self::Fp32,
            ComputePrecision::Fp16 => Self::Fp16,
            ComputePrecision::Bf16 => Self::Bf16,
        }
    }
}

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainLength {
    /// So many optimizer steps.
    Steps(u64),
    /// So many passes over the training set.
    Epochs(u64),
}

/// When LoRA files are written besides the last one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SaveSettings {
    /// Every so many optimizer steps.
    pub every_n_steps: Option<u64>,
    /// After every so many epochs.
    pub every_n_epochs: Option<u64>,
    /// Number format.
    pub precision: SavePrecision,
}

/// When resume points are written, besides at each LoRA file, at the end and when the worker is asked to leave. They
/// change nothing of what is computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResumeSettings {
    /// After every so many optimizer steps.
    pub every_n_steps: Option<u64>,
    /// After so many minutes.
    pub every_minutes: f64,
}

impl Default for ResumeSettings {
    fn default() -> Self {
        Self {
            every_n_steps: None,
            every_minutes: 5.0,
        }
    }
}

/// Preview pictures during training.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleSettings {
    /// What to draw; nothing when empty.
    pub prompts: Vec<SamplePrompt>,
    /// Every so many optimizer steps, besides the end.
    pub every_n_steps: Option<u64>,
    /// Also before the first step.
    pub at_first: bool,
}

/// One preview picture. A fixed seed makes pictures of different steps comparable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplePrompt {
    /// What to draw, with weights in A1111's style.
    pub prompt: String,
    /// What to move away from.
    pub negative_prompt: String,
    /// Width of the picture.
    pub width_px: u32,
    /// Height of the picture.
    pub height_px: u32,
    /// Seed of the picture's noise.
    pub seed: u64,
    /// Steps of the sampler, 1 to 1000.
    pub steps: usize,
    /// Strength of classifier-free guidance; 1 is none.
    pub cfg_scale: f64,
    /// Sampler.
    pub sampler: SamplerKind,
}

/// The loss on images that are not trained on, at fixed noise and timesteps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationSettings {
    /// Ids of the held-out images.
    pub image_ids: Vec<String>,
    /// Instead of ids: this share of the images (0 to 0.9), chosen by the run's seed. No validation without either.
    pub fraction: Option<f64>,
    /// Every so many optimizer steps, besides before the first, after the last, and at each saved LoRA.
    pub every_n_steps: Option<u64>,
}

impl ValidationSettings {
    /// Whether images are held out.
    pub fn is_on(&self) -> bool {
        !self.image_ids.is_empty() || self.fraction.is_some()
    }
}

/// Ends a run whose validation loss no longer falls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    /// Validations in a row without an improvement.
    pub patience: u64,
    /// An improvement lowers the best loss by more than this.
    #[serde(default)]
    pub min_delta: f64,
}

/// What a run does when its loss or its adapters are no longer finite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNonFinite {
    /// It fails.
    Fail,
    /// It goes back to the last resume point and on with half the learning rates; the second time it fails. This is
    /// the default: nobody watches a run at night, and one that has gone back says so wherever it is looked at.
    #[default]
    HalveLr,
}

/// An exponential moving average of the adapters. It is what is measured, drawn and saved; the training itself goes on
/// without it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmaSettings {
    /// The share of the average that stays in each update, 0 to 1; `1 / (1 − decay)` steps count.
    pub decay: f64,
    /// Whether the decay rises to that, as `(1 + updates) / (10 + updates)`.
    pub warm_up: bool,
}

impl Default for EmaSettings {
    fn default() -> Self {
        Self {
            decay: 0.999,
            warm_up: true,
        }
    }
}

/// A plugin and its settings, which only the plugin understands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluginChoice {
    /// Id of the optimizer or the schedule, such as `adamw`.
    pub id: String,
    /// Its settings; `{}` for the defaults.
    #[serde(default = "no_settings")]
    pub settings: Value,
}

impl Default for TrainSettings {
    fn default() -> Self {
        let plugin = |id: &str| PluginChoice {
            id: id.to_owned(),
            settings: no_settings(),
        };
        Self {
            output_name: "last".to_owned(),
            network: NetworkSettings::default(),
            unet_lr: 1e-4,
            text_encoder_lr: 5e-5,
            lr_warmup_steps: 0,
            length: TrainLength::Steps(1600),
            batch_size: 1,
            gradient_accumulation_steps: 1,
            gradient_checkpointing: GradientCheckpointing::None,
            precision: ComputePrecision::Fp32,
            max_grad_norm: 1.0,
            prediction: None,
            zero_terminal_snr: None,
            min_snr_gamma: None,
            loss: LossSettings::default(),
            noise: NoiseSettings::default(),
            timesteps: TimestepSettings::default(),
            prior_loss_weight: 1.0,
            clip_skip: 1,
            max_token_length: 75,
            captions: CaptionSettings::default(),
            augment: Augment::default(),
            seed: 0,
            save: SaveSettings::default(),
            resume: ResumeSettings::default(),
            samples: SampleSettings::default(),
            validation: ValidationSettings::default(),
            early_stopping: None,
            on_non_finite: OnNonFinite::default(),
            ema: None,
            optimizer: plugin("adamw"),
            scheduler: plugin("constant"),
        }
    }
}

impl Default for SamplePrompt {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            width_px: 512,
            height_px: 512,
            seed: 0,
            steps: 30,
            cfg_scale: 7.5,
            sampler: SamplerKind::DdimSd15,
        }
    }
}

fn no_settings() -> Value {
    Value::Object(serde_json::Map::new())
}

/// A setting that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pointer}: {message}")]
pub struct SettingProblem {
    /// JSON Pointer of the setting within [`TrainSettings`].
    pub pointer: String,
    /// What was found and what was expected.
    pub message: String,
}

impl TrainSettings {
    /// These with defaults for all that does not change what the next optimizer step computes from the same state:
    /// two runs may differ in it, and one still go on where the other was.
    pub fn deciding(&self) -> Self {
        let ours = self.clone();
        Self {
            output_name: String::new(),
            length: TrainLength::Steps(1),
            gradient_checkpointing: GradientCheckpointing::None,
            save: SaveSettings::default(),
            resume: ResumeSettings::default(),
            samples: SampleSettings::default(),
            validation: ValidationSettings {
                every_n_steps: None,
                ..ours.validation
            },
            early_stopping: None,
            on_non_finite: OnNonFinite::default(),
            ..ours
        }
    }

    /// All settings that are out of range. Plugins check their own.
    pub fn problems(&self) -> Vec<SettingProblem> {
        let mut check = Check(Vec::new());
        for (field, message) in self.network.problems() {
            check.report(&format!("/network/{field}"), message);
        }
        check.rate("/unet_lr", self.unet_lr);
        check.rate("/text_encoder_lr", self.text_encoder_lr);
        if self.unet_lr == 0.0 && self.text_encoder_lr == 0.0 {
            let message = "is 0, as is text_encoder_lr: nothing would be trained";
            check.report("/unet_lr", message.to_owned());
        }
        match self.length {
            TrainLength::Steps(steps) => check.count("/length/steps", steps, 10_000_000),
            TrainLength::Epochs(epochs) => check.count("/length/epochs", epochs, 1_000_000),
        }
        check.count("/batch_size", self.batch_size as u64, 1024);
        let accumulation = self.gradient_accumulation_steps as u64;
        check.count("/gradient_accumulation_steps", accumulation, 65_536);
        check.rate("/max_grad_norm", self.max_grad_norm);
        if let Some(gamma) = self.min_snr_gamma
            && !(gamma.is_finite() && gamma > 0.0)
        {
            let message = format!("is {gamma}, expected a number above 0");
            check.report("/min_snr_gamma", message);
        }
        for (field, message) in self.loss.problems() {
            check.report(&format!("/loss/{field}"), message);
        }
        for (field, message) in self.noise.problems() {
            check.report(&format!("/noise/{field}"), message);
        }
        if let Some((field, message)) = self.timesteps.problem() {
            check.report(&format!("/timesteps/{field}"), message);
        }
        check.rate("/prior_loss_weight", self.prior_loss_weight);
        check.count("/clip_skip", self.clip_skip as u64, 48);
        if !matches!(self.max_token_length, 75 | 150 | 225) {
            let message = format!("is {}, expected 75, 150 or 225", self.max_token_length);
            check.report("/max_token_length", message);
        }
        for (field, message) in self.captions.problems() {
            check.report(&format!("/captions/{field}"), message);
        }
        self.check_output(&mut check);
        self.check_judging(&mut check);
        check.0
    }

    fn check_output(&self, check: &mut Check) {
        let name = &self.output_name;
        let plain = !name.is_empty()
            && name.len() <= 200
            && !name.starts_with('.')
            && !name.contains(|c: char| c.is_control() || "/\\:*?\"<>|".contains(c));
        if !plain {
            let message = format!("is {name:?}, expected a plain file name without its ending");
            check.report("/output_name", message);
        }
        for (pointer, value) in [
            ("/save/every_n_steps", self.save.every_n_steps),
            ("/save/every_n_epochs", self.save.every_n_epochs),
            ("/resume/every_n_steps", self.resume.every_n_steps),
            ("/samples/every_n_steps", self.samples.every_n_steps),
            ("/validation/every_n_steps", self.validation.every_n_steps),
        ] {
            if let Some(value) = value {
                check.count(pointer, value, u64::MAX);
            }
        }
        let minutes = self.resume.every_minutes;
        if !(minutes > 0.0 && minutes <= 1440.0) {
            let message = format!("is {minutes}, expected a number above 0 and at most 1440");
            check.report("/resume/every_minutes", message);
        }
        if self.samples.prompts.len() > 64 {
            let message = format!(
                "has {} entries, expected at most 64",
                self.samples.prompts.len()
            );
            check.report("/samples/prompts", message);
        }
        for (index, prompt) in self.samples.prompts.iter().enumerate() {
            let at = |field: &str| format!("/samples/prompts/{index}/{field}");
            check.count(&at("steps"), prompt.steps as u64, 1000);
            check.rate(&at("cfg_scale"), prompt.cfg_scale);
            for (field, side) in [
                ("width_px", prompt.width_px),
                ("height_px", prompt.height_px),
            ] {
                if !(8..=4096).contains(&side) {
                    let message = format!("is {side}, expected a whole number from 8 to 4096");
                    check.report(&at(field), message);
                }
            }
        }
    }
}

impl TrainSettings {
    fn check_judging(&self, check: &mut Check) {
        if let Some(EmaSettings { decay, .. }) = self.ema
            && !(decay > 0.0 && decay < 1.0)
        {
            let message = format!("is {decay}, expected a number above 0 and below 1");
            check.report("/ema/decay", message);
        }
        let validation = &self.validation;
        if let Some(fraction) = validation.fraction {
            if !(fraction > 0.0 && fraction <= 0.9) {
                let message = format!("is {fraction}, expected a number above 0 and at most 0.9");
                check.report("/validation/fraction", message);
            }
            if !validation.image_ids.is_empty() {
                let message = "is given beside image_ids, expected one of the two";
                check.report("/validation/fraction", message.to_owned());
            }
        }
        let Some(rule) = &self.early_stopping else {
            return;
        };
        check.count("/early_stopping/patience", rule.patience, 1_000_000);
        check.rate("/early_stopping/min_delta", rule.min_delta);
        let save = &self.save;
        let measured = [
            validation.every_n_steps,
            save.every_n_steps,
            save.every_n_epochs,
        ];
        if !validation.is_on() || measured.iter().all(Option::is_none) {
            let message = "is given without validations to count, expected validation.image_ids or \
                           validation.fraction, and validation.every_n_steps or files on the way (save)";
            check.report("/early_stopping", message.to_owned());
        }
    }
}

struct Check(Vec<SettingProblem>);

impl Check {
    fn report(&mut self, pointer: &str, message: String) {
        let pointer = pointer.to_owned();
        self.0.push(SettingProblem { pointer, message });
    }

    fn rate(&mut self, pointer: &str, value: f64) {
        if !value.is_finite() || value < 0.0 {
            self.report(
                pointer,
                format!("is {value}, expected a number of at least 0"),
            );
        }
    }

    fn count(&mut self, pointer: &str, value: u64, max: u64) {
        if value == 0 || value > max {
            let message = format!("is {value}, expected a whole number from 1 to {max}");
            self.report(pointer, message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_sound_and_survive_json() {
        let settings = TrainSettings::default();
        assert_eq!(settings.problems(), []);
        let json = serde_json::to_value(&settings).expect("serializes");
        assert_eq!(json["length"]["steps"], 1600);
        let back: TrainSettings = serde_json::from_value(json).expect("deserializes");
        assert_eq!(back, settings);
    }

    #[test]
    fn unknown_settings_are_refused() {
        let result = serde_json::from_str::<TrainSettings>(r#"{"bacth_size": 4}"#);
        let message = result.expect_err("a typing error").to_string();
        assert!(message.contains("bacth_size"), "{message}");
    }

    #[test]
    fn every_problem_is_found_and_located() {
        let mut settings = TrainSettings {
            unet_lr: f64::NAN,
            batch_size: 0,
            max_token_length: 77,
            output_name: "../x".to_owned(),
            ..TrainSettings::default()
        };
        settings.network.rank = 0;
        settings.save.every_n_steps = Some(0);
        settings.samples.prompts = vec![SamplePrompt {
            steps: 0,
            ..SamplePrompt::default()
        }];
        settings.validation.fraction = Some(0.95);
        settings.early_stopping = Some(EarlyStopping {
            patience: 0,
            min_delta: 0.0,
        });
        settings.ema = Some(EmaSettings {
            decay: 1.0,
            ..EmaSettings::default()
        });
        let problems = settings.problems();
        let found: Vec<_> = problems.iter().map(|p| p.pointer.as_str()).collect();
        assert_eq!(
            found,
            [
                "/network/rank",
                "/unet_lr",
                "/batch_size",
                "/max_token_length",
                "/output_name",
                "/save/every_n_steps",
                "/samples/prompts/0/steps",
                "/ema/decay",
                "/validation/fraction",
                "/early_stopping/patience"
            ]
        );
    }
}
