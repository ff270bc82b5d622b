//! Dynamic loss scaling: small gradients must not vanish in f16.
//!
//! The loss is multiplied by a power of two before the backward, the gradients are divided by it after. A step whose
//! gradients overflow is left out and halves the scale; two thousand steps without one double it (Micikevicius et al.
//! 2017, arXiv:1710.03740; the numbers are those of `torch.amp.GradScaler`).

use serde_json::json;

use crate::training::TrainError;
use crate::training::resume::{Part, Resumable};

/// The exponent that it begins with: 65 536.
const FIRST: u32 = 16;
/// Steps without overflow after which the scale is doubled.
const GROWTH_INTERVAL: u32 = 2000;
/// The largest exponent: f32 would overflow soon after.
const MOST: u32 = 24;

/// The factor of the loss, and the steps that were left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    /// The exponent of the factor, a power of two; none where nothing is scaled.
    exponent: Option<u32>,
    good_steps: u32,
    skipped: u64,
}

impl LossScale {
    /// As a run begins.
    pub fn new(needed: bool) -> Self {
        Self {
            exponent: needed.then_some(FIRST),
            good_steps: 0,
            skipped: 0,
        }
    }

    /// What the loss is multiplied by.
    pub fn factor(&self) -> f64 {
        self.exponent
            .map_or(1.0, |exponent| f64::exp2(exponent.into()))
    }

    /// Whether the loss is scaled.
    pub fn is_on(&self) -> bool {
        self.exponent.is_some()
    }

    /// Steps that were left out.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Notes a step whose gradients overflowed; false when no scale is the cause, or none is left.
    pub fn overflowed(&mut self) -> bool {
        let Some(smaller) = self.exponent.and_then(|exponent| exponent.checked_sub(1)) else {
            return false;
        };
        self.exponent = Some(smaller);
        self.good_steps = 0;
        self.skipped += 1;
        true
    }

    /// Notes a step that did not.
    pub fn succeeded(&mut self) {
        let Some(exponent) = &mut self.exponent else {
            return;
        };
        self.good_steps += 1;
        if self.good_steps == GROWTH_INTERVAL {
            self.good_steps = 0;
            *exponent = (*exponent + 1).min(MOST);
        }
    }
}

impl Resumable for LossScale {
    fn keep(&mut self) -> Result<Part, TrainError> {
        Ok(Part {
            values: json!({
                "exponent": self.exponent,
                "good_steps": self.good_steps,
                "skipped": self.skipped,
            }),
            tensors: Vec::new(),
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        let small = |name: &str| -> Result<u32, TrainError> {
            Ok(u32::try_from(part.count(name)?).unwrap_or(u32::MAX))
        };
        if self.exponent.is_some() {
            self.exponent = Some(small("exponent")?.min(MOST));
        }
        self.good_steps = small("good_steps")?.min(GROWTH_INTERVAL - 1);
        self.skipped = part.count("skipped")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_falls_at_once_and_rises_slowly() {
        let mut scale = LossScale::new(true);
        assert!(scale.overflowed());
        assert_eq!(scale.factor(), 32_768.0);
        (0..GROWTH_INTERVAL - 1).for_each(|_| scale.succeeded());
        assert_eq!(scale.factor(), 32_768.0);
        scale.succeeded();
        assert_eq!((scale.factor(), scale.skipped()), (65_536.0, 1));
    }

    #[test]
    fn it_gives_up_below_one_and_where_nothing_is_scaled() {
        let mut scale = LossScale::new(true);
        assert_eq!((0..100).take_while(|_| scale.overflowed()).count(), 16);
        assert!(!LossScale::new(false).overflowed());
    }

    #[test]
    fn it_goes_on_where_it_was() {
        let mut scale = LossScale::new(true);
        scale.overflowed();
        scale.succeeded();
        let mut resumed = LossScale::new(true);
        resumed
            .take_up(scale.keep().expect("a part"))
            .expect("the same");
        assert_eq!(resumed, scale);
    }
}
