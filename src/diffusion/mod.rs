//! Stable Diffusion in burn.

pub mod devices;
pub mod error;
mod mapping;
pub mod weights;

pub use error::LoadError;
pub use weights::{KeySource, LoadOptions, Weights, WeightsAt};
