//! Tests of what the cache gives back: the bits that were computed, and only for the same question.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use image::{Rgb, RgbImage};

use crate::dataloader::{
    Augment, BucketSettings, CaptionSettings, ColorCorrection, CropMode, TensorCache, TrainingImage,
};
use crate::diffusion::StableDiffusion;
use crate::training::data::{LatentEncoder, Looks, TrainingSet, read};
use crate::training::goldens::{fixture, load_model};
use crate::training::progress::Phase;
use crate::training::text::Captions;
use crate::training::{Conditioning, TrainSettings};

/// A folder with pictures, a cache and a model.
struct Place {
    folder: tempfile::TempDir,
    model: StableDiffusion,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let model = load_model(fixture("diffusers"));
        Self { folder, model }
    }

    fn cache(&self) -> TensorCache {
        TensorCache::open(&self.folder.path().join("cache"), u64::MAX).expect("a cache")
    }

    /// A picture with a gradient from this shade.
    fn picture(&self, shade: u8) -> TrainingImage {
        let path = self.folder.path().join(format!("{shade}.png"));
        let pixel = |x: u32, y: u32| Rgb([shade, 2 * x as u8, 3 * y as u8]);
        let picture = RgbImage::from_fn(80, 64, pixel);
        picture.save(&path).expect("written");
        TrainingImage {
            id: format!("image-{shade}"),
            path,
            sha256: format!("{shade:064}"),
            width_px: 80,
            height_px: 64,
            caption: String::new(),
            repeats: 1,
            regularization: false,
            mask: None,
            background: None,
            augment: Augment::default(),
            correction: None,
            captioning: CaptionSettings::default(),
        }
    }

    fn files(&self, kind: &str) -> Vec<PathBuf> {
        let folder = self.folder.path().join("cache").join(kind);
        let entries = fs::read_dir(folder).expect("a folder");
        entries
            .map(|entry| entry.expect("an entry").path())
            .collect()
    }

    /// Latents of pictures at `side_px`, with the numbers of those from the cache and those from the VAE.
    fn latents(&self, images: &[TrainingImage], side_px: u32, seed: u64) -> Encoded {
        self.latents_by(&self.model, images, side_px, seed)
    }

    fn latents_by(
        &self,
        model: &StableDiffusion,
        images: &[TrainingImage],
        side_px: u32,
        seed: u64,
    ) -> Encoded {
        let set = TrainingSet {
            images: images.to_vec(),
            subsets: std::collections::HashMap::new(),
            buckets: BucketSettings {
                width_px: side_px,
                height_px: side_px,
                enabled: false,
                ..BucketSettings::default()
            },
            cache: Some(self.cache()),
            base_model: fixture("diffusers"),
        };
        let looks = Looks::new(&set, false).expect("pictures");
        let mut encoder = LatentEncoder::new(model, &Device::flex(), &set, looks, seed);
        let latents = images.iter().map(|image| {
            let latents = encoder
                .encode(image, (side_px, side_px), false)
                .expect("latents");
            bits(&latents.values)
        });
        Encoded {
            bits: latents.collect(),
            cached: encoder.cached,
            computed: encoder.encoded,
        }
    }

    /// States of captions.
    fn states(&self, captions: &[&str], clip_skip: usize, max_token_length: usize) -> Encoded {
        let settings = TrainSettings {
            clip_skip,
            max_token_length,
            text_encoder_lr: 0.0,
            ..TrainSettings::default()
        };
        let (mut total, mut cached) = (0, 0);
        let cache = self.cache();
        let (names, device) = (captions.iter().copied(), Device::flex());
        let prepared =
            Captions::prepare(&self.model, names, &settings, Some(&cache), &device, |p| {
                if let Phase::CachingText {
                    total: all,
                    cached: hits,
                    ..
                } = p
                {
                    (total, cached) = (all, hits);
                }
                Ok(())
            });
        let prepared = prepared.expect("captions");
        let states = captions.iter().map(|caption| {
            let Conditioning::States(states) = prepared.batch(&self.model, &[caption]) else {
                panic!("tokens of a frozen text encoder");
            };
            bits(&read(states.states).expect("numbers"))
        });
        Encoded {
            bits: states.collect(),
            cached,
            computed: total - cached,
        }
    }
}

