//! What a LoRA network looks like: ranks, alphas and which halves of the model it covers.

use serde::{Deserialize, Serialize};

/// Largest rank that is accepted; well above any useful one and small enough to keep a wrong number harmless.
pub const MAX_RANK: usize = 1024;

/// Size and strength of the adapters.
///
/// The strength of an adapter is `alpha / rank`, as in sd-scripts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSettings {
    /// Rank of the adapters of linear layers and 1×1 convolutions, 1 to 1024.
    pub rank: usize,
    /// Numerator of their strength; 0 means "equal to the rank".
    pub alpha: f64,
    /// Rank of the adapters of 3×3 convolutions; without it they have none.
    pub conv_rank: Option<usize>,
    /// Numerator of their strength; 1 when only `conv_rank` is given.
    pub conv_alpha: Option<f64>,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 16.0,
            conv_rank: None,
            conv_alpha: None,
        }
    }
}

impl NetworkSettings {
    /// Rank and alpha of the 3×3 convolutions, if they are covered.
    pub fn conv(&self) -> Option<(usize, f64)> {
        self.conv_rank
            .map(|rank| (rank, self.conv_alpha.unwrap_or(1.0)))
    }

    /// The fields that make no sense, as (field name, message).
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut rank = |field, value: usize| {
            if !(1..=MAX_RANK).contains(&value) {
                problems.push((
                    field,
                    format!("is {value}, expected a whole number from 1 to {MAX_RANK}"),
                ));
            }
        };
        rank("rank", self.rank);
        if let Some(value) = self.conv_rank {
            rank("conv_rank", value);
        }
        for (field, value) in [("alpha", Some(self.alpha)), ("conv_alpha", self.conv_alpha)] {
            if let Some(value) = value.filter(|value| !value.is_finite() || *value < 0.0) {
                problems.push((
                    field,
                    format!("is {value}, expected a number of at least 0"),
                ));
            }
        }
        if self.conv_alpha.is_some() && self.conv_rank.is_none() {
            problems.push(("conv_alpha", "is given without conv_rank".to_owned()));
        }
        problems
    }
}

/// Which halves of the model get adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainParts {
    /// Adapters in the UNet.
    pub unet: bool,
    /// Adapters in the text encoder.
    pub text_encoder: bool,
}

/// Number format of a saved LoRA file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SavePrecision {
    /// As trained.
    #[default]
    Fp32,
    /// IEEE half precision: half the size, what most programs load.
    Fp16,
    /// bfloat16.
    Bf16,
}
