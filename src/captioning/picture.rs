//! A picture file as captioners see it: decoded within limits, upright, transparent parts white.

use std::path::Path;

use image::RgbImage;

use super::CaptionError;
use crate::pictures::{self, Background, DecodeLimits};

/// What transparent parts become.
const WHITE: Background = Background([255; 3]);

/// Decodes a picture by its content, as training does.
///
/// # Errors
/// [`CaptionError::Picture`].
pub fn decode(path: &Path) -> Result<RgbImage, CaptionError> {
    let bytes = std::fs::read(path).map_err(|error| CaptionError::Picture(error.to_string()))?;
    let picture = pictures::decode(&bytes, &DecodeLimits::default());
    let picture = picture.map_err(|error| CaptionError::Picture(error.to_string()))?;
    Ok(picture.flatten(Some(WHITE)))
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
