//! Which part of a resized picture is kept: the centre, any part, or the one where most is to be seen.
//!
//! The last needs no face detector and no network: edges are where something is. Their energy is summed by columns and
//! by rows of the whole picture, so that it can be kept with the picture and asked for any bucket.

use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::Placement;
use crate::pictures::area;

/// Columns, and rows, that the energy is summed in.
const BINS: usize = 64;
/// Edges are looked for in a copy of at most this size: hair and grain are no subject.
const LOOK_SIDE_PX: u32 = 256;
/// The most that one edge counts, so that a hard line does not outweigh a face.
const MOST_OF_AN_EDGE: u32 = 48;
/// What energy counts in the middle, and how much less at the border: who takes a picture aims at the subject.
const MIDDLE_WEIGHT: u64 = 256;
const BORDER_LOSS: u64 = 96;

/// Where pictures are cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CropMode {
    /// Evenly on both sides.
    #[default]
    Centre,
    /// Anywhere, each time elsewhere.
    Random,
    /// So that most edges stay.
    Smart,
}

/// Where one picture is cut, this time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Window {
    /// Around its centre.
    #[default]
    Centre,
    /// Where most edges are.
    Smart,
    /// Where lots have fallen: of the whole range of numbers, for left and top.
    Drawn([u32; 2]),
}

/// The energy of a picture's edges by columns and rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Energy {
    /// From left to right, in parts of the same width.
    columns: Vec<u32>,
    /// From top to bottom, in parts of the same height.
    rows: Vec<u32>,
}

impl Energy {
    /// Of a whole picture.
    pub fn of(picture: &RgbImage) -> Self {
        let longest = picture.width().max(picture.height()).max(1);
        let small = |side: u32| (side * LOOK_SIDE_PX / longest).clamp(1, side.max(1));
        let (width, height) = (small(picture.width()), small(picture.height()));
        let copy = match longest > LOOK_SIDE_PX {
            true => &area::shrink(picture, width, height),
            false => picture,
        };
        let (width, height) = (copy.width() as usize, copy.height() as usize);
        let luma: Vec<u32> = copy.pixels().map(|pixel| luma(pixel.0)).collect();
        let mut energy = Self {
            columns: vec![0; BINS],
            rows: vec![0; BINS],
        };
        for y in 0..height.saturating_sub(1) {
            for x in 0..width.saturating_sub(1) {
                let at = y * width + x;
                let across = luma[at].abs_diff(luma[at + 1]);
                let down = luma[at].abs_diff(luma[at + width]);
                let edge = (across + down).min(MOST_OF_AN_EDGE);
                energy.columns[x * BINS / width] += edge;
                energy.rows[y * BINS / height] += edge;
            }
        }
        energy
    }
}

/// Brightness as BT.601 weighs it, 0 to 255.
pub(super) fn luma([red, green, blue]: [u8; 3]) -> u32 {
    (u32::from(red) * 299 + u32::from(green) * 587 + u32::from(blue) * 114 + 500) / 1000
}

impl Placement {
    /// Left and top of what is kept of the resized picture. `energy` is of the whole picture; without it a smart window
    /// is the centre.
    pub fn origin(&self, window: Window, energy: Option<&Energy>) -> (u32, u32) {
        let excess = [
            self.resized.0 - self.bucket.0,
            self.resized.1 - self.bucket.1,
        ];
        match (window, energy) {
            (Window::Drawn([left, top]), _) => (drawn(left, excess[0]), drawn(top, excess[1])),
            (Window::Smart, Some(energy)) => (
                richest(&energy.columns, self.resized.0, self.bucket.0),
                richest(&energy.rows, self.resized.1, self.bucket.1),
            ),
            (Window::Centre | Window::Smart, _) => (excess[0] / 2, excess[1] / 2),
        }
    }

    /// The share of the resized picture that is cut off.
    pub fn crop_loss(&self) -> f64 {
        let area = |(width, height): (u32, u32)| f64::from(width) * f64::from(height);
        1.0 - area(self.bucket) / area(self.resized)
    }
}

