//! How the distance of a prediction from its target is measured, and what it counts.
//!
//! Source: sd-scripts, `conditional_loss` and `get_huber_threshold_if_needed` in `library/train_util.py`, weights in
//! `library/custom_train_functions.py`.

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::diffusion::PredictionType;
use crate::diffusion::schedule::NoiseSchedule;

/// Distance and weights of a run; the squared error alone by default.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossSettings {
    /// Distance (`loss_type`).
    #[serde(rename = "type")]
    pub kind: LossKind,
    /// How the threshold `c` of `huber` and `smooth_l1` goes by the timestep.
    pub huber_schedule: HuberSchedule,
    /// `c` where it is smallest (`snr`, `exponential`), or everywhere.
    pub huber_c: f64,
    /// Factor of `c`, but for `snr`.
    pub huber_scale: f64,
    /// Whether the loss counts only where an image's mask says (`masked_loss`, `alpha_mask`).
    pub masked: bool,
    /// Weight `1 / √snr`, or `1 / (snr + 1)` of a velocity (`debiased_estimation_loss`).
    pub debiased_estimation: bool,
    /// Weight `snr / (snr + 1)` of a velocity (`scale_v_pred_loss_like_noise_pred`).
    pub scale_v_pred_loss: bool,
    /// Adds this share of the loss as a velocity's would be; none at 0.
    pub v_pred_like_loss: f64,
}

/// The distance `d = prediction − target` of one element.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// `d²`
    #[default]
    L2,
    /// `|d|`
    L1,
    /// `2 c (√(d² + c²) − c)`: `d²` where it is small, `2 c |d|` where it is large.
    Huber,
    /// `2 (√(d² + c²) − c)`: `d² / c` where it is small, `2 |d|` where it is large.
    SmoothL1,
}

/// How the threshold `c` goes by the timestep `t` of `T`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HuberSchedule {
    /// `(1 − huber_c) / (1 + σ)² + huber_c` with `σ² = (1 − ᾱ) / ᾱ`.
    #[default]
    Snr,
    /// `huber_c^(t / T) · huber_scale`
    Exponential,
    /// `huber_c · huber_scale`
    Constant,
}

impl Default for LossSettings {
    fn default() -> Self {
        Self {
            kind: LossKind::L2,
            huber_schedule: HuberSchedule::Snr,
            huber_c: 0.1,
            huber_scale: 1.0,
            masked: false,
            debiased_estimation: false,
            scale_v_pred_loss: false,
            v_pred_like_loss: 0.0,
        }
    }
}

