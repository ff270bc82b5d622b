//! What is measured of a picture, once for its content: how sharp and how bright it is, what it looks like, where its
//! edges are.

use std::panic::catch_unwind;
use std::path::Path;

use image::RgbImage;
use image_hasher::{HashAlg, HasherConfig};
use serde::{Deserialize, Serialize};

use super::thumbnails::fit_within;
use crate::dataloader::{Energy, Tones, decode, resize};

/// Another number when the same picture would be measured otherwise.
pub const FORMAT: i32 = 1;
/// Sharpness is compared at this size; a smaller picture is measured as it is.
const COMMON_SIDE_PX: u32 = 512;
/// Side of the copy that tells pictures of another colour apart.
const TINY_SIDE_PX: u32 = 4;

/// What became of measuring a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measured {
    /// It was measured.
    Whole(Box<Measures>),
    /// It cannot be decoded, and why.
    Unreadable(String),
}

/// Numbers about one picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Perceptual hash: signs of the lowest 8 × 8 frequencies about their median.
    pub phash: u64,
    /// A copy of 4 × 4 pixels, red, green, blue: the hash knows no colours.
    pub tiny: Vec<u8>,
    /// Variance of the Laplacian of the brightness, at 512 pixels on the longer side.
    pub sharpness: f64,
    /// Brightness that 5 % of the pixels do not reach, 0 to 255.
    pub darkest: u8,
    /// Brightness that 5 % of the pixels exceed.
    pub brightest: u8,
    /// Medians of red, green and blue.
    pub medians: [u8; 3],
    /// Where the edges are.
    pub energy: Energy,
}

impl Measured {
    /// Decodes and measures a file.
    pub fn of(path: &Path) -> Self {
        let measured = catch_unwind(|| {
            let picture = decode(path, None).map_err(|error| match error {
                // The file's place is ours.
                crate::dataloader::DataError::Decode { reason, .. } => reason,
                _ => "the file cannot be read".to_owned(),
            })?;
            Ok(Measures::of(&picture))
        });
        match measured {
            Ok(Ok(measures)) => Self::Whole(Box::new(measures)),
            Ok(Err(reason)) => Self::Unreadable(reason),
            Err(_) => Self::Unreadable("the decoder gave up".to_owned()),
        }
    }

    /// The numbers, where there are some.
    pub fn whole(&self) -> Option<&Measures> {
        match self {
            Self::Whole(measures) => Some(measures),
            Self::Unreadable(_) => None,
        }
    }
}

impl Measures {
    /// Of a picture.
    pub fn of(picture: &RgbImage) -> Self {
        let common = fit_within(picture.dimensions(), COMMON_SIDE_PX);
        let small = resize(picture.clone(), common);
        let tiny = small_copy(&small, TINY_SIDE_PX);
        let luma = luma(&small);
        let [darkest, brightest] = [0.05, 0.95].map(|share| quantile(&luma, share));
        Self {
            phash: perceptual_hash(&small),
            tiny: tiny.into_raw(),
            sharpness: laplacian_variance(&luma, small.width() as usize),
            darkest,
            brightest,
            medians: Tones::of(picture).medians(),
            energy: Energy::of(picture),
        }
    }
}

/// Neither side of a tiny picture may be enlarged by averaging.
fn small_copy(picture: &RgbImage, side: u32) -> RgbImage {
    resize(picture.clone(), (side, side))
}

fn perceptual_hash(picture: &RgbImage) -> u64 {
    let hasher = HasherConfig::with_bytes_type::<[u8; 8]>()
        .hash_size(8, 8)
        .hash_alg(HashAlg::Median)
        .preproc_dct()
        .to_hasher();
    u64::from_le_bytes(hasher.hash_image(picture).into_inner())
}

/// Brightness of each pixel (BT.601), 0 to 255.
fn luma(picture: &RgbImage) -> Vec<f64> {
    picture
        .pixels()
        .map(|pixel| {
            let [red, green, blue] = pixel.0.map(f64::from);
            0.299 * red + 0.587 * green + 0.114 * blue
        })
        .collect()
}

fn quantile(luma: &[f64], share: f64) -> u8 {
    let mut sorted: Vec<u8> = luma.iter().map(|value| value.round() as u8).collect();
    sorted.sort_unstable();
    let index = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(index).copied().unwrap_or_default()
}

/// The variance of `up + down + left + right − 4 · centre`; 0 where there is no inside.
fn laplacian_variance(luma: &[f64], width: usize) -> f64 {
    let height = luma.len() / width.max(1);
    let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
    for y in 1..height.saturating_sub(1) {
        for x in 1..width.saturating_sub(1) {
            let at = y * width + x;
            let around = luma[at - 1] + luma[at + 1] + luma[at - width] + luma[at + width];
            let edge = around - 4.0 * luma[at];
            sum += edge;
            squares += edge * edge;
            count += 1.0;
        }
    }
    if count == 0.0 {
        return 0.0;
    }
    let mean = sum / count;
    (squares / count - mean * mean).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgb, imageops};

    fn stripes(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let on = (x / 7 + y / 11) % 2 == 0;
            Rgb(if on { [230, 120, 40] } else { [20, 40, 60] })
        })
    }

    #[test]
    fn a_blurred_picture_is_less_sharp() {
        let sharp = Measures::of(&stripes(300, 200));
        let blurred = imageops::blur(&stripes(300, 200), 4.0);
        let blurred = Measures::of(&blurred);
        assert!(sharp.sharpness > 1000.0, "{}", sharp.sharpness);
        assert!(blurred.sharpness < 100.0, "{}", blurred.sharpness);
    }

    #[test]
    fn a_laplacian_is_worked_out_by_hand() {
        // 3 × 4: two inner pixels, and brightness in one of them alone.
        let mut luma = vec![0.0; 12];
        luma[4] = 10.0; // row 1, column 1
        // Laplacians −40 (itself) and +10 (below it): mean −15, variance 625.
        assert_eq!(laplacian_variance(&luma, 3), 625.0);
        assert_eq!(laplacian_variance(&[1.0; 4], 2), 0.0);
    }

    #[test]
    fn a_picture_of_another_size_or_quality_has_about_the_same_hash() {
        let scene = |width: u32, height: u32| {
            RgbImage::from_fn(width, height, |x, y| {
                let (x, y) = (
                    f64::from(x) / f64::from(width),
                    f64::from(y) / f64::from(height),
                );
                let wave = (9.0 * x + 4.0 * y * y).sin() * 60.0 + (5.0 * y).cos() * 50.0 + 128.0;
                Rgb([wave as u8, (wave * 0.7) as u8, 90])
            })
        };
        let hash = |picture: &RgbImage| Measures::of(picture).phash;
        let first = hash(&scene(640, 480));
        let smaller = hash(&scene(400, 300));
        assert!((first ^ smaller).count_ones() <= 4);
        let other = hash(&stripes(640, 480));
        assert!((first ^ other).count_ones() > 12);
    }

    #[test]
    fn a_file_that_is_no_picture_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.png");
        std::fs::write(&path, b"\x89PNG\r\n\x1a\nno").unwrap();
        let measured = Measured::of(&path);
        let Measured::Unreadable(reason) = &measured else {
            panic!("{measured:?}");
        };
        assert!(!reason.contains("x.png"), "{reason}");
        let json = serde_json::to_string(&measured).unwrap();
        assert_eq!(serde_json::from_str::<Measured>(&json).unwrap(), measured);
    }
}
