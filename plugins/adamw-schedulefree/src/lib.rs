//! Schedule-free AdamW: averages the weights instead of letting the learning rate fall (Defazio et al. 2024, "The Road Less
//! Scheduled", arXiv:2405.15682); the numbers of `schedulefree.AdamWScheduleFree`.
//!
//! Trained are the weights `y`, between the fast ones `z` and their average `x`; saved and measured is `x`, for which the
//! host asks through `eval`.

use lorasmith_sdk::{Beta, ElementwiseOptimizer, Epsilon, Error, Param, Result, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of schedule-free AdamW, with the names and defaults of the reference. Use a constant schedule.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWScheduleFree {
    /// Share of the average in the weights that are trained; decay of the squared gradients.
    betas: [Beta; 2],
    /// Added to the denominator.
    eps: Epsilon,
    /// Decoupled weight decay, per unit of learning rate, at the weights that are trained.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// Steps of a linear warm-up of its own.
    #[schemars(range(min = 0))]
    warmup_steps: u64,
    /// Power of the step's number in the average's weights.
    #[schemars(range(min = 0.0, max = 100.0))]
    r: f64,
    /// Power of the highest learning rate in the average's weights.
    #[schemars(range(min = 0.0, max = 100.0))]
    weight_lr_power: f64,
}

impl Default for AdamWScheduleFree {
    fn default() -> Self {
        Self {
            betas: [Beta(0.9), Beta(0.999)],
            eps: Epsilon(1e-8),
            weight_decay: 0.0,
            warmup_steps: 0,
            r: 0.0,
            weight_lr_power: 2.0,
        }
    }
}

impl ElementwiseOptimizer for AdamWScheduleFree {
    const ID: &'static str = "adamw-schedulefree";
    const SUMMARY: &'static str =
        "AdamW that averages its weights, so that it needs no falling learning rate.";
    const EVAL: bool = true;

    fn check(&self) -> Result<()> {
        if self.betas[0].0 == 0.0 {
            return Err(Error::new("the first of `betas` is 0, expected more"));
        }
        Ok(())
    }

    fn update(&self, p: &Param<'_>) -> Result<()> {
        let [Beta(beta1), Beta(beta2)] = self.betas;
        let k = p.count("step")?;
        let warmup = (k as f64 / self.warmup_steps.max(1) as f64).min(1.0);
        let lr = p.lr() * warmup;
        let average = self.average(p, k, lr)?;

        let (y, grad, mut z) = (p.value(), p.grad(), p.state("z"));
        if k == 1 {
            z = z + &y;
        }
        let exp_avg_sq = p.state("exp_avg_sq") * beta2 + grad.square() * (1.0 - beta2);
        let bias_correction2 = 1.0 - beta2.powf(k as f64);
        let denominator = (&exp_avg_sq / bias_correction2).sqrt() + self.eps.0;
        let mut direction = grad / denominator;
        let decay = p.decay(self.weight_decay);
        if decay != 0.0 {
            direction = direction + &y * decay;
        }
        let moved = &direction * (lr * (beta1 * (1.0 - average) - 1.0));
        p.set_value(&(y.lerp(&z, average) + moved))?;
        p.set_state("z", &(z - direction * lr))?;
        p.set_state("exp_avg_sq", &exp_avg_sq)
    }

    fn eval(&self, p: &Param<'_>) -> Result<()> {
        // Before its first step a parameter is its own average.
        if p.counter("step")? == 0 {
            return Ok(());
        }
        p.set_value(&p.value().lerp(&p.state("z"), 1.0 - 1.0 / self.betas[0].0))
    }
}

impl AdamWScheduleFree {
    /// The share of this step in the average.
    fn average(&self, p: &Param<'_>, k: i64, lr: f64) -> Result<f64> {
        let lr_max = p.number("lr_max")?.max(lr);
        p.set_number("lr_max", lr_max)?;
        let weight = (k as f64).powf(self.r) * lr_max.powf(self.weight_lr_power);
        let sum = p.number("weight_sum")? + weight;
        p.set_number("weight_sum", sum)?;
        Ok(if sum == 0.0 { 0.0 } else { weight / sum })
    }
}

export_plugin! { id: "adamw-schedulefree", optimizers: [AdamWScheduleFree], schedules: [] }
