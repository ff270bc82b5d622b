//! Colour correction: recipes that are worked out from a picture's own colours each time it is decoded. The file is
//! never changed.
//!
//! Each recipe is a table from old to new values of each channel, made of the histograms of the whole picture.

use image::RgbImage;
use serde::{Deserialize, Serialize};

/// The share of values, of all channels together, that may be clipped at either end by [`ColorCorrection::AutoLevels`].
const CLIPPED: f64 = 0.005;
/// Levels closer together than this are left alone: there is nothing to spread but noise.
const LEAST_SPREAD: usize = 32;
/// A channel is made at most this much stronger or weaker.
const MOST_GAIN: f64 = 2.0;

/// What is done to a picture's colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColorCorrection {
    /// Spreads the values to the whole range, all channels alike: hues stay.
    AutoLevels,
    /// Scales the channels to the same mean: the world is grey on average.
    GreyWorld,
    /// Bends each channel so that its median is that of the set.
    MatchMedian,
}

/// The colours of a picture: a histogram of each channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tones([[u32; 256]; 3]);

/// New values of red, green and blue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables([[u8; 256]; 3]);

impl Tones {
    /// Of a whole picture.
    pub fn of(picture: &RgbImage) -> Self {
        let mut tones = [[0; 256]; 3];
        for pixel in picture.pixels() {
            for (channel, value) in tones.iter_mut().zip(pixel.0) {
                channel[usize::from(value)] += 1;
            }
        }
        Self(tones)
    }

    /// The median of red, green and blue.
    pub fn medians(&self) -> [u8; 3] {
        self.0.each_ref().map(|channel| {
            let total: u64 = channel.iter().map(|count| u64::from(*count)).sum();
            let mut seen = 0;
            let median = channel.iter().position(|count| {
                seen += u64::from(*count);
                2 * seen >= total
            });
            byte(median.unwrap_or_default() as f64)
        })
    }

    fn means(&self) -> [f64; 3] {
        self.0.each_ref().map(|channel| {
            let (mut sum, mut total) = (0_u64, 0_u64);
            for (value, count) in (0_u64..).zip(channel) {
                sum += value * u64::from(*count);
                total += u64::from(*count);
            }
            sum as f64 / total.max(1) as f64
        })
    }

    /// The lowest and highest value that stay inside of the range.
    fn levels(&self) -> (usize, usize) {
        let count = |value: usize| -> u64 {
            let channels = self.0.iter().map(|channel| u64::from(channel[value]));
            channels.sum()
        };
        let total: u64 = (0..256).map(count).sum();
        let allowed = (total as f64 * CLIPPED) as u64;
        let end = |values: &[usize]| {
            let mut cut = 0;
            let found = values.iter().find(|value| {
                cut += count(**value);
                cut > allowed
            });
            found.copied()
        };
        let rising: Vec<usize> = (0..256).collect();
        let falling: Vec<usize> = (0..256).rev().collect();
        let (low, high) = (end(&rising).unwrap_or(0), end(&falling).unwrap_or(255));
        (low, high)
    }
}

/// The median of many pictures' medians, channel by channel: what [`ColorCorrection::MatchMedian`] brings them to. The
/// order of the pictures does not matter.
pub fn set_median(medians: &[[u8; 3]]) -> [u8; 3] {
    std::array::from_fn(|channel| {
        let mut values: Vec<u8> = medians.iter().map(|median| median[channel]).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(128)
    })
}

impl ColorCorrection {
    /// Its name, as settings and keys of caches have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AutoLevels => "auto_levels",
            Self::GreyWorld => "grey_world",
            Self::MatchMedian => "match_median",
        }
    }

    /// The tables for a picture of these colours; `target` is the set's median.
    pub fn tables(self, tones: &Tones, target: [u8; 3]) -> Tables {
        match self {
            Self::AutoLevels => {
                let (low, high) = tones.levels();
                if high < low + LEAST_SPREAD {
                    return Tables::of(|_, value| value);
                }
                let scale = 255.0 / (high - low) as f64;
                Tables::of(|_, value| (value - low as f64) * scale)
            }
            Self::GreyWorld => {
                let means = tones.means();
                let grey = means.iter().sum::<f64>() / 3.0;
                let gains = means.map(|mean| gain(grey / mean.max(1.0)));
                Tables::of(|channel, value| value * gains[channel])
            }
            Self::MatchMedian => {
                let medians = tones.medians();
                let powers: [f64; 3] = std::array::from_fn(|channel| {
                    let inside = |value: u8| f64::from(value.clamp(1, 254)) / 255.0;
                    gain(inside(target[channel]).ln() / inside(medians[channel]).ln())
                });
                Tables::of(|channel, value| 255.0 * (value / 255.0).powf(powers[channel]))
            }
        }
    }
}

