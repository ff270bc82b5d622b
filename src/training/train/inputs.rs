//! What goes into the steps: which images and how many steps, their latents and captions, and the batches of them.

use burn::tensor::Device;

use super::RunPlace;
use super::output::Reporter;
use crate::allocator;
use crate::dataloader::{Batch, EpochPlan, TrainingImage};
use crate::diffusion::StableDiffusion;
use crate::networks::metadata::BaseModelRecord;
use crate::training::TrainError;
use crate::training::data::{
    LatentEncoder, Latents, TrainingSet, encode_all, encode_held_out, stack, time_ids,
};
use crate::training::random::{Stream, generator, normal_tensor, timesteps};
use crate::training::record::RunFacts;
use crate::training::settings::{TrainLength, TrainSettings};
use crate::training::step::{MicroBatch, Trainer};
use crate::training::text::Captions;
use crate::training::validation::HeldOut;

/// Optimizer steps that [`train`](super::train) will do.
///
/// # Errors
/// When the settings or the bucket sizes make no sense, or nothing is left to train on.
pub fn planned_steps(data: &TrainingSet, settings: &TrainSettings) -> Result<u64, TrainError> {
    let (images, _) = data.split(settings)?;
    let (_, length) = plan(&images, data, settings)?;
    Ok(length.steps)
}

/// The order of the images, and how long the run is.
fn plan(
    images: &[TrainingImage],
    data: &TrainingSet,
    settings: &TrainSettings,
) -> Result<(EpochPlan, Length), TrainError> {
    let plan = EpochPlan::new(images, &data.buckets, settings.batch_size, settings.seed)?;
    let length = Length::new(settings, plan.batches_per_epoch())?;
    Ok((plan, length))
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Epochs, the last of which may be cut short.
    pub epochs: u64,
    /// Optimizer steps of a whole epoch.
    pub steps_per_epoch: u64,
}

impl Length {
    /// `epochs · ⌈batches / accumulation⌉` steps, or the epochs that the steps need.
    ///
    /// # Errors
    /// When there are no batches.
    pub fn new(settings: &TrainSettings, batches_per_epoch: usize) -> Result<Self, TrainError> {
        let accumulation = settings.gradient_accumulation_steps;
        let steps_per_epoch = batches_per_epoch.div_ceil(accumulation) as u64;
        if steps_per_epoch == 0 {
            return Err(TrainError::NoImages);
        }
        let (steps, epochs) = match settings.length {
            TrainLength::Steps(steps) => (steps, steps.div_ceil(steps_per_epoch)),
            TrainLength::Epochs(epochs) => (epochs.saturating_mul(steps_per_epoch), epochs),
        };
        Ok(Self {
            steps,
            epochs,
            steps_per_epoch,
        })
    }
}

/// What is trained on, and for how long.
pub(super) struct Selection {
    pub(super) plan: EpochPlan,
    pub(super) length: Length,
    images: Vec<TrainingImage>,
    held_out: Vec<TrainingImage>,
}

impl Selection {
    pub(super) fn new(data: &TrainingSet, settings: &TrainSettings) -> Result<Self, TrainError> {
        let (images, held_out) = data.split(settings)?;
        if images.is_empty() {
            return Err(TrainError::NoImages);
        }
        let (plan, length) = plan(&images, data, settings)?;
        Ok(Self {
            plan,
            length,
            images,
            held_out,
        })
    }

    /// What the run's files tell about it.
    pub(super) fn facts<'a>(
        &'a self,
        data: &'a TrainingSet,
        place: &RunPlace,
        trainer: &Trainer<'_>,
        base_model: BaseModelRecord,
    ) -> RunFacts<'a> {
        RunFacts {
            set: data,
            train: &self.images,
            held_out: self.held_out.len(),
            plan: &self.plan,
            family: trainer.model.family,
            prediction: trainer.objective().prediction,
            zero_terminal_snr: trainer.model.schedule.is_zero_terminal(),
            total_steps: self.length.steps,
            total_epochs: self.length.epochs,
            base_model,
            recorded_at: place.recorded_at,
            inputs_sha256: place.inputs_sha256.clone(),
            session_id: place.session_id,
        }
    }
}

