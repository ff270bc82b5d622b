//! A picture as a tagger sees it: padded to a square and resized, as the taggers' own programs do it.

use image::{Rgb, RgbImage};

use crate::pictures::area;
use crate::pictures::pillow::{self, Filter};

/// Prepares a picture for a WD tagger: white on both sides until it is a square, averaged areas when it shrinks, Lanczos
/// (Pillow's) when it grows; BGR, 0 to 255.
///
/// As `tag_images_by_wd14_tagger.py` of sd-scripts.
pub fn for_wd(picture: &RgbImage, width: usize, height: usize) -> Vec<f32> {
    let side = picture.width().max(picture.height());
    let mut square = RgbImage::from_pixel(side, side, Rgb([255; 3]));
    let left = (side - picture.width()) / 2;
    let top = (side - picture.height()) / 2;
    image::imageops::replace(&mut square, picture, left.into(), top.into());
    let bytes = if side as usize > width.max(height) {
        let values = area::average(&square, width as u32, height as u32);
        values.into_iter().map(f32::round_ties_even).collect()
    } else {
        let resized = pillow::resize(&square, width as u32, height as u32, Filter::Lanczos);
        resized.into_raw().into_iter().map(f32::from).collect()
    };
    bgr(bytes)
}

/// Prepares a picture for DeepDanbooru: as large as fits, by averaged areas also when it grows, in the middle, its edges
/// repeated to the border; RGB, 0 to 1.
///
/// As `load_image_for_evaluate` and `transform_and_pad_image` of DeepDanbooru.
pub fn for_deepdanbooru(picture: &RgbImage, width: usize, height: usize) -> Vec<f32> {
    let (own_width, own_height) = (f64::from(picture.width()), f64::from(picture.height()));
    let scale = (width as f64 / own_width).min(height as f64 / own_height);
    let fit = |side: f64| ((side * scale).round_ties_even() as usize).max(1);
    let (inner_width, inner_height) = (fit(own_width), fit(own_height));
    let resized = area::average(picture, inner_width as u32, inner_height as u32);
    // An odd rest puts pixels between two of the resized picture.
    let columns = placed(inner_width, width);
    let rows = placed(inner_height, height);
    let mut target = Vec::with_capacity(width * height * 3);
    for row in &rows {
        for column in &columns {
            for channel in 0..3 {
                let mut value = 0.0;
                for (y, part_y) in row {
                    for (x, part_x) in column {
                        value += part_y * part_x * resized[(y * inner_width + x) * 3 + channel];
                    }
                }
                target.push(value / 255.0);
            }
        }
    }
    target
}

/// For each of `outer` positions the two of `inner` that it lies between, and their shares, when `inner` is in the middle.
fn placed(inner: usize, outer: usize) -> Vec<[(usize, f32); 2]> {
    let before = (outer as f64 - inner as f64) / 2.0;
    let last = inner - 1;
    let within = |at: f64| (at.max(0.0) as usize).min(last);
    (0..outer)
        .map(|index| {
            let at = index as f64 - before;
            let share = (at - at.floor()) as f32;
            [
                (within(at.floor()), 1.0 - share),
                (within(at.floor() + 1.0), share),
            ]
        })
        .collect()
}

fn bgr(mut values: Vec<f32>) -> Vec<f32> {
    for pixel in values.chunks_exact_mut(3) {
        pixel.swap(0, 2);
    }
    values
}
