//! D-Adaptation for Adam: an estimate of the distance to the solution as the rate (Defazio and Mishchenko 2023,
//! arXiv:2301.07733); the numbers of `dadaptation.DAdaptAdam`.
//!
//! The estimate `d` is one number for all parameters and lives on the device: nothing is read back. The reference wants
//! one learning rate for all parameters. Here the highest one enters the estimate, and each parameter moves at its own.

use lorasmith_sdk::{Beta, Epsilon, Optimizer, Param, Result, Step, Tensor, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of D-Adaptation, with the names and defaults of the reference. The learning rate should be 1.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DAdaptAdam {
    /// Decay of the averages of the gradient and of its square.
    betas: [Beta; 2],
    /// Added to the denominator.
    eps: Epsilon,
    /// Weight decay: part of the gradient, or per unit of the rate with `decouple`.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// Decays the weights themselves, as AdamW does.
    decouple: bool,
    /// Corrects the bias of the averages, as Adam does; makes the beginning slower.
    use_bias_correction: bool,
    /// The first estimate.
    #[schemars(range(min = 1e-12, max = 1.0))]
    d0: f64,
    /// The most that the estimate grows by in one step, as a factor; without limit when absent.
    #[schemars(range(min = 1.0))]
    growth_rate: Option<f64>,
}

impl Default for DAdaptAdam {
    fn default() -> Self {
        Self {
            betas: [Beta(0.9), Beta(0.999)],
            eps: Epsilon(1e-8),
            weight_decay: 0.0,
            decouple: false,
            use_bias_correction: false,
            d0: 1e-6,
            growth_rate: None,
        }
    }
}

impl Optimizer for DAdaptAdam {
    const ID: &'static str = "dadapt-adam";
    const SUMMARY: &'static str =
        "Adam that finds its learning rate by D-Adaptation; give a rate of 1.";
    const STATE_BYTES: f64 = 12.0;

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
            step.full(&[], self.d0)
        } else {
            step.scalar_state("d")
        };
        let mut gained = step.full(&[], 0.0);
        let mut size = step.full(&[], 0.0);
        for p in step.params().iter().filter(|p| p.lr() > 0.0) {
            let rate = &d * (p.lr() * correction);
            let (gain, l1) = self.accumulate(p, &rate)?;
            gained = gained + gain;
            size = size + l1;
        }
        self.estimate(step, &d, gained, &size)?;
        for p in step.params() {
            self.apply(p, &(&d * (p.lr() * correction)))?;
        }
        Ok(())
    }
}

impl DAdaptAdam {
    /// Moves the averages of one parameter; its part of the estimate's numerator and denominator.
    fn accumulate<'h>(&self, p: &Param<'h>, rate: &Tensor<'h>) -> Result<(Tensor<'h>, Tensor<'h>)> {
        let [Beta(beta1), Beta(beta2)] = self.betas;
        let decay = p.decay(self.weight_decay);
        let grad = if decay == 0.0 || self.decouple {
            p.grad()
        } else {
            p.grad() + p.value() * decay
        };
        let (s, exp_avg_sq) = (p.state("s"), p.state("exp_avg_sq"));
        let gain = grad.dot(&(&s / (exp_avg_sq.sqrt() + self.eps.0))) * rate;

        let exp_avg = p.state("exp_avg") * beta1 + &grad * (rate * (1.0 - beta1));
        p.set_state("exp_avg", &exp_avg)?;
        p.set_state(
            "exp_avg_sq",
            &(exp_avg_sq * beta2 + grad.square() * (1.0 - beta2)),
        )?;
        let root = beta2.sqrt();
        let s = s * root + grad * (rate * (1.0 - root));
        p.set_state("s", &s)?;
        Ok((gain, s.abs().sum()))
    }

    fn estimate<'h>(
        &self,
        step: &Step<'h>,
        d: &Tensor<'h>,
        gained: Tensor<'h>,
        size: &Tensor<'h>,
    ) -> Result<()> {
        let root = self.betas[1].0.sqrt();
        let numerator = step.scalar_state("numerator_weighted") * root + gained * (1.0 - root);
        step.set_state("numerator_weighted", &numerator)?;
        // Without any gradient so far there is nothing to estimate from.
        let safe = size.select(size, &step.full(&[], 1.0)) * (1.0 - root);
        let mut found = size.select(&(numerator / safe), d);
        if let Some(rate) = self.growth_rate {
            found = found.min(&(d * rate));
        }
        step.set_state("d", &d.max(&found))
    }

    fn apply<'h>(&self, p: &Param<'h>, rate: &Tensor<'h>) -> Result<()> {
        let w = p.value();
        let denominator = p.state("exp_avg_sq").sqrt() + self.eps.0;
        let decay = p.decay(self.weight_decay);
        let decayed = if decay != 0.0 && self.decouple {
            &w - &w * (rate * decay)
        } else {
            w
        };
        p.set_value(&(decayed - p.state("exp_avg") / denominator))
    }
}

export_plugin! { id: "dadapt-adam", optimizers: [DAdaptAdam], schedules: [] }
