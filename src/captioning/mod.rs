//! Captions made by models: pictures in, text out.

pub mod blip;
pub mod catalog;
pub mod compose;
pub mod error;
pub mod picture;
pub mod taggers;

pub use catalog::{CaptionModel, Captioner, CaptionerCatalog};
pub use compose::{CaptionMode, Composed, Composer, Made};
pub use error::{CaptionError, MissingModel};