fn gain(wanted: f64) -> f64 {
    wanted.clamp(1.0 / MOST_GAIN, MOST_GAIN)
}

impl Tables {
    fn of(value: impl Fn(usize, f64) -> f64) -> Self {
        Self(std::array::from_fn(|channel| {
            std::array::from_fn(|old| byte(value(channel, old as f64)))
        }))
    }

    /// Changes a picture.
    pub fn apply(&self, picture: &mut RgbImage) {
        for pixel in picture.pixels_mut() {
            for (value, table) in pixel.0.iter_mut().zip(&self.0) {
                *value = table[usize::from(*value)];
            }
        }
    }
}

/// Rounded, within the range.
fn byte(value: f64) -> u8 {
    value.round().clamp(0.0, 255.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    /// Values from `low` to `high`, each channel shifted.
    fn ramp(low: u8, high: u8, shift: [u8; 3]) -> RgbImage {
        RgbImage::from_fn(256, 4, |x, _| {
            let value = u32::from(low) + x * u32::from(high - low) / 255;
            Rgb(shift.map(|shift| value as u8 + shift))
        })
    }

    fn corrected(picture: &RgbImage, recipe: ColorCorrection, target: [u8; 3]) -> RgbImage {
        let mut changed = picture.clone();
        recipe
            .tables(&Tones::of(picture), target)
            .apply(&mut changed);
        changed
    }

    #[test]
    fn auto_levels_spread_a_flat_picture_and_keep_a_full_one() {
        let flat = corrected(&ramp(60, 180, [0; 3]), ColorCorrection::AutoLevels, [0; 3]);
        let values = || flat.pixels().map(|pixel| pixel.0[0]);
        assert_eq!((values().min(), values().max()), (Some(0), Some(255)));
        let full = ramp(0, 255, [0; 3]);
        let kept = corrected(&full, ColorCorrection::AutoLevels, [0; 3]);
        let moved = full.pixels().zip(kept.pixels());
        assert!(moved.clone().all(|(a, b)| a.0[0].abs_diff(b.0[0]) <= 2));
        let single = RgbImage::from_pixel(4, 4, Rgb([90, 91, 92]));
        assert_eq!(
            corrected(&single, ColorCorrection::AutoLevels, [0; 3]),
            single
        );
    }

    #[test]
    fn grey_world_takes_a_cast_away() {
        let cast = ramp(50, 150, [40, 20, 0]);
        let means = Tones::of(&corrected(&cast, ColorCorrection::GreyWorld, [0; 3])).means();
        assert!((means[0] - means[2]).abs() < 1.0 && (means[0] - means[1]).abs() < 1.0);
        assert!((means[0] - 120.0).abs() < 1.5, "{means:?}"); // the mean of 140, 120 and 100 stays
    }

    #[test]
    fn the_median_becomes_that_of_the_set() {
        let target = set_median(&[[100, 120, 90], [10, 120, 200], [200, 130, 95]]);
        assert_eq!(target, [100, 120, 95]);
        let picture = ramp(60, 160, [0, 10, 20]);
        let medians =
            Tones::of(&corrected(&picture, ColorCorrection::MatchMedian, target)).medians();
        for (found, wanted) in medians.into_iter().zip(target) {
            assert!(found.abs_diff(wanted) <= 1, "{medians:?}");
        }
        // No picture is bent out of all recognition.
        let dark = RgbImage::from_pixel(4, 4, Rgb([0; 3]));
        let bent = corrected(&dark, ColorCorrection::MatchMedian, [200; 3]);
        assert_eq!(bent, dark);
    }

    #[test]
    fn medians_are_counted() {
        let picture = RgbImage::from_fn(5, 1, |x, _| Rgb([[9, 1, 5, 3, 7][x as usize], 4, 255]));
        assert_eq!(Tones::of(&picture).medians(), [5, 4, 255]);
    }
}
