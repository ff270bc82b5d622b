//! The noise schedule of DDPM: how much of a latent is left at a timestep, and what follows from it.
//!
//! Source: Ho et al. 2020 (arXiv:2006.11239); `DDPMScheduler` of diffusers for the arithmetic, which is in `f32`
//! because trained weights depend on it.

use burn::tensor::{Tensor, TensorData};

use super::PredictionType;

/// SNR above which the debiased and the v weights stay constant (sd-scripts).
const MAX_WEIGHT_SNR: f64 = 1000.0;

/// How the variances of the steps grow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BetaShape {
    /// `β` from start to end in equal steps.
    Linear,
    /// `√β` from start to end in equal steps; every Stable Diffusion.
    ScaledLinear,
}

/// `ᾱ_t = ∏ (1 − β_s)`, `s ≤ t`, for the timesteps of training.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseSchedule {
    /// Variance that each step adds.
    pub betas: Vec<f32>,
    /// Share of the latent's variance that is left: `ᾱ_t`.
    pub alphas_cumprod: Vec<f32>,
    /// What it was before [`Self::zero_terminal`].
    original: Option<Box<NoiseSchedule>>,
}

impl NoiseSchedule {
    /// The schedule of `steps` timesteps with variances from `start` to `end`.
    pub fn new(shape: BetaShape, start: f64, end: f64, steps: usize) -> Self {
        let betas = match shape {
            BetaShape::Linear => linspace(start as f32, end as f32, steps),
            BetaShape::ScaledLinear => linspace(start.sqrt() as f32, end.sqrt() as f32, steps)
                .into_iter()
                .map(|root| root * root)
                .collect(),
        };
        Self::from_betas(betas)
    }

    /// The schedule with these variances.
    pub fn from_betas(betas: Vec<f32>) -> Self {
        let alphas_cumprod = cumulative_product(betas.iter().map(|beta| 1.0 - beta));
        Self {
            betas,
            alphas_cumprod,
            original: None,
        }
    }

    /// Stable Diffusion's: scaled linear, 0.00085 to 0.012, 1000 steps.
    pub fn stable_diffusion() -> Self {
        Self::new(BetaShape::ScaledLinear, 0.00085, 0.012, 1000)
    }

    /// The same schedule shifted and stretched so that the last timestep is pure noise.
    ///
    /// `√ᾱ` loses its last value and keeps its first. Source: Lin et al. 2023 (arXiv:2305.08891), algorithm 1. Loss
    /// weights stay those of the schedule as it was, as in sd-scripts.
    #[must_use]
    pub fn zero_terminal(&self) -> Self {
        if self.is_zero_terminal() {
            return self.clone();
        }
        let roots: Vec<f32> = self.alphas_cumprod.iter().map(|a| a.sqrt()).collect();
        let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else {
            return self.clone();
        };
        let scale = first / (first - last);
        let bars: Vec<f32> = roots
            .iter()
            .map(|root| ((root - last) * scale).powi(2))
            .collect();
        let steps = bars.iter().zip(bars.iter().skip(1));
        let alphas = std::iter::once(first * first).chain(steps.map(|(before, bar)| bar / before));
        Self {
            original: Some(Box::new(self.clone())),
            ..Self::from_betas(alphas.map(|alpha| 1.0 - alpha).collect())
        }
    }

    /// Whether it has been shifted so that the last timestep is pure noise.
    pub fn is_zero_terminal(&self) -> bool {
        self.original.is_some()
    }

    /// The schedule as it was before [`Self::zero_terminal`].
    #[must_use]
    pub fn original(&self) -> &Self {
        self.original.as_deref().unwrap_or(self)
    }

