//! What the trainer will see of a dataset's pictures, and what speaks against training on them: previews, thumbnails,
//! measures of each picture, and the report before training.
//!
//! Sizes, crops and colours are made by `dataloader`, as in a run. Everything that decodes pictures runs beside the
//! threads that answer requests, a few at a time, and is kept by content.

mod error;
mod measures;
mod preview;
pub mod report;
mod service;
mod thumbnails;

pub use error::PreparationError;
pub use measures::{Measured, Measures};
pub use preview::Seen;
pub use service::{Planned, PreparationService, Rendering};
pub use thumbnails::{MAX_SIDE_PX, MIN_SIDE_PX, Thumbnail};

use crate::dataloader::ColorCorrection;
use crate::store::datasets::Correction;

/// What rows say of colours, for whoever decodes pictures.
pub fn color_correction(said: Option<Correction>) -> Option<ColorCorrection> {
    match said? {
        Correction::Off => None,
        Correction::AutoLevels => Some(ColorCorrection::AutoLevels),
        Correction::GreyWorld => Some(ColorCorrection::GreyWorld),
        Correction::MatchMedian => Some(ColorCorrection::MatchMedian),
    }
}
