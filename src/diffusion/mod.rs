//! Stable Diffusion in burn.

pub mod devices;
pub mod error;
mod mapping;
mod text_fix;
pub mod tokenizer;
pub mod weights;

pub use error::LoadError;
pub use tokenizer::{Padding, Tokenizer};
pub use weights::{KeySource, LoadOptions, Weights, WeightsAt};
