//! A picture file as captioners see it: decoded within limits, upright, transparent parts white.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use image::{DynamicImage, ImageDecoder as _, ImageReader, Limits, Rgb, RgbImage};

use super::CaptionError;

/// The longest side of a picture file.
const MAX_SIDE_PX: u32 = 32_768;
/// The most memory that a decoder may take: 512 MiB hold 130 megapixels of RGBA.
const MAX_DECODE_BYTES: u64 = 512 << 20;

/// Decodes a picture by its content.
///
/// # Errors
/// [`CaptionError::Picture`].
pub fn decode(path: &Path) -> Result<RgbImage, CaptionError> {
    let io = |error: std::io::Error| CaptionError::Picture(error.to_string());
    let broken = |error: image::ImageError| CaptionError::Picture(error.to_string());
    let file = BufReader::new(File::open(path).map_err(io)?);
    let mut reader = ImageReader::new(file).with_guessed_format().map_err(io)?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE_PX);
    limits.max_image_height = Some(MAX_SIDE_PX);
    limits.max_alloc = Some(MAX_DECODE_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let orientation = decoder.orientation().map_err(broken)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(broken)?;
    picture.apply_orientation(orientation);
    Ok(on_white(picture))
}

/// As Pillow's `alpha_composite` on white.
fn on_white(picture: DynamicImage) -> RgbImage {
    if !picture.color().has_alpha() {
        return picture.into_rgb8();
    }
    let picture = picture.into_rgba8();
    let mut flat = RgbImage::new(picture.width(), picture.height());
    for (target, pixel) in flat.pixels_mut().zip(picture.pixels()) {
        let [red, green, blue, alpha] = pixel.0.map(u32::from);
        let mixed = |value: u32| {
            let sum = value * alpha + 255 * (255 - alpha);
            ((sum + 127) / 255) as u8 // at most 255
        };
        *target = Rgb([mixed(red), mixed(green), mixed(blue)]);
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transparent_parts_are_white() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        for alpha in [0, 100, 200, 255] {
            let pixel = image::Rgba([155, 155, 155, alpha]);
            image::RgbaImage::from_pixel(4, 4, pixel)
                .save(&path)
                .unwrap();
            let found = decode(&path).unwrap().get_pixel(1, 1).0[1];
            let exact = 255.0 - 100.0 * f32::from(alpha) / 255.0;
            assert!((f32::from(found) - exact).abs() <= 0.5, "{alpha}: {found}");
        }
        std::fs::write(&path, b"\x89PNG\r\n\x1a\nnot really").unwrap();
        assert!(matches!(decode(&path), Err(CaptionError::Picture(_))));
    }
}
