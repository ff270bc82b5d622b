//! What the UNet learns to predict, and how far off it is.

use burn::tensor::{Tensor, TensorData};

use crate::diffusion::PredictionType;
use crate::diffusion::schedule::NoiseSchedule;

/// Target and loss weighting of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// What the UNet predicts.
    pub prediction: PredictionType,
    /// γ of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556).
    pub min_snr_gamma: Option<f64>,
}

impl Objective {
    /// `ε`, or the velocity `√ᾱ ε − √(1−ᾱ) x₀`.
    ///
    /// # Shapes
    /// - `latents`, `noise`, output: `[batch, channels, height, width]`
    pub fn target(
        &self,
        schedule: &NoiseSchedule,
        latents: Tensor<4>,
        noise: Tensor<4>,
        timesteps: &[usize],
    ) -> Tensor<4> {
        match self.prediction {
            PredictionType::Epsilon => noise,
            PredictionType::VPrediction => schedule.velocity(latents, noise, timesteps),
        }
    }

    /// The factor on the loss at a timestep: 1, or `min(snr, γ) / snr` for `ε` and `min(snr, γ) / (snr + 1)` for `v`.
    pub fn weight(&self, schedule: &NoiseSchedule, timestep: usize) -> f64 {
        match self.min_snr_gamma {
            None => 1.0,
            Some(gamma) => schedule.min_snr_weight(timestep, gamma, self.prediction),
        }
    }
}

/// Mean squared error of each sample, times its weight, averaged over the batch.
///
/// # Shapes
/// - `prediction`, `target`: `[batch, channels, height, width]`
/// - `weights`: `batch` numbers
/// - output: `[1]`
pub fn weighted_mse(prediction: Tensor<4>, target: Tensor<4>, weights: &[f64]) -> Tensor<1> {
    let per_sample = squared_errors(prediction, target);
    let weights: Vec<f32> = weights.iter().map(|&weight| weight as f32).collect();
    let shape = [weights.len()];
    let device = per_sample.device();
    let dtype = per_sample.dtype();
    let weights = Tensor::<1>::from_data(TensorData::new(weights, shape), (&device, dtype));
    (per_sample * weights.without_autodiff()).mean()
}

/// Mean squared error of each sample: `[batch]`.
pub fn squared_errors(prediction: Tensor<4>, target: Tensor<4>) -> Tensor<1> {
    let [batch, channels, height, width] = prediction.dims();
    (prediction - target)
        .square()
        .reshape([batch, channels * height * width])
        .mean_dim(1) // [batch, 1]
        .reshape([batch])
}