#[derive(Debug, PartialEq)]
struct Encoded {
    bits: Vec<Vec<u32>>,
    cached: usize,
    computed: usize,
}

impl Encoded {
    fn counts(&self) -> (usize, usize) {
        (self.cached, self.computed)
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The tiny model with one number of one component changed.
fn changed_model(folder: &Path, component: &str) -> StableDiffusion {
    let root = fixture("diffusers");
    let mut waiting = vec![root.clone()];
    while let Some(from) = waiting.pop() {
        let to = folder.join(from.strip_prefix(&root).expect("below"));
        fs::create_dir_all(&to).expect("a folder");
        for entry in fs::read_dir(&from).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                waiting.push(path);
            } else {
                let name = path.file_name().expect("a name");
                fs::copy(&path, to.join(name)).expect("copied");
            }
        }
    }
    let weights = fs::read_dir(folder.join(component)).expect("a folder");
    let weights = weights
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .expect("weights");
    let mut bytes = fs::read(&weights).expect("weights");
    let last = bytes.len() - 2; // the low byte of a 16-bit number
    bytes[last] ^= 1;
    fs::write(&weights, bytes).expect("written");
    load_model(folder.to_owned())
}

#[test]
fn latents_come_back_with_their_bits_and_without_the_vae() {
    let place = Place::new();
    let images = [10, 20, 30].map(|shade| place.picture(shade));
    let first = place.latents(&images, 64, 1);
    assert_eq!(first.counts(), (0, 3));
    // The files of the pictures are not needed any more.
    for image in &images {
        fs::remove_file(&image.path).expect("removed");
    }
    let second = place.latents(&images, 64, 1);
    assert_eq!(second.counts(), (3, 0));
    assert_eq!(second.bits, first.bits);
    // Another seed draws another sample from the same moments.
    let reseeded = place.latents(&images, 64, 2);
    assert_eq!(reseeded.counts(), (3, 0));
    assert_ne!(reseeded.bits, first.bits);
}

#[test]
fn another_picture_size_or_vae_is_a_miss() {
    let place = Place::new();
    let image = place.picture(10);
    place.latents(std::slice::from_ref(&image), 64, 1);
    assert_eq!(place.latents(&[place.picture(20)], 64, 1).counts(), (0, 1));
    let smaller = place.latents(std::slice::from_ref(&image), 32, 1);
    assert_eq!(smaller.counts(), (0, 1));
    let folder = tempfile::tempdir().expect("a folder");
    let other = changed_model(folder.path(), "vae");
    let found = place.latents_by(&other, std::slice::from_ref(&image), 64, 1);
    assert_eq!(found.counts(), (0, 1));
    // Another UNet has the same latents.
    let folder = tempfile::tempdir().expect("a folder");
    let other = changed_model(folder.path(), "unet");
    let found = place.latents_by(&other, std::slice::from_ref(&image), 64, 1);
    assert_eq!(found.counts(), (1, 0));
}

#[test]
fn a_flip_a_smart_crop_and_a_correction_are_entries_of_their_own() {
    let place = Place::new();
    let plain = place.picture(10);
    let levelled = TrainingImage {
        correction: Some(ColorCorrection::AutoLevels),
        ..plain.clone()
    };
    let matched = TrainingImage {
        correction: Some(ColorCorrection::MatchMedian),
        ..plain.clone()
    };
    let encode = |image: &TrainingImage, crop: CropMode, flipped: bool, others: &[u8]| {
        let others = others.iter().map(|shade| place.picture(*shade));
        let set = TrainingSet {
            images: others.chain([image.clone()]).collect(),
            subsets: std::collections::HashMap::new(),
            buckets: BucketSettings {
                width_px: 64,
                height_px: 64,
                enabled: false,
                crop,
                ..BucketSettings::default()
            },
            cache: Some(place.cache()),
            base_model: fixture("diffusers"),
        };
        let looks = Looks::new(&set, false).expect("pictures");
        let mut encoder = LatentEncoder::new(&place.model, &Device::flex(), &set, looks, 1);
        let latents = encoder.encode(image, (64, 64), flipped).expect("latents");
        (bits(&latents.values), encoder.encoded)
    };
    let mut seen = Vec::new();
    for (image, crop, flipped, others) in [
        (&plain, CropMode::Centre, false, &[][..]),
        (&plain, CropMode::Centre, true, &[]),
        (&plain, CropMode::Smart, false, &[]),
        (&levelled, CropMode::Centre, false, &[]),
        (&matched, CropMode::Centre, false, &[200, 220]),
        (&matched, CropMode::Centre, false, &[90, 100]), // another set has another median
    ] {
        let (first, encoded) = encode(image, crop, flipped, others);
        assert_eq!(encoded, 1, "{crop:?} {flipped}");
        assert_eq!(encode(image, crop, flipped, others), (first.clone(), 0));
        assert!(!seen.contains(&first));
        seen.push(first);
    }
}

