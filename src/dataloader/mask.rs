//! What of a picture counts in the loss: its transparency, brought to its bucket as the picture itself is.

use std::path::Path;

use image::{DynamicImage, GrayImage};

use super::pixels::{decode_whole, resize};
use super::{BucketSettings, DataError, Energy, Look, Window};

/// The mask of a picture at its training size, cut and flipped as the picture; `None` where all of it counts wholly. It is
/// a file of its own, or the picture's alpha.
///
/// `Look` is the picture's: only what says where it is cut and whether it is flipped is of use here.
///
/// # Errors
/// When a file cannot be decoded.
pub fn load_mask(
    path: &Path,
    own: Option<&Path>,
    settings: &BucketSettings,
    look: Look,
) -> Result<Option<GrayImage>, DataError> {
    let mut picture = decode_whole(path)?;
    let alpha = picture.alpha.take();
    let Some(mask) = own.map(grey).transpose()?.or_else(|| alpha.clone()) else {
        return Ok(None);
    };
    let placement = settings.place(picture.rgb.width(), picture.rgb.height());
    let energy = (look.window == Window::Smart).then(|| {
        picture.alpha = alpha; // edges are those of the picture on its background
        Energy::of(&picture.flatten(look.background))
    });
    let (left, top) = placement.origin(look.window, energy.as_ref());
    let (width, height) = placement.bucket;
    let mask = resize(DynamicImage::from(mask).into_rgb8(), placement.resized);
    let mut mask = image::imageops::crop_imm(&mask, left, top, width, height).to_image();
    if look.flipped {
        image::imageops::flip_horizontal_in_place(&mut mask);
    }
    // Red, green and blue are equal.
    Ok(Some(GrayImage::from_fn(width, height, |x, y| {
        image::Luma([mask.get_pixel(x, y).0[0]])
    })))
}

/// What is in a file of a mask.
fn grey(path: &Path) -> Result<GrayImage, DataError> {
    Ok(DynamicImage::from(decode_whole(path)?.rgb).into_luma8())
}

/// A mask at the size of the latents, 0 to 1: `[height, width]`, each the mean of the area that it covers.
pub fn shrink_mask(mask: &GrayImage, width: usize, height: usize) -> Vec<f32> {
    let (wide, high) = (mask.width() as usize, mask.height() as usize);
    // As `torch.nn.functional.interpolate(mode="area")`: areas overlap where sides do not divide.
    let parts = |index: usize, whole: usize, count: usize| {
        index * whole / count..((index + 1) * whole).div_ceil(count)
    };
    let values = mask.as_raw();
    let mut means = Vec::with_capacity(width * height);
    for y in 0..height {
        let rows = parts(y, high, height);
        for x in 0..width {
            let columns = parts(x, wide, width);
            let count = rows.len() * columns.len();
            let line = |row: usize| &values[row * wide..][columns.clone()];
            let sum: u64 = (rows.clone().flat_map(line))
                .map(|value| u64::from(*value))
                .sum();
            means.push((sum as f64 / (255 * count.max(1)) as f64) as f32);
        }
    }
    means
}

#[cfg(test)]
mod tests {
    use image::{Rgba, RgbaImage};
    use safetensors::SafeTensors;

    use super::*;

    fn settings(width_px: u32, height_px: u32) -> BucketSettings {
        BucketSettings {
            width_px,
            height_px,
            enabled: false,
            ..BucketSettings::default()
        }
    }

