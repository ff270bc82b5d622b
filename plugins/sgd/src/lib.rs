//! Stochastic gradient descent with Nesterov's momentum (Sutskever et al. 2013, "On the importance of initialization and
//! momentum in deep learning").
//!
//! The operations and their order are those of `torch.optim.SGD`: the momentum keeps gradients, not steps, and weight
//! decay is part of the gradient.

use lorasmith_sdk::{Beta, ElementwiseOptimizer, Error, Param, Result, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of SGD, with the names of torch. Momentum and Nesterov are on, as sd-scripts' `SGDNesterov` has them.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sgd {
    /// Share of the former gradients that is kept.
    momentum: Beta,
    /// Share of a gradient that does not enter the momentum; must be 0 with `nesterov`.
    #[schemars(range(min = 0.0, max = 1.0))]
    dampening: f64,
    /// Looks ahead: steps along the gradient and the new momentum.
    nesterov: bool,
    /// Weight decay, added to the gradient as a penalty.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
}

impl Default for Sgd {
    fn default() -> Self {
        Self {
            momentum: Beta(0.9),
            dampening: 0.0,
            nesterov: true,
            weight_decay: 0.0,
        }
    }
}

impl ElementwiseOptimizer for Sgd {
    const ID: &'static str = "sgd";
    const SUMMARY: &'static str =
        "Gradient descent with Nesterov's momentum, the numbers of torch.optim.SGD.";
    const STATE_BYTES: f64 = 4.0;

    fn check(&self) -> Result<()> {
        if self.nesterov && (self.momentum.0 == 0.0 || self.dampening != 0.0) {
            return Err(Error::new(format!(
                "`nesterov` wants a momentum and no dampening, found momentum {} and dampening {}",
                self.momentum.0, self.dampening
            )));
        }
        Ok(())
    }

    fn update(&self, p: &Param<'_>) -> Result<()> {
        let (w, mut grad) = (p.value(), p.grad());
        let decay = p.decay(self.weight_decay);
        if decay != 0.0 {
            grad = grad + &w * decay;
        }
        if self.momentum.0 != 0.0 {
            let kept = p.state("momentum_buffer") * self.momentum.0;
            // The first gradient enters as a whole.
            let share = if p.count("step")? == 1 {
                1.0
            } else {
                1.0 - self.dampening
            };
            let buffer = kept + &grad * share;
            p.set_state("momentum_buffer", &buffer)?;
            grad = if self.nesterov {
                grad + &buffer * self.momentum.0
            } else {
                buffer
            };
        }
        p.set_value(&(w - grad * p.lr()))
    }
}

export_plugin! { id: "sgd", optimizers: [Sgd], schedules: [] }
