//! What adapters leave out in a training step.
//!
//! Masks are drawn on the host as a function of (seed, step, batch, adapter), so that a block that runs again in the
//! backward, a run that goes on after a crash and every device have the same.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use sha2::{Digest, Sha256};

use crate::networks::settings::DropoutSettings;

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The run's seed.
    pub seed: u64,
    /// Optimizer steps done.
    pub step: u64,
    /// Number of the batch in the step.
    pub batch: u64,
}

/// The masks of one adapter in one place.
#[derive(Debug, Clone)]
pub struct Masks {
    settings: DropoutSettings,
    key: [u8; 32],
}

impl Masks {
    /// Those of the adapter of this name.
    pub fn new(settings: DropoutSettings, place: Place, name: &str) -> Self {
        let mut key = Sha256::new();
        key.update(b"network dropout");
        key.update(place.seed.to_le_bytes());
        key.update(place.step.to_le_bytes());
        key.update(place.batch.to_le_bytes());
        key.update(name);
        Self {
            settings,
            key: key.finalize().into(),
        }
    }

    fn generator(&self, of: &[u8]) -> ChaCha12Rng {
        let mut key = Sha256::new();
        key.update(self.key);
        key.update(of);
        ChaCha12Rng::from_seed(key.finalize().into())
    }

    /// Whether the whole adapter is left out.
    pub fn leaves_out(&self) -> bool {
        let chance = self.settings.module;
        chance > 0.0 && self.generator(b"module").random::<f64>() < chance
    }

    /// Zero for each output that is left out, one for the others: `[count]`. LyCORIS does not scale those up.
    pub fn outputs(&self, count: usize, device: &Device) -> Option<Tensor<1>> {
        let chance = self.settings.rank;
        if chance == 0.0 {
            return None;
        }
        let values = self.draw(b"rank", chance, 1.0, count);
        Some(tensor(values, [count], device))
    }

    /// Zero for each rank of each sample that is left out, the others scaled up: `[samples, rank]`.
    pub fn ranks(&self, samples: usize, rank: usize, device: &Device) -> Option<Tensor<2>> {
        let chance = self.settings.rank;
        if chance == 0.0 {
            return None;
        }
        let values = self.draw(b"rank", chance, 1.0 / (1.0 - chance), samples * rank);
        Some(tensor(values, [samples, rank], device))
    }

    /// The same for each number of a tensor.
    pub fn neurons<const N: usize>(&self, shape: [usize; N], device: &Device) -> Option<Tensor<N>> {
        let chance = self.settings.neuron;
        if chance == 0.0 {
            return None;
        }
        let count = shape.iter().product();
        let values = self.draw(b"neuron", chance, 1.0 / (1.0 - chance), count);
        Some(tensor(values, shape, device))
    }

    fn draw(&self, of: &[u8], chance: f64, kept: f64, count: usize) -> Vec<f32> {
        let mut rng = self.generator(of);
        // The chance in units of 2⁻³².
        let limit = (chance * 4_294_967_296.0) as u64;
        let kept = kept as f32;
        (0..count)
            .map(|_| {
                if u64::from(rng.random::<u32>()) < limit {
                    0.0
                } else {
                    kept
                }
            })
            .collect()
    }
}

fn tensor<const N: usize>(values: Vec<f32>, shape: [usize; N], device: &Device) -> Tensor<N> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_a_function_of_their_place() {
        let settings = DropoutSettings {
            neuron: 0.25,
            rank: 0.5,
            module: 0.1,
        };
        let place = Place {
            seed: 3,
            step: 7,
            batch: 0,
        };
        let device = Device::flex();
        let draw = |place: Place, name: &str| -> Vec<f32> {
            let masks = Masks::new(settings, place, name);
            let neurons = masks.neurons([4, 1000], &device).expect("a mask");
            neurons.to_data().iter::<f32>().collect()
        };
        let first = draw(place, "a");
        assert_eq!(first, draw(place, "a"));
        assert_ne!(first, draw(place, "b"));
        for other in [
            Place { seed: 4, ..place },
            Place { step: 8, ..place },
            Place { batch: 1, ..place },
        ] {
            assert_ne!(first, draw(other, "a"));
        }
        // Five standard errors of the share: √(p (1 − p) / n).
        let dropped = first.iter().filter(|value| **value == 0.0).count() as f64 / 4000.0;
        assert!((dropped - 0.25).abs() < 5.0 * 0.0069, "{dropped}");
        assert!(first.iter().all(|v| *v == 0.0 || *v == 1.0 / 0.75));
        let left_out = (0..4000).filter(|step| {
            let place = Place {
                step: *step,
                ..place
            };
            Masks::new(settings, place, "a").leaves_out()
        });
        let share = left_out.count() as f64 / 4000.0;
        assert!((share - 0.1).abs() < 5.0 * 0.0048, "{share}");
    }
}
