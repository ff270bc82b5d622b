//! Schedules that fall after a warm-up.

use std::f64::consts::PI;

use lorasmith_sdk::{Run, Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{progress, warmup};

/// The rate that `polynomial` ends at in diffusers and transformers.
const POLYNOMIAL_END_LR: f64 = 1e-7;
/// The steps after which `inverse_sqrt` has fallen by a root of two, without a warm-up.
const DEFAULT_TIMESCALE: u64 = 10_000;

/// Linear warm-up, then a line down to zero.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Linear {}

impl Schedule for Linear {
    const ID: &'static str = "linear";
    const SUMMARY: &'static str = "Linear warm-up, then a line down to zero.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or_else(|| {
            let steps = run.total_steps.saturating_sub(run.warmup_steps).max(1);
            run.total_steps.saturating_sub(step) as f64 / steps as f64
        })
    }
}

/// Linear warm-up, then a cosine down to zero.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Cosine {
    /// Waves of the cosine in the run; one half goes down once.
    #[schemars(range(min = 0.0, max = 1000.0))]
    num_cycles: f64,
}

impl Default for Cosine {
    fn default() -> Self {
        Self { num_cycles: 0.5 }
    }
}

impl Schedule for Cosine {
    const ID: &'static str = "cosine";
    const SUMMARY: &'static str = "Linear warm-up, then a cosine down to zero.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or_else(|| wave(self.num_cycles, progress(run, step)))
    }
}

/// Linear warm-up, then several cosines down to zero, each from the top (Loshchilov and Hutter 2017, arXiv:1608.03983).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CosineWithRestarts {
    /// How often it goes down.
    #[schemars(range(min = 1, max = 1000))]
    num_cycles: u32,
}

impl Default for CosineWithRestarts {
    fn default() -> Self {
        Self { num_cycles: 1 }
    }
}

impl Schedule for CosineWithRestarts {
    const ID: &'static str = "cosine_with_restarts";
    const SUMMARY: &'static str = "Linear warm-up, then several cosines down to zero.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or_else(|| {
            let progress = progress(run, step);
            if progress >= 1.0 {
                return 0.0;
            }
            let cycle = (f64::from(self.num_cycles) * progress) % 1.0;
            (0.5 * (1.0 + (PI * cycle).cos())).max(0.0)
        })
    }
}

/// Linear warm-up, then a cosine down to a part of the rate.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CosineWithMinLr {
    /// Waves of the cosine in the run; one half goes down once.
    #[schemars(range(min = 0.0, max = 1000.0))]
    num_cycles: f64,
    /// The part of the rate that stays.
    #[schemars(range(min = 0.0, max = 1.0))]
    min_lr_ratio: f64,
}

impl Default for CosineWithMinLr {
    fn default() -> Self {
        Self {
            num_cycles: 0.5,
            min_lr_ratio: 0.1,
        }
    }
}

impl Schedule for CosineWithMinLr {
    const ID: &'static str = "cosine_with_min_lr";
    const SUMMARY: &'static str = "Linear warm-up, then a cosine down to a part of the rate.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or_else(|| {
            let factor = 0.5 * (1.0 + (PI * self.num_cycles * 2.0 * progress(run, step)).cos());
            (factor * (1.0 - self.min_lr_ratio) + self.min_lr_ratio).max(0.0)
        })
    }
}

/// Linear warm-up, then a power of what is left, down to a rate of 1e-7.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Polynomial {
    /// The power; 1 is a line.
    #[schemars(range(min = 0.01, max = 100.0))]
    power: f64,
}

impl Default for Polynomial {
    fn default() -> Self {
        Self { power: 1.0 }
    }
}

impl Schedule for Polynomial {
    const ID: &'static str = "polynomial";
    const SUMMARY: &'static str = "Linear warm-up, then a power of what is left of the run.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or_else(|| {
            // A rate below the end would have to rise.
            let end = POLYNOMIAL_END_LR.min(run.base_lr);
            if run.base_lr <= 0.0 {
                return 0.0;
            }
            let left = (1.0 - progress(run, step)).max(0.0);
            ((run.base_lr - end) * left.powf(self.power) + end) / run.base_lr
        })
    }
}

/// Linear warm-up, then the inverse of a root of the steps.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InverseSqrt {
    /// Steps after the warm-up until the rate has fallen by a root of two; when absent the warm-up's, or 10000 without one.
    #[schemars(range(min = 1))]
    timescale: Option<u64>,
}

impl Schedule for InverseSqrt {
    const ID: &'static str = "inverse_sqrt";
    const SUMMARY: &'static str = "Linear warm-up, then the inverse of a root of the steps.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or_else(|| {
            let of_run = match run.warmup_steps {
                0 => DEFAULT_TIMESCALE,
                steps => steps,
            };
            let timescale = self.timescale.unwrap_or(of_run) as f64;
            let shift = timescale - run.warmup_steps as f64;
            1.0 / ((step as f64 + shift) / timescale).sqrt()
        })
    }
}

/// Linear warm-up, then a hyperbola that falls late (Chen et al. 2021, "REX: Revisiting Budgeted Training with an Improved
/// Schedule", arXiv:2107.04197).
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Rex {
    /// The part of the rate that stays.
    #[schemars(range(min = 0.0, max = 1.0))]
    min_lr_ratio: f64,
}

impl Schedule for Rex {
    const ID: &'static str = "rex";
    const SUMMARY: &'static str = "Linear warm-up, then a curve that stays high and falls late.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or_else(|| {
            let left = (1.0 - progress(run, step)).max(0.0);
            let factor = left / (0.5 + 0.5 * left);
            self.min_lr_ratio + (1.0 - self.min_lr_ratio) * factor
        })
    }
}

/// `num_cycles` waves of a cosine from 1 to 0.
fn wave(num_cycles: f64, progress: f64) -> f64 {
    (0.5 * (1.0 + (PI * num_cycles * 2.0 * progress).cos())).max(0.0)
}
