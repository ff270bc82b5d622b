//! The images of a run as latents: encoded once for many runs, sampled once for this one and frozen, as sd-scripts'
//! `cache_latents` does. Images that look different each time are encoded as they are shown.

use std::collections::HashMap;
use std::path::PathBuf;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::RngExt as _;
use rand_chacha::ChaCha12Rng;
use rayon::prelude::*;

use crate::dataloader::{
    Batch, BucketSettings, CacheKey, CacheKind, CachedTensor, ColorCorrection, CropMode, EpochPlan,
    Look, TensorCache, Tones, TrainingImage, Window, crop_ltrb, decode, load_mask, load_pixels,
    set_median, shrink_mask,
};
use crate::diffusion::devices::is_cpu;
use crate::diffusion::vae::Moments;
use crate::diffusion::{StableDiffusion, TimeIds, instruction_set};
use crate::training::TrainError;
use crate::training::progress::Phase;
use crate::training::random::{Stream, generator, normal_tensor};
use crate::training::settings::TrainSettings;
use crate::training::validation::HeldOut;

/// What a run trains on.
#[derive(Debug, Clone)]
pub struct TrainingSet {
    /// All images of the dataset, the held-out ones among them.
    pub images: Vec<TrainingImage>,
    /// Subset names by image id, such as `10_lumo`; told in the LoRA file.
    pub subsets: HashMap<String, String>,
    /// Sizes of the pictures.
    pub buckets: BucketSettings,
    /// Where latents and states of captions are kept between runs; none are kept without.
    pub cache: Option<TensorCache>,
    /// The base model's file or folder; told in the LoRA file.
    pub base_model: PathBuf,
}

/// The latents of one image on the host, scaled as the UNet expects them.
#[derive(Debug, Clone)]
pub struct Latents {
    /// `[channels, height, width]`
    pub shape: [usize; 3],
    /// Row-major.
    pub values: Vec<f32>,
    /// How much each place counts in the loss, 0 to 1: `[height, width]`; wholly without.
    pub mask: Option<Vec<f32>>,
}

impl Latents {
    /// `[1, channels, height, width]` on a device.
    pub fn tensor(&self, device: &Device) -> Tensor<4> {
        stack(&[self], device)
    }
}

/// The latents of a batch, all of one shape: `[batch, channels, height, width]`.
pub fn stack(batch: &[&Latents], device: &Device) -> Tensor<4> {
    let [channels, height, width] = batch[0].shape;
    let values: Vec<f32> = batch
        .iter()
        .flat_map(|latents| latents.values.iter().copied())
        .collect();
    let data = TensorData::new(values, [batch.len(), channels, height, width]);
    Tensor::from_data(data, (device, DType::F32))
}

/// The masks of a batch, where one of its images has one: `[batch, 1, height, width]`.
pub fn stack_masks(batch: &[&Latents], device: &Device) -> Option<Tensor<4>> {
    batch.iter().find(|latents| latents.mask.is_some())?;
    let [_, height, width] = batch[0].shape;
    let mask = |latents: &&Latents| match &latents.mask {
        Some(mask) => mask.clone(),
        None => vec![1.0; height * width],
    };
    let values: Vec<f32> = batch.iter().flat_map(mask).collect();
    let data = TensorData::new(values, [batch.len(), 1, height, width]);
    Some(Tensor::from_data(data, (device, DType::F32)))
}

/// The sizes of a picture that is trained at the size of a bucket, by the rule of sd-scripts.
pub fn time_ids(image: &TrainingImage, bucket: (u32, u32)) -> TimeIds {
    let (width, height) = (image.width_px.max(1), image.height_px.max(1));
    let [left, top, ..] = crop_ltrb(bucket, (width, height));
    [
        height as f32,
        width as f32,
        top as f32,
        left as f32,
        bucket.1 as f32,
        bucket.0 as f32,
    ]
}

impl TrainingSet {
    /// The median of the set's colours, where an image is to be brought to it: of all images but those for
    /// regularization, held-out ones among them, so that it does not depend on the run's seed.
    pub fn median(&self) -> Result<[u8; 3], TrainError> {
        let matched = Some(ColorCorrection::MatchMedian);
        if !self.images.iter().any(|image| image.correction == matched) {
            return Ok([0; 3]);
        }
        let images: Vec<_> = (self.images.iter())
            .filter(|image| !image.regularization)
            .collect();
        let medians: Result<Vec<_>, _> = images
            .par_iter()
            .map(|image| Ok(Tones::of(&decode(&image.path, image.background)?).medians()))
            .collect();
        medians
            .map(|medians| set_median(&medians))
            .map_err(TrainError::Data)
    }

