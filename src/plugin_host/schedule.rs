//! A plugin's schedule as the training loop sees it.

use super::library::ScheduleInstance;
use crate::training::optimizer::{LrScheduler, OptimizerError};

/// See [`LrScheduler`].
pub struct PluginSchedule {
    id: String,
    instance: ScheduleInstance,
}

impl PluginSchedule {
    pub fn new(id: &str, instance: ScheduleInstance) -> Self {
        Self {
            id: id.to_owned(),
            instance,
        }
    }
}

impl LrScheduler for PluginSchedule {
    fn factor(&self, step: u64) -> Result<f64, OptimizerError> {
        let failed =
            |message: String| OptimizerError(format!("scheduler `{}`: {message}", self.id));
        let factor = self.instance.factor(step).map_err(failed)?;
        if factor.is_finite() && factor >= 0.0 {
            Ok(factor)
        } else {
            Err(failed(format!(
                "the factor at step {step} is {factor}, expected a number of at least 0"
            )))
        }
    }
}
