//! The loss on held-out images, at noise and timesteps that never change, so that its course over a run is smooth
//! and runs with different seeds can be compared.

use burn::tensor::{DType, Tensor};

use crate::diffusion::{TextStates, TimeIds};
use crate::training::TrainError;
use crate::training::data::{Latents, read, stack_masks};
use crate::training::judge::Measured;
use crate::training::random::{Stream, generator, normal_tensor};
use crate::training::step::Trainer;
use crate::training::text::Captions;

/// In the middle of so many equal parts of the timesteps that are trained on: 50, 150, … 950 of all.
const TIMESTEPS: usize = 10;

/// Samples that pass the UNet at once.
const SAMPLES_AT_ONCE: usize = 5;

/// One held-out image.
#[derive(Debug)]
pub struct HeldOut {
    /// Digest of its content; decides its noise.
    pub sha256: String,
    /// Its caption.
    pub caption: String,
    /// Its sizes.
    pub time_ids: TimeIds,
    /// Its latents.
    pub latents: Latents,
}

/// The mean distance of the prediction from its target over all images and timesteps: the one that is trained with, where
/// the images' masks say that it counts, at white noise and without any weight, so that runs that differ in those can be
/// compared.
pub fn validate(
    trainer: &Trainer<'_>,
    images: &[HeldOut],
    captions: &Captions,
) -> Result<Measured, TrainError> {
    let schedule_steps = trainer.model.schedule.len();
    let timesteps: [usize; TIMESTEPS] = trainer.timesteps().middles(schedule_steps);
    let mut losses = Vec::with_capacity(images.len() * TIMESTEPS);
    for image in images {
        let states = trainer.encode(&captions.batch(trainer.model, &[&image.caption]))?; // [1, tokens, d]
        for timesteps in timesteps.chunks(SAMPLES_AT_ONCE) {
            losses.push(image_loss(trainer, image, &states, timesteps));
        }
    }
    let losses = Tensor::cat(losses, 0); // [images · timesteps]
    let losses = read(losses.cast(burn::tensor::FloatDType::from(DType::F32)))?;
    let losses: Vec<f64> = losses.into_iter().map(f64::from).collect();
    Ok(Measured {
        step: trainer.steps_done(),
        loss: mean(&losses),
        standard_error: standard_error(&losses, TIMESTEPS),
    })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard error of the mean of all losses, those of an image in a row.
///
/// Losses of one image are not independent, and timesteps are fixed, so images are what is drawn: `s / √images` with
/// the deviation `s` of their means. A single image says nothing of others; then it is that over its timesteps.
fn standard_error(losses: &[f64], per_image: usize) -> f64 {
    let means: Vec<f64> = if losses.len() > per_image {
        losses.chunks(per_image).map(mean).collect()
    } else {
        losses.to_vec()
    };
    let center = mean(&means);
    let squares: f64 = means.iter().map(|value| (value - center).powi(2)).sum();
    let count = means.len() as f64;
    (squares / (count - 1.0).max(1.0) / count).sqrt()
}

/// The losses of one image: `[timesteps]`.
fn image_loss(
    trainer: &Trainer<'_>,
    image: &HeldOut,
    states: &TextStates,
    timesteps: &[usize],
) -> Tensor<1> {
    let count = timesteps.len();
    let schedule = &trainer.model.schedule;
    let latents = image.latents.tensor(&trainer.device()); // [1, channels, height, width]
    let mask = stack_masks(&[&image.latents], &trainer.device()); // the same for all timesteps
    let device = trainer.device();
    let shape = latents.dims();
    let noise = timesteps.iter().map(|t| {
        let place = format!("{}/{t}", image.sha256);
        let mut rng = generator(0, Stream::Validation, place.as_bytes());
        normal_tensor(&mut rng, shape, &device)
    });
    let noise = Tensor::cat(noise.collect(), 0); // [timesteps, channels, height, width]
    let latents = latents.repeat_dim(0, count);
    let noisy = schedule.add_noise(latents.clone(), noise.clone(), timesteps);
    let objective = trainer.objective();
    let target = objective.target(schedule, latents, noise, timesteps);
    let times: Vec<f32> = timesteps.iter().map(|&t| t as f32).collect();
    let condition = states.clone().repeat(count);
    let condition = condition.with_sizes(&vec![image.time_ids; count]);
    let prediction = trainer.model.unet.forward(noisy, &times, condition);
    (objective.loss).distances(prediction, target, mask, schedule, timesteps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confidence_is_that_of_the_images() {
        // Means 1, 2 and 6: variance 7, by hand.
        let losses = [0.5, 1.5, 1.0, 3.0, 5.0, 7.0];
        let found = standard_error(&losses, 2);
        assert!((found - (7.0_f64 / 3.0).sqrt()).abs() < 1e-12, "{found}");
        // One image: 1, 2, 6 are its timesteps.
        let found = standard_error(&[1.0, 2.0, 6.0], 3);
        assert!((found - (7.0_f64 / 3.0).sqrt()).abs() < 1e-12, "{found}");
        assert_eq!(standard_error(&[1.0], 1), 0.0);
    }
}
