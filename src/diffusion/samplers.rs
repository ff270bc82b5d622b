//! From noise to a latent: DDIM and Euler with classifier-free guidance.
//!
//! Timesteps have diffusers' "leading" spacing. Sources: Song et al. 2020 (arXiv:2010.02502) for DDIM with `η = 0`,
//! Karras et al. 2022 (arXiv:2206.00364) for Euler; `DDIMScheduler` and `EulerDiscreteScheduler` of diffusers.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::PredictionType;
use super::conditioning::Condition;
use super::schedule::NoiseSchedule;
use super::unet::UNet;

/// Least `ᾱ` that Euler's noise levels are made of: 2⁻²⁴.
const LEAST_ALPHA_BAR: f64 = 1.0 / 16_777_216.0;

/// How the latent moves from one timestep to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplerKind {
    /// DDIM as the Stable Diffusion 1.5 repository configures it: not clipped, ends at the first timestep's noise.
    #[default]
    DdimSd15,
    /// DDIM with diffusers' defaults, which sd-scripts' previews use: clipped to [-1, 1], ends without noise.
    DdimKohya,
    /// Euler's method on the noise level.
    Euler,
}

impl SamplerKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::DdimSd15, Self::DdimKohya, Self::Euler];

    /// The name in settings and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::DdimSd15 => "ddim_sd15",
            Self::DdimKohya => "ddim_kohya",
            Self::Euler => "euler",
        }
    }

    /// What is added to every timestep.
    fn offset(self) -> usize {
        match self {
            Self::DdimSd15 | Self::Euler => 1,
            Self::DdimKohya => 0,
        }
    }
}

/// The arithmetic of one sampling run, without the model.
#[derive(Clone, Debug)]
pub struct Sampler {
    kind: SamplerKind,
    prediction: PredictionType,
    timesteps: Vec<usize>,
    /// `ᾱ` (DDIM) or `σ = √((1−ᾱ)/ᾱ)` (Euler) before each step, and after the last.
    levels: Vec<f64>,
}

impl Sampler {
    /// `steps` is limited to the number of timesteps there are.
    pub fn new(
        kind: SamplerKind,
        schedule: &NoiseSchedule,
        prediction: PredictionType,
        steps: usize,
    ) -> Self {
        let steps = steps.clamp(1, schedule.len().max(1));
        let stride = schedule.len() / steps;
        let last = schedule.len().saturating_sub(1);
        let timesteps: Vec<usize> = (0..steps)
            .rev()
            .map(|i| (i * stride + kind.offset()).min(last))
            .collect();
        let bar = |t: usize| f64::from(schedule.alpha_bar(t));
        let levels = match kind {
            SamplerKind::Euler => {
                // Where nothing of the picture is left, as little as diffusers leaves there.
                let bar = |t: usize| bar(t).max(LEAST_ALPHA_BAR);
                let sigma = |&t: &usize| ((1.0 - bar(t)) / bar(t)).sqrt();
                timesteps.iter().map(sigma).chain([0.0]).collect()
            }
            SamplerKind::DdimSd15 => timesteps.iter().map(|&t| bar(t)).chain([bar(0)]).collect(),
            SamplerKind::DdimKohya => timesteps.iter().map(|&t| bar(t)).chain([1.0]).collect(),
        };
        Self {
            kind,
            prediction,
            timesteps,
            levels,
        }
    }

    /// The number of steps.
    pub fn len(&self) -> usize {
        self.timesteps.len()
    }

    /// Whether there is nothing to do; never, as one step is the least.
    pub fn is_empty(&self) -> bool {
        self.timesteps.is_empty()
    }

    /// The timestep that step `i` (from 0) gives the model.
    pub fn timestep(&self, i: usize) -> f32 {
        self.timesteps[i] as f32
    }

