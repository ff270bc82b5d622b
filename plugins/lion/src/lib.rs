//! Lion: the sign of an interpolated momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms",
//! arXiv:2302.06675, algorithm 2); `lion` has the numbers of `lion_pytorch.Lion`, `lion8bit` those of
//! `bitsandbytes.optim.Lion8bit`.
//!
//! Both are here because they are one update; only where the momentum is kept differs.

use lorasmith_sdk::{
    Beta, ElementwiseOptimizer, Optimizer, Param, Result, Step, Tensor, export_plugin,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of Lion, with the names of the reference.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lion {
    /// Decay of the momentum in the update, and in what is kept.
    betas: [Beta; 2],
    /// Decoupled weight decay, per unit of learning rate.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self {
            betas: [Beta(0.9), Beta(0.99)],
            weight_decay: 0.0,
        }
    }
}

impl Lion {
    /// The new momentum.
    fn moved<'h>(&self, p: &Param<'h>, momentum: &Tensor<'h>) -> Result<Tensor<'h>> {
        let [Beta(beta1), Beta(beta2)] = self.betas;
        let grad = p.grad();
        let decayed = p.value() * (1.0 - p.lr() * p.decay(self.weight_decay));
        let direction = (momentum * beta1 + &grad * (1.0 - beta1)).sign();
        p.set_value(&(decayed - direction * p.lr()))?;
        Ok(momentum * beta2 + grad * (1.0 - beta2))
    }
}

impl ElementwiseOptimizer for Lion {
    const ID: &'static str = "lion";
    const SUMMARY: &'static str = "Sign of a momentum: half of Adam's state, a tenth of its rate.";
    const STATE_BYTES: f64 = 4.0;

    fn update(&self, p: &Param<'_>) -> Result<()> {
        let momentum = self.moved(p, &p.state("exp_avg"))?;
        p.set_state("exp_avg", &momentum)
    }
}

/// Settings of Lion with its state in 8 bits.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lion8bit {
    /// Decay of the momentum in the update, and in what is kept.
    betas: [Beta; 2],
    /// Decoupled weight decay, per unit of learning rate.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// Smaller parameters keep their state in 32 bits, in elements.
    #[schemars(range(min = 0))]
    min_8bit_size: u64,
}

impl Default for Lion8bit {
    fn default() -> Self {
        let Lion {
            betas,
            weight_decay,
        } = Lion::default();
        Self {
            betas,
            weight_decay,
            min_8bit_size: 4096,
        }
    }
}

impl Optimizer for Lion8bit {
    const ID: &'static str = "lion8bit";
    const SUMMARY: &'static str = "Lion with its state in 8 bits: a quarter of its memory.";
    const STATE_BYTES: f64 = 1.0 + 4.0 / 256.0; // a byte, and a scale for each block

    fn step(&self, step: &Step<'_>) -> Result<()> {
        let lion = Lion {
            betas: self.betas,
            weight_decay: self.weight_decay,
        };
        for p in step.params() {
            if p.elements()? < self.min_8bit_size {
                lion.update(p)?;
            } else {
                let momentum = lion.moved(p, &p.signed_8bit_state("exp_avg"))?;
                p.set_state("exp_avg", &momentum)?;
            }
        }
        Ok(())
    }
}

export_plugin! { id: "lion", optimizers: [Lion, Lion8bit], schedules: [] }
