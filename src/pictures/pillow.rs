//! Pillow's resize of 8-bit pictures, to the bit: the filter grows with the scale (antialiasing), weights are fixed-point
//! numbers, and what one direction gives is rounded to 8 bits before the other.

use image::RgbImage;
use rayon::prelude::*;

/// Bits of a weight behind the point: 32, less 8 of a pixel and 2 for sums beyond its range.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// What pixels are weighed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Bicubic,
    /// With three lobes.
    Lanczos,
}

impl Filter {
    /// How far it reaches at scale 1.
    fn support(self) -> f64 {
        match self {
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Bicubic => cubic(x),
            Self::Lanczos => lanczos(x),
        }
    }
}

/// What one pixel of the result is made of.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// The picture at another size; black when it has no pixels.
pub fn resize(picture: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    if picture.width() == 0 || picture.height() == 0 || width == 0 || height == 0 {
        return RgbImage::new(width, height);
    }
    // Pillow 13 begins with the columns where the height shrinks by much more than the width; earlier ones never do.
    let [by_width, by_height] = [
        i64::from(picture.width()) - i64::from(width),
        i64::from(picture.height()) - i64::from(height),
    ];
    if by_height > (2 * by_width).max(0) {
        across(&down(picture, height, filter), width, filter)
    } else {
        down(&across(picture, width, filter), height, filter)
    }
}

/// The picture at another width.
fn across(picture: &RgbImage, width: u32, filter: Filter) -> RgbImage {
    if picture.width() == width {
        return picture.clone();
    }
    let mut resized = RgbImage::new(width, picture.height());
    let (from, to) = (picture.width() as usize * 3, width as usize * 3);
    let taps = taps(picture.width() as usize, width as usize, filter);
    let rows = resized.par_chunks_exact_mut(to);
    rows.zip(picture.as_raw().par_chunks_exact(from))
        .for_each(|(to, from)| {
            for (pixel, taps) in to.chunks_exact_mut(3).zip(&taps) {
                for (channel, value) in pixel.iter_mut().enumerate() {
                    let from = from[taps.first * 3 + channel..].iter().step_by(3);
                    *value = weighted(from, &taps.weights);
                }
            }
        });
    resized
}

/// The picture at another height.
fn down(picture: &RgbImage, height: u32, filter: Filter) -> RgbImage {
    if picture.height() == height {
        return picture.clone();
    }
    let mut resized = RgbImage::new(picture.width(), height);
    let row = picture.width() as usize * 3;
    let taps = taps(picture.height() as usize, height as usize, filter);
    let rows = resized.par_chunks_exact_mut(row).zip(&taps);
    rows.for_each(|(to, taps)| {
        for (column, value) in to.iter_mut().enumerate() {
            let from = picture.as_raw()[taps.first * row + column..].iter();
            *value = weighted(from.step_by(row), &taps.weights);
        }
    });
    resized
}

fn weighted<'a>(values: impl Iterator<Item = &'a u8>, weights: &[i32]) -> u8 {
    let half = 1 << (PRECISION_BITS - 1);
    let sum = values.zip(weights).fold(half, |sum: i32, (value, weight)| {
        sum + i32::from(*value) * weight
    });
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    (0..to)
        .map(|place| {
            let center = (place as f64 + 0.5) * scale;
            // Casts truncate and saturate, as Pillow's do after its comparison with zero.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let weights: Vec<f64> = (first..end)
                .map(|at| filter.weight((at as f64 - center + 0.5) * (1.0 / stretch)))
                .collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |weight: &f64| {
                let weight = weight / sum * f64::from(1 << PRECISION_BITS);
                (weight + 0.5_f64.copysign(weight)) as i32
            };
            Taps {
                first,
                weights: weights.iter().map(fixed).collect(),
            }
        })
        .collect()
}

/// Keys' cubic with a = -0.5 (Catmull-Rom).
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// The sine cardinal, windowed by its own middle.
fn lanczos(x: f64) -> f64 {
    let sinc = |x: f64| match x * std::f64::consts::PI {
        0.0 => 1.0,
        x => x.sin() / x,
    };
    if (-3.0..3.0).contains(&x) {
        sinc(x) * sinc(x / 3.0)
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_picture_stays_uniform_at_any_size() {
        let picture = RgbImage::from_pixel(37, 91, image::Rgb([255, 128, 3]));
        let sizes = [(37, 91), (1, 1), (384, 384), (91, 37)];
        for (filter, (width, height)) in [Filter::Bicubic, Filter::Lanczos]
            .into_iter()
            .flat_map(|filter| sizes.map(|size| (filter, size)))
        {
            let resized = resize(&picture, width, height, filter);
            assert!(resized.pixels().all(|pixel| pixel.0 == [255, 128, 3]));
            assert_eq!(resized.dimensions(), (width, height));
        }
    }

    #[test]
    fn a_picture_without_pixels_is_no_panic() {
        assert_eq!(
            resize(&RgbImage::new(0, 5), 4, 4, Filter::Lanczos).dimensions(),
            (4, 4)
        );
    }
}