#[test]
fn damaged_latents_are_made_again() {
    let place = Place::new();
    let images = [10, 20].map(|shade| place.picture(shade));
    let first = place.latents(&images, 64, 1);
    let files = place.files("latents");
    assert_eq!(files.len(), 2);
    fs::write(&files[0], b"nonsense").expect("written");
    let second = place.latents(&images, 64, 1);
    assert_eq!(second.counts(), (1, 1));
    assert_eq!(second.bits, first.bits);
    assert_eq!(place.latents(&images, 64, 1).counts(), (2, 0));
}

#[test]
fn states_come_back_with_their_bits() {
    let place = Place::new();
    let captions = ["a red cat", "a blue dog on a hill"];
    let first = place.states(&captions, 2, 75);
    assert_eq!(first.counts(), (0, 2));
    let second = place.states(&captions, 2, 75);
    assert_eq!(second.counts(), (2, 0));
    assert_eq!(second.bits, first.bits);
    // Among others, and in another group, a caption has the same states.
    let captions = ["one more", "a red cat", "", "a blue dog on a hill"];
    let third = place.states(&captions, 2, 75);
    assert_eq!(third.counts(), (2, 2));
    for file in place.files("text") {
        fs::remove_file(file).expect("removed");
    }
    let fourth = place.states(&captions, 2, 75);
    assert_eq!(fourth.counts(), (0, 4));
    assert_eq!(fourth.bits, third.bits);
}

#[test]
fn another_clip_skip_length_or_text_encoder_is_a_miss() {
    let mut place = Place::new();
    let captions = ["a red cat"];
    place.states(&captions, 1, 75);
    assert_eq!(place.states(&captions, 2, 75).counts(), (0, 1));
    let long = place.states(&captions, 1, 150);
    assert_eq!(long.counts(), (0, 1));
    assert_eq!(
        place.states(&captions, 1, 150),
        Encoded {
            cached: 1,
            computed: 0,
            ..long
        }
    );
    let folder = tempfile::tempdir().expect("a folder");
    place.model = changed_model(folder.path(), "text_encoder");
    assert_eq!(place.states(&captions, 1, 75).counts(), (0, 1));
}

#[test]
fn a_file_that_is_replaced_later_does_not_change_a_loaded_model() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = changed_model(folder.path(), "vae");
    let before = model.vae_digest();
    let file = folder
        .path()
        .join("vae/diffusion_pytorch_model.safetensors");
    let original = fixture("diffusers/vae/diffusion_pytorch_model.safetensors");
    let beside = folder.path().join("new.safetensors");
    fs::copy(original, &beside).expect("copied");
    fs::rename(beside, file).expect("replaced");
    assert_eq!(model.vae_digest(), before);
    assert_ne!(load_model(folder.path().to_owned()).vae_digest(), before);
}

#[test]
fn an_unloaded_vae_is_loaded_again() {
    let mut place = Place::new();
    let encode = |model: &StableDiffusion| {
        let picture = Tensor::<4>::full([1, 3, 64, 64], 0.25, &Device::flex());
        let moments = model.vae().expect("loads").encode(picture);
        bits(&read(moments.mean).expect("numbers"))
    };
    let before = encode(&place.model);
    place.model.unload_vae();
    assert_eq!(encode(&place.model), before);
}
