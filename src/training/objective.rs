//! What the UNet learns to predict, and how far off it is.

use burn::tensor::{Tensor, TensorData};

use crate::diffusion::PredictionType;
use crate::diffusion::schedule::NoiseSchedule;
use crate::training::loss::LossSettings;
use crate::training::settings::TrainSettings;

/// Target and loss of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// What the UNet predicts.
    pub prediction: PredictionType,
    /// γ of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556).
    pub min_snr_gamma: Option<f64>,
    /// Distance and other weights.
    pub loss: LossSettings,
}

impl Objective {
    /// That of a run on a model with this target.
    pub fn new(settings: &TrainSettings, of_model: PredictionType) -> Self {
        Self {
            prediction: settings.prediction.unwrap_or(of_model),
            min_snr_gamma: settings.min_snr_gamma,
            loss: settings.loss,
        }
    }

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

    /// The factor on the loss at a timestep: 1, or the product of the weights that are on, in the order of sd-scripts.
    /// That of min-SNR is `min(snr, γ) / snr` for `ε` and `min(snr, γ) / (snr + 1)` for `v`.
    pub fn weight(&self, schedule: &NoiseSchedule, timestep: usize) -> f64 {
        let of_snr = match self.min_snr_gamma {
            None => 1.0,
            Some(gamma) => schedule.min_snr_weight(timestep, gamma, self.prediction),
        };
        of_snr * self.loss.weight(schedule, timestep, self.prediction)
    }

    /// The loss of a batch, `[1]`: the mean distance of each sample, times its own weight and that of its timestep,
    /// averaged over the batch.
    ///
    /// # Shapes
    /// - `prediction`, `target`: `[batch, channels, height, width]`
    /// - `mask`: `[batch, 1, height, width]`
    /// - `weights`: `batch` numbers
    pub fn loss(
        &self,
        prediction: Tensor<4>,
        target: Tensor<4>,
        mask: Option<Tensor<4>>,
        schedule: &NoiseSchedule,
        timesteps: &[usize],
        weights: &[f64],
    ) -> Tensor<1> {
        let per_sample = (self.loss).distances(prediction, target, mask, schedule, timesteps);
        let weights = weights.iter().zip(timesteps);
        let weights: Vec<f32> = weights
            .map(|(weight, &t)| (weight * self.weight(schedule, t)) as f32)
            .collect();
        let shape = [weights.len()];
        let device = per_sample.device();
        let dtype = per_sample.dtype();
        let weights = Tensor::<1>::from_data(TensorData::new(weights, shape), (&device, dtype));
        (per_sample * weights.without_autodiff()).mean()
    }
}
