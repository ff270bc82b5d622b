//! Is this file a whole image? Told by its bytes, within limits, and by decoding it once to the end.

use std::fs::File;
use std::io::{BufReader, Read as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder as _, ImageFormat, ImageReader};

use super::limits::Limits;

/// What is kept of a checked image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub media_type: &'static str,
    /// As a viewer shows it: after the EXIF orientation.
    pub width_px: u32,
    pub height_px: u32,
}

/// Why a file is no image that can be trained on.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    #[error("the content is not a PNG, JPEG, WebP, BMP, GIF or TIFF image")]
    NotAnImage,
    #[error("the file ends before the image does")]
    Truncated,
    #[error("the image cannot be decoded: {0}")]
    Damaged(String),
    #[error("found {found} bytes, expected at most {limit}")]
    TooLarge { found: u64, limit: u64 },
    #[error("found {width_px} x {height_px} pixels, expected at most {limit} in all")]
    TooManyPixels {
        width_px: u32,
        height_px: u32,
        limit: u64,
    },
    #[error("reading the file: {0}")]
    Io(#[from] std::io::Error),
}

impl PictureError {
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotAnImage => "not_an_image",
            Self::Truncated => "truncated",
            Self::Damaged(_) => "damaged",
            Self::TooLarge { .. } => "too_large",
            Self::TooManyPixels { .. } => "too_many_pixels",
            Self::Io(_) => "unreadable",
        }
    }
}

/// The format of an image by its first bytes; `None` for what is no image we decode.
pub fn format_of(head: &[u8]) -> Option<ImageFormat> {
    image::guess_format(head)
        .ok()
        .filter(|format| media_type(*format).is_some())
}

fn media_type(format: ImageFormat) -> Option<&'static str> {
    match format {
        ImageFormat::Png => Some("image/png"),
        ImageFormat::Jpeg => Some("image/jpeg"),
        ImageFormat::WebP => Some("image/webp"),
        ImageFormat::Bmp => Some("image/bmp"),
        ImageFormat::Gif => Some("image/gif"),
        ImageFormat::Tiff => Some("image/tiff"),
        _ => None,
    }
}

/// Checks and decodes one file.
///
/// # Errors
/// With the reason, when the file is not a whole image within the limits.
pub fn check(path: &Path, limits: &Limits) -> Result<Picture, PictureError> {
    let found = std::fs::metadata(path)?.len();
    if found > limits.image_bytes {
        return Err(PictureError::TooLarge {
            found,
            limit: limits.image_bytes,
        });
    }
    let mut head = Vec::new();
    File::open(path)?.take(64).read_to_end(&mut head)?;
    let format = format_of(&head).ok_or(PictureError::NotAnImage)?;
    if !is_complete(format, &std::fs::read(path)?) {
        return Err(PictureError::Truncated);
    }
    // The decoders are safe Rust, but a strange file may still trip an assertion in them.
    catch_unwind(AssertUnwindSafe(|| decode(path, format, limits)))
        .unwrap_or_else(|_| Err(PictureError::Damaged("the decoder gave up".to_owned())))
}

