//! A picture file as the model sees it: decoded, turned upright, resized, cropped, in -1 to 1.

use std::path::Path;

use image::RgbImage;

use super::{BucketSettings, ColorCorrection, DataError, Energy, Placement, Tint, Tones, Window};
use crate::pictures::pillow::{self, Filter};
use crate::pictures::{self, Background, DecodeLimits, Decoded, area};

/// A picture at its training size.
#[derive(Clone, Debug, PartialEq)]
pub struct Pixels {
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
    /// `[3, height, width]`, red, green, blue, -1 to 1.
    pub data: Vec<f32>,
}

/// What is made of a picture besides its size. Nothing by default: the centre of the file as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Look {
    /// What it is laid on where it is transparent.
    pub background: Option<Background>,
    /// Where it is cut.
    pub window: Window,
    /// What is done to its colours, and the set's median for it.
    pub correction: Option<(ColorCorrection, [u8; 3])>,
    /// Colour augmentation.
    pub tint: Option<Tint>,
    /// Whether left and right change places.
    pub flipped: bool,
}

/// Decodes a picture and brings it to its bucket.
///
/// As sd-scripts: shrinking averages areas, enlarging uses Lanczos; then it is cropped, its colours are changed, and it
/// is flipped.
///
/// # Errors
/// When the file cannot be decoded, or its size is not the one that `bucket` was planned for.
pub fn load_pixels(
    path: &Path,
    bucket: (u32, u32),
    settings: &BucketSettings,
    look: Look,
) -> Result<Pixels, DataError> {
    let picture = decode(path, look.background)?;
    let placement = settings.place(picture.width(), picture.height());
    if placement.bucket != bucket {
        return Err(DataError::Changed {
            path: path.to_owned(),
            found: picture.dimensions(),
            expected: placement.bucket,
            planned: bucket,
        });
    }
    Ok(normalize(&frame(picture, placement, look)))
}

/// Decodes by content, within limits, upright, in sRGB, without alpha.
///
/// # Errors
/// When the file cannot be read, or is no whole picture.
pub fn decode(path: &Path, background: Option<Background>) -> Result<RgbImage, DataError> {
    Ok(decode_whole(path)?.flatten(background))
}

