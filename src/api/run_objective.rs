//! Settings of a run about what is learned, and their way to the domain: the loss, the noise, the timesteps.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::twins::{same_fields, same_variants};
use crate::runs::settings as domain;

/// How far off a prediction is, and what that counts. The squared error alone by default. Weights multiply, in the order
/// of sd-scripts, after `prior_loss_weight` and `min_snr_gamma`; SNRs are those of the schedule before
/// `zero_terminal_snr`. Validation measures with the same `type` and `masked`, without any weight.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(example = json!({"type": "huber", "huber_schedule": "snr", "huber_c": 0.1, "masked": true}))]
pub struct Loss {
    /// Distance of prediction and target (`--loss_type`).
    #[serde(rename = "type")]
    pub kind: LossType,
    /// How the threshold of `huber` and `smooth_l1` goes by the timestep (`--huber_schedule`).
    pub huber_schedule: HuberSchedule,
    /// Their smallest threshold (`--huber_c`).
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub huber_c: f64,
    /// Factor of their threshold with `exponential` and `constant` (`--huber_scale`).
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub huber_scale: f64,
    /// Whether pictures count only where their mask says (`--masked_loss`), or as far as they are opaque where they have
    /// none (`--alpha_mask`): the loss of each place of the latents is multiplied by the mean of the mask there, and its
    /// mean stays that over the whole picture. A picture without mask and transparency counts wholly. What is transparent
    /// is still laid on the image's `background`. Masks come by `PUT …/images/{image_id}/mask`.
    pub masked: bool,
    /// Weight `1 / √snr`, or `1 / (snr + 1)` of a v-prediction (`--debiased_estimation_loss`).
    pub debiased_estimation: bool,
    /// Weight `snr / (snr + 1)` (`--scale_v_pred_loss_like_noise_pred`); only of a v-prediction.
    pub scale_v_pred_loss: bool,
    /// Adds this share of the loss as that of a v-prediction would be (`--v_pred_like_loss`); not of a v-prediction, and
    /// none at 0.
    #[schema(minimum = 0, maximum = 100)]
    pub v_pred_like_loss: f64,
}

/// The distance of prediction and target, `d` apart at one element; `c` is a threshold.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// `d²`
    #[default]
    L2,
    /// `|d|`
    L1,
    /// `2 c (√(d² + c²) − c)`: as `l2` below the threshold, as `l1` above it.
    Huber,
    /// `2 (√(d² + c²) − c)`: `huber` by its threshold.
    SmoothL1,
}

/// How the threshold `c` goes by the timestep `t` of 1000.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HuberSchedule {
    /// `(1 − huber_c) / (1 + σ)² + huber_c`, where `σ` is noise to signal: 1 where there is little noise.
    #[default]
    Snr,
    /// `huber_c^(t / 1000) · huber_scale`
    Exponential,
    /// `huber_c · huber_scale`
    Constant,
}

/// The noise that is added, and that the model learns to find. White by default. All of it is a function of the run's
/// `seed` and the batch's number. Validation and previews use white noise.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(example = json!({"offset": 0.05, "adaptive_scale": 0.005}))]
pub struct Noise {
    /// Strength of a random number for each channel of a picture's latents that is added everywhere, so that pictures
    /// can become darker or lighter as a whole (`--noise_offset`); off at 0, often 0.05.
    #[schema(minimum = 0, maximum = 10)]
    pub offset: f64,
    /// Whether each batch takes a random part of `offset` (`--noise_offset_random_strength`).
    pub offset_random_strength: bool,
    /// Times the size of a channel's mean, added to `offset` (`--adaptive_noise_scale`); below 0 it takes away.
    #[schema(minimum = -10, maximum = 10)]
    pub adaptive_scale: f64,
    /// How many levels of noise are added at most, each 2 to 4 times as coarse as the one before, before the sum is
    /// brought back to a deviation of 1 (`--multires_noise_iterations`); off at 0, often 6 to 10.
    #[schema(minimum = 0, maximum = 64)]
    pub multires_iterations: u32,
    /// The strength of each level beside the one before (`--multires_noise_discount`).
    #[schema(minimum = 0, maximum = 1)]
    pub multires_discount: f64,
    /// Strength of noise that the model sees besides that which it is to find (`--ip_noise_gamma`); off at 0, 0.1 in its
    /// paper.
    #[schema(minimum = 0, maximum = 10)]
    pub input_perturbation: f64,
    /// Whether each batch takes a random part of `input_perturbation` (`--ip_noise_gamma_random_strength`).
    pub input_perturbation_random_strength: bool,
}

/// The timesteps that are trained on, drawn uniformly from `min` to below `max`: 0 is the picture, 1000 noise alone.
/// Validation measures at the middles of ten equal parts of them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(example = json!({"min": 0, "max": 1000}))]
pub struct Timesteps {
    /// The smallest (`--min_timestep`); below `max`.
    #[schema(minimum = 0, maximum = 999)]
    pub min: usize,
    /// One above the largest (`--max_timestep`).
    #[schema(minimum = 1, maximum = 1000)]
    pub max: usize,
}

impl Default for Loss {
    fn default() -> Self {
        domain::LossSettings::default().into()
    }
}

impl Default for Noise {
    fn default() -> Self {
        domain::NoiseSettings::default().into()
    }
}

impl Default for Timesteps {
    fn default() -> Self {
        domain::TimestepSettings::default().into()
    }
}

same_variants!(LossType, domain::LossKind: L2, L1, Huber, SmoothL1);
same_variants!(HuberSchedule, domain::HuberSchedule: Snr, Exponential, Constant);
same_fields!(Noise, domain::NoiseSettings:
    offset, offset_random_strength, adaptive_scale, multires_iterations, multires_discount, input_perturbation,
    input_perturbation_random_strength);
same_fields!(Timesteps, domain::TimestepSettings: min, max);

impl From<Loss> for domain::LossSettings {
    fn from(wire: Loss) -> Self {
        Self {
            kind: wire.kind.into(),
            huber_schedule: wire.huber_schedule.into(),
            huber_c: wire.huber_c,
            huber_scale: wire.huber_scale,
            masked: wire.masked,
            debiased_estimation: wire.debiased_estimation,
            scale_v_pred_loss: wire.scale_v_pred_loss,
            v_pred_like_loss: wire.v_pred_like_loss,
        }
    }
}

impl From<domain::LossSettings> for Loss {
    fn from(domain: domain::LossSettings) -> Self {
        Self {
            kind: domain.kind.into(),
            huber_schedule: domain.huber_schedule.into(),
            huber_c: domain.huber_c,
            huber_scale: domain.huber_scale,
            masked: domain.masked,
            debiased_estimation: domain.debiased_estimation,
            scale_v_pred_loss: domain.scale_v_pred_loss,
            v_pred_like_loss: domain.v_pred_like_loss,
        }
    }
}
