//! The learning-rate schedules of sd-scripts and diffusers: `constant`, `constant_with_warmup`, `cosine`.
//!
//! The warm-up factor is `step / warmup_steps`, so the first step of a warm-up runs at a rate of zero, as there.

use std::f64::consts::PI;

use lorasmith_sdk::{Error, Result, Run, Schedule, export_plugin};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The learning rate as given, at every step.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Constant {}

impl Schedule for Constant {
    const ID: &'static str = "constant";
    const SUMMARY: &'static str = "The learning rate as given, without warm-up.";

    fn check(&self, run: &Run) -> Result<()> {
        if run.warmup_steps == 0 {
            return Ok(());
        }
        Err(Error::new(format!(
            "`constant` has no warm-up, found {} warm-up steps; expected 0, or `constant_with_warmup`",
            run.warmup_steps
        )))
    }

    fn factor(&self, _run: &Run, _step: u64) -> f64 {
        1.0
    }
}

/// Linear warm-up, then the learning rate as given.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConstantWithWarmup {}

impl Schedule for ConstantWithWarmup {
    const ID: &'static str = "constant_with_warmup";
    const SUMMARY: &'static str = "Linear warm-up, then the learning rate as given.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or(1.0)
    }
}

/// Linear warm-up, then a cosine down to zero.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Cosine {
    /// Waves of the cosine in the run; one half goes down once.
    #[schemars(range(min = 0.0, max = 1000.0))]
    num_cycles: f64,
}

impl Default for Cosine {
    fn default() -> Self {
        Self { num_cycles: 0.5 }
    }
}

impl Schedule for Cosine {
    const ID: &'static str = "cosine";
    const SUMMARY: &'static str = "Linear warm-up, then a cosine down to zero.";

    fn factor(&self, run: &Run, step: u64) -> f64 {
        warmup(run, step).unwrap_or_else(|| {
            let decay_steps = run.total_steps.saturating_sub(run.warmup_steps).max(1);
            let progress = (step - run.warmup_steps) as f64 / decay_steps as f64;
            (0.5 * (1.0 + (PI * self.num_cycles * 2.0 * progress).cos())).max(0.0)
        })
    }
}

/// The factor during the warm-up, `None` after it.
fn warmup(run: &Run, step: u64) -> Option<f64> {
    (step < run.warmup_steps).then(|| step as f64 / run.warmup_steps as f64)
}

export_plugin! { id: "schedules", optimizers: [], schedules: [Constant, ConstantWithWarmup, Cosine] }

#[cfg(test)]
mod tests {
    use lorasmith_sdk::testing::factors;
    use serde_json::{Value, json};

    use super::*;

    const GOLDEN: &str = include_str!("../../../tests/fixtures/kohya/kohya_golden_lr.json");

    /// The schedule has the learning rates that sd-scripts had, with a group rate of 2e-4 and 20 steps.
    fn assert_golden<S: Schedule>(vector: &str, warmup_steps: u64) {
        let golden: Value = serde_json::from_str(GOLDEN).unwrap();
        let expected: Vec<f64> = serde_json::from_value(golden["lr"][vector].clone()).unwrap();
        let run = Run {
            base_lr: 2e-4,
            warmup_steps,
            total_steps: 20,
        };
        let found = factors::<S>(json!({}), run, 20).unwrap();
        for (step, (factor, lr)) in found.iter().zip(expected).enumerate() {
            // One rounding of the product.
            assert!(
                (factor * 2e-4 - lr).abs() < 1e-18,
                "{vector}, step {step}: {factor} {lr}"
            );
        }
    }

    #[test]
    fn the_rates_are_those_of_sd_scripts() {
        assert_golden::<Constant>("constant", 0);
        assert_golden::<ConstantWithWarmup>("constant_with_warmup", 4);
        assert_golden::<Cosine>("cosine", 4);
        assert_golden::<Cosine>("cosine_w_float0.1", 2);
    }

    #[test]
    fn constant_refuses_a_warm_up_as_sd_scripts_does() {
        let run = Run {
            base_lr: 1e-4,
            warmup_steps: 4,
            total_steps: 20,
        };
        let message = factors::<Constant>(json!({}), run, 1).unwrap_err();
        assert!(message.contains("constant_with_warmup"), "{message}");
    }

    #[test]
    fn steps_beyond_the_run_and_odd_lengths_stay_finite() {
        for (warmup_steps, total_steps) in [(0, 0), (5, 5), (9, 3), (0, 1)] {
            let run = Run {
                base_lr: 1e-4,
                warmup_steps,
                total_steps,
            };
            let found = factors::<Cosine>(json!({ "num_cycles": 2.5 }), run, 30).unwrap();
            assert!(
                found
                    .iter()
                    .all(|f| f.is_finite() && (0.0..=1.0).contains(f))
            );
        }
    }
}
