//! Picture files: told by their bytes, decoded within limits, turned upright, in 8-bit sRGB. Ingest checks with the same
//! decoder that training reads with, so that what was accepted can be trained on. Sizes for training are not made here.

mod alpha;
pub mod area;
mod avif;
mod colour;
mod container;
mod heif;
pub mod pillow;
#[cfg(test)]
mod tests;

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, ImageDecoder as _, ImageFormat, ImageReader, RgbImage};

pub use alpha::{Background, BackgroundError};

/// What a decoder may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Width times height.
    pub pixels: u64,
    /// The longest side.
    pub side_px: u32,
    /// Bytes of everything that one decoding holds besides the file.
    pub memory_bytes: u64,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self {
            pixels: 100_000_000,
            side_px: 65_535,
            memory_bytes: 768 << 20,
        }
    }
}

/// The formats that are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Png,
    Jpeg,
    WebP,
    Bmp,
    Gif,
    Tiff,
    Avif,
}

impl Format {
    /// Told by the first bytes; `None` for what is no picture we decode.
    pub fn of(head: &[u8]) -> Option<Self> {
        if matches!(head.get(4..12), Some(b"ftypavif" | b"ftypavis")) {
            return Some(Self::Avif);
        }
        match image::guess_format(head).ok()? {
            ImageFormat::Png => Some(Self::Png),
            ImageFormat::Jpeg => Some(Self::Jpeg),
            ImageFormat::WebP => Some(Self::WebP),
            ImageFormat::Bmp => Some(Self::Bmp),
            ImageFormat::Gif => Some(Self::Gif),
            ImageFormat::Tiff => Some(Self::Tiff),
            _ => None,
        }
    }

    pub fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::WebP => "image/webp",
            Self::Bmp => "image/bmp",
            Self::Gif => "image/gif",
            Self::Tiff => "image/tiff",
            Self::Avif => "image/avif",
        }
    }

    /// As `image` calls it; AVIF is decoded elsewhere.
    fn in_image(self) -> Option<ImageFormat> {
        match self {
            Self::Png => Some(ImageFormat::Png),
            Self::Jpeg => Some(ImageFormat::Jpeg),
            Self::WebP => Some(ImageFormat::WebP),
            Self::Bmp => Some(ImageFormat::Bmp),
            Self::Gif => Some(ImageFormat::Gif),
            Self::Tiff => Some(ImageFormat::Tiff),
            Self::Avif => None,
        }
    }
}

/// A picture as it is trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    pub format: Format,
    /// Upright, in sRGB. Where a pixel is transparent its colour is that of the file.
    pub rgb: RgbImage,
    /// How opaque each pixel is; `None` when all of them wholly are.
    pub alpha: Option<GrayImage>,
    /// In the order of the enum, each at most once.
    pub notes: Vec<Note>,
}

/// What was done to a picture, or left out of it, besides decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Note {
    #[error("the colours were converted from the file's colour profile to sRGB")]
    ConvertedToSrgb,
    #[error("the file's colour profile cannot be used; its colours are taken for sRGB")]
    ProfileIgnored,
    #[error("the picture has a high dynamic range, which is converted without tone mapping")]
    HighDynamicRange,
    #[error("the file holds several pictures; the first one is used")]
    OnlyFirstFrame,
    #[error("there is something else in the file after the picture; it is not looked at")]
    TrailingBytes,
}

impl Note {
    pub const ALL: [Self; 5] = [
        Self::ConvertedToSrgb,
        Self::ProfileIgnored,
        Self::HighDynamicRange,
        Self::OnlyFirstFrame,
        Self::TrailingBytes,
    ];

    pub fn code(self) -> &'static str {
        match self {
            Self::ConvertedToSrgb => "converted_to_srgb",
            Self::ProfileIgnored => "profile_ignored",
            Self::HighDynamicRange => "high_dynamic_range",
            Self::OnlyFirstFrame => "only_first_frame",
            Self::TrailingBytes => "trailing_bytes",
        }
    }
}

/// Why bytes are no picture that can be trained on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    #[error("the content is not a PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF image")]
    NotAnImage,
    #[error("the file ends before the image does")]
    Truncated,
    #[error("the image cannot be decoded: {0}")]
    Damaged(String),
    #[error("found {width_px} x {height_px} pixels, expected at most {limit} in all")]
    TooManyPixels {
        width_px: u32,
        height_px: u32,
        limit: u64,
    },
    #[error("decoding needs {found} bytes of memory, expected at most {limit}")]
    TooMuchMemory { found: u64, limit: u64 },
}

