//! CAME: Adafactor with a momentum that trusts steady updates more (Luo et al. 2023, arXiv:2307.02047); the numbers of
//! `came_pytorch.CAME`.

use lorasmith_sdk::{Beta, Optimizer, Param, Result, Step, Tensor, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of CAME, with the names and defaults of the reference.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Came {
    /// Decay of the momentum, of the squared gradients, and of the instability.
    betas: [Beta; 3],
    /// Added to squared gradients and to the instability.
    eps: [Small; 2],
    /// Root mean square that an update may have.
    #[schemars(range(min = 1e-6, max = 1000.0))]
    clip_threshold: f64,
    /// Decoupled weight decay, per unit of learning rate.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
}

/// 0 to 1.
#[derive(Debug, Clone, Copy, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("minimum" = 0.0, "maximum" = 1.0))]
struct Small(f64);

impl Default for Came {
    fn default() -> Self {
        Self {
            betas: [Beta(0.9), Beta(0.999), Beta(0.9999)],
            eps: [Small(1e-30), Small(1e-16)],
            clip_threshold: 1.0,
            weight_decay: 0.0,
        }
    }
}

impl Optimizer for Came {
    const ID: &'static str = "came";
    const SUMMARY: &'static str = "Adafactor with a momentum that is guided by confidence.";
    const STATE_BYTES: f64 = 6.0; // a momentum; rows and columns of two matrices

    fn step(&self, step: &Step<'_>) -> Result<()> {
        step.params().iter().try_for_each(|p| self.update(step, p))
    }
}

impl Came {
    fn update(&self, step: &Step<'_>, p: &Param<'_>) -> Result<()> {
        let [Beta(beta1), Beta(beta2), Beta(beta3)] = self.betas;
        let (w, grad) = (p.value(), p.grad());
        let shape = w.shape()?;
        let squares = grad.square() + self.eps[0].0;
        let update = match &shape[..] {
            [.., _, _] => factored(p, "exp_avg_sq", &squares, beta2, &shape)?,
            _ => {
                let v = p.state("exp_avg_sq") * beta2 + squares * (1.0 - beta2);
                p.set_state("exp_avg_sq", &v)?;
                v.rsqrt()
            }
        } * &grad;
        let rms = update.norm() / (p.elements()? as f64).sqrt();
        let update = update / (rms / self.clip_threshold).max(&step.full(&[], 1.0));
        let momentum = p.state("exp_avg") * beta1 + &update * (1.0 - beta1);
        p.set_state("exp_avg", &momentum)?;

        let step_taken = match &shape[..] {
            [.., _, _] => {
                let instability = (update - &momentum).square() + self.eps[1].0;
                factored(p, "exp_avg_res", &instability, beta3, &shape)? * momentum
            }
            _ => momentum,
        };
        let decayed = &w - &w * (p.decay(self.weight_decay) * p.lr());
        p.set_value(&(decayed - step_taken * p.lr()))
    }
}

/// `1 / sqrt(v)` of the running means `v` of `new`, which are a column times a row.
fn factored<'h>(
    p: &Param<'h>,
    name: &str,
    new: &Tensor<'h>,
    beta: f64,
    shape: &[u64],
) -> Result<Tensor<'h>> {
    let means = |name: &str, axis: i32| -> Result<Tensor<'h>> {
        let mut reduced = shape.to_vec();
        let index = shape.len() - axis.unsigned_abs() as usize;
        reduced[index] = 1;
        let kept = p.shaped_state(name, &reduced) * beta + new.mean_axis(axis) * (1.0 - beta);
        p.set_state(name, &kept)?;
        Ok(kept)
    };
    let row = means(&format!("{name}_row"), -1)?;
    let column = means(&format!("{name}_col"), -2)?;
    Ok((&row / row.mean_axis(-2)).rsqrt() * column.rsqrt())
}

export_plugin! { id: "came", optimizers: [Came], schedules: [] }
