//! What a running training tells its surroundings, and how they stop it.

use std::path::Path;

use crate::lora_tools::Checked;
use crate::networks::SavedLora;
use crate::training::guard::RolledBack;
use crate::training::judge::Measured;

/// Receives reports; the training stops soon after it answers [`Control::Stop`].
pub trait ProgressSink {
    /// Takes one report.
    fn report(&mut self, report: Report<'_>) -> Control;

    /// What somebody wants to be done after this step.
    fn wishes(&mut self) -> Wishes {
        Wishes::default()
    }

    /// Tells that the wishes to save or to draw were fulfilled.
    fn fulfilled(&mut self, wishes: Wishes) {
        let _ = wishes;
    }

    /// Waits until all that was reported is safe: a resume point that is ahead of it would lose it.
    fn settle(&mut self) -> Control {
        Control::Continue
    }
}

/// What somebody wants besides the settings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wishes {
    /// A LoRA file of this moment.
    pub save: bool,
    /// The preview pictures of this moment.
    pub sample: bool,
    /// The process should end; a resume point is to be left behind.
    pub leave: bool,
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Stop; no further file is written.
    Stop,
}

/// What happened.
#[derive(Debug)]
pub enum Report<'a> {
    /// Another kind of work begins or advances.
    Phase(Phase),
    /// The run goes on where it was kept.
    Resumed {
        /// Optimizer steps done.
        step: u64,
        /// Epoch, from 1.
        epoch: u64,
        /// Mean of the latest loss at each position of the epoch.
        loss_average: f64,
    },
    /// A resume point is safely on disk.
    Kept {
        /// Optimizer steps done.
        step: u64,
    },
    /// Numbers were no longer finite: the run has gone back, and does again what came after.
    RolledBack {
        /// From where, to where, and why.
        back: &'a RolledBack,
        /// Epoch of the step it went back to, from 1.
        epoch: u64,
        /// Mean of the latest loss at each position of the epoch.
        loss_average: f64,
        /// What is to be said of the run now.
        verdict: &'a str,
    },
    /// An optimizer step is done.
    Step(&'a StepReport),
    /// The held-out images were measured.
    Validation {
        /// The loss, and where it was measured.
        measured: Measured,
        /// What all validations say; none when this one was made only because somebody wished for a file.
        verdict: Option<&'a str>,
        /// Why the run ends with this step, before its last.
        early_stop: Option<&'a str>,
    },
    /// A preview picture is drawn.
    Sample {
        /// Optimizer steps done.
        step: u64,
        /// Position in the list of prompts.
        prompt_index: usize,
        /// The prompt.
        prompt: &'a str,
        /// The seed of its noise.
        seed: u64,
        /// The picture.
        image: &'a image::RgbImage,
    },
    /// A LoRA file is safely on disk.
    Checkpoint {
        /// Optimizer steps done.
        step: u64,
        /// Epoch, from 1.
        epoch: u64,
        /// Whether this is the run's result.
        last: bool,
        /// The file.
        path: &'a Path,
        /// Its digest and size.
        saved: &'a SavedLora,
        /// What was seen when it was read again.
        checked: &'a Checked,
        /// What validation says of it.
        measured: Option<Measured>,
    },
}

/// Kinds of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Comparing the device with the CPU, at its first use.
    CheckingDevice {
        /// Checks done.
        done: usize,
        /// Checks in all.
        total: usize,
    },
    /// Reading the base model.
    Loading,
    /// Encoding images.
    CachingLatents {
        /// Images done.
        done: usize,
        /// Images in all.
        total: usize,
        /// Images among those done whose latents an earlier run has left.
        cached: usize,
    },
    /// Encoding captions.
    CachingText {
        /// Captions done.
        done: usize,
        /// Captions in all.
        total: usize,
        /// Captions among those done whose states an earlier run has left.
        cached: usize,
    },
    /// Optimizer steps.
    Training,
    /// Measuring the held-out images.
    Validating,
    /// Drawing previews.
    Sampling,
    /// Writing a file.
    Saving,
}

/// One optimizer step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Optimizer steps done, from 1.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Epoch of this step, from 1.
    pub epoch: u64,
    /// Epochs of the whole run.
    pub total_epochs: u64,
    /// Loss of this step; not finite only in a step that was left out.
    pub loss: f64,
    /// Mean of the latest loss at each position of the epoch, as sd-scripts shows it.
    pub loss_average: f64,
    /// L2 norm of all gradients before clipping; not finite in a step that was left out.
    pub grad_norm: f64,
    /// That of the UNet's adapters alone; none when they are not trained.
    pub grad_norm_unet: Option<f64>,
    /// That of the text encoder's adapters alone; none when they are not trained.
    pub grad_norm_text_encoder: Option<f64>,
    /// Steps so far that were left out because their gradients overflowed in f16.
    pub skipped_steps: u64,
    /// Learning rate of the UNet in this step.
    pub lr_unet: f64,
    /// Learning rate of the text encoder in this step.
    pub lr_text_encoder: f64,
    /// Images in this step.
    pub images: usize,
    /// Wall-clock time of this step.
    pub step_time_s: f64,
    /// Images per second of training, without caching, previews and validation.
    pub images_per_s: f64,
    /// What the device has set aside for this process; none on the CPU, and where the device does not tell.
    pub device_memory_bytes: Option<u64>,
    /// Expected time of the remaining steps.
    pub eta_s: f64,
}
