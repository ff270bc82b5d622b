//! What goes into the steps: which images and how many steps, their latents and captions, and the batches of them.

use std::borrow::Cow;
use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::RunPlace;
use super::output::Reporter;
use crate::allocator;
use crate::dataloader::{Batch, EpochPlan, Moment, TrainingImage};
use crate::diffusion::StableDiffusion;
use crate::networks::metadata::BaseModelRecord;
use crate::training::TrainError;
use crate::training::data::{
    LatentEncoder, Latents, Looks, Prepared, TrainingSet, encode_all, encode_held_out,
    measured_caption, stack, stack_masks, time_ids,
};
use crate::training::random::{Stream, generator, timesteps};
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
    latents: Vec<Prepared>,
    looks: Looks,
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
        let looks = Looks::new(data, settings.loss.masked)?;
        let varying = images
            .iter()
            .any(|image| image.captioning.varies(&image.caption));
        let frozen_text = settings.text_encoder_lr == 0.0;
        let draws = !settings.samples.prompts.is_empty();
        if frozen_text {
            model.unload_text(); // not beside the VAE
        }
        let mut encoder = LatentEncoder::new(model, device, data, looks.clone(), settings.seed);
        let latents = encode_all(&mut encoder, images, plan, |phase| reporter.phase(phase))?;
        let held_out = encode_held_out(&mut encoder, &selection.held_out, &data.buckets)?;
        tracing::info!(
            cached = encoder.cached,
            encoded = encoder.encoded,
            "pictures are encoded"
        );
        let fresh = latents.iter().any(|found| matches!(found, Prepared::Fresh));
        if !draws && !fresh {
            model.unload_vae();
        }
        allocator::release();
        let mut fixed: Vec<String> = images
            .iter()
            .filter(|image| !image.captioning.varies(&image.caption))
            .map(measured_caption)
            .collect();
        fixed.extend(held_out.iter().map(|image| image.caption.clone()));
        let fixed = fixed.iter().map(String::as_str);
        let cache = data.cache.as_ref();
        let captions = Captions::prepare(model, fixed, settings, cache, device, |phase| {
            reporter.phase(phase)
        })?;
        if frozen_text && !draws && !varying {
            model.unload_text();
        }
        Ok(Self {
            latents,
            looks,
            held_out,
            captions,
        })
    }
}

/// Makes batches: latents of the images, their captions at this moment, noise, masks and timesteps of the batch's number.
pub(super) struct BatchSource<'a> {
    settings: &'a TrainSettings,
    images: &'a [TrainingImage],
    inputs: &'a Inputs,
    captions: &'a Captions,
    total_steps: u64,
    timesteps: Range<usize>,
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
            inputs,
            captions: &inputs.captions,
            total_steps: selection.length.steps,
            timesteps: settings.timesteps.of(schedule_steps),
            device,
        }
    }

    /// The batch of a number, counted over the whole run, in an epoch (from 1) after so many optimizer steps.
    /// The model's VAE encodes what looks different each time.
    pub(super) fn micro_batch(
        &self,
        batch: &Batch,
        number: u64,
        epoch: u64,
        step: u64,
        model: &StableDiffusion,
    ) -> Result<MicroBatch, TrainError> {
        let place = number.to_le_bytes();
        let seed = self.settings.seed;
        let images = || batch.images.iter().map(|&index| &self.images[index]);
        let latents: Vec<_> = (0..batch.images.len())
            .map(|slot| self.latents(batch, number, slot, model))
            .collect::<Result<_, _>>()?;
        let latents: Vec<&Latents> = latents.iter().map(AsRef::as_ref).collect();
        let noise = self.settings.noise.draw(seed, &place, &latents);
        let mask = stack_masks(&latents, self.device);
        let latents = stack(&latents, self.device); // [batch, channels, height, width]
        let like_latents = |values: Vec<f32>| {
            let data = TensorData::new(values, latents.dims());
            Tensor::<4>::from_data(data, (self.device, DType::F32))
        };
        let mut timestep_rng = generator(seed, Stream::Timesteps, &place);
        let moment = Moment {
            epoch,
            step,
            total_steps: self.total_steps,
        };
        let captions: Vec<String> = images()
            .enumerate()
            .map(|(index, image)| self.caption(image, moment, number, index))
            .collect();
        let prior = self.settings.prior_loss_weight;
        Ok(MicroBatch {
            noise: like_latents(noise.target),
            input_noise: noise.input.map(like_latents),
            mask,
            latents,
            timesteps: timesteps(&mut timestep_rng, captions.len(), self.timesteps.clone()),
            conditioning: self.captions.batch(model, &captions),
            time_ids: images()
                .map(|image| time_ids(image, batch.bucket))
                .collect(),
            loss_weights: images()
                .map(|image| if image.regularization { prior } else { 1.0 })
                .collect(),
        })
    }

    /// The latents of one image of a batch, as it looks this time.
    fn latents(
        &self,
        batch: &Batch,
        number: u64,
        slot: usize,
        model: &StableDiffusion,
    ) -> Result<Cow<'a, Latents>, TrainError> {
        let index = batch.images[slot];
        let (image, seed) = (&self.images[index], self.settings.seed);
        let looks = &self.inputs.looks;
        let look = image
            .augment
            .draw(seed, number, slot, &image.sha256, looks.usual(image));
        if let Prepared::Kept { plain, flipped } = &self.inputs.latents[index] {
            let chosen = flipped.as_ref().filter(|_| look.flipped);
            return Ok(Cow::Borrowed(chosen.unwrap_or(plain)));
        }
        let place = format!("{number}/{slot}/{}", image.sha256);
        let rng = generator(seed, Stream::Latents, place.as_bytes());
        let made = looks.encode_fresh(model, self.device, image, batch.bucket, look, rng);
        made.map(Cow::Owned)
    }

    /// What a step sees of an image's caption. Its chances are those of its place in the run, so that a run that is taken
    /// up again sees the same.
    fn caption(&self, image: &TrainingImage, moment: Moment, number: u64, index: usize) -> String {
        if !image.captioning.varies(&image.caption) {
            return measured_caption(image);
        }
        let place = format!("{number}/{index}/{}", image.sha256);
        let mut rng = generator(self.settings.seed, Stream::Captions, place.as_bytes());
        image.captioning.at(&image.caption, moment, &mut rng)
    }
}
