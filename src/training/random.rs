//! Random numbers that are a pure function of a seed and a place, made on the host, so that a run draws the same
//! noise on every device and after every resume.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use rand_distr::StandardNormal;
use sha2::{Digest, Sha256};

/// What random numbers are for. Each use has its own stream: more draws of one never shift another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Noise of training batches; the place is the batch's number.
    Noise,
    /// Offsets of that noise; the place is the batch's number.
    NoiseOffset,
    /// Coarser levels of that noise; the place is the batch's number.
    MultiresNoise,
    /// Noise that the UNet sees besides; the place is the batch's number.
    InputPerturbation,
    /// Timesteps of training batches; the place is the batch's number.
    Timesteps,
    /// Samples of the VAE's posterior; the place is the image's content and size.
    Latents,
    /// Noise of validation; the place is the image's content and the timestep.
    Validation,
    /// Which images are held out; the place is the image's content and id.
    HeldOut,
    /// How a picture is changed this time; the place is the batch's number, the picture's place in it and its content.
    Augment,
    /// Noise of preview pictures.
    Preview,
    /// What a step sees of a caption; the place is the batch's number, the image's place in it and its content.
    Captions,
}

impl Stream {
    fn tag(self) -> &'static [u8] {
        match self {
            Self::Noise => b"noise",
            Self::NoiseOffset => b"noise offset",
            Self::MultiresNoise => b"multires noise",
            Self::InputPerturbation => b"input perturbation",
            Self::Timesteps => b"timesteps",
            Self::Latents => b"latents",
            Self::Validation => b"validation",
            Self::HeldOut => b"held out",
            Self::Augment => b"augment",
            Self::Preview => b"preview",
            Self::Captions => b"captions",
        }
    }
}

/// The generator of one place in one stream.
pub fn generator(seed: u64, stream: Stream, place: &[u8]) -> ChaCha12Rng {
    let mut key = Sha256::new();
    key.update(stream.tag());
    key.update(seed.to_le_bytes());
    key.update(place);
    ChaCha12Rng::from_seed(key.finalize().into())
}

/// `count` independent standard normal numbers.
pub fn normal(rng: &mut ChaCha12Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.sample(StandardNormal)).collect()
}

/// A tensor of independent standard normal numbers.
pub fn normal_tensor<const D: usize>(
    rng: &mut ChaCha12Rng,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    let values = normal(rng, shape.iter().product());
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// Timesteps of one batch: uniform and independent in a range that is not empty.
pub fn timesteps(rng: &mut ChaCha12Rng, count: usize, range: Range<usize>) -> Vec<usize> {
    (0..count)
        .map(|_| rng.random_range(range.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_depend_on_seed_stream_and_place_alone() {
        let draw = |seed, stream, place: u64| {
            normal(&mut generator(seed, stream, &place.to_le_bytes()), 4)
        };
        let first = draw(1, Stream::Noise, 7);
        assert_eq!(first, draw(1, Stream::Noise, 7));
        assert_ne!(first, draw(2, Stream::Noise, 7));
        assert_ne!(first, draw(1, Stream::Preview, 7));
        assert_ne!(first, draw(1, Stream::Noise, 8));
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let values = normal(&mut generator(0, Stream::Noise, b""), 100_000);
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let square = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        // Five standard errors: 1/√n of the mean, √(2/n) of the variance.
        assert!(mean.abs() < 5.0 / n.sqrt(), "{mean}");
        assert!((square - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{square}");
    }

    #[test]
    fn timesteps_cover_the_schedule() {
        let values = timesteps(&mut generator(0, Stream::Timesteps, b""), 100_000, 0..1000);
        assert_eq!(values.iter().min(), Some(&0));
        assert_eq!(values.iter().max(), Some(&999));
        let mean = values.iter().sum::<usize>() as f64 / 100_000.0;
        assert!((mean - 499.5).abs() < 5.0 * 288.7 / 316.2, "{mean}");
        let values = timesteps(&mut generator(0, Stream::Timesteps, b""), 10_000, 200..205);
        let found: std::collections::BTreeSet<usize> = values.into_iter().collect();
        assert_eq!(found, (200..205).collect());
    }
}
