//! Captions made by models: pictures in, text out.

pub mod blip;
pub mod error;
pub mod picture;
pub mod taggers;

pub use error::{CaptionError, MissingModel};
