//! The model's part of a step: noise, both halves of the model forward and backward, the loss.

use std::time::Instant;

use burn::tensor::{Gradients, Tensor};

use super::{Conditioning, MicroBatch, StepTimes, Trainer};
use crate::diffusion::{Keep, TextStates};
use crate::networks::{Leaves, Place};
use crate::training::TrainError;

impl Trainer<'_> {
    /// Adds the gradients of one batch to the sums; the result is its loss.
    pub(super) fn forward_backward(
        &mut self,
        batch: &MicroBatch,
        place: Place,
        sums: &mut [Option<Tensor<4>>],
        times: &mut StepTimes,
    ) -> Result<Tensor<1>, TrainError> {
        // Only a graph that is kept needs leaves in the forward.
        let tracked = self.keep == Keep::Graphs;
        let mut leaves = self.network.attach_at(self.model, tracked, place);

        let started = Instant::now();
        let (states, text) = match &batch.conditioning {
            Conditioning::Tokens(captions) if self.network.covers_text() => {
                let encoders = self.model.text()?;
                let (states, traces) = encoders.encode_kept(captions, self.clip_skip, self.keep);
                (states, Some(traces))
            }
            given => (self.encode(given)?, None),
        };
        let condition = states.with_sizes(&batch.time_ids);
        times.text_encoder_s += self.seconds_since(started)?;

        let started = Instant::now();
        let (noisy, target, timesteps) = self.noisy(batch);
        let unet = &self.model.unet;
        let (prediction, trace) =
            unet.forward_kept(noisy, &timesteps, condition, text.is_some(), self.keep);
        let prediction = prediction.autodiff().require_grad();
        let loss = self.loss_of(batch, prediction.clone(), target);
        let value = loss.clone().without_autodiff();
        times.forward_s += self.seconds_since(started)?;

        let started = Instant::now();
        if self.keep == Keep::Inputs {
            leaves = self.network.attach_at(self.model, true, place);
        }
        let scale = self.loss_scale.factor();
        let share = scale / self.gradient_accumulation_steps as f64;
        let mut gradients = loss.mul_scalar(share).backward();
        let mut collect = |gradients: &mut Gradients| add_gradients(sums, &leaves, gradients);
        if let Some(gradient) = prediction.grad_remove(&mut gradients) {
            let of_condition = self.model.unet.backward(trace, gradient, &mut collect);
            if let Some(traces) = text {
                let encoders = self.model.text()?;
                encoders.backward(traces, of_condition, &mut collect);
            }
        }
        times.backward_s += self.seconds_since(started)?;
        Ok(value)
    }

    /// The loss of one batch: `[1]`.
    pub fn loss(&self, batch: &MicroBatch) -> Result<Tensor<1>, TrainError> {
        let (noisy, target, timesteps) = self.noisy(batch);
        let states = self.encode(&batch.conditioning)?; // [batch, tokens, d]
        let condition = states.with_sizes(&batch.time_ids);
        let prediction = self.model.unet.forward(noisy, &timesteps, condition);
        Ok(self.loss_of(batch, prediction, target))
    }

    /// Noisy latents, what to predict from them, and their timesteps.
    fn noisy(&self, batch: &MicroBatch) -> (Tensor<4>, Tensor<4>, Vec<f32>) {
        let schedule = &self.model.schedule;
        let (latents, noise) = (batch.latents.clone(), batch.noise.clone());
        let added = batch.input_noise.as_ref().unwrap_or(&noise).clone();
        let noisy = schedule.add_noise(latents.clone(), added, &batch.timesteps);
        let target = self
            .objective
            .target(schedule, latents, noise, &batch.timesteps);
        let timesteps = batch.timesteps.iter().map(|&t| t as f32).collect();
        (noisy, target, timesteps)
    }

    fn loss_of(&self, batch: &MicroBatch, prediction: Tensor<4>, target: Tensor<4>) -> Tensor<1> {
        self.objective.loss(
            prediction,
            target,
            batch.mask.clone(),
            &self.model.schedule,
            &batch.timesteps,
            &batch.loss_weights,
        )
    }

    /// The hidden states that condition the UNet: `[batch, tokens, d]`.
    pub fn encode(&self, conditioning: &Conditioning) -> Result<TextStates, TrainError> {
        Ok(match conditioning {
            Conditioning::Tokens(captions) => self.model.text()?.encode(captions, self.clip_skip),
            Conditioning::States(states) => states.clone(),
        })
    }
}

/// The leaves' gradients added to those of earlier batches.
fn add_gradients(sums: &mut [Option<Tensor<4>>], leaves: &Leaves, gradients: &mut Gradients) {
    for (sum, leaf) in sums.iter_mut().zip(&leaves.0) {
        if let Some(gradient) = leaf.grad_remove(gradients) {
            *sum = Some(match sum.take() {
                Some(sum) => sum + gradient,
                None => gradient,
            });
        }
    }
}
