//! One optimizer step: forward, loss, backward, clip, update.

mod forward;
mod gradients;

use std::time::Instant;

use burn::tensor::{Device, Tensor};

use self::gradients::clip_factor;
use crate::diffusion::devices::is_cpu;
use crate::diffusion::{CaptionTokens, Keep, StableDiffusion, TextStates, TimeIds};
use crate::networks::{LoraNetwork, Place};
use crate::training::TrainError;
use crate::training::guard::{Cause, NonFinite, weights_are_finite};
use crate::training::loss_scale::LossScale;
use crate::training::objective::Objective;
use crate::training::optimizer::{LrScheduler, Optimizer, ParamValue};
use crate::training::resume::Parts;
use crate::training::settings::{ComputePrecision, TrainSettings};
use crate::training::timesteps::TimestepSettings;

/// A batch that is ready for the UNet.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// Scaled latents: `[batch, channels, height, width]`.
    pub latents: Tensor<4>,
    /// Noise of the same shape, which the UNet is to find.
    pub noise: Tensor<4>,
    /// What is added to the latents in its place, where that is something else.
    pub input_noise: Option<Tensor<4>>,
    /// How much each place of the latents counts, 0 to 1: `[batch, 1, height, width]`. All of them do without.
    pub mask: Option<Tensor<4>>,
    /// One timestep per sample.
    pub timesteps: Vec<usize>,
    /// Captions.
    pub conditioning: Conditioning,
    /// Sizes of the pictures, one for each sample; only SDXL is told them.
    pub time_ids: Vec<TimeIds>,
    /// One loss weight per sample: 1, or that of regularization images.
    pub loss_weights: Vec<f64>,
}

/// The captions of a batch.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one per batch")]
pub enum Conditioning {
    /// Token ids for the text encoders. Of encoders that are not trained, too, where captions are not the same each time.
    Tokens(Vec<CaptionTokens>),
    /// Hidden states of text encoders that are not trained.
    States(TextStates),
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutput {
    /// Mean of the batches' losses.
    pub loss: f64,
    /// L2 norm of all gradients before clipping.
    pub grad_norm: f64,
    /// That of the UNet's adapters alone; none when they are not trained.
    pub grad_norm_unet: Option<f64>,
    /// That of the text encoder's adapters alone; none when they are not trained.
    pub grad_norm_text_encoder: Option<f64>,
    /// Learning rate of the UNet's adapters.
    pub lr_unet: f64,
    /// Learning rate of the text encoder's adapters.
    pub lr_text_encoder: f64,
    /// How many adapters were scaled down after the update, where their norms are limited.
    pub scaled_norms: Option<usize>,
    /// Whether the gradients overflowed: nothing was changed, and the loss is scaled less from now on.
    pub skipped: bool,
    /// Where the time went.
    pub times: StepTimes,
}

/// Seconds of a step by phase. A GPU works on when the host has handed its commands over: exact only on the CPU, and
/// with [`Trainer::wait_after_phases`].
#[derive(Debug, Clone, Copy, Default)]
pub struct StepTimes {
    /// Text encoder, forward.
    pub text_encoder_s: f64,
    /// UNet and loss, forward.
    pub forward_s: f64,
    /// Both, backward; with gradient checkpointing also their second forward.
    pub backward_s: f64,
    /// Clipping and the optimizer's update.
    pub optimizer_s: f64,
}

/// How long a step took says nothing of what it computed.
impl PartialEq for StepTimes {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// A model, its adapters and what changes them.
pub struct Trainer<'a> {
    /// The frozen base model; between steps the adapters are attached as constants.
    pub model: &'a mut StableDiffusion,
    /// The adapters.
    pub network: &'a mut LoraNetwork,
    optimizer: &'a mut dyn Optimizer,
    scheduler: &'a dyn LrScheduler,
    objective: Objective,
    timesteps: TimestepSettings,
    unet_lr: f64,
    text_encoder_lr: f64,
    lr_factor: f64,
    clip_skip: usize,
    max_grad_norm: f64,
    max_weight_norm: Option<f64>,
    gradient_accumulation_steps: usize,
    seed: u64,
    keep: Keep,
    waits: bool,
    step: u64,
    loss_scale: LossScale,
}

impl<'a> Trainer<'a> {
    /// Brings the parts together and attaches the adapters.
    pub fn new(
        model: &'a mut StableDiffusion,
        network: &'a mut LoraNetwork,
        optimizer: &'a mut dyn Optimizer,
        scheduler: &'a dyn LrScheduler,
        settings: &TrainSettings,
    ) -> Self {
        network.attach(model, false);
        if let Some(zero_terminal) = settings.zero_terminal_snr {
            model.set_zero_terminal_snr(zero_terminal);
        }
        let scaled = settings.precision == ComputePrecision::Fp16 && !is_cpu(&network.device());
        Self {
            objective: Objective::new(settings, model.prediction),
            timesteps: settings.timesteps,
            model,
            network,
            optimizer,
            scheduler,
            unet_lr: settings.unet_lr,
            text_encoder_lr: settings.text_encoder_lr,
            lr_factor: 1.0,
            clip_skip: settings.clip_skip,
            max_grad_norm: settings.max_grad_norm,
            max_weight_norm: settings.network.scale_weight_norms,
            seed: settings.seed,
            gradient_accumulation_steps: settings.gradient_accumulation_steps,
            keep: settings.gradient_checkpointing.into(),
            waits: false,
            step: 0,
            loss_scale: LossScale::new(scaled),
        }
    }

