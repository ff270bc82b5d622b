//! Muon: momentum made orthogonal by Newton–Schulz's iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon;
//! the rate of Liu et al. 2025, arXiv:2502.16982); the numbers of `pytorch_optimizer.Muon`, whose iteration runs in
//! bfloat16, computed in float32.
//!
//! Matrices are updated so; a convolution is a matrix of its output channels. Vectors are updated by AdamW.

use lorasmith_sdk::{Beta, Epsilon, Optimizer, Param, Result, Step, Tensor, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The quintic's coefficients: as steep at 0 as it can be, while singular values stay near 1.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// The least norm that a momentum is divided by.
const LEAST_NORM: f64 = 1e-7;

/// Settings of Muon.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Muon {
    /// Decay of the momentum.
    momentum: Beta,
    /// Looks ahead: makes a mixture of gradient and momentum orthogonal.
    nesterov: bool,
    /// Decoupled weight decay, per unit of learning rate.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// Iterations of Newton and Schulz.
    #[schemars(range(min = 1, max = 20))]
    ns_steps: u32,
    /// What the learning rate means.
    rate: Rate,
    /// For vectors: decay of the averages of the gradient and of its square.
    adamw_betas: [Beta; 2],
    /// For vectors: added to the denominator.
    adamw_eps: Epsilon,
}

/// How the learning rate depends on a matrix's shape.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Rate {
    /// Times the root of rows over columns, where there are more rows.
    Original,
    /// Such that an update is as large as one of AdamW: times 0.2 and the root of the longer side.
    MatchRmsAdamw,
}

impl Default for Muon {
    fn default() -> Self {
        Self {
            momentum: Beta(0.95),
            nesterov: true,
            weight_decay: 0.0,
            ns_steps: 5,
            rate: Rate::Original,
            adamw_betas: [Beta(0.9), Beta(0.95)],
            adamw_eps: Epsilon(1e-10),
        }
    }
}

impl Optimizer for Muon {
    const ID: &'static str = "muon";
    const SUMMARY: &'static str = "Momentum made orthogonal, so that all directions move alike.";
    const STATE_BYTES: f64 = 4.0; // of matrices, which adapters are

    fn step(&self, step: &Step<'_>) -> Result<()> {
        for p in step.params() {
            let shape = p.value().shape()?;
            match shape[..] {
                [rows, _, ..] => self.matrix(step, p, rows, shape[1..].iter().product())?,
                _ => self.vector(p)?,
            }
        }
        Ok(())
    }
}

impl Muon {
    fn decayed<'h>(&self, p: &Param<'h>) -> Tensor<'h> {
        p.value() * (1.0 - p.lr() * p.decay(self.weight_decay))
    }

    fn matrix(&self, step: &Step<'_>, p: &Param<'_>, rows: u64, columns: u64) -> Result<()> {
        let Beta(momentum) = self.momentum;
        let grad = p.grad();
        let buffer = p.state("momentum_buffer").lerp(&grad, 1.0 - momentum);
        p.set_state("momentum_buffer", &buffer)?;
        let direction = if self.nesterov {
            grad.lerp(&buffer, momentum)
        } else {
            buffer
        };
        let direction = self.orthogonal(step, &direction.reshape(&[rows, columns]), rows > columns);
        let (rows_f, columns_f) = (rows as f64, columns as f64);
        let rate = p.lr()
            * match self.rate {
                Rate::Original => (rows_f / columns_f).max(1.0).sqrt(),
                Rate::MatchRmsAdamw => 0.2 * rows_f.max(columns_f).sqrt(),
            };
        let direction = direction.reshape(&p.value().shape()?);
        p.set_value(&(self.decayed(p) - direction * rate))
    }

    /// Nearly `U Vᵀ` of a matrix `U S Vᵀ`.
    fn orthogonal<'h>(&self, step: &Step<'h>, matrix: &Tensor<'h>, tall: bool) -> Tensor<'h> {
        let [a, b, c] = COEFFICIENTS;
        let wide = if tall {
            matrix.transpose(-2, -1)
        } else {
            matrix * 1.0
        };
        let norm = wide.norm().max(&step.full(&[], LEAST_NORM));
        let mut x = wide / norm;
        for _ in 0..self.ns_steps {
            let gram = x.matmul(&x.transpose(-2, -1));
            let polynomial = &gram * b + gram.matmul(&gram) * c;
            x = &x * a + polynomial.matmul(&x);
        }
        if tall { x.transpose(-2, -1) } else { x }
    }

    fn vector(&self, p: &Param<'_>) -> Result<()> {
        let [Beta(beta1), Beta(beta2)] = self.adamw_betas;
        let t = p.count("step")? as f64;
        let grad = p.grad();
        let exp_avg = p.state("exp_avg").lerp(&grad, 1.0 - beta1);
        let exp_avg_sq = p.state("exp_avg_sq").lerp(&grad.square(), 1.0 - beta2);
        let denominator = exp_avg_sq.sqrt() / (1.0 - beta2.powf(t)).sqrt() + self.adamw_eps.0;
        let rate = p.lr() / (1.0 - beta1.powf(t));
        p.set_value(&(self.decayed(p) - &exp_avg / denominator * rate))?;
        p.set_state("exp_avg", &exp_avg)?;
        p.set_state("exp_avg_sq", &exp_avg_sq)
    }
}

export_plugin! { id: "muon", optimizers: [Muon], schedules: [] }
