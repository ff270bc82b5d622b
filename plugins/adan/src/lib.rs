//! Adan: Nesterov's momentum for Adam, from differences of gradients (Xie et al. 2022, arXiv:2208.06677, algorithm 1);
//! the numbers of `pytorch_optimizer.Adan`.

use lorasmith_sdk::{Beta, ElementwiseOptimizer, Epsilon, Param, Result, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of Adan, with the names and defaults of pytorch_optimizer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Adan {
    /// Decay of the averages of the gradient, of its differences, and of squares.
    betas: [Beta; 3],
    /// Added to the denominator.
    eps: Epsilon,
    /// Weight decay, per unit of learning rate.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// Decays as AdamW does, before the step; otherwise proximally, after it, as the paper does.
    weight_decouple: bool,
}

impl Default for Adan {
    fn default() -> Self {
        Self {
            betas: [Beta(0.98), Beta(0.92), Beta(0.99)],
            eps: Epsilon(1e-8),
            weight_decay: 0.0,
            weight_decouple: false,
        }
    }
}

impl ElementwiseOptimizer for Adan {
    const ID: &'static str = "adan";
    const SUMMARY: &'static str = "Adam with Nesterov's momentum from differences of gradients.";
    const STATE_BYTES: f64 = 16.0;

    fn update(&self, p: &Param<'_>) -> Result<()> {
        let [Beta(beta1), Beta(beta2), Beta(beta3)] = self.betas;
        let t = p.count("step")? as f64;
        let unbiased = |beta: f64| 1.0 - beta.powf(t);
        let (grad, former) = (p.grad(), p.state("previous_grad"));
        // There is no difference at first.
        let difference = if t == 1.0 { former } else { &grad - former };
        p.set_state("previous_grad", &grad)?;

        let exp_avg = p.state("exp_avg").lerp(&grad, 1.0 - beta1);
        let exp_avg_diff = p.state("exp_avg_diff").lerp(&difference, 1.0 - beta2);
        let ahead = difference * beta2 + grad;
        let exp_avg_sq = p.state("exp_avg_sq") * beta3 + ahead.square() * (1.0 - beta3);

        let decay = p.lr() * p.decay(self.weight_decay);
        let (before, after) = if self.weight_decouple {
            (1.0 - decay, 1.0)
        } else {
            (1.0, 1.0 + decay)
        };
        let denominator = exp_avg_sq.sqrt() / unbiased(beta3).sqrt() + self.eps.0;
        let moved = p.value() * before
            - &exp_avg / &denominator * (p.lr() / unbiased(beta1))
            - &exp_avg_diff / denominator * (p.lr() * beta2 / unbiased(beta2));
        p.set_value(&(moved / after))?;
        p.set_state("exp_avg", &exp_avg)?;
        p.set_state("exp_avg_diff", &exp_avg_diff)?;
        p.set_state("exp_avg_sq", &exp_avg_sq)
    }
}

export_plugin! { id: "adan", optimizers: [Adan], schedules: [] }
