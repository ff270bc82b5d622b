//! Aspect-ratio buckets: which size a picture is trained at, by the rule of sd-scripts (`BucketManager`).
//!
//! All pictures of a batch have one size. Instead of cropping every picture to a square, there is a list of sizes of
//! about the same area, and each picture goes to the one that is closest in aspect ratio.

use serde::{Deserialize, Serialize};

use super::{CropMode, DataError};

/// The longest side that a picture is trained at.
const MAX_SIDE_PX: u32 = 8192;

/// Sizes of the training pictures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BucketSettings {
    /// Width of a square or unbucketed picture; with the height it gives the area of all buckets.
    pub width_px: u32,
    /// Height of a square or unbucketed picture.
    pub height_px: u32,
    /// Whether pictures keep about their aspect ratio; otherwise all are cropped to `width_px` × `height_px`.
    pub enabled: bool,
    /// Shortest side of a bucket. Not used with `no_upscale`.
    pub min_px: u32,
    /// Longest side of a bucket. Not used with `no_upscale`.
    pub max_px: u32,
    /// Sides of buckets are multiples of this.
    pub step_px: u32,
    /// Leave pictures that are smaller than the area as they are.
    pub no_upscale: bool,
    /// Where pictures are cut to the size of their bucket.
    pub crop: CropMode,
}

impl Default for BucketSettings {
    /// sd-scripts' values, with buckets on.
    fn default() -> Self {
        Self {
            width_px: 512,
            height_px: 512,
            enabled: true,
            min_px: 256,
            max_px: 1024,
            step_px: 64,
            no_upscale: false,
            crop: CropMode::Centre,
        }
    }
}

/// How one picture is brought to its training size: resized, then cropped; [`Placement::origin`] says where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Placement {
    /// Width and height to train at.
    pub bucket: (u32, u32),
    /// Width and height to resize to; at least the bucket's.
    pub resized: (u32, u32),
}

impl BucketSettings {
    /// Everything that is wrong with the settings: field and message.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let sides = [
            ("width_px", self.width_px),
            ("height_px", self.height_px),
            ("min_px", self.min_px),
            ("max_px", self.max_px),
            ("step_px", self.step_px),
        ];
        for (field, value) in sides {
            if !(8..=MAX_SIDE_PX).contains(&value) {
                problems.push((field, format!("is {value}, expected 8 to {MAX_SIDE_PX}")));
            } else if value % 8 != 0 {
                problems.push((field, format!("is {value}, expected a multiple of 8")));
            }
        }
        if !problems.is_empty() || !self.enabled || self.no_upscale {
            return problems;
        }
        let (short, long) = (
            self.width_px.min(self.height_px),
            self.width_px.max(self.height_px),
        );
        if self.lowest() > short {
            problems.push((
                "min_px",
                format!(
                    "is {}, expected at most the shorter side {short}",
                    self.min_px
                ),
            ));
        }
        if self.highest() < long {
            problems.push((
                "max_px",
                format!(
                    "is {}, expected at least the longer side {long}",
                    self.max_px
                ),
            ));
        }
        problems
    }

    /// # Errors
    /// The first of [`Self::problems`].
    pub fn validate(&self) -> Result<(), DataError> {
        match self.problems().into_iter().next() {
            Some((field, message)) => Err(DataError::Settings { field, message }),
            None => Ok(()),
        }
    }

    fn lowest(&self) -> u32 {
        self.min_px / self.step_px * self.step_px
    }

    fn highest(&self) -> u32 {
        self.max_px.div_ceil(self.step_px) * self.step_px
    }

    /// All buckets, sorted by width and height. With `no_upscale` sizes follow the pictures and there is no list.
    pub fn buckets(&self) -> Vec<(u32, u32)> {
        if !self.enabled {
            return vec![(self.width_px, self.height_px)];
        }
        let (low, high, step) = (
            self.lowest().max(self.step_px),
            self.highest(),
            self.step_px,
        );
        let area = u64::from(self.width_px) * u64::from(self.height_px);
        let square = side(area.isqrt()) / step * step;
        let mut buckets = vec![(square, square)];
        for width in (low..=high).step_by(step as usize) {
            let height = (side(area / u64::from(width)) / step * step).min(high);
            if height >= low {
                buckets.push((width, height));
                buckets.push((height, width));
            }
        }
        buckets.sort_unstable();
        buckets.dedup();
        buckets
    }

    /// Where a picture of this size goes. Settings are valid, sides are at least 1.
    pub fn place(&self, width: u32, height: u32) -> Placement {
        if self.enabled && self.no_upscale {
            self.place_without_upscaling(width, height)
        } else {
            choose(&self.buckets(), width, height)
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "sides are positive and below 2^32"
    )]
    fn place_without_upscaling(&self, width: u32, height: u32) -> Placement {
        let area = f64::from(self.width_px) * f64::from(self.height_px);
        let ratio = f64::from(width) / f64::from(height);
        let step = self.step_px;
        let round = |side: f64| (side + 0.5) as u32;
        let round_to_step = |side: f64| round(side) / step * step;
        let resized = if f64::from(width) * f64::from(height) > area {
            let wide = (area * ratio).sqrt();
            let high = area / wide;
            // Either the width is exact and the height follows, or the other way round.
            let by_width = round_to_step(wide);
            let by_width_height = round_to_step(f64::from(by_width) / ratio);
            let by_height = round_to_step(high);
            let by_height_width = round_to_step(f64::from(by_height) * ratio);
            let error = |w: u32, h: u32| (f64::from(w) / f64::from(h) - ratio).abs();
            if error(by_width, by_width_height) < error(by_height_width, by_height) {
                (by_width, round(f64::from(by_width) / ratio))
            } else {
                (round(f64::from(by_height) * ratio), by_height)
            }
        } else {
            (width, height)
        };
        // A picture narrower than one step has no bucket of its own: it is enlarged to one step.
        let resized = (resized.0.max(step), resized.1.max(step));
        Placement {
            bucket: (resized.0 / step * step, resized.1 / step * step),
            resized,
        }
    }
}