    #[test]
    fn a_mask_is_cut_and_flipped_as_its_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture.png");
        // Four columns of 8 pixels: opaque, half, a tenth, nothing.
        let alphas = [255, 128, 26, 0];
        RgbaImage::from_fn(32, 8, |x, _| Rgba([0, 0, 0, alphas[(x / 8) as usize]]))
            .save(&path)
            .unwrap();
        let columns = |look: Look| {
            let mask = load_mask(&path, None, &settings(16, 8), look)
                .unwrap()
                .unwrap();
            assert_eq!(mask.dimensions(), (16, 8));
            (mask.get_pixel(0, 3).0[0], mask.get_pixel(15, 3).0[0])
        };
        assert_eq!(columns(Look::default()), (128, 26));
        let flipped = Look {
            flipped: true,
            ..Look::default()
        };
        assert_eq!(columns(flipped), (26, 128));
        let drawn = Look {
            window: Window::Drawn([0, 0]),
            ..Look::default()
        };
        assert_eq!(columns(drawn), (255, 128));
        image::RgbImage::new(16, 8).save(&path).unwrap();
        let opaque = load_mask(&path, None, &settings(16, 8), Look::default()).unwrap();
        assert_eq!(opaque, None);
    }

    #[test]
    fn a_mask_of_its_own_may_be_smaller_and_comes_before_transparency() {
        let folder = tempfile::tempdir().unwrap();
        let (path, own) = (folder.path().join("a.png"), folder.path().join("mask.png"));
        let clear = RgbaImage::from_pixel(32, 16, Rgba([0, 0, 0, 0]));
        clear.save(&path).unwrap();
        let half = GrayImage::from_fn(16, 8, |x, _| image::Luma([if x < 8 { 255 } else { 0 }]));
        half.save(&own).unwrap();
        let look = Look {
            flipped: true,
            ..Look::default()
        };
        let mask = load_mask(&path, Some(&own), &settings(32, 16), look);
        let mask = mask.unwrap().unwrap();
        assert_eq!(
            (mask.get_pixel(0, 8).0[0], mask.get_pixel(31, 8).0[0]),
            (0, 255)
        );
    }

    #[test]
    fn a_smart_window_is_that_of_the_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture.png");
        // Edges on the left only; the right half is opaque, the left transparent.
        let picture = RgbaImage::from_fn(64, 16, |x, y| {
            let value = if x < 16 && (x + y) % 2 == 0 { 255 } else { 0 };
            Rgba([value, value, value, if x < 24 { 40 } else { 255 }])
        });
        picture.save(&path).unwrap();
        let look = Look {
            window: Window::Smart,
            ..Look::default()
        };
        let mask = load_mask(&path, None, &settings(16, 16), look)
            .unwrap()
            .unwrap();
        assert!(mask.pixels().all(|pixel| pixel.0[0] == 40));
    }

    #[test]
    fn shrinking_is_that_of_torch() {
        // Made by `tests/fixtures/reference/make_objectives.py`.
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/tiny-sd15/goldens/objectives.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let goldens = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |name: &str| {
            let view = goldens.tensor(name).unwrap();
            let (numbers, _) = view.data().as_chunks::<4>();
            let numbers = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes));
            (numbers.collect::<Vec<f32>>(), view.shape().to_vec())
        };
        let (large, shape) = tensor("mask_px");
        let (small, _) = tensor("mask");
        let (height, width) = (shape[2], shape[3]);
        let pairs = large.chunks(height * width).zip(small.chunks(8 * 8));
        for (large, small) in pairs {
            let bytes = large
                .iter()
                .map(|value| (value * 255.0).round() as u8)
                .collect();
            let mask = GrayImage::from_raw(width as u32, height as u32, bytes).unwrap();
            for (found, expected) in shrink_mask(&mask, 8, 8).iter().zip(small) {
                // torch sums 64 numbers in f32.
                assert!((found - expected).abs() < 1e-6, "{found} {expected}");
            }
        }
    }

    #[test]
    fn sides_that_do_not_divide_overlap() {
        let mask = GrayImage::from_raw(3, 1, vec![0, 51, 255]).unwrap();
        // {0, 51} and {51, 255}
        let found = shrink_mask(&mask, 2, 1);
        assert!((found[0] - 0.1).abs() < 1e-6 && (found[1] - 0.6).abs() < 1e-6);
    }
}
