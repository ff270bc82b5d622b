//! The loss on held-out images, at noise and timesteps that never change, so that its course over a run is smooth
//! and runs with different seeds can be compared.

use burn::tensor::{DType, Tensor};

use crate::training::TrainError;
use crate::training::data::Latents;
use crate::training::objective::squared_errors;
use crate::training::random::{Stream, generator, normal_tensor};
use crate::training::step::Trainer;
use crate::training::text::Captions;

/// 50, 150, … 950: the middle of each tenth of the schedule.
const TIMESTEPS: [usize; 10] = [50, 150, 250, 350, 450, 550, 650, 750, 850, 950];

/// Samples that pass the UNet at once.
const SAMPLES_AT_ONCE: usize = 5;

/// One held-out image.
#[derive(Debug)]
pub struct HeldOut {
    /// Digest of its content; decides its noise.
    pub sha256: String,
    /// Its caption.
    pub caption: String,
    /// Its latents.
    pub latents: Latents,
}

/// The mean squared error of the prediction over all images and timesteps, without any loss weighting.
pub fn validation_loss(
    trainer: &Trainer<'_>,
    images: &[HeldOut],
    captions: &Captions,
) -> Result<f64, TrainError> {
    let mut losses = Vec::with_capacity(images.len() * TIMESTEPS.len());
    for image in images {
        let states = trainer.encode(&captions.batch(&[&image.caption])); // [1, tokens, d]
        for timesteps in TIMESTEPS.chunks(SAMPLES_AT_ONCE) {
            losses.push(image_loss(trainer, image, &states, timesteps));
        }
    }
    let losses = Tensor::cat(losses, 0)
        .cast(burn::tensor::FloatDType::from(DType::F32))
        .try_into_vec_as::<f32>()
        .map_err(|error| TrainError::Device(error.to_string()))?;
    let sum: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
    Ok(sum / losses.len() as f64)
}

/// The losses of one image: `[timesteps]`.
fn image_loss(
    trainer: &Trainer<'_>,
    image: &HeldOut,
    states: &Tensor<3>,
    timesteps: &[usize],
) -> Tensor<1> {
    let count = timesteps.len();
    let schedule = &trainer.model.schedule;
    let latents = image.latents.tensor(&trainer.device()); // [1, channels, height, width]
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
    let context = states.clone().repeat_dim(0, count);
    let prediction = trainer.model.unet.forward(noisy, &times, context);
    squared_errors(prediction, target)
}