impl PictureError {
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotAnImage => "not_an_image",
            Self::Truncated => "truncated",
            Self::Damaged(_) => "damaged",
            Self::TooManyPixels { .. } | Self::TooMuchMemory { .. } => "too_many_pixels",
        }
    }
}

impl DecodeLimits {
    /// Before anything of that size is allocated.
    fn check(
        &self,
        (width_px, height_px): (u32, u32),
        bytes_per_pixel: u64,
    ) -> Result<(), PictureError> {
        let pixels = u64::from(width_px) * u64::from(height_px);
        if pixels > self.pixels || width_px.max(height_px) > self.side_px {
            return Err(PictureError::TooManyPixels {
                width_px,
                height_px,
                limit: self.pixels,
            });
        }
        if pixels == 0 {
            return Err(PictureError::Damaged("it has no pixels".to_owned()));
        }
        let found = pixels.saturating_mul(bytes_per_pixel);
        if found > self.memory_bytes {
            let limit = self.memory_bytes;
            return Err(PictureError::TooMuchMemory { found, limit });
        }
        Ok(())
    }
}

/// Decodes a whole file.
///
/// # Errors
/// With the reason, when the bytes are not a whole picture within the limits.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<Decoded, PictureError> {
    let format = Format::of(bytes).ok_or(PictureError::NotAnImage)?;
    // The decoders are made for strange files, but one may still trip an assertion in them.
    catch_unwind(AssertUnwindSafe(|| decode_as(format, bytes, limits)))
        .unwrap_or_else(|_| Err(PictureError::Damaged("the decoder gave up".to_owned())))
}

fn decode_as(format: Format, bytes: &[u8], limits: &DecodeLimits) -> Result<Decoded, PictureError> {
    let ending = container::walk(format, bytes)?;
    let Raw {
        picture,
        profile,
        orientation,
        mut notes,
    } = match format.in_image() {
        Some(known) => raw(known, bytes, ending.is_progressive, limits)?,
        None => avif::decode(bytes, limits)?,
    };
    let mut picture = match profile {
        Some(profile) => {
            let (picture, note) = colour::to_srgb(picture, &profile);
            notes.extend(note);
            picture
        }
        None => picture,
    };
    picture.apply_orientation(orientation);
    let (rgb, alpha) = alpha::split(picture);
    if ending.has_more_frames {
        notes.push(Note::OnlyFirstFrame);
    }
    if ending.has_trailing_bytes {
        notes.push(Note::TrailingBytes);
    }
    Ok(Decoded {
        format,
        rgb,
        alpha,
        notes,
    })
}

/// What a decoder gives, before it is upright and in sRGB.
struct Raw {
    picture: DynamicImage,
    profile: Option<colour::Profile>,
    orientation: Orientation,
    notes: Vec<Note>,
}

fn raw(
    format: ImageFormat,
    bytes: &[u8],
    is_progressive: bool,
    limits: &DecodeLimits,
) -> Result<Raw, PictureError> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut decoder_limits = image::Limits::default();
    decoder_limits.max_alloc = Some(limits.memory_bytes);
    reader.limits(decoder_limits);
    let mut decoder = reader.into_decoder().map_err(damage)?;
    let size = decoder.dimensions();
    // The decoder's own picture and ours; of a progressive JPEG also every coefficient.
    let own = u64::from(decoder.color_type().bytes_per_pixel()) + 4;
    limits.check(size, own + if is_progressive { 6 } else { 0 })?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let (profile, notes) = match decoder.icc_profile() {
        Ok(Some(icc)) => match colour::Profile::from_icc(&icc) {
            Some(profile) => (Some(profile), Vec::new()),
            None => (None, vec![Note::ProfileIgnored]),
        },
        Ok(None) => (None, Vec::new()),
        Err(_) => (None, vec![Note::ProfileIgnored]),
    };
    let picture = DynamicImage::from_decoder(decoder).map_err(damage)?;
    Ok(Raw {
        picture,
        profile,
        orientation,
        notes,
    })
}

fn damage(error: image::ImageError) -> PictureError {
    match error {
        image::ImageError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof => {
            PictureError::Truncated
        }
        other => PictureError::Damaged(other.to_string()),
    }
}
