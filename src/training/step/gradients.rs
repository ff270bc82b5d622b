//! The gradients of a step: read, clipped, handed to the optimizer.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{StepOutput, Trainer};
use crate::diffusion::Part;
use crate::diffusion::devices::is_cpu;
use crate::training::TrainError;
use crate::training::data::read;
use crate::training::optimizer::ParamUpdate;

/// Added to the norm before dividing by it, as `torch.nn.utils.clip_grad_norm_` does.
const CLIP_EPSILON: f64 = 1e-6;

/// L2 norms of the gradients, of all and of the halves of the model that are trained.
pub(super) struct Norms {
    pub(super) all: f64,
    pub(super) unet: Option<f64>,
    pub(super) text_encoder: Option<f64>,
}

impl Trainer<'_> {
    /// The mean loss and the L2 norms of the gradients, in one read from the device.
    pub(super) fn read_loss_and_norms(
        &self,
        losses: Vec<Tensor<1>>,
        gradients: &[Option<Tensor<4>>],
    ) -> Result<(f64, Norms), TrainError> {
        let count = losses.len();
        let mut numbers = losses;
        numbers.extend(squared_norms(gradients));
        let none = numbers.len() == count;
        // With dropout of whole adapters a step may have left out all of them.
        if count == 0 || (none && !self.network.drops()) {
            return Err(TrainError::NothingToTrain);
        }
        let numbers = read(Tensor::cat(numbers, 0))?;
        let (losses, squares) = numbers.split_at(count);
        let sum = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>();
        let parameters = self.network.parameters().iter().zip(gradients);
        let parts = parameters.filter_map(|(parameter, gradient)| {
            gradient.as_ref()?;
            Some(parameter.part)
        });
        let parts: Vec<Part> = parts.collect();
        let of_half = |text: bool| {
            let own = parts
                .iter()
                .zip(squares)
                .filter(|(part, _)| part.is_text() == text);
            own.map(|(_, square)| f64::from(*square))
                .sum::<f64>()
                .sqrt()
        };
        let norms = Norms {
            all: sum(squares).sqrt(),
            unet: self.network.covers(Part::UNet).then(|| of_half(false)),
            text_encoder: self.network.covers_text().then(|| of_half(true)),
        };
        Ok((sum(losses) / count as f64, norms))
    }

    /// Lets the optimizer change the adapters, with the gradients times `grad_scale` and the learning rates of `output`.
    pub(super) fn update(
        &mut self,
        gradients: Vec<Option<Tensor<4>>>,
        grad_scale: f64,
        updates_done: u64,
        output: &StepOutput,
    ) -> Result<(), TrainError> {
        let mut updates = Vec::with_capacity(gradients.len());
        let parameters = self.network.parameters_mut().iter_mut();
        for (id, (parameter, gradient)) in parameters.zip(gradients).enumerate() {
            // A parameter that the loss does not reach (behind clip skip) is left alone, even by weight decay.
            let Some(grad) = gradient else { continue };
            updates.push(ParamUpdate {
                id: id as u32,
                name: &parameter.name,
                shape: &parameter.shape,
                value: &mut parameter.value,
                grad,
                grad_scale,
                lr: parameter.lr_factor
                    * match parameter.part {
                        Part::UNet => output.lr_unet,
                        Part::TextEncoder | Part::TextEncoder2 => output.lr_text_encoder,
                    },
                weight_decay: true,
            });
        }
        self.optimizer.step(updates_done, &mut updates)?;
        Ok(())
    }
}

/// The sum of the squares of each gradient. On the CPU the threads share the gradients: there are many small ones.
fn squared_norms(gradients: &[Option<Tensor<4>>]) -> Vec<Tensor<1>> {
    let norm = |gradient: &Tensor<4>| gradient.clone().square().sum();
    let all: Vec<&Tensor<4>> = gradients.iter().flatten().collect();
    match all.first() {
        Some(first) if is_cpu(&first.device()) => all.into_par_iter().map(norm).collect(),
        _ => all.into_iter().map(norm).collect(),
    }
}

/// What brings the L2 norm of all gradients down to `max_norm`, where it is above; 0 switches that off.
pub(super) fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    let factor = max_norm / (norm + CLIP_EPSILON);
    if max_norm == 0.0 {
        1.0
    } else {
        factor.min(1.0)
    }
}