    /// The images to train on and the held-out ones, as the settings name or draw them.
    pub fn split(
        &self,
        settings: &TrainSettings,
    ) -> Result<(Vec<TrainingImage>, Vec<TrainingImage>), TrainError> {
        let validation = &settings.validation;
        let held_out = match validation.fraction {
            Some(fraction) => self.draw(fraction, settings.seed),
            None => validation.image_ids.clone(),
        };
        let held: Vec<TrainingImage> = held_out
            .iter()
            .map(|id| {
                let found = self.images.iter().find(|image| image.id == *id);
                let unknown = || TrainError::UnknownImage { id: id.clone() };
                found.cloned().ok_or_else(unknown)
            })
            .collect::<Result<_, _>>()?;
        let train = self
            .images
            .iter()
            .filter(|image| !held_out.contains(&image.id));
        Ok((train.cloned().collect(), held))
    }

    /// A share of the images, regularization aside: at least one, and at least one is left. The choice depends on the
    /// seed, contents and ids, not on any order, and another picture changes it little.
    fn draw(&self, fraction: f64, seed: u64) -> Vec<String> {
        let images = self.images.iter().filter(|image| !image.regularization);
        let mut lots: Vec<(u64, &str)> = images
            .map(|image| {
                let place = format!("{}/{}", image.sha256, image.id);
                let mut rng = generator(seed, Stream::HeldOut, place.as_bytes());
                (rng.random(), image.id.as_str())
            })
            .collect();
        lots.sort_unstable();
        let wanted = (fraction * lots.len() as f64).round() as usize;
        let count = wanted.max(1).min(lots.len().saturating_sub(1));
        lots[..count]
            .iter()
            .map(|(_, id)| (*id).to_owned())
            .collect()
    }
}

/// Encodes images to latents, through a cache that outlives the run.
pub struct LatentEncoder<'a> {
    model: &'a StableDiffusion,
    device: Device,
    cache: Option<(&'a TensorCache, String)>,
    looks: Looks,
    seed: u64,
    /// Images whose latents were in the cache.
    pub cached: usize,
    /// Images that the VAE has seen.
    pub encoded: usize,
}

impl<'a> LatentEncoder<'a> {
    /// Tells the VAE apart, when there is a cache.
    pub fn new(
        model: &'a StableDiffusion,
        device: &Device,
        set: &'a TrainingSet,
        looks: Looks,
        seed: u64,
    ) -> Self {
        let encoder = || format!("{} {}", model.vae_digest(), computed_by(device));
        Self {
            model,
            device: device.clone(),
            cache: set.cache.as_ref().map(|cache| (cache, encoder())),
            looks,
            seed,
            cached: 0,
            encoded: 0,
        }
    }

    /// The latents of one image at one size, as it is or flipped: a sample of the VAE's posterior, its noise decided by
    /// seed, content and size.
    pub fn encode(
        &mut self,
        image: &TrainingImage,
        bucket: (u32, u32),
        flipped: bool,
    ) -> Result<Latents, TrainError> {
        let look = Look {
            flipped,
            ..self.looks.usual(image)
        };
        let place = self.looks.place(image, bucket, look);
        let moments = self.moments(image, bucket, look, &place)?; // both ways the same numbers, by way of the host
        let rng = generator(self.seed, Stream::Latents, place.as_bytes());
        let latents = sample(self.model, &self.device, moments, rng)?;
        self.looks.masked(latents, image, look)
    }

    fn moments(
        &mut self,
        image: &TrainingImage,
        bucket: (u32, u32),
        look: Look,
        place: &str,
    ) -> Result<HostMoments, TrainError> {
        let Some((cache, encoder)) = &self.cache else {
            self.encoded += 1;
            return self
                .looks
                .run_vae(self.model, &self.device, image, bucket, look);
        };
        let config = self.model.vae_config();
        let [width, height] = [bucket.0, bucket.1].map(|side| side as usize / config.factor());
        let shape = [1, config.latent_channels, height, width];
        let key = CacheKey::new(CacheKind::Latents, &[place, encoder]);
        let stored = cache.get(&key, &[("mean", &shape), ("logvar", &shape)]);
        if let Some(Ok([mean, logvar])) = stored.map(<[_; 2]>::try_from) {
            self.cached += 1;
            return Ok(HostMoments {
                shape,
                mean,
                logvar,
            });
        }
        let moments = self
            .looks
            .run_vae(self.model, &self.device, image, bucket, look)?;
        let tensor = |name, values| CachedTensor {
            name,
            shape: &moments.shape,
            values,
        };
        cache.put(
            &key,
            &[
                tensor("mean", &moments.mean),
                tensor("logvar", &moments.logvar),
            ],
        );
        self.encoded += 1;
        Ok(moments)
    }
}