/// What the frozen parts of the model have made of images and captions.
pub(super) struct Inputs {
    latents: Vec<Latents>,
    pub(super) held_out: Vec<HeldOut>,
    pub(super) captions: Captions,
}

impl Inputs {
    /// Frozen halves of the model run once per image and caption, not once per step.
    pub(super) fn prepare(
        model: &mut StableDiffusion,
        data: &TrainingSet,
        settings: &TrainSettings,
        selection: &Selection,
        device: &Device,
        reporter: &mut Reporter<'_>,
    ) -> Result<Self, TrainError> {
        let Selection { images, plan, .. } = selection;
        let (frozen_text, draws) = (
            settings.text_encoder_lr == 0.0,
            !settings.samples.prompts.is_empty(),
        );
        if frozen_text {
            model.unload_text(); // not beside the VAE
        }
        let mut encoder = LatentEncoder::new(model, device, data, settings.seed);
        let latents = encode_all(&mut encoder, images, plan, |phase| reporter.phase(phase))?;
        let held_out = encode_held_out(&mut encoder, &selection.held_out, &data.buckets)?;
        tracing::info!(
            cached = encoder.cached,
            encoded = encoder.encoded,
            "pictures are encoded"
        );
        if !draws {
            model.unload_vae();
        }
        allocator::release();
        let captions = data.images.iter().map(|image| image.caption.as_str());
        let cache = data.cache.as_ref();
        let captions = Captions::prepare(model, captions, settings, cache, device, |phase| {
            reporter.phase(phase)
        })?;
        if frozen_text && !draws {
            model.unload_text();
        }
        Ok(Self {
            latents,
            held_out,
            captions,
        })
    }
}

/// Makes batches: latents and captions of the images, noise and timesteps of the batch's number.
pub(super) struct BatchSource<'a> {
    settings: &'a TrainSettings,
    images: &'a [TrainingImage],
    latents: &'a [Latents],
    captions: &'a Captions,
    schedule_steps: usize,
    device: &'a Device,
}

impl<'a> BatchSource<'a> {
    pub(super) fn new(
        settings: &'a TrainSettings,
        selection: &'a Selection,
        inputs: &'a Inputs,
        schedule_steps: usize,
        device: &'a Device,
    ) -> Self {
        Self {
            settings,
            images: &selection.images,
            latents: &inputs.latents,
            captions: &inputs.captions,
            schedule_steps,
            device,
        }
    }

    pub(super) fn micro_batch(&self, batch: &Batch, number: u64) -> MicroBatch {
        let place = number.to_le_bytes();
        let seed = self.settings.seed;
        let images = || batch.images.iter().map(|&index| &self.images[index]);
        let latents: Vec<_> = batch.images.iter().map(|&i| &self.latents[i]).collect();
        let latents = stack(&latents, self.device); // [batch, channels, height, width]
        let mut noise_rng = generator(seed, Stream::Noise, &place);
        let mut timestep_rng = generator(seed, Stream::Timesteps, &place);
        let captions: Vec<&str> = images().map(|image| image.caption.as_str()).collect();
        let prior = self.settings.prior_loss_weight;
        MicroBatch {
            noise: normal_tensor(&mut noise_rng, latents.dims(), self.device),
            latents,
            timesteps: timesteps(&mut timestep_rng, captions.len(), self.schedule_steps),
            conditioning: self.captions.batch(&captions),
            time_ids: images()
                .map(|image| time_ids(image, batch.bucket))
                .collect(),
            loss_weights: images()
                .map(|image| if image.regularization { prior } else { 1.0 })
                .collect(),
        }
    }
}
