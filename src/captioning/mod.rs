//! Captions made by models: pictures in, text out.

pub mod blip;
pub mod error;

pub use error::{CaptionError, MissingModel};