/// How the images of a set look when nothing is drawn.
#[derive(Debug, Clone)]
pub struct Looks {
    buckets: BucketSettings,
    median: [u8; 3],
    /// Whether masks count.
    masks: bool,
}

impl Looks {
    /// Reads the whole set where its median is wanted. `masks`: whether the masks of images count.
    pub fn new(set: &TrainingSet, masks: bool) -> Result<Self, TrainError> {
        Ok(Self {
            buckets: set.buckets.clone(),
            median: set.median()?,
            masks,
        })
    }

    /// A window that is drawn is the centre as long as nothing is.
    pub fn usual(&self, image: &TrainingImage) -> Look {
        Look {
            window: match self.buckets.crop {
                CropMode::Centre | CropMode::Random => Window::Centre,
                CropMode::Smart => Window::Smart,
            },
            background: image.background,
            correction: image.correction.map(|recipe| (recipe, self.median)),
            ..Look::default()
        }
    }

    /// All that decides the pixels of a look that can be kept.
    fn place(&self, image: &TrainingImage, bucket: (u32, u32), look: Look) -> String {
        let resized = self.buckets.place(image.width_px, image.height_px).resized;
        let mut place = format!("{}/{resized:?}/{bucket:?}", image.sha256);
        if let Some(background) = look.background {
            place += &format!("/{background}");
        }
        if look.window == Window::Smart {
            place += "/smart 1";
        }
        match look.correction {
            Some((ColorCorrection::MatchMedian, median)) => {
                place += &format!("/match_median {median:?}");
            }
            Some((recipe, _)) => place += &format!("/{}", recipe.name()),
            None => {}
        }
        if look.flipped {
            place += "/flipped";
        }
        place
    }

    /// Latents of a look that is not kept; `rng` draws the sample of the posterior.
    pub fn encode_fresh(
        &self,
        model: &StableDiffusion,
        device: &Device,
        image: &TrainingImage,
        bucket: (u32, u32),
        look: Look,
        rng: ChaCha12Rng,
    ) -> Result<Latents, TrainError> {
        let moments = self.run_vae(model, device, image, bucket, look)?;
        self.masked(sample(model, device, moments, rng)?, image, look)
    }

    /// The latents with the mask of their image, where masks count.
    fn masked(
        &self,
        latents: Latents,
        image: &TrainingImage,
        look: Look,
    ) -> Result<Latents, TrainError> {
        if !self.masks {
            return Ok(latents);
        }
        let [_, height, width] = latents.shape;
        let mask = load_mask(&image.path, image.mask.as_deref(), &self.buckets, look)?;
        Ok(Latents {
            mask: mask.map(|mask| shrink_mask(&mask, width, height)),
            ..latents
        })
    }

    fn run_vae(
        &self,
        model: &StableDiffusion,
        device: &Device,
        image: &TrainingImage,
        bucket: (u32, u32),
        look: Look,
    ) -> Result<HostMoments, TrainError> {
        let pixels = load_pixels(&image.path, bucket, &self.buckets, look)?;
        let shape = [1, 3, pixels.height as usize, pixels.width as usize];
        let data = TensorData::new(pixels.data, shape);
        let picture = Tensor::<4>::from_data(data, (device, DType::F32));
        let moments = model.vae()?.encode(picture);
        let host = HostMoments {
            shape: moments.mean.dims(),
            mean: read(moments.mean)?,
            logvar: read(moments.logvar)?,
        };
        let mut values = host.mean.iter().chain(&host.logvar);
        if values.any(|value| !value.is_finite()) {
            let id = image.id.clone();
            return Err(TrainError::LatentsNotFinite { id });
        }
        Ok(host)
    }
}

