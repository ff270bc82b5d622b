//! Adafactor: second moments kept as a row and a column (Shazeer and Stern 2018, arXiv:1804.04235).
//!
//! The numbers are those of `transformers.optimization.Adafactor`. With `relative_step` the rate is
//! `min(0.01, 1 / sqrt(t))` times the root mean square of the parameter, and the run's learning rate counts for nothing.

use lorasmith_sdk::{Beta, Error, Optimizer, Param, Result, Step, Tensor, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of Adafactor, with the names and defaults of transformers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Adafactor {
    /// Added to squared gradients; the least root mean square that a parameter is taken to have.
    eps: [Small; 2],
    /// Root mean square that an update may have.
    #[schemars(range(min = 1e-6, max = 1000.0))]
    clip_threshold: f64,
    /// Exponent of the decay of second moments, which is `1 - t^decay_rate`.
    #[schemars(range(min = -1.0, max = 0.0))]
    decay_rate: f64,
    /// Decay of a first moment; none is kept without it.
    beta1: Option<Beta>,
    /// Decoupled weight decay, per unit of the rate.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// Multiplies the rate with the root mean square of the parameter.
    scale_parameter: bool,
    /// Makes the rate from the number of steps instead of taking the run's.
    relative_step: bool,
    /// Makes it grow from 1e-6 per step; wants `relative_step`.
    warmup_init: bool,
}

/// 0 to 1.
#[derive(Debug, Clone, Copy, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("minimum" = 0.0, "maximum" = 1.0))]
struct Small(f64);

impl Default for Adafactor {
    fn default() -> Self {
        Self {
            eps: [Small(1e-30), Small(1e-3)],
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            weight_decay: 0.0,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
        }
    }
}

impl Optimizer for Adafactor {
    const ID: &'static str = "adafactor";
    const SUMMARY: &'static str =
        "Adam's second moments as a row and a column, with a rate of its own: hardly any state.";
    const STATE_BYTES: f64 = 1.0; // rows and columns of a matrix of rank 4 and above

    fn check(&self) -> Result<()> {
        if self.warmup_init && !self.relative_step {
            return Err(Error::new(
                "`warmup_init` wants `relative_step`, found false",
            ));
        }
        Ok(())
    }

    fn step(&self, step: &Step<'_>) -> Result<()> {
        step.params().iter().try_for_each(|p| self.update(step, p))
    }
}

impl Adafactor {
    fn update(&self, step: &Step<'_>, p: &Param<'_>) -> Result<()> {
        let (w, grad) = (p.value(), p.grad());
        let t = p.count("step")? as f64;
        let beta2 = 1.0 - t.powf(self.decay_rate);
        let squares = grad.square() + self.eps[0].0;
        let inverse_root = self.inverse_root(p, &squares, beta2)?;
        let update = inverse_root * &grad;
        let excess = (rms(p, &update)? / self.clip_threshold).max(&step.full(&[], 1.0));

        // Of rank 0, and on the device: the parameter's size is not known here.
        let mut rate = step.full(&[], self.rate(p, t));
        if self.scale_parameter {
            rate = rms(p, &w)?.max(&step.full(&[], self.eps[1].0)) * rate;
        }
        let mut update = update / excess * &rate;
        if let Some(Beta(beta1)) = self.beta1 {
            update = p.state("exp_avg") * beta1 + update * (1.0 - beta1);
            p.set_state("exp_avg", &update)?;
        }
        let decay = p.decay(self.weight_decay);
        let decayed = if decay == 0.0 {
            w
        } else {
            &w - &w * (rate * decay)
        };
        p.set_value(&(decayed - update))
    }

    fn rate(&self, p: &Param<'_>, t: f64) -> f64 {
        if !self.relative_step {
            return p.lr();
        }
        let most = if self.warmup_init { 1e-6 * t } else { 1e-2 };
        most.min(1.0 / t.sqrt())
    }

    /// `1 / sqrt(v)` of the second moments `v`, which are a column times a row for tensors of rank 2 or more.
    fn inverse_root<'h>(
        &self,
        p: &Param<'h>,
        squares: &Tensor<'h>,
        beta2: f64,
    ) -> Result<Tensor<'h>> {
        let shape = squares.shape()?;
        let moved = |state: Tensor<'h>, new: Tensor<'h>| state * beta2 + new * (1.0 - beta2);
        let [.., _, _] = shape[..] else {
            let v = moved(p.state("exp_avg_sq"), squares * 1.0);
            p.set_state("exp_avg_sq", &v)?;
            return Ok(v.rsqrt());
        };
        let row = moved(
            p.shaped_state("exp_avg_sq_row", &reduced(&shape, 1)),
            squares.mean_axis(-1),
        );
        let column = moved(
            p.shaped_state("exp_avg_sq_col", &reduced(&shape, 2)),
            squares.mean_axis(-2),
        );
        p.set_state("exp_avg_sq_row", &row)?;
        p.set_state("exp_avg_sq_col", &column)?;
        Ok((&row / row.mean_axis(-2)).rsqrt() * column.rsqrt())
    }
}

/// The shape with one axis, counted from the end, of length 1.
fn reduced(shape: &[u64], from_end: usize) -> Vec<u64> {
    let mut shape = shape.to_vec();
    let axis = shape.len() - from_end;
    shape[axis] = 1;
    shape
}

/// Root mean square, of rank 0.
fn rms<'h>(p: &Param<'_>, a: &Tensor<'h>) -> Result<Tensor<'h>> {
    Ok(a.norm() / (p.elements()? as f64).sqrt())
}

export_plugin! { id: "adafactor", optimizers: [Adafactor], schedules: [] }