    /// The latent before the first step: noise of unit variance, scaled for Euler.
    pub fn start(&self, noise: Tensor<4>) -> Tensor<4> {
        match self.kind {
            SamplerKind::Euler => {
                let sigma = self.levels[0];
                noise.mul_scalar((sigma * sigma + 1.0).sqrt())
            }
            SamplerKind::DdimSd15 | SamplerKind::DdimKohya => noise,
        }
    }

    /// What the model sees of the latent at step `i`.
    pub fn scale_input(&self, i: usize, latent: Tensor<4>) -> Tensor<4> {
        match self.kind {
            SamplerKind::Euler => {
                let sigma = self.levels[i];
                latent.div_scalar((sigma * sigma + 1.0).sqrt())
            }
            SamplerKind::DdimSd15 | SamplerKind::DdimKohya => latent,
        }
    }

    /// The latent after step `i`, given the model's output.
    pub fn step(&self, i: usize, latent: Tensor<4>, output: Tensor<4>) -> Tensor<4> {
        let (now, next) = (self.levels[i], self.levels[i + 1]);
        match self.kind {
            SamplerKind::Euler => self.euler(latent, output, now, next),
            SamplerKind::DdimSd15 | SamplerKind::DdimKohya => self.ddim(latent, output, now, next),
        }
    }

    /// `x' = √ᾱ' x̂₀ + √(1−ᾱ') ε̂`, with `x̂₀ = (x − √(1−ᾱ) ε̂) / √ᾱ`.
    fn ddim(&self, x: Tensor<4>, output: Tensor<4>, now: f64, next: f64) -> Tensor<4> {
        let (signal, sigma) = (now.sqrt(), (1.0 - now).sqrt());
        let (clean, noise) = match self.prediction {
            PredictionType::Epsilon => {
                let clean = (x - output.clone().mul_scalar(sigma)).div_scalar(signal);
                (clean, output)
            }
            PredictionType::VPrediction => {
                let clean = x.clone().mul_scalar(signal) - output.clone().mul_scalar(sigma);
                (clean, output.mul_scalar(signal) + x.mul_scalar(sigma))
            }
        };
        let clean = match self.kind {
            SamplerKind::DdimKohya => clean.clamp(-1.0, 1.0),
            SamplerKind::DdimSd15 | SamplerKind::Euler => clean,
        };
        clean.mul_scalar(next.sqrt()) + noise.mul_scalar((1.0 - next).sqrt())
    }

    /// `x' = x + (σ' − σ) (x − x̂₀) / σ`.
    fn euler(&self, x: Tensor<4>, output: Tensor<4>, now: f64, next: f64) -> Tensor<4> {
        let slope = match self.prediction {
            PredictionType::Epsilon => output, // (x − (x − σ ε)) / σ
            PredictionType::VPrediction => {
                let variance = now * now + 1.0;
                let clean =
                    x.clone().div_scalar(variance) - output.mul_scalar(now / variance.sqrt());
                (x.clone() - clean).div_scalar(now)
            }
        };
        x + slope.mul_scalar(next - now)
    }
}

/// What to draw, and what to move away from.
#[derive(Clone, Debug)]
pub struct Guidance {
    /// The prompt.
    pub cond: Condition,
    /// The negative prompt.
    pub uncond: Condition,
    /// Strength of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); 1 is none and costs half.
    pub cfg_scale: f64,
}

/// Leads noise to a latent.
///
/// `visit` sees the latent before the first step and after each one.
///
/// # Shapes
/// - `noise`, output: `[batch, channels, height, width]`; the output is scaled as the UNet sees it
pub fn sample(
    unet: &UNet,
    sampler: &Sampler,
    guidance: &Guidance,
    noise: Tensor<4>,
    mut visit: impl FnMut(usize, &Tensor<4>),
) -> Tensor<4> {
    let mut latent = sampler.start(noise);
    visit(0, &latent);
    for i in 0..sampler.len() {
        let input = sampler.scale_input(i, latent.clone());
        let output = predict(unet, input, sampler.timestep(i), guidance);
        latent = sampler.step(i, latent, output);
        visit(i + 1, &latent);
    }
    latent
}

