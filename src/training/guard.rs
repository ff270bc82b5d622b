//! What a run does when its numbers are no longer finite: it goes back to where they were, once, with half the learning
//! rates, or it fails and says what to change. Overflows of f16 are the loss scale's business, not this one's.

use std::fmt;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::networks::LoraNetwork;
use crate::training::TrainError;
use crate::training::data::read;
use crate::training::optimizer::StateDtype;
use crate::training::resume::{Part, Resumable, ResumeError, ResumePoint};
use crate::training::settings::{ComputePrecision, OnNonFinite, TrainSettings};

/// The learning rates' factor after a run has gone back.
const HALF: f64 = 0.5;

/// What was found not to be finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cause {
    /// A step's loss or gradients; nothing was updated in this step.
    Loss {
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
    },
    /// The adapters after a step.
    Weights,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loss { loss, grad_norm } => {
                write!(f, "the loss was {loss} and the gradient norm {grad_norm}")
            }
            Self::Weights => write!(f, "the adapters had values that are not finite"),
        }
    }
}

/// Numbers that are not finite, and what to do about them.
#[derive(Debug, Clone, PartialEq)]
pub struct NonFinite {
    /// The optimizer step in which they were found, from 1.
    pub step: u64,
    /// Which.
    pub cause: Cause,
    /// Learning rate of the UNet in this step.
    pub lr_unet: f64,
    /// Learning rate of the text encoder in this step.
    pub lr_text_encoder: f64,
    /// What to change, in sentences; empty until the loop knows that the run ends with this.
    pub advice: String,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, cause, .. } = self;
        write!(f, "step {step}: {cause}, expected finite numbers; ")?;
        match step.saturating_sub(1) {
            0 => write!(f, "it was the first step.")?,
            last => write!(f, "the last finite step was {last}.")?,
        }
        write!(
            f,
            " The learning rates were {:e} (UNet) and {:e} (text encoder).{}",
            self.lr_unet, self.lr_text_encoder, self.advice
        )
    }
}

impl NonFinite {
    /// With what to change in these settings.
    pub fn advised(mut self, settings: &TrainSettings, guard: &Guard) -> Self {
        let mut sentences = Vec::new();
        if let Some(back) = &guard.rolled_back {
            sentences.push(format!(
                "The run had gone back from step {} to step {} and on with half the learning rates before.",
                back.at_step, back.to_step
            ));
        }
        let mut changes = vec!["learning rates of a third or less (unet_lr, text_encoder_lr)"];
        if settings.lr_warmup_steps == 0 {
            changes.push("a warm-up (lr_warmup_steps with a scheduler that knows it)");
        }
        if settings.max_grad_norm == 0.0 || settings.max_grad_norm > 1.0 {
            changes.push("shorter gradients (max_grad_norm: 1)");
        }
        match settings.precision {
            ComputePrecision::Fp16 => {
                changes.push("precision bf16 or fp32, whose numbers are larger");
            }
            ComputePrecision::Bf16 => changes.push("precision fp32"),
            ComputePrecision::Fp32 => {}
        }
        sentences.push(format!("Try {}.", changes.join(", or ")));
        if settings.on_non_finite == OnNonFinite::Fail {
            let hint = "With on_non_finite: halve_lr a run goes back once by itself.";
            sentences.push(hint.to_owned());
        }
        self.advice = format!(" {}", sentences.join(" "));
        self
    }
}

/// That a run has gone back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolledBack {
    /// The step whose numbers were not finite.
    pub at_step: u64,
    /// The step from which it went on.
    pub to_step: u64,
    /// What was not finite.
    pub cause: String,
}

impl RolledBack {
    /// What its learning rates have been multiplied by since.
    pub fn lr_factor(&self) -> f64 {
        HALF
    }
}

impl fmt::Display for RolledBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            at_step,
            to_step,
            cause,
        } = self;
        write!(
            f,
            "at step {at_step} {cause}, so it went back to step {to_step} and on with half the learning rates"
        )
    }
}