    /// The device that computes.
    pub fn device(&self) -> Device {
        self.network.device()
    }

    /// Waits for the device at the end of each phase, so that [`StepTimes`] are true on a GPU.
    pub fn wait_after_phases(&mut self) {
        self.waits = true;
    }

    /// Multiplies the learning rates by this from now on, beside the schedule.
    pub fn set_lr_factor(&mut self, factor: f64) {
        self.lr_factor = factor;
    }

    /// Lets the model have the adapters' values of this moment.
    pub fn attach(&mut self) {
        self.network.attach(self.model, false);
    }

    /// Optimizer steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The factor of the loss, and the steps that changed nothing because their gradients overflowed.
    pub fn loss_scale(&self) -> &LossScale {
        &self.loss_scale
    }

    /// Everything here that a resume point holds.
    pub fn resumable(&mut self) -> Parts<'_> {
        vec![
            ("adapters", &mut *self.network),
            ("optimizer", &mut self.optimizer),
            ("loss_scale", &mut self.loss_scale),
        ]
    }

    /// Goes on after so many steps, with what [`resumable`](Self::resumable) parts have taken up.
    pub fn resume_at(&mut self, step: u64) {
        self.step = step;
        self.attach();
    }

    /// Does something with the values that are to be saved and measured, where the optimizer keeps others to train on;
    /// those are put back, whatever comes of it.
    pub fn with_eval_values<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        let values: Vec<ParamValue<'_>> = (0..)
            .zip(self.network.parameters())
            .map(|(id, parameter)| ParamValue {
                id,
                name: &parameter.name,
                shape: &parameter.shape,
                value: &parameter.value,
            })
            .collect();
        let Some(mut values) = self.optimizer.eval(&values)? else {
            return work(self);
        };
        self.exchange(&mut values);
        let outcome = work(self);
        self.exchange(&mut values);
        outcome
    }

    fn exchange(&mut self, values: &mut [Tensor<4>]) {
        let parameters = self.network.parameters_mut().iter_mut();
        for (parameter, value) in parameters.zip(values) {
            std::mem::swap(&mut parameter.value, value);
        }
        self.attach();
    }

    /// What the UNet learns to predict.
    pub fn objective(&self) -> Objective {
        self.objective
    }

    /// Which timesteps are trained on.
    pub fn timesteps(&self) -> TimestepSettings {
        self.timesteps
    }

    /// Trains on the batches of one optimizer step.
    ///
    /// Fewer batches than `gradient_accumulation_steps` (the end of an epoch) are still divided by that number, as
    /// accelerate does. The learning rate's factor is that of the steps done before, so a warm-up begins at 0. A step
    /// that is skipped for overflowing gradients is done, but moves neither the schedule nor the optimizer.
    pub fn optimizer_step(&mut self, batches: &[MicroBatch]) -> Result<StepOutput, TrainError> {
        let mut gradients: Vec<Option<Tensor<4>>> = vec![None; self.network.parameters().len()];
        let mut losses = Vec::with_capacity(batches.len());
        let mut times = StepTimes::default();
        for (number, batch) in (0..).zip(batches) {
            let place = Place {
                seed: self.seed,
                step: self.step,
                batch: number,
            };
            losses.push(self.forward_backward(batch, place, &mut gradients, &mut times)?);
        }
        let started = Instant::now();
        let scale = self.loss_scale.factor();
        let gradients = self.collect(gradients);
        let (loss, norms) = self.read_loss_and_norms(losses, &gradients)?;
        let grad_norm = norms.all / scale;
        let updates_done = self.step - self.loss_scale.skipped();
        let (lr_unet, lr_text_encoder) = self.learning_rates(updates_done)?;
        let mut output = StepOutput {
            loss,
            grad_norm,
            grad_norm_unet: norms.unet.map(|norm| norm / scale),
            grad_norm_text_encoder: norms.text_encoder.map(|norm| norm / scale),
            lr_unet,
            lr_text_encoder,
            scaled_norms: None,
            skipped: false,
            times,
        };
        if !loss.is_finite() || !grad_norm.is_finite() {
            return self.leave_out(output);
        }
        self.loss_scale.succeeded();
        let clip = clip_factor(grad_norm, self.max_grad_norm);
        self.update(gradients, clip / scale, updates_done, &output)?;
        if let Some(limit) = self.max_weight_norm {
            output.scaled_norms = Some(self.network.scale_norms(limit)?);
        }
        self.step += 1;
        self.attach();
        output.times.optimizer_s = self.seconds_since(started)?;
        Ok(output)
    }

    /// Ends a step whose gradients have overflowed without any change, where a smaller scale of the loss may mend that.
    fn leave_out(&mut self, mut output: StepOutput) -> Result<StepOutput, TrainError> {
        // A smaller scale does not mend adapters that are not finite.
        let scaled = self.loss_scale.is_on() && weights_are_finite(self.network)?;
        if scaled && self.loss_scale.overflowed() {
            self.step += 1;
            self.attach();
            output.skipped = true;
            return Ok(output);
        }
        let StepOutput {
            loss, grad_norm, ..
        } = output;
        let cause = Cause::Loss { loss, grad_norm };
        Err(self.non_finite(self.step + 1, cause)?.into())
    }

    /// The learning rates of the UNet's and of the text encoder's adapters after so many updates.
    fn learning_rates(&self, updates_done: u64) -> Result<(f64, f64), TrainError> {
        let factor = self.scheduler.factor(updates_done)? * self.lr_factor;
        Ok((self.unet_lr * factor, self.text_encoder_lr * factor))
    }

    /// An error for what was found in a step.
    pub fn non_finite(&self, step: u64, cause: Cause) -> Result<NonFinite, TrainError> {
        let updates_done = step.saturating_sub(1 + self.loss_scale.skipped());
        let (lr_unet, lr_text_encoder) = self.learning_rates(updates_done)?;
        Ok(NonFinite {
            step,
            cause,
            lr_unet,
            lr_text_encoder,
            advice: String::new(),
        })
    }

    fn seconds_since(&self, started: Instant) -> Result<f64, TrainError> {
        if self.waits {
            self.device()
                .sync()
                .map_err(|error| TrainError::Device(error.to_string()))?;
        }
        Ok(started.elapsed().as_secs_f64())
    }
}
