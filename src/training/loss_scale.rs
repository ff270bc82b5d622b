//! Dynamic loss scaling: small gradients must not vanish in f16.
//!
//! The loss is multiplied by a power of two before the backward, the gradients are divided by it after. A step whose
//! gradients overflow is left out and halves the scale; two thousand steps without one double it (Micikevicius et al.
//! 2017, arXiv:1710.03740; the numbers are those of `torch.amp.GradScaler`).

/// Where it begins.
const FIRST: f64 = 65_536.0;
/// Steps without overflow after which the scale is doubled.
const GROWTH_INTERVAL: u32 = 2000;
/// What the scale never exceeds: f32 would overflow soon after.
const MOST: f64 = 16_777_216.0;

/// The factor of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    /// The factor, a power of two.
    pub scale: f64,
    /// Steps since it last changed.
    pub good_steps: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self {
            scale: FIRST,
            good_steps: 0,
        }
    }
}

impl LossScale {
    /// Notes a step that overflowed; false when the scale cannot help any more.
    pub fn overflowed(&mut self) -> bool {
        self.good_steps = 0;
        self.scale /= 2.0;
        self.scale >= 1.0
    }

    /// Notes a step that did not.
    pub fn succeeded(&mut self) {
        self.good_steps += 1;
        if self.good_steps == GROWTH_INTERVAL {
            self.good_steps = 0;
            self.scale = (2.0 * self.scale).min(MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_falls_at_once_and_rises_slowly() {
        let mut scale = LossScale::default();
        assert!(scale.overflowed());
        assert_eq!(scale.scale, FIRST / 2.0);
        (0..GROWTH_INTERVAL - 1).for_each(|_| scale.succeeded());
        assert_eq!(scale.scale, FIRST / 2.0);
        scale.succeeded();
        assert_eq!((scale.scale, scale.good_steps), (FIRST, 0));
    }

    #[test]
    fn it_gives_up_below_one() {
        let mut scale = LossScale::default();
        let halvings = (0..100).take_while(|_| scale.overflowed()).count();
        assert_eq!(halvings, 16);
    }
}
