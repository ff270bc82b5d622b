//! A picture as the vision model sees it: `BlipImageProcessor` of transformers.

use std::path::Path;

use image::RgbImage;
use serde::Deserialize;

use crate::diffusion::LoadError;
use crate::diffusion::config::read_json;
use crate::pictures::pillow::{self, Filter};

/// Pillow's number of the bicubic filter.
const BICUBIC: u32 = 3;

/// `preprocessor_config.json`
#[derive(Clone, Debug)]
pub struct Processor {
    width: u32,
    height: u32,
    scale: f64,
    mean: [f32; 3],
    std: [f32; 3],
}

/// The file. What is absent is CLIP's.
#[derive(Deserialize)]
#[serde(default)]
struct Stored {
    do_resize: bool,
    do_rescale: bool,
    do_normalize: bool,
    size: Size,
    resample: u32,
    rescale_factor: f64,
    image_mean: [f64; 3],
    image_std: [f64; 3],
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Square(u32),
    Sides { width: u32, height: u32 },
}

impl Default for Stored {
    fn default() -> Self {
        Self {
            do_resize: true,
            do_rescale: true,
            do_normalize: true,
            size: Size::Square(384),
            resample: BICUBIC,
            rescale_factor: 1.0 / 255.0,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
        }
    }
}

impl Processor {
    /// Reads the file; the pictures must be as large as the model takes them.
    ///
    /// # Errors
    /// When it cannot be read, or asks for something else than a bicubic resize to `side`.
    pub fn load(path: &Path, side: usize) -> Result<Self, LoadError> {
        let stored: Stored = read_json(path)?;
        Self::of(&stored, side).map_err(|reason| LoadError::config(path, reason))
    }

    fn of(stored: &Stored, side: usize) -> Result<Self, String> {
        let (width, height) = match stored.size {
            Size::Square(side) => (side, side),
            Size::Sides { width, height } => (width, height),
        };
        if (width as usize, height as usize) != (side, side) {
            return Err(format!(
                "size is {width}x{height}, expected {side}x{side} as in config.json"
            ));
        }
        if !stored.do_resize || stored.resample != BICUBIC {
            return Err(format!(
                "do_resize is {} and resample {}, expected true and {BICUBIC} (bicubic)",
                stored.do_resize, stored.resample
            ));
        }
        if stored.image_std.iter().any(|std| *std as f32 == 0.0) {
            return Err("image_std has a zero".to_owned());
        }
        let (mean, std) = if stored.do_normalize {
            (stored.image_mean, stored.image_std)
        } else {
            ([0.0; 3], [1.0; 3])
        };
        Ok(Self {
            width,
            height,
            scale: if stored.do_rescale {
                stored.rescale_factor
            } else {
                1.0
            },
            mean: mean.map(|value| value as f32),
            std: std.map(|value| value as f32),
        })
    }

    /// `[3, height, width]`; none for a picture without pixels.
    pub fn pixels(&self, picture: &RgbImage) -> Vec<f32> {
        let resized = pillow::resize(picture, self.width, self.height, Filter::Bicubic);
        let plane = (self.width * self.height) as usize;
        let mut values = vec![0.0; 3 * plane];
        for (index, pixel) in resized.pixels().enumerate() {
            for (channel, value) in pixel.0.into_iter().enumerate() {
                let value = (f64::from(value) * self.scale) as f32;
                values[channel * plane + index] = (value - self.mean[channel]) / self.std[channel];
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str, side: usize) -> Result<Processor, String> {
        let stored: Stored = serde_json::from_str(json).map_err(|error| error.to_string())?;
        Processor::of(&stored, side)
    }

    #[test]
    fn both_ways_to_write_the_size_are_read() {
        let square = read(r#"{"size": 384}"#, 384).unwrap();
        let sides = read(r#"{"size": {"height": 384, "width": 384}}"#, 384).unwrap();
        assert_eq!((square.width, sides.height), (384, 384));
    }

    #[test]
    fn what_would_be_another_picture_is_refused() {
        for (json, word) in [
            (r#"{"size": 224}"#, "224x224"),
            (r#"{"size": {"shortest_edge": 384}}"#, "Size"),
            (r#"{"resample": 2}"#, "bicubic"),
            (r#"{"do_resize": false}"#, "do_resize"),
            (r#"{"image_std": [1, 0, 1]}"#, "image_std"),
        ] {
            let message = read(json, 384).unwrap_err();
            assert!(message.contains(word), "{json}: {message}");
        }
    }
}
