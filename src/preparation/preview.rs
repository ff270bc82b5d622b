//! What a run would see of each image, told in numbers.

use uuid::Uuid;

use super::color_correction;
use super::measures::Measured;
use crate::dataloader::{BucketSettings, ColorCorrection, CropMode, Energy, Window};
use crate::store::datasets::{Correction, Image};

/// One image as a run would see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub image_id: Uuid,
    pub file_name: String,
    pub subset: String,
    /// Of the file, upright.
    pub size_px: (u32, u32),
    pub bucket: (u32, u32),
    pub resized: (u32, u32),
    /// Left and top of the bucket in the resized picture; of a random crop, the centre.
    pub origin: (u32, u32),
    /// The share of the resized picture that is cut off.
    pub crop_loss: f64,
    /// Whether a side is enlarged.
    pub upscaled: bool,
    pub correction: Option<ColorCorrection>,
}

impl Seen {
    /// `measured` is what is known of the picture; a smart crop without it is around the centre.
    pub fn new(
        image: &Image,
        of_dataset: Option<Correction>,
        settings: &BucketSettings,
        measured: Option<&Measured>,
    ) -> Self {
        let (width, height) = (image.width_px.max(1), image.height_px.max(1));
        let placement = settings.place(width, height);
        let energy = measured
            .and_then(Measured::whole)
            .map(|measures| &measures.energy);
        Self {
            image_id: image.id,
            file_name: image.file_name.clone(),
            subset: image.subset_name.clone(),
            size_px: (width, height),
            bucket: placement.bucket,
            resized: placement.resized,
            origin: placement.origin(window(settings.crop, energy), energy),
            crop_loss: placement.crop_loss(),
            upscaled: placement.resized.0 > width || placement.resized.1 > height,
            correction: color_correction(image.color_correction.or(of_dataset)),
        }
    }
}

fn window(crop: CropMode, energy: Option<&Energy>) -> Window {
    match (crop, energy) {
        (CropMode::Smart, Some(_)) => Window::Smart,
        _ => Window::Centre,
    }
}