/// The same with its alpha beside it.
pub(super) fn decode_whole(path: &Path) -> Result<Decoded, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Io {
        path: path.to_owned(),
        source,
    })?;
    let picture = pictures::decode(&bytes, &DecodeLimits::default());
    picture.map_err(|error| DataError::Decode {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// A decoded picture at its training size, with all that is made of it.
pub fn frame(picture: RgbImage, placement: Placement, look: Look) -> RgbImage {
    // Colours and edges are of the whole picture: another bucket changes neither.
    let tables = look
        .correction
        .map(|(recipe, target)| recipe.tables(&Tones::of(&picture), target));
    let energy = (look.window == Window::Smart).then(|| Energy::of(&picture));
    let resized = resize(picture, placement.resized);
    let (left, top) = placement.origin(look.window, energy.as_ref());
    let (width, height) = placement.bucket;
    let mut cut = image::imageops::crop_imm(&resized, left, top, width, height).to_image();
    if let Some(tables) = tables {
        tables.apply(&mut cut);
    }
    if let Some(tint) = look.tint {
        tint.apply(&mut cut);
    }
    if look.flipped {
        image::imageops::flip_horizontal_in_place(&mut cut);
    }
    cut
}

/// A picture at another size: areas are averaged where neither side grows, else Lanczos.
pub fn resize(picture: RgbImage, (width, height): (u32, u32)) -> RgbImage {
    if picture.dimensions() == (width, height) {
        picture
    } else if width <= picture.width() && height <= picture.height() {
        area::shrink(&picture, width, height)
    } else {
        pillow::resize(&picture, width, height, Filter::Lanczos)
    }
}

fn normalize(picture: &RgbImage) -> Pixels {
    let plane = (picture.width() * picture.height()) as usize;
    let mut data = vec![0.0; plane * 3];
    for (index, pixel) in picture.pixels().enumerate() {
        for (channel, value) in pixel.0.into_iter().enumerate() {
            // (v / 255 - 0.5) / 0.5
            data[channel * plane + index] = f32::from(value) / 127.5 - 1.0;
        }
    }
    Pixels {
        width: picture.width(),
        height: picture.height(),
        data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{DynamicImage, Rgb};

    fn settings(width_px: u32, height_px: u32) -> BucketSettings {
        BucketSettings {
            width_px,
            height_px,
            enabled: false,
            ..BucketSettings::default()
        }
    }

    #[test]
    fn channels_become_planes_and_the_crop_is_central() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("picture.png");
        // Black margins of 2 pixels left and right of an 8x8 square.
        RgbImage::from_fn(12, 8, |x, _| {
            if (2..10).contains(&x) {
                Rgb([255, 0, 51])
            } else {
                Rgb([0, 0, 0])
            }
        })
        .save(&path)
        .unwrap();
        let pixels = load_pixels(&path, (8, 8), &settings(8, 8), Look::default()).unwrap();
        assert_eq!((pixels.width, pixels.height), (8, 8));
        for (plane, expected) in pixels.data.chunks(64).zip([1.0, -1.0, -0.6]) {
            assert!(plane.iter().all(|v| (v - expected).abs() < 1e-6));
        }
    }

    #[test]
    fn grey_alpha_and_16_bit_pictures_are_converted() {
        let folder = tempfile::tempdir().unwrap();
        let pictures = [
            DynamicImage::ImageLuma8(image::GrayImage::from_pixel(8, 8, image::Luma([255]))),
            DynamicImage::ImageLuma16(image::ImageBuffer::from_pixel(8, 8, image::Luma([65_535]))),
            // Alpha is dropped, not flattened on black.
            DynamicImage::ImageRgba8(image::RgbaImage::from_pixel(
                8,
                8,
                image::Rgba([255, 255, 255, 0]),
            )),
        ];
        for (index, picture) in pictures.into_iter().enumerate() {
            let path = folder.path().join(format!("{index}.png"));
            picture.save(&path).unwrap();
            let pixels = load_pixels(&path, (8, 8), &settings(8, 8), Look::default()).unwrap();
            assert!(pixels.data.iter().all(|v| *v == 1.0), "picture {index}");
        }
    }

    #[test]
    fn a_broken_or_changed_file_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.png");
        std::fs::write(&path, b"\x89PNG\r\n\x1a\nnot really").unwrap();
        let error = load_pixels(&path, (8, 8), &settings(8, 8), Look::default()).unwrap_err();
        assert!(error.to_string().contains("broken.png"), "{error}");
        RgbImage::new(8, 8).save(&path).unwrap();
        let error = load_pixels(&path, (16, 8), &settings(8, 8), Look::default()).unwrap_err();
        assert!(matches!(error, DataError::Changed { .. }), "{error}");
    }

    #[test]
    fn a_flip_comes_after_the_crop_and_a_correction_is_of_the_whole_picture() {
        // Dark, then two greys, then light; the crop keeps the greys.
        let values = [0, 60, 120, 255];
        let picture = RgbImage::from_fn(32, 8, |x, _| Rgb([values[(x / 8) as usize]; 3]));
        let placement = settings(16, 8).place(32, 8);
        let look = Look {
            flipped: true,
            correction: Some((ColorCorrection::AutoLevels, [0; 3])),
            ..Look::default()
        };
        let made = frame(picture.clone(), placement, look);
        // Levels are spread already: of the crop alone 60 and 120 would have become 0 and 255.
        assert_eq!(
            (made.get_pixel(0, 0).0[0], made.get_pixel(15, 0).0[0]),
            (120, 60)
        );
        let look = Look {
            window: Window::Drawn([0, 0]),
            ..Look::default()
        };
        let made = frame(picture, placement, look);
        assert_eq!(
            (made.get_pixel(0, 0).0[0], made.get_pixel(15, 0).0[0]),
            (0, 60)
        );
    }

    /// Pictures that the reference implementation's own libraries have made; see `make.py` beside them.
    fn golden(name: &str) -> RgbImage {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kohya/pictures");
        decode(&folder.join(name), None).unwrap()
    }

    /// The largest and the mean difference of two pictures.
    fn apart(a: &RgbImage, b: &RgbImage) -> (u8, f64) {
        assert_eq!(a.dimensions(), b.dimensions());
        let each = a.iter().zip(b.iter()).map(|(a, b)| a.abs_diff(*b));
        let sum: u64 = each.clone().map(u64::from).sum();
        (each.max().unwrap_or_default(), sum as f64 / a.len() as f64)
    }

    #[test]
    fn resized_and_cropped_pictures_equal_those_of_opencv_and_pillow() {
        let cases = include_str!("../../tests/fixtures/kohya/pictures/cases.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(cases).unwrap();
        assert_eq!(cases.len(), 6);
        for case in cases {
            let pair = |name: &str| {
                let side =
                    |index: usize| u32::try_from(case[name][index].as_u64().unwrap()).unwrap();
                (side(0), side(1))
            };
            let placement = Placement {
                bucket: pair("bucket"),
                resized: pair("resized"),
            };
            let made = frame(golden("source.png"), placement, Look::default());
            let (most, mean) = apart(&made, &golden(case["file"].as_str().unwrap()));
            // Values lie half-way between two bytes now and then, and are rounded either way.
            assert!(most <= 1 && mean < 0.02, "{placement:?}: {most}, {mean}");
        }
    }

    #[test]
    fn changed_colours_equal_those_of_sd_scripts() {
        let mut gamma = golden("source.png");
        Tint::Gamma(0.97).apply(&mut gamma);
        assert_eq!(apart(&gamma, &golden("gamma.png")), (0, 0.0));
        let mut hue = golden("source.png");
        Tint::Hue(-16.0).apply(&mut hue);
        let (most, mean) = apart(&hue, &golden("hue.png"));
        // OpenCV keeps the hue in 180 steps: half a step is 1 degree, or a sixtieth of the spread, in one channel.
        assert!(most <= 6 && mean < 1.2, "{most}, {mean}");
    }
}
