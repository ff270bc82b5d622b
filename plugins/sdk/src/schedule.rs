//! What a learning-rate schedule implements.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::Result;

/// What a schedule knows of its run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// Learning rate that the factor applies to.
    pub base_lr: f64,
    /// Optimizer steps of warm-up.
    pub warmup_steps: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
}

/// A learning-rate schedule. The type is its settings.
pub trait Schedule: DeserializeOwned + JsonSchema + Send + 'static {
    /// Id by which a run chooses it.
    const ID: &'static str;
    /// One sentence for a list.
    const SUMMARY: &'static str;

    /// Refuses what the schema alone cannot.
    ///
    /// # Errors
    /// What is wrong, for the user.
    fn check(&self, _run: &Run) -> Result<()> {
        Ok(())
    }

    /// The factor on every learning rate after `step` optimizer steps: finite, not negative, a pure function.
    fn factor(&self, run: &Run, step: u64) -> f64;
}