/// `uncond + cfg_scale · (cond − uncond)`, both halves in one pass through the UNet.
fn predict(unet: &UNet, input: Tensor<4>, timestep: f32, guidance: &Guidance) -> Tensor<4> {
    let batch = input.dims()[0];
    if guidance.cfg_scale == 1.0 {
        return unet.forward(input, &vec![timestep; batch], guidance.cond.clone());
    }
    let context = Condition::cat(guidance.uncond.clone(), guidance.cond.clone());
    let twice = Tensor::cat(vec![input.clone(), input], 0); // [2 batch, channels, height, width]
    let output = unet.forward(twice, &vec![timestep; 2 * batch], context);
    let uncond = output.clone().narrow(0, 0, batch);
    let cond = output.narrow(0, batch, batch);
    uncond.clone() + (cond - uncond).mul_scalar(guidance.cfg_scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn constant(value: f64) -> Tensor<4> {
        Tensor::full([1, 1, 1, 2], value, &Device::flex())
    }

    fn first(tensor: Tensor<4>) -> f64 {
        f64::from(tensor.into_data().try_into_vec::<f32>().unwrap()[0])
    }

    #[test]
    fn timesteps_are_leading() {
        let schedule = NoiseSchedule::stable_diffusion();
        let of =
            |kind, steps| Sampler::new(kind, &schedule, PredictionType::Epsilon, steps).timesteps;
        assert_eq!(of(SamplerKind::DdimSd15, 5), [801, 601, 401, 201, 1]);
        assert_eq!(of(SamplerKind::DdimKohya, 5), [800, 600, 400, 200, 0]);
        assert_eq!(of(SamplerKind::Euler, 3), [667, 334, 1]);
        assert_eq!(of(SamplerKind::Euler, 0).len(), 1);
        let all = of(SamplerKind::DdimSd15, 5000);
        assert_eq!((all.len(), all[0]), (1000, 999));
    }

    /// A model that knows the answer must be led to it, whatever it predicts, by every sampler that ends without noise.
    #[test]
    fn a_perfect_model_gives_the_clean_latent() {
        let schedule = NoiseSchedule::stable_diffusion();
        let (clean, noise) = (0.5, -1.25);
        for kind in SamplerKind::ALL {
            for prediction in [PredictionType::Epsilon, PredictionType::VPrediction] {
                let sampler = Sampler::new(kind, &schedule, prediction, 7);
                let level = sampler.levels[0];
                // The noisy latent of the first timestep, in each sampler's own scale.
                let mut latent = match kind {
                    SamplerKind::Euler => constant(clean + level * noise),
                    _ => constant(level.sqrt() * clean + (1.0 - level).sqrt() * noise),
                };
                for i in 0..sampler.len() {
                    let bar = f64::from(schedule.alpha_bar(sampler.timesteps[i]));
                    let output = match prediction {
                        PredictionType::Epsilon => noise,
                        PredictionType::VPrediction => {
                            bar.sqrt() * noise - (1.0 - bar).sqrt() * clean
                        }
                    };
                    latent = sampler.step(i, latent, constant(output));
                }
                let expected = match kind {
                    SamplerKind::DdimSd15 => {
                        let bar = f64::from(schedule.alpha_bar(0));
                        bar.sqrt() * clean + (1.0 - bar).sqrt() * noise
                    }
                    _ => clean,
                };
                let found = first(latent);
                assert!(
                    (found - expected).abs() < 1e-4,
                    "{kind:?} {prediction:?}: {found}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn names_are_those_of_the_settings() {
        for kind in SamplerKind::ALL {
            let name = serde_json::to_value(kind).unwrap();
            assert_eq!(name, kind.name());
        }
    }
}
