//! A picture file as the model sees it: decoded, turned upright, resized, cropped, in -1 to 1.

use std::path::Path;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use super::{BucketSettings, DataError, Placement, area};
use crate::pictures::{self, Background, DecodeLimits};

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

/// Decodes a picture and brings it to its bucket.
///
/// As sd-scripts: shrinking averages areas, enlarging uses Lanczos; what is over is cropped evenly on both sides.
///
/// # Errors
/// When the file cannot be decoded, or its size is not the one that `bucket` was planned for.
pub fn load_pixels(
    path: &Path,
    bucket: (u32, u32),
    settings: &BucketSettings,
    background: Option<Background>,
) -> Result<Pixels, DataError> {
    let picture = decode(path, background)?;
    let placement = settings.place(picture.width(), picture.height());
    if placement.bucket != bucket {
        return Err(DataError::Changed {
            path: path.to_owned(),
            found: picture.dimensions(),
            expected: placement.bucket,
            planned: bucket,
        });
    }
    let cropped = fit(picture, placement).map_err(|reason| DataError::Decode {
        path: path.to_owned(),
        reason,
    })?;
    Ok(normalize(&cropped))
}

/// Upright, in sRGB, without alpha.
fn decode(path: &Path, background: Option<Background>) -> Result<RgbImage, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Io {
        path: path.to_owned(),
        source,
    })?;
    let picture = pictures::decode(&bytes, &DecodeLimits::default());
    let picture = picture.map_err(|error| DataError::Decode {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(picture.flatten(background))
}

fn fit(picture: RgbImage, placement: Placement) -> Result<RgbImage, String> {
    let (width, height) = placement.resized;
    let resized = if picture.dimensions() == placement.resized {
        picture
    } else if width <= picture.width() && height <= picture.height() {
        area::shrink(&picture, width, height)
    } else {
        enlarge(&picture, width, height)?
    };
    let left = (width - placement.bucket.0) / 2;
    let top = (height - placement.bucket.1) / 2;
    let (bucket_width, bucket_height) = placement.bucket;
    Ok(image::imageops::crop_imm(&resized, left, top, bucket_width, bucket_height).to_image())
}

/// Lanczos with three lobes, as Pillow's.
fn enlarge(picture: &RgbImage, width: u32, height: u32) -> Result<RgbImage, String> {
    let source = ImageRef::new(
        picture.width(),
        picture.height(),
        picture.as_raw(),
        PixelType::U8x3,
    )
    .map_err(|error| error.to_string())?;
    let mut target = Image::new(width, height, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
    Resizer::new()
        .resize(&source, &mut target, &options)
        .map_err(|error| error.to_string())?;
    RgbImage::from_raw(width, height, target.into_vec())
        .ok_or_else(|| "the resized picture has another size".to_owned())
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
        let pixels = load_pixels(&path, (8, 8), &settings(8, 8), None).unwrap();
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
            let pixels = load_pixels(&path, (8, 8), &settings(8, 8), None).unwrap();
            assert!(pixels.data.iter().all(|v| *v == 1.0), "picture {index}");
        }
    }

    #[test]
    fn a_broken_or_changed_file_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broken.png");
        std::fs::write(&path, b"\x89PNG\r\n\x1a\nnot really").unwrap();
        let error = load_pixels(&path, (8, 8), &settings(8, 8), None).unwrap_err();
        assert!(error.to_string().contains("broken.png"), "{error}");
        RgbImage::new(8, 8).save(&path).unwrap();
        let error = load_pixels(&path, (16, 8), &settings(8, 8), None).unwrap_err();
        assert!(matches!(error, DataError::Changed { .. }), "{error}");
    }
}
