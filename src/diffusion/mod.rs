//! Stable Diffusion in burn.

pub mod attention;
pub mod config;
pub mod devices;
pub mod error;
pub mod layers;
mod mapping;
pub mod resnet;
pub mod text_encoder;
mod text_fix;
pub mod tokenizer;
pub mod transformer;
pub mod unet;
pub mod vae;
pub mod weights;

pub use error::LoadError;
pub use tokenizer::{Padding, Tokenizer};
pub use weights::{KeySource, LoadOptions, Weights, WeightsAt};

#[cfg(test)]
mod testing;
