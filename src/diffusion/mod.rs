//! Stable Diffusion in burn.

pub mod attention;
pub mod conditioning;
pub mod config;
pub mod device_memory;
pub mod devices;
mod emphasis;
pub mod error;
mod files;
mod formats;
mod kinds;
pub mod layers;
pub mod ldm;
mod mapping;
pub mod model;
mod pickle;
pub mod resnet;
pub mod samplers;
pub mod schedule;
mod scheduler_config;
pub mod segments;
pub mod source;
#[cfg(test)]
mod testing;
pub mod text_encoder;
mod text_fix;
pub mod tokenizer;
pub mod transformer;
pub mod unet;
mod unet_pass;
pub mod vae;
mod vae_source;
pub mod vendor;
pub mod weights;

pub use crate::kernels::{Precision, instruction_set};
pub use conditioning::{
    CaptionTokens, Condition, ConditionGradients, TextStates, TimeIds, WeightedTokens,
};
pub use error::LoadError;
pub use model::{Family, Footprint, Layout, ModelInfo, Part, StableDiffusion, StoredTensor};
pub use samplers::SamplerKind;
pub use schedule::NoiseSchedule;
pub use segments::Keep;
pub use source::FILE_ENDINGS;
pub use tokenizer::{Padding, Tokenizer};
pub use vae_source::VaeInfo;
pub use weights::{KeySource, LoadOptions, Weights, WeightsAt};

use serde::{Deserialize, Serialize};

/// What the UNet was trained to predict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise.
    #[default]
    Epsilon,
    /// The velocity `√ᾱ ε − √(1−ᾱ) x₀`.
    VPrediction,
}
