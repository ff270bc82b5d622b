//! Schedules of several phases.

use std::f64::consts::PI;

use lorasmith_sdk::{Error, Result, Run, Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Up, level, and down in the last steps (Hu et al. 2024, "MiniCPM", arXiv:2404.06395), as
/// `get_wsd_schedule` of transformers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WarmupStableDecay {
    /// Steps of the way down, at the end of the run; a tenth of the run when absent.
    #[schemars(range(min = 0))]
    decay_steps: Option<u64>,
    /// The part of the rate that it starts and ends at.
    #[schemars(range(min = 0.0, max = 1.0))]
    min_lr_ratio: f64,
    /// Waves of the cosine on the way down; one half goes down once.
    #[schemars(range(min = 0.0, max = 1000.0))]
    num_cycles: f64,
}

impl Default for WarmupStableDecay {
    fn default() -> Self {
        Self {
            decay_steps: None,
            min_lr_ratio: 0.0,
            num_cycles: 0.5,
        }
    }
}

impl WarmupStableDecay {
    fn decay_steps(&self, run: &Run) -> u64 {
        self.decay_steps.unwrap_or(run.total_steps / 10)
    }
}

impl Schedule for WarmupStableDecay {
    const ID: &'static str = "warmup_stable_decay";
    const SUMMARY: &'static str = "Linear warm-up, level, and a cosine down in the last steps.";

    fn check(&self, run: &Run) -> Result<()> {
        let decay = self.decay_steps(run);
        if run.warmup_steps.saturating_add(decay) > run.total_steps {
            return Err(Error::new(format!(
                "{} steps of warm-up and {decay} of decay, expected at most the run's {}",
                run.warmup_steps, run.total_steps
            )));
        }
        Ok(())
    }

    fn factor(&self, run: &Run, step: u64) -> f64 {
        let decay = self.decay_steps(run);
        let decay_start = run.total_steps.saturating_sub(decay);
        let factor = if step < run.warmup_steps {
            step as f64 / run.warmup_steps as f64
        } else if step < decay_start {
            1.0
        } else if step < run.total_steps {
            let progress = (step - decay_start) as f64 / decay.max(1) as f64;
            (0.5 * (1.0 + (PI * self.num_cycles * 2.0 * progress).cos())).max(0.0)
        } else {
            0.0
        };
        factor * (1.0 - self.min_lr_ratio) + self.min_lr_ratio
    }
}

/// Up to the rate and down to nearly nothing (Smith and Topin 2018, "Super-Convergence", arXiv:1708.07120), as
/// `torch.optim.lr_scheduler.OneCycleLR` with the run's rate as `max_lr`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OneCycle {
    /// The part of the run that goes up; the run's warm-up steps take its place if there are any.
    #[schemars(range(min = 0.0, max = 1.0))]
    pct_start: f64,
    /// The first rate is the highest one divided by this.
    #[schemars(range(min = 1.0, max = 1e9))]
    div_factor: f64,
    /// The last rate is the first one divided by this.
    #[schemars(range(min = 1.0, max = 1e9))]
    final_div_factor: f64,
    /// The way up and the way down.
    anneal_strategy: Anneal,
}

/// How one rate becomes another.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Anneal {
    /// Half a wave.
    Cos,
    /// A line.
    Linear,
}

impl Default for OneCycle {
    fn default() -> Self {
        Self {
            pct_start: 0.3,
            div_factor: 25.0,
            final_div_factor: 1e4,
            anneal_strategy: Anneal::Cos,
        }
    }
}

impl Schedule for OneCycle {
    const ID: &'static str = "one_cycle";
    const SUMMARY: &'static str = "Up to the rate and down to nearly nothing, in one cycle.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        let first = 1.0 / self.div_factor;
        let last = first / self.final_div_factor;
        let end = run.total_steps.saturating_sub(1) as f64;
        let peak = if run.warmup_steps > 0 {
            run.warmup_steps as f64
        } else {
            self.pct_start * run.total_steps as f64 - 1.0
        };
        let step = step as f64;
        if step >= end {
            last
        } else if step <= peak {
            self.between(first, 1.0, step / peak.max(1.0))
        } else {
            let start = peak.max(0.0);
            self.between(
                1.0,
                last,
                ((step - start) / (end - start).max(1.0)).min(1.0),
            )
        }
    }
}

impl OneCycle {
    fn between(&self, start: f64, end: f64, part: f64) -> f64 {
        match self.anneal_strategy {
            Anneal::Cos => end + (start - end) / 2.0 * ((PI * part).cos() + 1.0),
            Anneal::Linear => (end - start) * part + start,
        }
    }
}
