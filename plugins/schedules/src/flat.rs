//! Schedules that stay where they are, or jump.

use lorasmith_sdk::{Error, Result, Run, Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::warmup;

/// The learning rate as given, at every step.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Constant {}

impl Schedule for Constant {
    const ID: &'static str = "constant";
    const SUMMARY: &'static str = "The learning rate as given, without warm-up.";

    fn check(&self, run: &Run) -> Result<()> {
        refuse_warmup("constant", run)
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

/// Another factor from each of some steps on, as `piecewise_constant` of diffusers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PiecewiseConstant {
    /// Steps, ascending, at which the factor changes.
    steps: Vec<u64>,
    /// Factors before the first of these steps, between them, and from the last one on: one more than steps.
    factors: Vec<Factor>,
}

/// 0 to 1000.
#[derive(Debug, Clone, Copy, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("minimum" = 0.0, "maximum" = 1000.0))]
struct Factor(f64);

impl Default for PiecewiseConstant {
    fn default() -> Self {
        Self {
            steps: Vec::new(),
            factors: vec![Factor(1.0)],
        }
    }
}

impl Schedule for PiecewiseConstant {
    const ID: &'static str = "piecewise_constant";
    const SUMMARY: &'static str = "Another factor from each of some steps on, without warm-up.";

    fn check(&self, run: &Run) -> Result<()> {
        if self.factors.len() != self.steps.len() + 1 {
            return Err(Error::new(format!(
                "found {} steps and {} factors, expected one factor more than steps",
                self.steps.len(),
                self.factors.len()
            )));
        }
        if !self.steps.is_sorted_by(|a, b| a < b) {
            return Err(Error::new(format!(
                "the steps are {:?}, expected them to ascend",
                self.steps
            )));
        }
        refuse_warmup("piecewise_constant", run)
    }

    fn factor(&self, _run: &Run, step: u64) -> f64 {
        let past = self.steps.partition_point(|&start| start <= step);
        self.factors[past].0
    }
}

fn refuse_warmup(id: &str, run: &Run) -> Result<()> {
    if run.warmup_steps == 0 {
        return Ok(());
    }
    Err(Error::new(format!(
        "`{id}` has no warm-up, found {} warm-up steps; expected 0, or `constant_with_warmup`",
        run.warmup_steps
    )))
}
