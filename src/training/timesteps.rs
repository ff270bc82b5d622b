//! Which timesteps are trained on.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Timesteps there are in every Stable Diffusion.
const STEPS: usize = 1000;

/// The timesteps `min .. max`; all of them by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimestepSettings {
    /// The smallest one (`min_timestep`): how little noise there is at least.
    pub min: usize,
    /// One above the largest (`max_timestep`).
    pub max: usize,
}

impl Default for TimestepSettings {
    fn default() -> Self {
        Self { min: 0, max: STEPS }
    }
}

impl TimestepSettings {
    /// What is wrong with it: field and message.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        if self.max == 0 || self.max > STEPS {
            let message = format!("is {}, expected a whole number from 1 to {STEPS}", self.max);
            return Some(("max", message));
        }
        (self.min >= self.max).then(|| {
            let message = format!("is {}, expected less than max, {}", self.min, self.max);
            ("min", message)
        })
    }

    /// The timesteps of a schedule of so many; all of them where the schedule has none of these.
    pub fn of(&self, schedule_steps: usize) -> Range<usize> {
        let max = self.max.min(schedule_steps);
        if self.min < max {
            self.min..max
        } else {
            0..schedule_steps
        }
    }

    /// The middles of so many equal parts: where a loss is measured.
    pub fn middles<const N: usize>(&self, schedule_steps: usize) -> [usize; N] {
        let Range { start, end } = self.of(schedule_steps);
        std::array::from_fn(|part| start + (2 * part + 1) * (end - start) / (2 * N))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_and_divided() {
        let range = |min, max| TimestepSettings { min, max };
        let all = TimestepSettings::default();
        assert_eq!(all.problem(), None);
        assert_eq!(all.of(1000), 0..1000);
        let middles = [50, 150, 250, 350, 450, 550, 650, 750, 850, 950];
        assert_eq!(all.middles(1000), middles);
        assert_eq!(range(200, 400).middles(1000), [250, 350]);
        assert_eq!(range(7, 8).middles(1000), [7, 7]);
        for (wrong, field) in [
            (range(5, 5), "min"),
            (range(0, 0), "max"),
            (range(0, 1001), "max"),
        ] {
            assert_eq!(wrong.problem().map(|(field, _)| field), Some(field));
        }
    }
}
