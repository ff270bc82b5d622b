//! The images of a run as latents: encoded once, sampled once and frozen, as sd-scripts' `cache_latents` does.

use std::collections::HashMap;
use std::path::PathBuf;

use burn::tensor::{DType, Device, Tensor, TensorData};
use sha2::{Digest, Sha256};

use crate::dataloader::{
    Batch, BucketSettings, CachedLatent, EpochPlan, LatentCache, TrainingImage, load_pixels,
};
use crate::diffusion::StableDiffusion;
use crate::training::TrainError;
use crate::training::progress::Phase;
use crate::training::random::{Stream, generator, normal_tensor};
use crate::training::validation::HeldOut;

/// Side of the picture by which a VAE is recognised.
const FINGERPRINT_PX: usize = 64;

/// What a run trains on.
#[derive(Debug, Clone)]
pub struct TrainingSet {
    /// All images of the dataset, the held-out ones among them.
    pub images: Vec<TrainingImage>,
    /// Subset names by image id, such as `10_lumo`; told in the LoRA file.
    pub subsets: HashMap<String, String>,
    /// Sizes of the pictures.
    pub buckets: BucketSettings,
    /// Folder in which latents are kept between runs; none are kept without.
    pub latent_cache: Option<PathBuf>,
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

impl TrainingSet {
    /// The images to train on and the held-out ones, in the order of `held_out`.
    pub fn split(
        &self,
        held_out: &[String],
    ) -> Result<(Vec<TrainingImage>, Vec<TrainingImage>), TrainError> {
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
}

/// Encodes images to latents, through a cache that outlives the run.
pub struct LatentEncoder<'a> {
    model: &'a StableDiffusion,
    device: Device,
    cache: Option<LatentCache>,
    fingerprint: String,
    buckets: BucketSettings,
    seed: u64,
}

impl<'a> LatentEncoder<'a> {
    /// Opens the cache.
    pub fn new(
        model: &'a StableDiffusion,
        device: &Device,
        set: &TrainingSet,
        seed: u64,
    ) -> Result<Self, TrainError> {
        let cache = set
            .latent_cache
            .as_deref()
            .map(LatentCache::open)
            .transpose()?;
        Ok(Self {
            model,
            device: device.clone(),
            cache,
            fingerprint: fingerprint(model, device)?,
            buckets: set.buckets.clone(),
            seed,
        })
    }

    /// The latents of one image at one size.
    pub fn encode(&self, image: &TrainingImage, bucket: (u32, u32)) -> Result<Latents, TrainError> {
        let resized = self.buckets.place(image.width_px, image.height_px).resized;
        let place = format!("{}/{resized:?}/{bucket:?}", image.sha256);
        let key = hex::encode(Sha256::digest(format!(
            "{place}/{}/{}",
            self.fingerprint, self.seed
        )));
        let cached = self.cache.as_ref().and_then(|cache| cache.get(&key));
        let latents = match cached {
            Some(cached) => cached,
            None => {
                let sampled = self.sample(image, bucket, &place)?;
                if let Some(cache) = &self.cache {
                    cache.put(&key, &sampled)?;
                }
                sampled
            }
        };
        let scale = self.model.vae.scaling_factor() as f32;
        Ok(Latents {
            shape: latents.shape,
            values: latents.data.iter().map(|value| value * scale).collect(),
        })
    }

    /// One unscaled sample of the VAE's posterior, its noise decided by seed, content and size.
    fn sample(
        &self,
        image: &TrainingImage,
        bucket: (u32, u32),
        place: &str,
    ) -> Result<CachedLatent, TrainError> {
        let pixels = load_pixels(&image.path, bucket, &self.buckets)?;
        let shape = [1, 3, pixels.height as usize, pixels.width as usize];
        let data = TensorData::new(pixels.data, shape);
        let picture = Tensor::<4>::from_data(data, (&self.device, DType::F32));
        let moments = self.model.vae.encode(picture);
        let mut rng = generator(self.seed, Stream::Latents, place.as_bytes());
        let noise = normal_tensor(&mut rng, moments.mean.dims(), &self.device);
        let sample = moments.sample(noise); // [1, channels, height, width]
        let [_, channels, height, width] = sample.dims();
        let values = read(sample)?;
        if values.iter().any(|value| !value.is_finite()) {
            let id = image.id.clone();
            return Err(TrainError::LatentsNotFinite { id });
        }
        Ok(CachedLatent {
            shape: [channels, height, width],
            data: values,
        })
    }
}

/// Encodes every training image at the size of its bucket, in the order of `images`.
pub fn encode_all(
    encoder: &LatentEncoder<'_>,
    images: &[TrainingImage],
    plan: &EpochPlan,
    mut report: impl FnMut(Phase) -> Result<(), TrainError>,
) -> Result<Vec<Latents>, TrainError> {
    let buckets = buckets_of(plan, images.len());
    let total = images.len();
    let mut latents = Vec::with_capacity(total);
    for (done, (image, bucket)) in images.iter().zip(buckets).enumerate() {
        report(Phase::CachingLatents { done, total })?;
        // An image that the plan leaves out (a surplus regularization image) needs none.
        latents.push(match bucket {
            Some(bucket) => encoder.encode(image, bucket)?,
            None => Latents {
                shape: [0; 3],
                values: Vec::new(),
            },
        });
    }
    report(Phase::CachingLatents { done: total, total })?;
    Ok(latents)
}

/// Encodes the held-out images, each at the size that training would give it.
pub fn encode_held_out(
    encoder: &LatentEncoder<'_>,
    images: &[TrainingImage],
    settings: &BucketSettings,
) -> Result<Vec<HeldOut>, TrainError> {
    let mut held_out = Vec::with_capacity(images.len());
    for image in images {
        let bucket = settings.place(image.width_px, image.height_px).bucket;
        held_out.push(HeldOut {
            sha256: image.sha256.clone(),
            caption: image.caption.clone(),
            latents: encoder.encode(image, bucket)?,
        });
    }
    Ok(held_out)
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

/// Tells VAEs apart by what they do: a digest of how they encode one fixed picture.
fn fingerprint(model: &StableDiffusion, device: &Device) -> Result<String, TrainError> {
    let mut rng = generator(0, Stream::Latents, b"fingerprint");
    let shape = [1, 3, FINGERPRINT_PX, FINGERPRINT_PX];
    let picture = normal_tensor(&mut rng, shape, device).clamp(-1.0, 1.0);
    let moments = model.vae.encode(picture);
    let mut digest = Sha256::new();
    for values in [read(moments.mean)?, read(moments.logvar)?] {
        for value in values {
            digest.update(value.to_le_bytes());
        }
    }
    Ok(hex::encode(digest.finalize()))
}

fn read(tensor: Tensor<4>) -> Result<Vec<f32>, TrainError> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| TrainError::Device(error.to_string()))
}