    /// How many timesteps there are.
    pub fn len(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Whether there is no timestep at all.
    pub fn is_empty(&self) -> bool {
        self.alphas_cumprod.is_empty()
    }

    /// Signal to noise ratio `ᾱ / (1 − ᾱ)`, of the schedule as it was before [`Self::zero_terminal`].
    pub fn snr(&self, timestep: usize) -> f64 {
        let bar = self.original().alpha_bar(timestep);
        f64::from((bar.sqrt() / (1.0 - bar).sqrt()).powi(2))
    }

    /// `x_t = √ᾱ x₀ + √(1−ᾱ) ε`.
    ///
    /// # Shapes
    /// - `latents`, `noise`, output: `[batch, channels, height, width]`
    /// - `timesteps`: `batch` numbers
    pub fn add_noise(
        &self,
        latents: Tensor<4>,
        noise: Tensor<4>,
        timesteps: &[usize],
    ) -> Tensor<4> {
        let (signal, sigma) = self.factors(timesteps, &latents);
        latents * signal + noise * sigma
    }

    /// `v = √ᾱ ε − √(1−ᾱ) x₀`, what a v-prediction model learns.
    ///
    /// Source: Salimans and Ho 2022 (arXiv:2202.00512). Shapes as in [`Self::add_noise`].
    pub fn velocity(&self, latents: Tensor<4>, noise: Tensor<4>, timesteps: &[usize]) -> Tensor<4> {
        let (signal, sigma) = self.factors(timesteps, &latents);
        noise * signal - latents * sigma
    }

    /// Loss weight `min(snr, γ) / snr`, or `/ (snr + 1)` where the velocity is predicted (arXiv:2303.09556).
    pub fn min_snr_weight(&self, timestep: usize, gamma: f64, prediction: PredictionType) -> f64 {
        let snr = self.snr(timestep);
        match prediction {
            PredictionType::Epsilon => snr.min(gamma) / snr,
            PredictionType::VPrediction => snr.min(gamma) / (snr + 1.0),
        }
    }

    /// Loss weight `1 / √snr`, or `1 / (snr + 1)` where the velocity is predicted (arXiv:2310.08442, sd-scripts).
    pub fn debiased_weight(&self, timestep: usize, prediction: PredictionType) -> f64 {
        let snr = self.snr(timestep).min(MAX_WEIGHT_SNR);
        match prediction {
            PredictionType::Epsilon => 1.0 / snr.sqrt(),
            PredictionType::VPrediction => 1.0 / (snr + 1.0),
        }
    }

    /// Loss weight `snr / (snr + 1)`, which makes a velocity's loss as large as that of the noise (sd-scripts).
    pub fn velocity_as_noise_weight(&self, timestep: usize) -> f64 {
        let snr = self.snr(timestep).min(MAX_WEIGHT_SNR);
        snr / (snr + 1.0)
    }

    /// `ᾱ_t`; a timestep beyond the schedule is its last one.
    pub fn alpha_bar(&self, timestep: usize) -> f32 {
        let last = self.len().saturating_sub(1);
        let bar = self.alphas_cumprod.get(timestep.min(last));
        bar.copied().unwrap_or(1.0)
    }

    /// `√ᾱ` and `√(1−ᾱ)` per sample: `[batch, 1, 1, 1]`.
    fn factors(&self, timesteps: &[usize], like: &Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let column = |value: fn(f32) -> f32| {
            let values: Vec<f32> = timesteps
                .iter()
                .map(|&t| value(self.alpha_bar(t)))
                .collect();
            let data = TensorData::new(values, [timesteps.len(), 1, 1, 1]);
            Tensor::from_data(data, (&like.device(), like.dtype()))
        };
        (column(f32::sqrt), column(|bar| (1.0 - bar).sqrt()))
    }
}

/// `torch.linspace` in `f32`: counted from both ends, so that both are met exactly.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    if steps < 2 {
        return vec![start; steps];
    }
    let step = (end - start) / (steps - 1) as f32;
    let half = steps / 2;
    (0..steps)
        .map(|i| match i < half {
            true => step.mul_add(i as f32, start), // fused, as torch's compiler does it
            false => (-step).mul_add((steps - i - 1) as f32, end),
        })
        .collect()
}

/// `torch.cumprod` on the CPU: accumulated in `f64`, stored in `f32`.
fn cumulative_product(factors: impl Iterator<Item = f32>) -> Vec<f32> {
    let mut product = 1.0f64;
    factors
        .map(|factor| {
            product *= f64::from(factor);
            product as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::Weights;
    use std::path::Path;

    fn goldens() -> Weights {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/tiny-sd15/goldens/scheduler.safetensors");
        Weights::open(&[path]).unwrap()
    }

    fn worst(found: &[f32], expected: &[f32]) -> f32 {
        assert_eq!(found.len(), expected.len());
        let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f32::max)
    }

    #[test]
    fn the_schedule_is_diffusers_to_the_last_bit() {
        let goldens = goldens();
        let schedule = NoiseSchedule::stable_diffusion();
        let (betas, _) = goldens.read_f32("betas").unwrap();
        let (bars, _) = goldens.read_f32("alphas_cumprod").unwrap();
        assert_eq!(worst(&schedule.betas, &betas), 0.0);
        assert_eq!(worst(&schedule.alphas_cumprod, &bars), 0.0);
        let (expected, _) = goldens
            .read_f32("alphas_cumprod_zero_terminal_snr")
            .unwrap();
        let shifted = schedule.zero_terminal();
        // Ratios of rounded numbers are multiplied up again: the last bits are noise.
        let error = worst(&shifted.alphas_cumprod, &expected);
        assert!(error < 1e-6, "{error:e}");
        assert_eq!(shifted.alphas_cumprod[999], 0.0);
    }

    #[test]
    fn snr_is_that_of_the_reference() {
        let (expected, _) = goldens().read_f32("all_snr").unwrap();
        let schedule = NoiseSchedule::stable_diffusion();
        for (t, &snr) in expected.iter().enumerate() {
            // A few units in the last place: torch's vectorised root is not always rounded to the nearest.
            let relative = schedule.snr(t) / f64::from(snr) - 1.0;
            assert!(relative.abs() < 5e-7, "{t}: {relative:e}");
        }
    }

    #[test]
    fn a_linear_schedule_meets_both_ends() {
        let schedule = NoiseSchedule::new(BetaShape::Linear, 0.1, 0.3, 3);
        assert_eq!(schedule.betas, [0.1, 0.2, 0.3]);
        // 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7
        for (found, expected) in schedule.alphas_cumprod.iter().zip([0.9, 0.72, 0.504]) {
            assert!((found - expected).abs() < 1e-7);
        }
        assert_eq!(schedule.alpha_bar(7), schedule.alpha_bar(2));
    }

    #[test]
    fn weights_by_hand() {
        // ᾱ = 0.8: snr 4; ᾱ = 0.1: snr 1/9
        let schedule = NoiseSchedule {
            betas: vec![0.2, 0.875],
            alphas_cumprod: vec![0.8, 0.1],
            original: None,
        };
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found}");
        near(schedule.snr(0), 4.0);
        near(
            schedule.min_snr_weight(0, 1.0, PredictionType::Epsilon),
            0.25,
        );
        near(
            schedule.min_snr_weight(0, 1.0, PredictionType::VPrediction),
            0.2,
        );
        near(
            schedule.min_snr_weight(1, 1.0, PredictionType::Epsilon),
            1.0,
        );
        near(schedule.debiased_weight(0, PredictionType::Epsilon), 0.5);
        near(
            schedule.debiased_weight(0, PredictionType::VPrediction),
            0.2,
        );
        near(schedule.velocity_as_noise_weight(1), 0.1);
    }
}
