//! Is this file a picture that can be trained on? Told by decoding it once to the end, as training will.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::limits::Limits;
use super::report::Remark;
use super::trial::{Trial, TrialError};
use crate::pictures::{self, DecodeLimits, Decoded, Format};

/// Files from this size on are decoded one at a time, so that many of them need no more memory than one.
const LARGE_PIXELS: u64 = 24_000_000;
static ONE_LARGE: Mutex<()> = Mutex::new(());

/// What is kept of a checked picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub media_type: &'static str,
    /// As a viewer shows it: after the EXIF orientation.
    pub width_px: u32,
    pub height_px: u32,
    /// Whether any pixel is not wholly opaque.
    pub has_alpha: bool,
    /// Of the file, lower-case hex.
    pub sha256: String,
    pub size_bytes: u64,
    /// What its owner should know.
    pub remarks: Vec<Remark>,
}

/// Why a file is no picture that can be trained on.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    #[error(transparent)]
    Undecodable(#[from] pictures::PictureError),
    #[error("found {found} bytes, expected at most {limit}")]
    TooLarge { found: u64, limit: u64 },
    #[error("{message}")]
    Refused { code: &'static str, message: String },
    #[error("reading the file: {0}")]
    Io(#[from] std::io::Error),
}

impl PictureError {
    pub fn code(&self) -> &'static str {
        match self {
            Self::Undecodable(error) => error.code(),
            Self::TooLarge { .. } => "too_large",
            Self::Refused { code, .. } => code,
            Self::Io(_) => "unreadable",
        }
    }
}

/// What can be told of a picture without its pixels; a trial sends it from process to process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    width_px: u32,
    height_px: u32,
    has_alpha: bool,
    /// Codes and sentences.
    notes: Vec<(String, String)>,
}

/// Checks and decodes one file. AVIF is tried in another process, if there is a program for it.
///
/// # Errors
/// With the reason, when the file is not a whole picture within the limits.
pub fn check(path: &Path, limits: &Limits, trial: Option<&Trial>) -> Result<Picture, PictureError> {
    let found = std::fs::metadata(path)?.len();
    if found > limits.image_bytes {
        let limit = limits.image_bytes;
        return Err(PictureError::TooLarge { found, limit });
    }
    let mut head = Vec::new();
    File::open(path)?.take(64).read_to_end(&mut head)?;
    let format = Format::of(&head).ok_or(pictures::PictureError::NotAnImage)?;
    let bytes = std::fs::read(path)?;
    let sha256 = hex::encode(Sha256::digest(&bytes)); // here, as the bytes are at hand, and on all cores
    let findings = match trial {
        Some(trial) if format == Format::Avif => tried(path, limits, trial)?,
        _ => with_pixels(&bytes, limits, |decoded| Findings::of(&decoded))?,
    };
    Ok(Picture::new(format, findings, sha256, bytes.len() as u64))
}

/// Decodes a file in this process.
///
/// # Errors
/// With the reason, when the file is not a whole picture within the limits.
pub fn examine(path: &Path, limits: &Limits) -> Result<Findings, PictureError> {
    let bytes = std::fs::read(path)?;
    with_pixels(&bytes, limits, |decoded| Findings::of(&decoded))
}

/// Does something with a decoded picture, with large ones one at a time.
///
/// # Errors
/// With the reason, when the bytes are not a whole picture within the limits.
pub(super) fn with_pixels<T>(
    bytes: &[u8],
    limits: &Limits,
    work: impl FnOnce(Decoded) -> T,
) -> Result<T, PictureError> {
    let mut decode_limits = DecodeLimits {
        pixels: limits.image_pixels.min(LARGE_PIXELS),
        ..DecodeLimits::default()
    };
    match pictures::decode(bytes, &decode_limits) {
        Err(
            pictures::PictureError::TooManyPixels { .. }
            | pictures::PictureError::TooMuchMemory { .. },
        ) => {}
        decoded => return Ok(work(decoded?)),
    }
    // It was refused before anything was allocated for it.
    let _alone = ONE_LARGE.lock().unwrap_or_else(PoisonError::into_inner);
    decode_limits.pixels = limits.image_pixels;
    Ok(work(pictures::decode(bytes, &decode_limits)?))
}

fn tried(path: &Path, limits: &Limits, trial: &Trial) -> Result<Findings, PictureError> {
    trial.examine(path, limits).map_err(|error| match error {
        TrialError::Refused { code, message } => {
            // A code is a word of ours, whatever the other process says.
            let known = ["truncated", "too_many_pixels", "not_an_image", "unreadable"];
            let code = known.into_iter().find(|known| *known == code);
            PictureError::Refused {
                code: code.unwrap_or("damaged"),
                message,
            }
        }
        TrialError::Ended(message) => PictureError::Refused {
            code: "damaged",
            message,
        },
        TrialError::Io(error) => PictureError::Io(error),
    })
}

impl Findings {
    fn of(decoded: &Decoded) -> Self {
        let notes = decoded.notes.iter();
        Self {
            width_px: decoded.rgb.width(),
            height_px: decoded.rgb.height(),
            has_alpha: decoded.alpha.is_some(),
            notes: notes
                .map(|note| (note.code().to_owned(), note.to_string()))
                .collect(),
        }
    }
}

impl Picture {
    fn new(format: Format, findings: Findings, sha256: String, size_bytes: u64) -> Self {
        let remarks = findings.notes.into_iter().filter_map(|(code, message)| {
            let code = pictures::Note::ALL
                .into_iter()
                .find(|note| note.code() == code)?
                .code();
            Some(Remark { code, message })
        });
        Self {
            media_type: format.media_type(),
            width_px: findings.width_px,
            height_px: findings.height_px,
            has_alpha: findings.has_alpha,
            sha256,
            size_bytes,
            remarks: remarks.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(bytes: &[u8], limits: &Limits) -> Result<Picture, PictureError> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        check(file.path(), limits, None)
    }

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::RgbImage::new(width, height)
            .write_to(&mut bytes, image::ImageFormat::Png)
            .expect("an encoder");
        bytes.into_inner()
    }

    #[test]
    fn a_picture_is_measured() {
        let picture = checked(&png(40, 30), &Limits::default()).expect("a whole image");
        let found = (picture.width_px, picture.height_px, picture.media_type);
        assert_eq!(found, (40, 30, "image/png"));
        assert!(!picture.has_alpha && picture.remarks.is_empty());
    }

    #[test]
    fn a_large_picture_is_taken_too() {
        let picture = checked(&png(6000, 5000), &Limits::default()).expect("a whole image");
        assert_eq!((picture.width_px, picture.height_px), (6000, 5000));
    }

    #[test]
    fn limits_hold() {
        let limits = |image_bytes, image_pixels| Limits {
            image_bytes,
            image_pixels,
            ..Limits::default()
        };
        let code = |limits| {
            let refused = checked(&png(40, 30), &limits).expect_err("refused");
            refused.code()
        };
        assert_eq!(code(limits(1 << 20, 1000)), "too_many_pixels");
        assert_eq!(code(limits(10, 1 << 20)), "too_large");
        let text = checked(b"hello", &Limits::default()).expect_err("refused");
        assert_eq!(text.code(), "not_an_image");
    }
}