/// Left, top, right and bottom of a picture within its bucket, as SDXL is told them: where the picture would be if it
/// were fitted into the bucket as a whole. sd-scripts reckons with aspect ratios, not with what is really cropped.
pub fn crop_ltrb(bucket: (u32, u32), picture: (u32, u32)) -> [f64; 4] {
    let (width, height) = (f64::from(bucket.0), f64::from(bucket.1));
    let ratio = f64::from(picture.0) / f64::from(picture.1);
    let (fitted_width, fitted_height) = if width / height > ratio {
        (height * ratio, height)
    } else {
        (width, width / ratio)
    };
    let left = ((width - fitted_width) / 2.0).floor();
    let top = ((height - fitted_height) / 2.0).floor();
    [left, top, left + fitted_width, top + fitted_height]
}

/// The bucket closest in aspect ratio, and the size that covers it.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sides are positive and below 2^32"
)]
fn choose(buckets: &[(u32, u32)], width: u32, height: u32) -> Placement {
    let ratio = f64::from(width) / f64::from(height);
    let error = |bucket: &(u32, u32)| (f64::from(bucket.0) / f64::from(bucket.1) - ratio).abs();
    // An exact size wins; on ties the first in sorted order.
    let bucket = if buckets.contains(&(width, height)) {
        (width, height)
    } else {
        let mut best = buckets[0];
        for bucket in buckets {
            if error(bucket) < error(&best) {
                best = *bucket;
            }
        }
        best
    };
    let scale = if ratio > f64::from(bucket.0) / f64::from(bucket.1) {
        f64::from(bucket.1) / f64::from(height)
    } else {
        f64::from(bucket.0) / f64::from(width)
    };
    let scaled = |side: u32| (f64::from(side) * scale + 0.5) as u32;
    Placement {
        bucket,
        // Rounding must not leave a side one pixel short of the bucket.
        resized: (scaled(width).max(bucket.0), scaled(height).max(bucket.1)),
    }
}

fn side(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn pair(value: &Value) -> (u32, u32) {
        let side = |index: usize| u32::try_from(value[index].as_u64().unwrap()).unwrap();
        (side(0), side(1))
    }

    #[test]
    fn buckets_and_placements_equal_sd_scripts() {
        let text = include_str!("../../tests/fixtures/kohya/kohya_golden_buckets.json");
        let cases: Vec<Value> = serde_json::from_str(text).unwrap();
        let (mut compared, mut crops) = (0, 0);
        for case in &cases {
            let number = |key: &str, default: u64| {
                u32::try_from(case[key].as_u64().unwrap_or(default)).unwrap()
            };
            let (width_px, height_px) = pair(&case["reso"]);
            let settings = BucketSettings {
                width_px,
                height_px,
                enabled: true,
                min_px: number("min", 256),
                max_px: number("max", 1024),
                step_px: number("steps", 64),
                no_upscale: case["no_upscale"].as_bool().unwrap(),
                crop: CropMode::Centre,
            };
            if let Some(expected) = case["buckets"].as_array() {
                let expected: Vec<_> = expected.iter().map(pair).collect();
                assert_eq!(settings.buckets(), expected, "{settings:?}");
            }
            for select in case["select"].as_array().unwrap() {
                let image = pair(&select["image"]);
                let placement = settings.place(image.0, image.1);
                let expected = Placement {
                    bucket: pair(&select["bucket"]),
                    resized: pair(&select["resized"]),
                };
                assert_eq!(placement, expected, "{image:?} with {settings:?}");
                // The reference was asked for these with a list of buckets alone.
                if let Ok(crop) = serde_json::from_value::<[f64; 4]>(select["crop_ltrb"].clone()) {
                    assert_eq!(crop_ltrb(placement.bucket, image), crop, "{image:?}");
                    crops += 1;
                }
                compared += 1;
            }
        }
        assert_eq!((compared, crops), (120, 60));
    }

    #[test]
    fn without_buckets_every_picture_covers_the_one_size() {
        let settings = BucketSettings {
            enabled: false,
            ..BucketSettings::default()
        };
        let placement = settings.place(640, 480);
        assert_eq!(placement.bucket, (512, 512));
        assert_eq!(placement.resized, (683, 512));
    }

    #[test]
    fn a_picture_smaller_than_a_step_still_has_a_bucket() {
        let settings = BucketSettings {
            no_upscale: true,
            ..BucketSettings::default()
        };
        assert_eq!(settings.place(20, 100).bucket, (64, 64));
    }

    #[test]
    fn wrong_settings_name_their_field() {
        let settings = BucketSettings {
            step_px: 0,
            max_px: 1_000_000,
            ..BucketSettings::default()
        };
        let fields: Vec<_> = settings.problems().into_iter().map(|p| p.0).collect();
        assert_eq!(fields, ["max_px", "step_px"]);
        let settings = BucketSettings {
            min_px: 768,
            ..BucketSettings::default()
        };
        assert_eq!(settings.problems()[0].0, "min_px");
    }
}