fn decode(path: &Path, format: ImageFormat, limits: &Limits) -> Result<Picture, PictureError> {
    let mut reader = ImageReader::with_format(BufReader::new(File::open(path)?), format);
    let mut decode_limits = image::Limits::default();
    decode_limits.max_alloc = Some(limits.image_pixels.saturating_mul(16)); // RGBA in 32-bit floats is the widest
    reader.limits(decode_limits);
    let mut decoder = reader.into_decoder().map_err(damage)?;
    let (width_px, height_px) = decoder.dimensions();
    if u64::from(width_px) * u64::from(height_px) > limits.image_pixels {
        return Err(PictureError::TooManyPixels {
            width_px,
            height_px,
            limit: limits.image_pixels,
        });
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let pixels = DynamicImage::from_decoder(decoder).map_err(damage)?;
    let turned = matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    );
    let (width_px, height_px) = if turned {
        (pixels.height(), pixels.width())
    } else {
        (pixels.width(), pixels.height())
    };
    let media_type = media_type(format).ok_or(PictureError::NotAnImage)?;
    Ok(Picture {
        media_type,
        width_px,
        height_px,
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

/// Decoders fill in what is missing at the end of some formats; their containers tell whether anything is.
fn is_complete(format: ImageFormat, bytes: &[u8]) -> bool {
    match format {
        ImageFormat::Jpeg => jpeg_is_complete(bytes).unwrap_or(false),
        ImageFormat::Png => png_is_complete(bytes).unwrap_or(false),
        ImageFormat::WebP => webp_is_complete(bytes).unwrap_or(false),
        _ => true,
    }
}

/// Walks the segments to the end-of-image marker. Thumbnails inside of segments are skipped with them.
fn jpeg_is_complete(bytes: &[u8]) -> Option<bool> {
    let mut at = 2; // after the start of the image
    loop {
        while *bytes.get(at)? != 0xff {
            at += 1; // entropy-coded data, or padding between segments
        }
        while *bytes.get(at)? == 0xff {
            at += 1;
        }
        match *bytes.get(at)? {
            0xd9 => return Some(true),
            0x00 | 0x01 | 0xd0..=0xd8 => at += 1, // a stuffed byte, or a marker without a length
            _ => {
                let length = [*bytes.get(at + 1)?, *bytes.get(at + 2)?];
                at += 1 + usize::from(u16::from_be_bytes(length));
            }
        }
    }
}

/// Walks the chunks to `IEND`.
fn png_is_complete(bytes: &[u8]) -> Option<bool> {
    let mut at = 8_usize; // after the signature
    loop {
        let header = bytes.get(at..at.checked_add(8)?)?;
        let length = u32::from_be_bytes(header[..4].try_into().ok()?) as usize;
        at = at.checked_add(12)?.checked_add(length)?; // length, kind, content, checksum
        if &header[4..] == b"IEND" {
            return Some(at <= bytes.len());
        }
    }
}

fn webp_is_complete(bytes: &[u8]) -> Option<bool> {
    let size = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?) as usize;
    Some(bytes.len() >= size.checked_add(8)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::RgbImage;
    use std::io::Cursor;

    fn picture() -> RgbImage {
        RgbImage::from_fn(40, 30, |x, y| {
            image::Rgb([(x * 6) as u8, (y * 8) as u8, (x * y % 251) as u8])
        })
    }

    fn encoded(format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture().write_to(&mut bytes, format).expect("an encoder");
        bytes.into_inner()
    }

    fn checked(bytes: &[u8], limits: &Limits) -> Result<Picture, PictureError> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        check(file.path(), limits)
    }

    const FORMATS: [ImageFormat; 6] = [
        ImageFormat::Png,
        ImageFormat::Jpeg,
        ImageFormat::WebP,
        ImageFormat::Bmp,
        ImageFormat::Gif,
        ImageFormat::Tiff,
    ];

    #[test]
    fn whole_images_are_measured() {
        for format in FORMATS {
            let picture = checked(&encoded(format), &Limits::default()).expect("a whole image");
            assert_eq!(
                (picture.width_px, picture.height_px),
                (40, 30),
                "{format:?}"
            );
            assert_eq!(Some(picture.media_type), media_type(format));
        }
    }

    #[test]
    fn cut_images_are_refused() {
        for format in FORMATS {
            let bytes = encoded(format);
            for keep in [bytes.len() / 4, bytes.len() / 2, bytes.len() * 9 / 10] {
                let error = checked(&bytes[..keep], &Limits::default()).expect_err("a cut image");
                assert!(
                    matches!(error, PictureError::Truncated | PictureError::Damaged(_)),
                    "{format:?}: {error}"
                );
            }
        }
        let jpeg = encoded(ImageFormat::Jpeg);
        let cut =
            checked(&jpeg[..jpeg.len() - 2], &Limits::default()).expect_err("without its end");
        assert!(matches!(cut, PictureError::Truncated), "{cut}");
    }

    #[test]
    fn limits_and_foreign_content_are_refused() {
        let png = encoded(ImageFormat::Png);
        let few_pixels = Limits {
            image_pixels: 1000,
            ..Limits::default()
        };
        assert!(matches!(
            checked(&png, &few_pixels),
            Err(PictureError::TooManyPixels { width_px: 40, .. })
        ));
        let few_bytes = Limits {
            image_bytes: 10,
            ..Limits::default()
        };
        assert!(matches!(
            checked(&png, &few_bytes),
            Err(PictureError::TooLarge { .. })
        ));
        for bytes in [b"".as_slice(), b"hello", b"\x89PN", b"%PDF-1.7"] {
            assert!(
                matches!(
                    checked(bytes, &Limits::default()),
                    Err(PictureError::NotAnImage)
                ),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn a_turned_image_has_its_sides_swapped() {
        // a JPEG with an APP1 segment that says orientation 6 (rotate by 90 degrees)
        let jpeg = encoded(ImageFormat::Jpeg);
        let exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let mut turned = jpeg[..2].to_vec();
        turned.extend([0xff, 0xe1]);
        turned.extend(((exif.len() + 2) as u16).to_be_bytes());
        turned.extend(exif);
        turned.extend(&jpeg[2..]);
        let picture = checked(&turned, &Limits::default()).expect("a whole image");
        assert_eq!((picture.width_px, picture.height_px), (30, 40));
    }
}