/// One of `0 ..= excess`, each as likely.
fn drawn(lot: u32, excess: u32) -> u32 {
    ((u64::from(lot) * (u64::from(excess) + 1)) >> 32) as u32
}

/// The start of the window of `kept` out of `side` pixels that holds most energy; the one closest to the centre where
/// there are several.
fn richest(bins: &[u32], side: u32, kept: u32) -> u32 {
    let excess = side - kept;
    let sums = Sums::new(bins, side);
    let centre = excess / 2;
    let mut best = (sums.between(centre, centre + kept), centre);
    for distance in 1..=excess - centre {
        for start in [centre.checked_sub(distance), Some(centre + distance)] {
            let Some(start) = start.filter(|start| *start <= excess) else {
                continue;
            };
            let found = sums.between(start, start + kept);
            if found > best.0 {
                best = (found, start);
            }
        }
    }
    best.1
}

/// The weighed energy left of a pixel, in whole numbers.
struct Sums {
    before: Vec<u64>,
    weighed: Vec<u64>,
    side: u64,
}

impl Sums {
    fn new(bins: &[u32], side: u32) -> Self {
        let count = bins.len().max(1) as u64;
        let weigh = |(index, energy): (usize, &u32)| {
            let off_centre = (2 * index as u64 + 1).abs_diff(count);
            u64::from(*energy) * (MIDDLE_WEIGHT - BORDER_LOSS * off_centre / count)
        };
        let weighed: Vec<u64> = bins.iter().enumerate().map(weigh).collect();
        let mut before = vec![0];
        for energy in &weighed {
            before.push(before.last().copied().unwrap_or_default() + energy);
        }
        Self {
            before,
            weighed,
            side: u64::from(side),
        }
    }

    /// `side` times the energy in the pixels `start .. end`; a bin is as dense everywhere.
    fn between(&self, start: u32, end: u32) -> u64 {
        self.up_to(end) - self.up_to(start)
    }

    fn up_to(&self, pixel: u32) -> u64 {
        let place = u64::from(pixel) * self.weighed.len() as u64;
        let (bin, part) = ((place / self.side) as usize, place % self.side);
        let rest = self.weighed.get(bin).map_or(0, |energy| energy * part);
        self.before[bin] * self.side + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    fn wide() -> Placement {
        Placement {
            bucket: (512, 512),
            resized: (1024, 512),
        }
    }

    /// A grey picture with a chequered square from `left`.
    fn subject_at(left: u32) -> RgbImage {
        RgbImage::from_fn(1000, 500, |x, y| {
            let inside = (left..left + 200).contains(&x) && (150..350).contains(&y);
            Rgb([if inside && (x / 10 + y / 10) % 2 == 0 {
                220
            } else {
                90
            }; 3])
        })
    }

    #[test]
    fn the_centre_is_cut_evenly_and_lots_cover_every_place() {
        assert_eq!(wide().origin(Window::Centre, None), (256, 0));
        assert_eq!(wide().origin(Window::Drawn([0, 0]), None), (0, 0));
        let last = wide().origin(Window::Drawn([u32::MAX; 2]), None);
        assert_eq!(last, (512, 0));
        assert!((wide().crop_loss() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_smart_window_follows_the_subject() {
        for (left, expected) in [(0, 0..=90), (780, 420..=512), (400, 150..=360)] {
            let energy = Energy::of(&subject_at(left));
            let (x, y) = wide().origin(Window::Smart, Some(&energy));
            assert!(expected.contains(&x), "{left}: {x}");
            assert_eq!(y, 0);
            // The whole subject is in.
            let scaled = |side: u32| side * 1024 / 1000;
            assert!(x <= scaled(left) + 8 && scaled(left + 200) <= x + 520);
        }
    }

    #[test]
    fn a_picture_without_edges_is_cut_around_its_centre() {
        let energy = Energy::of(&RgbImage::from_pixel(300, 10, Rgb([7, 8, 9])));
        assert_eq!(wide().origin(Window::Smart, Some(&energy)), (256, 0));
        let tiny = Energy::of(&RgbImage::new(1, 1));
        assert_eq!(wide().origin(Window::Smart, Some(&tiny)), (256, 0));
    }
}
