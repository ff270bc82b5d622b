//! Transparency: split off a picture, and laid on a colour.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use image::{DynamicImage, GrayImage, RgbImage};

use super::Decoded;

/// The colour that transparent pictures are laid on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Background(pub [u8; 3]);

/// A text that is no colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a colour as #rrggbb, such as #ffffff")]
pub struct BackgroundError;

impl FromStr for Background {
    type Err = BackgroundError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix('#').ok_or(BackgroundError)?;
        let mut colour = [0; 3];
        hex::decode_to_slice(digits, &mut colour).map_err(|_| BackgroundError)?;
        Ok(Self(colour))
    }
}

impl fmt::Display for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", hex::encode(self.0))
    }
}

impl Decoded {
    /// The picture without transparency: laid on a colour, or with the colours that the file has under it, as sd-scripts
    /// (`convert("RGB")`) takes them.
    pub fn flatten(self, background: Option<Background>) -> RgbImage {
        let Self { mut rgb, alpha, .. } = self;
        if let (Some(alpha), Some(Background(colour))) = (alpha, background) {
            for (pixel, alpha) in rgb.pixels_mut().zip(alpha.pixels()) {
                let opaque = u32::from(alpha.0[0]);
                for (value, under) in pixel.0.iter_mut().zip(colour) {
                    let sum = u32::from(*value) * opaque + u32::from(under) * (255 - opaque);
                    *value = ((sum + 127) / 255) as u8; // a weighted mean of bytes is a byte
                }
            }
        }
        rgb
    }
}

/// Colours and, if any pixel is not wholly opaque, alpha.
pub fn split(picture: DynamicImage) -> (RgbImage, Option<GrayImage>) {
    if !picture.color().has_alpha() {
        return (picture.into_rgb8(), None);
    }
    let both = picture.into_rgba8();
    let (width, height) = both.dimensions();
    let alpha = both.pixels().any(|pixel| pixel.0[3] < 255).then(|| {
        GrayImage::from_fn(width, height, |x, y| {
            image::Luma([both.get_pixel(x, y).0[3]])
        })
    });
    (DynamicImage::ImageRgba8(both).into_rgb8(), alpha)
}