/// A sample of the posterior, scaled as the UNet expects it.
fn sample(
    model: &StableDiffusion,
    device: &Device,
    moments: HostMoments,
    mut rng: ChaCha12Rng,
) -> Result<Latents, TrainError> {
    let shape = moments.shape;
    let noise = normal_tensor(&mut rng, shape, device);
    let tensor = |values| {
        let data = TensorData::new(values, shape);
        Tensor::<4>::from_data(data, (device, DType::F32))
    };
    let moments = Moments {
        mean: tensor(moments.mean),
        logvar: tensor(moments.logvar),
    };
    let scale = model.vae_config().scaling_factor as f32;
    let sample = read(moments.sample(noise))?;
    let [_, channels, height, width] = shape;
    Ok(Latents {
        shape: [channels, height, width],
        values: sample.iter().map(|value| value * scale).collect(),
        mask: None,
    })
}

/// What the VAE makes of a picture, on the host: `[1, channels, height, width]` each.
struct HostMoments {
    shape: [usize; 4],
    mean: Vec<f32>,
    logvar: Vec<f32>,
}

/// What else decides the bits of a frozen part's output, besides its weights and its input.
pub(super) fn computed_by(device: &Device) -> String {
    // On other devices the driver decides; the CPU's results depend on its instructions.
    let instructions = is_cpu(device).then(instruction_set).unwrap_or_default();
    format!("{} {device:?} {instructions}", env!("CARGO_PKG_VERSION"))
}

/// The latents of an image, as far as they can be had before it is shown.
#[derive(Debug, Clone)]
pub enum Prepared {
    /// An image that the plan leaves out: a surplus one for regularization.
    Unused,
    /// As it is, and flipped where that may be drawn.
    Kept {
        /// Not flipped.
        plain: Latents,
        /// Flipped.
        flipped: Option<Latents>,
    },
    /// It looks different each time.
    Fresh,
}

/// Encodes every training image at the size of its bucket, in the order of `images`.
pub fn encode_all(
    encoder: &mut LatentEncoder<'_>,
    images: &[TrainingImage],
    plan: &EpochPlan,
    mut report: impl FnMut(Phase) -> Result<(), TrainError>,
) -> Result<Vec<Prepared>, TrainError> {
    let buckets = buckets_of(plan, images.len());
    let total = images.len();
    let mut latents = Vec::with_capacity(total);
    let mut tell = |done, cached| {
        report(Phase::CachingLatents {
            done,
            total,
            cached,
        })
    };
    for (done, (image, bucket)) in images.iter().zip(buckets).enumerate() {
        tell(done, encoder.cached)?;
        latents.push(match bucket {
            None => Prepared::Unused,
            Some(_) if image.augment.is_fresh() => Prepared::Fresh,
            Some(bucket) => Prepared::Kept {
                plain: encoder.encode(image, bucket, false)?,
                flipped: image
                    .augment
                    .flip
                    .then(|| encoder.encode(image, bucket, true))
                    .transpose()?,
            },
        });
    }
    tell(total, encoder.cached)?;
    Ok(latents)
}

/// Encodes the held-out images, each at the size that training would give it.
pub fn encode_held_out(
    encoder: &mut LatentEncoder<'_>,
    images: &[TrainingImage],
    settings: &BucketSettings,
) -> Result<Vec<HeldOut>, TrainError> {
    let mut held_out = Vec::with_capacity(images.len());
    for image in images {
        let bucket = settings.place(image.width_px, image.height_px).bucket;
        held_out.push(HeldOut {
            sha256: image.sha256.clone(),
            caption: measured_caption(image),
            time_ids: time_ids(image, bucket),
            latents: encoder.encode(image, bucket, false)?,
        });
    }
    Ok(held_out)
}

/// An image's caption as it is measured with: whole, and the same in every run.
pub(super) fn measured_caption(image: &TrainingImage) -> String {
    let mut rng = generator(0, Stream::Captions, image.sha256.as_bytes());
    image.captioning.whole(&image.caption, &mut rng)
}

/// The bucket of each image, where the plan uses it.
fn buckets_of(plan: &EpochPlan, images: usize) -> Vec<Option<(u32, u32)>> {
    let mut buckets = vec![None; images];
    for Batch { bucket, images } in plan.batches(0) {
        for image in images {
            buckets[image] = Some(bucket);
        }
    }
    buckets
}

/// A tensor's elements on the host.
pub(super) fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, TrainError> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| TrainError::Device(error.to_string()))
}