impl LossSettings {
    /// All that is out of range: field and message.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        for (field, value) in [("huber_c", self.huber_c), ("huber_scale", self.huber_scale)] {
            if !(value > 0.0 && value <= 100.0) {
                let message = format!("is {value}, expected a number above 0 and at most 100");
                problems.push((field, message));
            }
        }
        let share = self.v_pred_like_loss;
        if !(0.0..=100.0).contains(&share) {
            let message = format!("is {share}, expected a number from 0 to 100");
            problems.push(("v_pred_like_loss", message));
        }
        problems
    }

    /// What makes no sense for what the UNet predicts, as in sd-scripts: field and message.
    pub fn problem_with(&self, prediction: PredictionType) -> Option<(&'static str, String)> {
        match prediction {
            PredictionType::Epsilon if self.scale_v_pred_loss => Some((
                "scale_v_pred_loss",
                "is true, but the model predicts noise: it scales the loss of a velocity"
                    .to_owned(),
            )),
            PredictionType::VPrediction if self.v_pred_like_loss > 0.0 => Some((
                "v_pred_like_loss",
                format!(
                    "is {}, expected 0: the model predicts a velocity already",
                    self.v_pred_like_loss
                ),
            )),
            _ => None,
        }
    }

    /// The factor on the loss at a timestep, beside that of min-SNR. SNRs are those of the schedule before it was made
    /// zero-terminal.
    pub fn weight(
        &self,
        schedule: &NoiseSchedule,
        timestep: usize,
        prediction: PredictionType,
    ) -> f64 {
        let mut weight = 1.0;
        if self.scale_v_pred_loss {
            weight *= schedule.velocity_as_noise_weight(timestep);
        }
        if self.v_pred_like_loss > 0.0 {
            let scale = schedule.velocity_as_noise_weight(timestep);
            weight += weight / scale * self.v_pred_like_loss;
        }
        if self.debiased_estimation {
            weight *= schedule.debiased_weight(timestep, prediction);
        }
        weight
    }

    /// The threshold `c` at a timestep, of the schedule as it is trained on.
    pub fn threshold(&self, schedule: &NoiseSchedule, timestep: usize) -> f64 {
        match self.huber_schedule {
            HuberSchedule::Snr => {
                let bar = f64::from(schedule.alpha_bar(timestep));
                let sigma = ((1.0 - bar) / bar).sqrt(); // infinite where nothing is left of the picture
                (1.0 - self.huber_c) / (1.0 + sigma).powi(2) + self.huber_c
            }
            HuberSchedule::Exponential => {
                let part = timestep as f64 / schedule.len() as f64;
                self.huber_c.powf(part) * self.huber_scale
            }
            HuberSchedule::Constant => self.huber_c * self.huber_scale,
        }
    }

    /// The mean distance of each sample: `[batch]`.
    ///
    /// A mask multiplies what each element counts; the mean stays that over all elements, as in sd-scripts.
    ///
    /// # Shapes
    /// - `prediction`, `target`: `[batch, channels, height, width]`
    /// - `mask`: `[batch, 1, height, width]`
    pub fn distances(
        &self,
        prediction: Tensor<4>,
        target: Tensor<4>,
        mask: Option<Tensor<4>>,
        schedule: &NoiseSchedule,
        timesteps: &[usize],
    ) -> Tensor<1> {
        let [batch, channels, height, width] = prediction.dims();
        let difference = prediction - target;
        let distances = match self.kind {
            LossKind::L2 => difference.square(),
            LossKind::L1 => difference.abs(),
            LossKind::Huber | LossKind::SmoothL1 => {
                self.soft_distances(difference, schedule, timesteps)
            }
        };
        let distances = match mask {
            Some(mask) => distances * mask,
            None => distances,
        };
        distances
            .reshape([batch, channels * height * width])
            .mean_dim(1) // [batch, 1]
            .reshape([batch])
    }

    fn soft_distances(
        &self,
        difference: Tensor<4>,
        schedule: &NoiseSchedule,
        timesteps: &[usize],
    ) -> Tensor<4> {
        let thresholds = timesteps.iter().map(|&t| self.threshold(schedule, t));
        let thresholds: Vec<f32> = thresholds.map(|c| c as f32).collect();
        let data = TensorData::new(thresholds, [timesteps.len(), 1, 1, 1]);
        let c = Tensor::<4>::from_data(data, (&difference.device(), difference.dtype()));
        let c = c.without_autodiff();
        let bent = (difference.square() + c.clone().square()).sqrt() - c.clone();
        match self.kind {
            LossKind::Huber => bent * c.mul_scalar(2.0),
            _ => bent.mul_scalar(2.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn loss(kind: LossKind) -> LossSettings {
        LossSettings {
            kind,
            huber_schedule: HuberSchedule::Constant,
            huber_c: 3.0,
            ..LossSettings::default()
        }
    }

    #[test]
    fn distances_by_hand() {
        let device = Device::flex();
        let schedule = NoiseSchedule::stable_diffusion();
        let tensor = |values: [f32; 4]| {
            let data = TensorData::new(values.to_vec(), [2, 1, 1, 2]);
            Tensor::<4>::from_data(data, &device)
        };
        let mask = tensor([1.0, 0.0, 0.5, 1.0]);
        for (kind, expected) in [
            // d = 4, 0 and -4, 2
            (LossKind::L2, [8.0, 6.0]),
            (LossKind::L1, [2.0, 2.0]),
            // √(16 + 9) = 5, √(4 + 9) = 3.6056
            (LossKind::Huber, [6.0, (6.0 + 6.0 * 0.605_551_3) / 2.0]),
            (LossKind::SmoothL1, [2.0, (2.0 + 2.0 * 0.605_551_3) / 2.0]),
        ] {
            let (prediction, target) =
                (tensor([5.0, 1.0, -3.0, 2.0]), tensor([1.0, 1.0, 1.0, 0.0]));
            let found =
                loss(kind).distances(prediction, target, Some(mask.clone()), &schedule, &[3, 999]);
            let found: Vec<f32> = found.to_data().iter::<f32>().collect();
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-5, "{kind:?}: {found}");
            }
        }
    }

    #[test]
    fn thresholds_meet_their_ends() {
        let schedule = NoiseSchedule::stable_diffusion().zero_terminal();
        let of = |huber_schedule, timestep| {
            let settings = LossSettings {
                huber_schedule,
                huber_scale: 2.0,
                ..LossSettings::default()
            };
            settings.threshold(&schedule, timestep)
        };
        assert_eq!(of(HuberSchedule::Snr, 999), 0.1);
        assert_eq!(of(HuberSchedule::Exponential, 0), 2.0);
        assert!((of(HuberSchedule::Exponential, 500) - 2.0 * 0.1_f64.sqrt()).abs() < 1e-12);
        assert!((of(HuberSchedule::Constant, 7) - 0.2).abs() < 1e-12);
    }

    #[test]
    fn what_makes_no_sense_is_told() {
        let settings = LossSettings {
            huber_c: 0.0,
            huber_scale: f64::NAN,
            v_pred_like_loss: -1.0,
            ..LossSettings::default()
        };
        let found: Vec<_> = settings.problems().into_iter().map(|(at, _)| at).collect();
        assert_eq!(found, ["huber_c", "huber_scale", "v_pred_like_loss"]);
        let settings = LossSettings {
            scale_v_pred_loss: true,
            v_pred_like_loss: 1.0,
            ..LossSettings::default()
        };
        let field = |prediction| settings.problem_with(prediction).map(|(field, _)| field);
        assert_eq!(field(PredictionType::Epsilon), Some("scale_v_pred_loss"));
        assert_eq!(field(PredictionType::VPrediction), Some("v_pred_like_loss"));
    }
}
