//! The first values of adapters' tensors: a function of seed, adapter and tensor alone.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use rand_distr::StandardNormal;
use sha2::{Digest, Sha256};

use crate::networks::form::{Init, TensorSpec};

/// The values of a tensor of the adapter called `name`; `None` for what begins with the layer's own weight.
pub fn values(seed: u64, name: &str, spec: &TensorSpec) -> Option<Vec<f32>> {
    let count: usize = spec.shape.iter().product();
    match spec.init {
        Init::RowNorms => None,
        Init::Zeros => Some(vec![0.0; count]),
        Init::KaimingUniform => {
            let fan_in: usize = spec.shape[1..].iter().product();
            let bound = 1.0 / (fan_in as f32).sqrt();
            let mut rng = generator(seed, name, spec.suffix);
            let draw = |_| (rng.random::<f32>() * 2.0 - 1.0) * bound;
            Some((0..count).map(draw).collect())
        }
        Init::Normal(deviation) => {
            let mut rng = generator(seed, name, spec.suffix);
            let draw = |_| rng.sample::<f32, _>(StandardNormal) * deviation;
            Some((0..count).map(draw).collect())
        }
    }
}

fn generator(seed: u64, name: &str, suffix: &str) -> ChaCha12Rng {
    let mut key = Sha256::new();
    key.update(suffix.trim_end_matches(".weight"));
    key.update(seed.to_le_bytes());
    key.update(name);
    ChaCha12Rng::from_seed(key.finalize().into())
}
