//! Masks of images: any picture becomes a grey PNG that says how much each place of its image counts in the loss.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{GrayImage, ImageFormat, ImageResult};
use tokio::task::spawn_blocking;

use super::error::DatasetError;
use super::limits::Limits;
use super::pictures::{self, PictureError};
use super::service::{DatasetService, missing};
use super::trial::Trial;
use crate::pictures::{Background, Decoded};
use crate::store::datasets::Image;

/// What of a mask that is transparent counts nothing.
const BLACK: Background = Background([0; 3]);

/// Why a picture is no mask of an image.
#[derive(Debug, thiserror::Error)]
pub enum MaskError {
    #[error(transparent)]
    Picture(#[from] PictureError),
    #[error(
        "found {} x {} pixels, expected the image's {} x {}, or its aspect ratio",
        found.0, found.1, expected.0, expected.1
    )]
    Shape {
        found: (u32, u32),
        expected: (u32, u32),
    },
}

impl MaskError {
    /// A word for reports.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Picture(error) => error.code(),
            Self::Shape { .. } => "mask_of_other_shape",
        }
    }
}

impl DatasetService {
    /// Gives an image a mask, made of a picture file; with an expected revision only at that revision.
    ///
    /// # Errors
    /// [`DatasetError::Mask`], [`DatasetError::ImageNotFound`], [`DatasetError::Changed`].
    pub async fn set_mask(
        &self,
        image: &Image,
        file: PathBuf,
        expected: Option<i64>,
    ) -> Result<Image, DatasetError> {
        let (limits, trial, blobs) = (self.limits, self.trial.clone(), self.store.blobs().clone());
        let size = (image.width_px, image.height_px);
        let stored = spawn_blocking(move || -> Result<_, DatasetError> {
            let mask = make(&file, size, &limits, trial.as_ref())?;
            Ok(blobs.put(&mask)?)
        });
        let sha256 = stored.await??.sha256;
        let set = self.store.set_mask(image.id, Some(sha256), expected).await;
        set.map_err(|error| missing(error, DatasetError::ImageNotFound(image.id)))
    }

    /// Takes an image's mask away, if it has one; with an expected revision only at that revision.
    ///
    /// # Errors
    /// [`DatasetError::ImageNotFound`], [`DatasetError::Changed`].
    pub async fn remove_mask(
        &self,
        image: &Image,
        expected: Option<i64>,
    ) -> Result<(), DatasetError> {
        let set = self.store.set_mask(image.id, None, expected).await;
        let set = set.map_err(|error| missing(error, DatasetError::ImageNotFound(image.id)));
        set.map(|_| ())
    }

    /// Where the content of a mask is.
    pub fn mask_path(&self, mask_sha256: &str) -> PathBuf {
        self.store.blobs().path(mask_sha256)
    }
}

/// A grey PNG of a picture's red channel, as sd-scripts takes it. It may be of another size than its image, but not of
/// another shape.
///
/// # Errors
/// When the file is no whole picture within the limits, or of another shape.
pub fn make(
    path: &Path,
    image_px: (u32, u32),
    limits: &Limits,
    trial: Option<&Trial>,
) -> Result<Vec<u8>, MaskError> {
    let checked = pictures::check(path, limits, trial)?;
    let found = (checked.width_px, checked.height_px);
    if !same_shape(found, image_px) {
        return Err(MaskError::Shape {
            found,
            expected: image_px,
        });
    }
    let bytes = std::fs::read(path).map_err(PictureError::from)?;
    // An AVIF has passed its trial by now.
    let png = pictures::with_pixels(&bytes, limits, grey_png)?;
    let png = png.map_err(|error| PictureError::from(std::io::Error::other(error)))?;
    Ok(png)
}

fn grey_png(mask: Decoded) -> ImageResult<Vec<u8>> {
    let picture = mask.flatten(Some(BLACK));
    let grey = GrayImage::from_fn(picture.width(), picture.height(), |x, y| {
        image::Luma([picture.get_pixel(x, y).0[0]])
    });
    let mut png = Cursor::new(Vec::new());
    grey.write_to(&mut png, ImageFormat::Png)?;
    Ok(png.into_inner())
}

/// Whether one side differs by less than a pixel where the other is made equal.
fn same_shape(mask: (u32, u32), image: (u32, u32)) -> bool {
    let across = |a: u32, b: u32| u64::from(a) * u64::from(b);
    let apart = across(mask.0, image.1).abs_diff(across(mask.1, image.0));
    apart < u64::from(image.0.max(image.1).max(mask.0).max(mask.1))
}

#[cfg(test)]
mod tests {
    use image::{Rgba, RgbaImage};

    use super::*;

    fn made(picture: &RgbaImage, image_px: (u32, u32)) -> Result<GrayImage, MaskError> {
        let file = tempfile::Builder::new().suffix(".png").tempfile();
        let file = file.expect("a file");
        picture.save(file.path()).expect("an encoder");
        let png = make(file.path(), image_px, &Limits::default(), None)?;
        let decoded = image::load_from_memory(&png).expect("a PNG");
        Ok(decoded.as_luma8().expect("grey").clone())
    }

    #[test]
    fn the_red_channel_on_black_is_the_mask() {
        let mut picture = RgbaImage::from_pixel(4, 2, Rgba([200, 0, 9, 255]));
        picture.put_pixel(1, 0, Rgba([255, 255, 255, 0]));
        picture.put_pixel(2, 1, Rgba([255, 255, 255, 51]));
        let mask = made(&picture, (400, 200)).expect("a mask");
        let values: Vec<u8> = mask.pixels().map(|pixel| pixel.0[0]).collect();
        assert_eq!(values, [200, 0, 200, 200, 200, 200, 51, 200]);
    }

    #[test]
    fn another_shape_is_refused() {
        let picture = RgbaImage::from_pixel(64, 32, Rgba([255; 4]));
        for (size, fits) in [
            ((64, 32), true),
            ((641, 320), true),
            ((1000, 501), true),
            ((64, 64), false),
            ((64, 34), false),
        ] {
            assert_eq!(made(&picture, size).is_ok(), fits, "{size:?}");
        }
        assert!(same_shape((u32::MAX, u32::MAX), (1, 1)));
    }
}
