//! The exponential moving average of the adapters: it follows them slowly, and is less noisy than the last step.

use burn::tensor::Tensor;
use serde_json::json;

use crate::networks::LoraNetwork;
use crate::training::TrainError;
use crate::training::resume::{Part, PartTensor, Resumable};
use crate::training::settings::EmaSettings;

/// The average; it is on the device, beside the adapters.
///
/// `ema ← ema − (1 − decay) · (ema − adapter)` after each update, as `EMAModel` of diffusers has it.
#[derive(Debug)]
pub struct Ema {
    settings: EmaSettings,
    updates: u64,
    names: Vec<(String, Vec<usize>)>,
    values: Vec<Tensor<4>>,
}

impl Ema {
    /// It begins with the adapters as they are.
    pub fn new(settings: EmaSettings, network: &LoraNetwork) -> Self {
        let parameters = network.parameters();
        Self {
            settings,
            updates: 0,
            names: parameters
                .iter()
                .map(|parameter| (parameter.name.clone(), parameter.shape.clone()))
                .collect(),
            values: parameters
                .iter()
                .map(|parameter| parameter.value.clone())
                .collect(),
        }
    }

    /// Moves towards the adapters after an optimizer step.
    pub fn update(&mut self, network: &LoraNetwork) {
        let decay = decay(&self.settings, self.updates);
        self.updates += 1;
        for (average, parameter) in self.values.iter_mut().zip(network.parameters()) {
            let value = parameter.value.clone();
            *average = average.clone() - (average.clone() - value).mul_scalar(1.0 - decay);
        }
    }

    /// Exchanges the adapters' values and the average; done twice, all is as it was.
    pub fn exchange(&mut self, network: &mut LoraNetwork) {
        for (average, parameter) in self.values.iter_mut().zip(network.parameters_mut()) {
            std::mem::swap(average, &mut parameter.value);
        }
    }
}

/// The decay of an update, of which so many were done before: with a warm-up
/// `min((1 + updates) / (10 + updates), decay)`, and 0 in the first, which forgets where the adapters began.
fn decay(settings: &EmaSettings, updates: u64) -> f64 {
    if !settings.warm_up {
        return settings.decay;
    }
    if updates == 0 {
        return 0.0;
    }
    let updates = updates as f64;
    ((1.0 + updates) / (10.0 + updates)).min(settings.decay)
}

impl Resumable for Ema {
    fn keep(&mut self) -> Result<Part, TrainError> {
        let tensors = self.names.iter().zip(&self.values);
        Ok(Part {
            values: json!({ "updates": self.updates }),
            tensors: tensors
                .map(|((name, shape), value)| PartTensor::of_floats(name, shape, value))
                .collect::<Result<_, _>>()?,
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        self.updates = part.count("updates")?;
        for ((name, shape), value) in self.names.iter().zip(&mut self.values) {
            *value = part.tensor(name)?.floats_like(shape, value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decay_rises_as_in_diffusers() {
        let settings = EmaSettings {
            decay: 0.999,
            warm_up: true,
        };
        // `EMAModel(decay=0.999).get_decay(step)` for step 1, 2, 3, 101, 100 001.
        for (updates, expected) in [
            (0, 0.0),
            (1, 2.0 / 11.0),
            (2, 3.0 / 12.0),
            (100, 101.0 / 110.0),
            (100_000, 0.999),
        ] {
            assert!((decay(&settings, updates) - expected).abs() < 1e-15);
        }
        let at_once = EmaSettings {
            warm_up: false,
            ..settings
        };
        assert_eq!(decay(&at_once, 0), 0.999);
    }
}
