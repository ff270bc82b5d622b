//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).
//!
//! The operations and their order are those of `torch.optim.AdamW`, so that a run gives the same weights. `adamw8bit` is
//! `bitsandbytes.optim.AdamW8bit` (Dettmers et al. 2022, arXiv:2110.02861). Both are here because they are one update; only
//! where the averages are kept differs.

use lorasmith_sdk::{
    Beta, ElementwiseOptimizer, Optimizer, Param, Result, Step, Tensor, export_plugin,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of AdamW, with the names and defaults of torch.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// Decay of the averages of the gradient and of its square.
    betas: [Beta; 2],
    /// Added to the denominator.
    #[schemars(range(min = 0.0, max = 1.0))]
    eps: f64,
    /// Decoupled weight decay, per unit of learning rate.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            betas: [Beta(0.9), Beta(0.999)],
            eps: 1e-8,
            weight_decay: 0.01,
        }
    }
}

impl AdamW {
    /// The new averages, of the gradient and of its square.
    fn moved<'h>(&self, p: &Param<'h>, averages: [Tensor<'h>; 2]) -> Result<[Tensor<'h>; 2]> {
        let [Beta(beta1), Beta(beta2)] = self.betas;
        // Counted per parameter, as torch does: one without a gradient is not listed and stays behind.
        let t = p.count("step")? as f64;
        let (bias_correction1, bias_correction2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));

        let decayed = p.value() * (1.0 - p.lr() * p.decay(self.weight_decay));
        let grad = p.grad();
        let [exp_avg, exp_avg_sq] = averages;
        let exp_avg = exp_avg.lerp(&grad, 1.0 - beta1);
        let exp_avg_sq = exp_avg_sq * beta2 + grad.square() * (1.0 - beta2);

        let denominator = exp_avg_sq.sqrt() / bias_correction2.sqrt() + self.eps;
        let step_size = p.lr() / bias_correction1;
        p.set_value(&(decayed - (&exp_avg / denominator) * step_size))?;
        Ok([exp_avg, exp_avg_sq])
    }
}

impl ElementwiseOptimizer for AdamW {
    const ID: &'static str = "adamw";
    const SUMMARY: &'static str =
        "Adam with decoupled weight decay, the numbers of torch.optim.AdamW.";

    fn update(&self, p: &Param<'_>) -> Result<()> {
        let averages = [p.state("exp_avg"), p.state("exp_avg_sq")];
        let [exp_avg, exp_avg_sq] = self.moved(p, averages)?;
        p.set_state("exp_avg", &exp_avg)?;
        p.set_state("exp_avg_sq", &exp_avg_sq)
    }
}

/// Settings of AdamW with its state in 8 bits, with the names and defaults of bitsandbytes.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW8bit {
    /// Decay of the averages of the gradient and of its square.
    betas: [Beta; 2],
    /// Added to the denominator.
    #[schemars(range(min = 0.0, max = 1.0))]
    eps: f64,
    /// Decoupled weight decay, per unit of learning rate.
    #[schemars(range(min = 0.0, max = 1000.0))]
    weight_decay: f64,
    /// Smaller parameters keep their state in 32 bits, in elements.
    #[schemars(range(min = 0))]
    min_8bit_size: u64,
}

impl Default for AdamW8bit {
    fn default() -> Self {
        let AdamW {
            betas,
            eps,
            weight_decay,
        } = AdamW::default();
        Self {
            betas,
            eps,
            weight_decay,
            min_8bit_size: 4096,
        }
    }
}

impl Optimizer for AdamW8bit {
    const ID: &'static str = "adamw8bit";
    const SUMMARY: &'static str = "AdamW with its state in 8 bits: a quarter of its memory.";
    const STATE_BYTES: f64 = 2.0 * (1.0 + 4.0 / 256.0); // a byte each, and a scale for each block

    fn step(&self, step: &Step<'_>) -> Result<()> {
        let adamw = AdamW {
            betas: self.betas,
            eps: self.eps,
            weight_decay: self.weight_decay,
        };
        for p in step.params() {
            if p.elements()? < self.min_8bit_size {
                adamw.update(p)?;
                continue;
            }
            let averages = [
                p.signed_8bit_state("exp_avg"),
                p.unsigned_8bit_state("exp_avg_sq"),
            ];
            let [exp_avg, exp_avg_sq] = adamw.moved(p, averages)?;
            p.set_state("exp_avg", &exp_avg)?;
            p.set_state("exp_avg_sq", &exp_avg_sq)?;
        }
        Ok(())
    }
}

export_plugin! { id: "adamw", optimizers: [AdamW, AdamW8bit], schedules: [] }

#[cfg(test)]
mod tests {
    use lorasmith_sdk::testing::TestHost;
    use serde_json::{Value, json};

    use super::*;

    /// AdamW in double precision, written from the paper's algorithm 2.
    fn reference(mut w: f64, grads: &[f64], lr: f64, weight_decay: f64) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for (t, g) in (1..).zip(grads) {
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9_f64.powi(t)), v / (1.0 - 0.999_f64.powi(t)));
            w -= lr * (m_hat / (v_hat.sqrt() + 1e-8) + weight_decay * w);
        }
        w
    }

    #[test]
    fn twenty_steps_follow_the_paper() {
        let (start, lr) = ([0.5_f32, -1.25, 0.0, 2.0], 0.02);
        let grads: Vec<Vec<f32>> = (0..20)
            .map(|step| {
                (0..4)
                    .map(|i| ((step * 7 + i * 3) as f32).sin() * 0.3)
                    .collect()
            })
            .collect();
        let mut host = TestHost::<AdamW>::new(json!({ "weight_decay": 0.1 }))
            .unwrap()
            .param("w", &[2, 2], &start, lr);
        for grad in &grads {
            host.step(std::slice::from_ref(grad)).unwrap();
        }
        for (i, &found) in host.params[0].value.iter().enumerate() {
            let grads: Vec<f64> = grads.iter().map(|grad| f64::from(grad[i])).collect();
            let expected = reference(f64::from(start[i]), &grads, lr, 0.1);
            // Twenty float32 updates of at most 0.02 on values near 1.
            assert!(
                (f64::from(found) - expected).abs() < 2e-6,
                "{i}: {found} {expected}"
            );
        }
        assert_eq!(host.state("w", "step").unwrap(), [20.0]);
    }

    #[test]
    fn weight_decay_can_be_off_for_a_parameter() {
        let mut host = TestHost::<AdamW>::new(json!({ "weight_decay": 1.0 }))
            .unwrap()
            .param("a", &[1], &[1.0], 0.1)
            .param("b", &[1], &[1.0], 0.1);
        host.params[1].weight_decay = false;
        host.step(&[vec![0.0], vec![0.0]]).unwrap();
        assert_eq!(host.params[0].value, [0.9]);
        assert_eq!(host.params[1].value, [1.0]);
    }

    #[test]
    fn the_schema_has_defaults_and_ranges() {
        let schema: Value = schemars::schema_for!(AdamW).to_value();
        let properties = &schema["properties"];
        assert_eq!(properties["betas"]["default"], json!([0.9, 0.999]));
        assert_eq!(properties["betas"]["items"]["exclusiveMaximum"], json!(1.0));
        assert_eq!(properties["betas"]["items"]["minimum"], json!(0.0));
        assert_eq!(properties["eps"]["default"], json!(1e-8));
        assert_eq!(properties["weight_decay"]["maximum"], json!(1000.0));
        assert_eq!(schema["additionalProperties"], json!(false));
    }
}