/// Whether the run has gone back; a resume point holds that.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Guard {
    /// When and where to, if it has.
    pub rolled_back: Option<RolledBack>,
}

impl Guard {
    /// What the learning rates are multiplied by.
    pub fn lr_factor(&self) -> f64 {
        self.rolled_back.as_ref().map_or(1.0, RolledBack::lr_factor)
    }
}

impl Resumable for Guard {
    fn keep(&mut self) -> Result<Part, TrainError> {
        Ok(Part {
            values: json!({ "rolled_back": self.rolled_back }),
            tensors: Vec::new(),
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        self.rolled_back = serde_json::from_value(part.values["rolled_back"].clone())
            .map_err(|error| ResumeError::Parts(format!("guard: {error}")))?;
        Ok(())
    }
}

/// Whether every value of the adapters is finite, in one read from the device.
///
/// Squares are summed, as some shader compilers do not believe in comparisons with what is not a number. Values above
/// 1e19 count as infinite: they overflow there, and no adapter has them.
pub fn weights_are_finite(network: &LoraNetwork) -> Result<bool, TrainError> {
    let parameters = network.parameters().iter();
    let sums = parameters.map(|parameter| parameter.value.clone().square().sum());
    let sums = read(Tensor::cat(sums.collect(), 0))?;
    Ok(sums.iter().all(|sum| sum.is_finite()))
}

/// Whether all floats of a resume point are finite; they are on the host anyway. An optimizer may use infinities.
pub fn is_finite(point: &ResumePoint) -> bool {
    point.parts.iter().all(|(name, part)| {
        let mut floats = part
            .tensors
            .iter()
            .filter(|tensor| tensor.dtype == StateDtype::F32)
            .flat_map(|tensor| tensor.data.as_chunks::<4>().0)
            .map(|bytes| f32::from_le_bytes(*bytes));
        match name.as_str() {
            "optimizer" => !floats.any(f32::is_nan),
            _ => floats.all(f32::is_finite),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found() -> NonFinite {
        NonFinite {
            step: 31,
            cause: Cause::Loss {
                loss: f64::NAN,
                grad_norm: f64::INFINITY,
            },
            lr_unet: 1e-2,
            lr_text_encoder: 5e-5,
            advice: String::new(),
        }
    }

    #[test]
    fn advice_depends_on_the_settings() {
        let mut settings = TrainSettings {
            precision: ComputePrecision::Fp16,
            on_non_finite: OnNonFinite::Fail,
            ..TrainSettings::default()
        };
        let text = found().advised(&settings, &Guard::default()).to_string();
        assert_eq!(
            text,
            "step 31: the loss was NaN and the gradient norm inf, expected finite numbers; the last finite step was \
             30. The learning rates were 1e-2 (UNet) and 5e-5 (text encoder). Try learning rates of a third or less \
             (unet_lr, text_encoder_lr), or a warm-up (lr_warmup_steps with a scheduler that knows it), or precision \
             bf16 or fp32, whose numbers are larger. With on_non_finite: halve_lr a run goes back once by itself."
        );
        settings.precision = ComputePrecision::Fp32;
        settings.on_non_finite = OnNonFinite::HalveLr;
        settings.max_grad_norm = 0.0;
        let guard = Guard {
            rolled_back: Some(RolledBack {
                at_step: 20,
                to_step: 10,
                cause: Cause::Weights.to_string(),
            }),
        };
        let text = found().advised(&settings, &guard).to_string();
        for part in ["back from step 20 to step 10", "max_grad_norm: 1"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("precision") && !text.contains("halve_lr"));
    }

    #[test]
    fn a_halving_is_not_forgotten() {
        let mut guard = Guard {
            rolled_back: Some(RolledBack {
                at_step: 20,
                to_step: 10,
                cause: Cause::Weights.to_string(),
            }),
        };
        let mut resumed = Guard::default();
        assert_eq!(resumed.lr_factor(), 1.0);
        resumed
            .take_up(guard.keep().expect("a part"))
            .expect("the same");
        assert_eq!((resumed.lr_factor(), &resumed), (0.5, &guard));
    }
}
