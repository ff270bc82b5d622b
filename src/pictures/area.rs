//! Resizing by averaging: each target pixel is the mean of the source area that it covers (OpenCV's `INTER_AREA`).

use image::RgbImage;

/// Part of a source row or column in one target pixel.
struct Tap {
    source: usize,
    weight: f32,
}

/// Shrinks a picture to whole bytes, with OpenCV's rounding; neither side may grow.
pub fn shrink(picture: &RgbImage, width: u32, height: u32) -> RgbImage {
    // OpenCV has a path of its own for this, which rounds halves up: `(a + b + c + d + 2) >> 2`.
    let halved = picture.dimensions() == (2 * width, 2 * height);
    let values = average(picture, width, height);
    let bytes = values.into_iter().map(|value| to_byte(value, halved));
    RgbImage::from_raw(width, height, bytes.collect()).unwrap_or_default()
}

/// The means of the three channels, row by row, from 0 to 255. A side that grows is made of nearest and mixed pixels, as
/// TensorFlow's `AREA` does it.
pub fn average(picture: &RgbImage, width: u32, height: u32) -> Vec<f32> {
    let columns = taps(picture.width(), width);
    let rows = taps(picture.height(), height);
    let source_width = picture.width() as usize;
    let source = picture.as_raw();
    let mut target = Vec::with_capacity((width * height * 3) as usize);
    // One pass down the rows: a target row is the weighted sum of its narrowed source rows.
    let mut sums = vec![0.0_f32; columns.len() * 3];
    for row in &rows {
        sums.fill(0.0);
        for tap in row {
            let line = &source[tap.source * source_width * 3..][..source_width * 3];
            for (sum, column) in sums.chunks_exact_mut(3).zip(&columns) {
                let mut pixel = [0.0_f32; 3];
                for part in column {
                    for (value, channel) in pixel.iter_mut().zip(&line[part.source * 3..]) {
                        *value += f32::from(*channel) * part.weight;
                    }
                }
                for (total, value) in sum.iter_mut().zip(pixel) {
                    *total += value * tap.weight;
                }
            }
        }
        target.extend_from_slice(&sums);
    }
    target
}

/// For each target position the source positions that it covers; weights sum to 1.
fn taps(source: u32, target: u32) -> Vec<Vec<Tap>> {
    let scale = f64::from(source) / f64::from(target);
    (0..target)
        .map(|index| {
            let start = f64::from(index) * scale;
            let end = (start + scale).min(f64::from(source));
            covered(start, end)
        })
        .collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "positions within a picture"
)]
fn covered(start: f64, end: f64) -> Vec<Tap> {
    let first = start.floor() as usize;
    let last = (end.ceil() as usize).max(first + 1);
    (first..last)
        .filter_map(|source| {
            let part = end.min(source as f64 + 1.0) - start.max(source as f64);
            // A sliver is rounding, not coverage; OpenCV leaves out the same.
            (part > 1e-3 * (end - start).min(1.0)).then(|| Tap {
                source,
                weight: (part / (end - start)) as f32,
            })
        })
        .collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to a byte"
)]
fn to_byte(value: f32, halves_up: bool) -> u8 {
    let rounded = match halves_up {
        true => value.round(),
        false => value.round_ties_even(),
    };
    rounded.clamp(0.0, 255.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn whole_pixels_are_averaged() {
        let picture = RgbImage::from_fn(4, 2, |x, y| {
            let value = u8::try_from(x * 10 + y * 100).unwrap();
            Rgb([value, 0, 255])
        });
        let small = shrink(&picture, 2, 1);
        // Means of {0, 10, 100, 110} and {20, 30, 120, 130}.
        assert_eq!(small.get_pixel(0, 0).0, [55, 0, 255]);
        assert_eq!(small.get_pixel(1, 0).0, [75, 0, 255]);
    }

    #[test]
    fn parts_of_pixels_count_by_their_share() {
        let picture = RgbImage::from_fn(3, 1, |x, _| Rgb([[0, 90, 240][x as usize]; 3]));
        let small = shrink(&picture, 2, 1);
        // (0 + 90/2) / 1.5 and (90/2 + 240) / 1.5
        assert_eq!(small.get_pixel(0, 0).0[0], 30);
        assert_eq!(small.get_pixel(1, 0).0[0], 190);
    }
}
