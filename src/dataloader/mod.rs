//! From files and captions to batches: buckets, pixels, the order of an epoch, and a cache of what pictures and
//! captions were encoded to.
//!
//! Sizes and order follow sd-scripts, so that a run here sees its pictures as a run there would. Nothing in this
//! folder knows a model.

mod augment;
mod buckets;
mod captioning;
mod correction;
mod crop;
mod epoch;
mod mask;
mod pixels;
mod tensor_cache;
mod tint;

use std::path::PathBuf;

use crate::pictures::Background;

pub use augment::Augment;
pub use buckets::{BucketSettings, Placement, crop_ltrb};
pub use captioning::{CaptionSettings, Moment};
pub use correction::{ColorCorrection, Tables, Tones, set_median};
pub use crop::{CropMode, Energy, Window};
pub use epoch::{Batch, EpochPlan};
pub use mask::{load_mask, shrink_mask};
pub use pixels::{Look, Pixels, decode, frame, load_pixels, resize};
pub use tensor_cache::{CacheKey, CacheKind, CachedTensor, TensorCache};
pub use tint::Tint;

/// One picture to train on.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingImage {
    /// Stable name of the picture.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// What of it counts in the loss, a grey picture; its transparency says so without.
    pub mask: Option<PathBuf>,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// Width as shown, after the EXIF orientation.
    pub width_px: u32,
    /// Height as shown, after the EXIF orientation.
    pub height_px: u32,
    /// What is in it, as its owner has written it: [`captioning`](Self::captioning) says what a step sees of it.
    pub caption: String,
    /// How often it appears in an epoch.
    pub repeats: u32,
    /// Whether it shows the class in general (DreamBooth's prior preservation) instead of the subject.
    pub regularization: bool,
    /// What it is laid on where it is transparent; without it the file's colours are taken.
    pub background: Option<Background>,
    /// What may be changed about it each time it is shown.
    pub augment: Augment,
    /// What is done to its colours.
    pub correction: Option<ColorCorrection>,
    /// What becomes of its caption.
    pub captioning: CaptionSettings,
}

/// Data that cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// The file is not a picture, or a broken one.
    #[error("{path}: cannot be decoded: {reason}")]
    Decode {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        reason: String,
    },
    /// The file is not the one that the plan was made for.
    #[error(
        "{path}: is {found:?} pixels and belongs into bucket {expected:?}, but was planned for {planned:?}"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Its size.
        found: (u32, u32),
        /// The bucket of that size.
        expected: (u32, u32),
        /// The bucket of the plan.
        planned: (u32, u32),
    },
    /// A bucket setting that makes no sense.
    #[error("`{field}` {message}")]
    Settings {
        /// The field of [`BucketSettings`].
        field: &'static str,
        /// What was found and what was expected.
        message: String,
    },
    /// There is nothing to train on.
    #[error("there is no picture to train on besides regularization pictures")]
    Empty,
}
