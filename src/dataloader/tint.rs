//! Colour augmentation as sd-scripts does it (`AugHelper.color_aug`): now and then a shift of the hue, or of the gamma.

use image::RgbImage;
use rand::{Rng, RngExt as _};

/// How often a picture's colours change.
const SHARE: f64 = 0.33;
/// The largest shift of the hue, in degrees: 8 of OpenCV's 180.
const HUE_DEG: f64 = 16.0;
/// The range of the exponent.
const GAMMA: std::ops::Range<f64> = 0.95..1.05;

/// A change of colours.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tint {
    /// All hues move by so many degrees.
    Hue(f64),
    /// `v^γ` of values from 0 to 255, cut off at 255: sd-scripts does not scale them to 1 first, so that 0.95 and 1.05
    /// darken and brighten by about a quarter.
    Gamma(f64),
}

impl Tint {
    /// A change, or none: two in three pictures stay as they are.
    pub fn draw(rng: &mut impl Rng) -> Option<Self> {
        // All three are drawn in any case.
        let (share, kind, size) = (
            rng.random::<f64>(),
            rng.random::<f64>(),
            rng.random::<f64>(),
        );
        if share > SHARE {
            None
        } else if kind > 0.5 {
            Some(Self::Hue(HUE_DEG * (2.0 * size - 1.0)))
        } else {
            Some(Self::Gamma(GAMMA.start + size * (GAMMA.end - GAMMA.start)))
        }
    }

    /// Changes a picture.
    pub fn apply(self, picture: &mut RgbImage) {
        match self {
            Self::Hue(degrees) => {
                for pixel in picture.pixels_mut() {
                    pixel.0 = turn(pixel.0, degrees);
                }
            }
            Self::Gamma(gamma) => {
                // numpy's `astype(uint8)` cuts off what is behind the point.
                let table: [u8; 256] =
                    std::array::from_fn(|value| (value as f64).powf(gamma).clamp(0.0, 255.0) as u8);
                for value in picture.iter_mut() {
                    *value = table[usize::from(*value)];
                }
            }
        }
    }
}

/// The hue of an RGB value turned, saturation and value as they were (HSV).
fn turn(rgb: [u8; 3], degrees: f64) -> [u8; 3] {
    let [red, green, blue] = rgb.map(f64::from);
    let most = red.max(green).max(blue);
    let spread = most - red.min(green).min(blue);
    if spread == 0.0 {
        return rgb;
    }
    let hue = if most == red {
        (green - blue) / spread
    } else if most == green {
        2.0 + (blue - red) / spread
    } else {
        4.0 + (red - green) / spread
    };
    let hue = (hue + degrees / 60.0).rem_euclid(6.0);
    // How far a channel is below the largest: `f(n) = v − v·s·max(0, min(k, 4 − k, 1))`, k = (n + hue) mod 6.
    [5.0, 3.0, 1.0].map(|n: f64| {
        let k = (n + hue).rem_euclid(6.0);
        let value = most - spread * k.min(4.0 - k).clamp(0.0, 1.0);
        value.round().clamp(0.0, 255.0) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;
    use rand::SeedableRng as _;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn a_third_of_the_pictures_changes_half_of_them_in_hue() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let drawn: Vec<_> = (0..3000).filter_map(|_| Tint::draw(&mut rng)).collect();
        assert!((900..1080).contains(&drawn.len()), "{}", drawn.len());
        let hues = drawn.iter().filter(|tint| matches!(tint, Tint::Hue(_)));
        assert!((420..570).contains(&hues.count()));
        assert!(drawn.iter().all(|tint| match tint {
            Tint::Hue(degrees) => degrees.abs() <= 16.0,
            Tint::Gamma(gamma) => GAMMA.contains(gamma),
        }));
    }

    #[test]
    fn a_turned_hue_keeps_saturation_and_value() {
        assert_eq!(turn([255, 0, 0], 120.0), [0, 255, 0]);
        assert_eq!(turn([255, 0, 0], -120.0), [0, 0, 255]);
        assert_eq!(turn([200, 100, 100], 60.0), [200, 200, 100]);
        assert_eq!(turn([9, 9, 9], 33.0), [9, 9, 9]);
        for rgb in [[1, 2, 3], [250, 17, 90], [0, 255, 128]] {
            assert_eq!(turn(rgb, 0.0), rgb);
        }
    }

    #[test]
    fn gamma_is_of_unscaled_values() {
        let mut picture = RgbImage::from_pixel(1, 1, Rgb([255, 100, 0]));
        Tint::Gamma(0.95).apply(&mut picture);
        // 255^0.95 = 193.3, 100^0.95 = 79.4
        assert_eq!(picture.get_pixel(0, 0).0, [193, 79, 0]);
        Tint::Gamma(1.05).apply(&mut picture);
        // 193^1.05 = 251.07, 79^1.05 = 98.3
        assert_eq!(picture.get_pixel(0, 0).0, [251, 98, 0]);
    }
}
