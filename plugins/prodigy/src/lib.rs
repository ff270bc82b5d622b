//! Prodigy: Adam with an estimate of the distance to the solution as its rate (Mishchenko and Defazio 2023,
//! arXiv:2306.06101); the numbers of `prodigyopt.Prodigy`.
//!
//! The estimate `d` is one number for all parameters and lives on the device: nothing is read back. The reference wants
//! one learning rate for all parameters. Here the highest one enters the estimate, and each parameter moves at its own.

use lorasmith_sdk::{Beta, Epsilon, Optimizer, Param, Result, Step, Tensor, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of Prodigy, with the names and defaults of the reference. The learning rate should be 1.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Prodigy {
    /// Decay of the averages of the gradient and of its square.
    betas: [Beta; 2],
    /// Decay of the sums of the estimate; the root of the second beta when absent.
    beta3: Option<Beta>,
    /// Added to the denominator, times the estimate.
    eps: Epsilon,
    /// Weight decay: per unit of the rate, or part of the gradient without `decouple`.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// Decays the weights themselves, as AdamW does.
    decouple: bool,
    /// Corrects the bias of the averages, as Adam does; makes the beginning slower.
    use_bias_correction: bool,
    /// Keeps the learning rate out of the estimate's denominator, for schedules with a warm-up.
    safeguard_warmup: bool,
    /// The first estimate.
    #[schemars(range(min = 1e-12, max = 1.0))]
    d0: f64,
    /// Factor on the estimate.
    #[schemars(range(min = 1e-6, max = 1e6))]
    d_coef: f64,
    /// The most that the estimate grows by in one step, as a factor; without limit when absent.
    #[schemars(range(min = 1.0))]
    growth_rate: Option<f64>,
}

impl Default for Prodigy {
    fn default() -> Self {
        Self {
            betas: [Beta(0.9), Beta(0.999)],
            beta3: None,
            eps: Epsilon(1e-8),
            weight_decay: 0.0,
            decouple: true,
            use_bias_correction: false,
            safeguard_warmup: false,
            d0: 1e-6,
            d_coef: 1.0,
            growth_rate: None,
        }
    }
}

impl Optimizer for Prodigy {
    const ID: &'static str = "prodigy";
    const SUMMARY: &'static str = "Adam that finds its learning rate by itself; give a rate of 1.";
    const STATE_BYTES: f64 = 16.0;

    fn step(&self, step: &Step<'_>) -> Result<()> {
        let lr = step.params().iter().map(Param::lr).fold(0.0, f64::max);
        if lr == 0.0 {
            return Ok(());
        }
        let k = step.count("k")?;
        let [Beta(beta1), Beta(beta2)] = self.betas;
        let correction = if self.use_bias_correction {
            (1.0 - beta2.powi(k as i32)).sqrt() / (1.0 - beta1.powi(k as i32))
        } else {
            1.0
        };
        let d = if k == 1 {
            step.set_state("d", &(step.scalar_state("d") + self.d0))?;
            step.set_state("d_max", &(step.scalar_state("d_max") + self.d0))?;
            step.full(&[], self.d0)
        } else {
            step.scalar_state("d")
        };
        // What is common to all parameters; the estimate's rate is `d lr`, and a parameter's own is a part of it.
        let all = Common {
            lr: lr * correction,
            correction,
            beta3: self.beta3.map_or(beta2.sqrt(), |Beta(beta3)| beta3),
            d: &d,
        };
        let mut gained = step.full(&[], 0.0);
        let mut denominator = step.full(&[], 0.0);
        for p in step.params().iter().filter(|p| p.lr() > 0.0) {
            let (gain, size) = self.accumulate(p, &all)?;
            gained = gained + gain;
            denominator = denominator + size;
        }
        let d_new = self.estimate(step, &all, gained, &denominator)?;
        for p in step.params() {
            self.apply(p, &all, &d_new)?;
        }
        Ok(())
    }
}

/// What one step has for all parameters.
struct Common<'a, 'h> {
    /// The highest learning rate, bias correction included.
    lr: f64,
    correction: f64,
    beta3: f64,
    /// The estimate before this step.
    d: &'a Tensor<'h>,
}

impl Prodigy {
    /// The gradient, with the weight decay that is part of it.
    fn gradient<'h>(&self, p: &Param<'h>) -> Tensor<'h> {
        let decay = p.decay(self.weight_decay);
        if decay == 0.0 || self.decouple {
            p.grad()
        } else {
            p.grad() + p.value() * decay
        }
    }

    /// Moves the averages of one parameter; its part of the estimate's numerator and denominator.
    fn accumulate<'h>(
        &self,
        p: &Param<'h>,
        all: &Common<'_, 'h>,
    ) -> Result<(Tensor<'h>, Tensor<'h>)> {
        let [Beta(beta1), Beta(beta2)] = self.betas;
        let (w, grad, d) = (p.value(), self.gradient(p), all.d);
        let mut start = p.state("p0");
        if p.count("step")? == 1 {
            start = start + &w;
            p.set_state("p0", &start)?;
        }
        // d / d0, for numbers that are not too small.
        let share = d / self.d0;
        let gain = (&share * d * all.lr) * grad.dot(&(start - &w));

        let exp_avg = p.state("exp_avg") * beta1 + &grad * (d * (1.0 - beta1));
        let exp_avg_sq = p.state("exp_avg_sq") * beta2 + grad.square() * (d * d * (1.0 - beta2));
        p.set_state("exp_avg", &exp_avg)?;
        p.set_state("exp_avg_sq", &exp_avg_sq)?;

        let weight = share * d * if self.safeguard_warmup { 1.0 } else { all.lr };
        let s = p.state("s") * all.beta3 + grad * weight;
        p.set_state("s", &s)?;
        Ok((gain, s.abs().sum()))
    }

    /// The estimate after this step.
    fn estimate<'h>(
        &self,
        step: &Step<'h>,
        all: &Common<'_, 'h>,
        gained: Tensor<'h>,
        denominator: &Tensor<'h>,
    ) -> Result<Tensor<'h>> {
        let numerator = step.scalar_state("d_numerator") * all.beta3 + gained;
        step.set_state("d_numerator", &numerator)?;
        // Without any gradient so far there is nothing to estimate from.
        let safe = denominator.select(denominator, &step.full(&[], 1.0));
        let d_hat = denominator.select(&(&numerator * self.d_coef / safe), all.d);
        // The first estimate is left at once; afterwards the largest one so far limits.
        let first = all.d.greater(&step.full(&[], self.d0));
        let d = first.select(all.d, &all.d.max(&d_hat));
        let d_max = step.scalar_state("d_max").max(&d_hat);
        step.set_state("d_max", &d_max)?;
        let d = match self.growth_rate {
            Some(rate) => d_max.min(&(d * rate)),
            None => d_max,
        };
        step.set_state("d", &d)?;
        Ok(d)
    }

    fn apply<'h>(&self, p: &Param<'h>, all: &Common<'_, 'h>, d_new: &Tensor<'h>) -> Result<()> {
        let (w, rate) = (p.value(), all.d * (p.lr() * all.correction));
        let denominator = p.state("exp_avg_sq").sqrt() + d_new * self.eps.0;
        let decay = p.decay(self.weight_decay);
        let decayed = if decay != 0.0 && self.decouple {
            &w - &w * (&rate * decay)
        } else {
            w
        };
        p.set_value(&(decayed - p.state("exp_avg") / denominator * rate))
    }
}

export_plugin! { id: "prodigy", optimizers: [Prodigy], schedules: [] }
