//! The gradients of a step: read, clipped, handed to the optimizer.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{StepOutput, Trainer};
use crate::diffusion::Part;
use crate::diffusion::devices::is_cpu;
use crate::kernels::together::{copied_together, places};
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

/// The gradients of a step.
pub(super) struct Collected {
    /// Of each parameter.
    each: Vec<Option<Tensor<4>>>,
    /// Sums of their squares, and whether they belong to text encoders.
    squares: Vec<(Tensor<1>, bool)>,
}

impl Trainer<'_> {
    /// Prepares gradients for being measured and used.
    ///
    /// On the CPU the threads share the gradients: there are many small ones. Elsewhere an operation is a launch: there
    /// they are put behind one another, and everything that follows is done once for all.
    pub(super) fn collect(&self, gradients: Vec<Option<Tensor<4>>>) -> Collected {
        let parameters = self.network.parameters().iter();
        let texts: Vec<bool> = parameters
            .map(|parameter| parameter.part.is_text())
            .collect();
        if !is_cpu(&self.device()) {
            return side_by_side(gradients, &texts);
        }
        let own = gradients.iter().zip(&texts);
        let own: Vec<_> = own
            .filter_map(|(g, text)| Some((g.as_ref()?, *text)))
            .collect();
        let squares = own.into_par_iter();
        let squares = squares.map(|(gradient, text)| (gradient.clone().square().sum(), text));
        Collected {
            squares: squares.collect(),
            each: gradients,
        }
    }

    /// The mean loss and the L2 norms of the gradients, in one read from the device.
    pub(super) fn read_loss_and_norms(
        &self,
        losses: Vec<Tensor<1>>,
        gradients: &Collected,
    ) -> Result<(f64, Norms), TrainError> {
        let count = losses.len();
        let squares = &gradients.squares;
        // With dropout of whole adapters a step may have left out all of them.
        if count == 0 || (squares.is_empty() && !self.network.drops()) {
            return Err(TrainError::NothingToTrain);
        }
        let mut numbers = losses;
        numbers.extend(squares.iter().map(|(square, _)| square.clone()));
        let numbers = read(Tensor::cat(numbers, 0))?;
        let (losses, values) = numbers.split_at(count);
        let sum = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>();
        let of_half = |text: bool| {
            let own = squares
                .iter()
                .zip(values)
                .filter(|((_, of_text), _)| *of_text == text);
            own.map(|(_, square)| f64::from(*square))
                .sum::<f64>()
                .sqrt()
        };
        let norms = Norms {
            all: sum(values).sqrt(),
            unet: self.network.covers(Part::UNet).then(|| of_half(false)),
            text_encoder: self.network.covers_text().then(|| of_half(true)),
        };
        Ok((sum(losses) / count as f64, norms))
    }

    /// Lets the optimizer change the adapters, with the gradients times `grad_scale` and the learning rates of `output`.
    pub(super) fn update(
        &mut self,
        gradients: Collected,
        grad_scale: f64,
        updates_done: u64,
        output: &StepOutput,
    ) -> Result<(), TrainError> {
        let mut updates = Vec::with_capacity(gradients.each.len());
        let parameters = self.network.parameters_mut().iter_mut();
        for (id, (parameter, gradient)) in parameters.zip(gradients.each).enumerate() {
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

/// Gradients in one buffer, in their order; the squares are summed by runs of one half of the model.
fn side_by_side(gradients: Vec<Option<Tensor<4>>>, texts: &[bool]) -> Collected {
    let shapes: Vec<Option<[usize; 4]>> = gradients
        .iter()
        .map(|gradient| gradient.as_ref().map(Tensor::dims))
        .collect();
    let counts = |shape: &Option<[usize; 4]>| shape.map_or(0, |shape| shape.iter().product());
    let (begins, length) = places(shapes.iter().map(counts));
    let there = gradients.into_iter().zip(&begins);
    let there = there.filter_map(|(gradient, &begin)| Some((gradient?, begin)));
    let (own, places): (Vec<Tensor<1>>, Vec<usize>) = there
        .map(|(gradient, begin)| {
            let count = gradient.shape().num_elements();
            (gradient.reshape([count]), begin)
        })
        .unzip();
    let Some(long) = copied_together(own, &places, length) else {
        return Collected {
            each: shapes.iter().map(|_| None).collect(),
            squares: Vec::new(),
        };
    };
    let mut runs: Vec<(std::ops::Range<usize>, bool)> = Vec::new();
    let ends = begins.iter().copied().skip(1).chain([length]);
    for ((&begin, end), &text) in begins.iter().zip(ends).zip(texts) {
        match runs.last_mut() {
            Some((range, of_text)) if *of_text == text => range.end = end,
            _ => runs.push((begin..end, text)),
        }
    }
    let runs = runs.into_iter().filter(|(range, _)| !range.is_empty());
    let squares = runs.map(|(range, text)| (long.clone().slice([range]).square().sum(), text));
    let squares = squares.collect();
    let each = shapes.into_iter().zip(begins).map(|(shape, begin)| {
        let shape = shape?;
        let count = shape.iter().product();
        Some(long.clone().narrow(0, begin, count).reshape(shape))
    });
    Collected {
        each: each.collect(),
        squares,
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;

    #[test]
    fn gradients_behind_one_another_are_what_they_were() {
        let device = Device::flex();
        let shapes = [
            Some([1, 1, 3, 5]),
            None,
            Some([4, 100, 1, 1]),
            Some([1, 1, 1, 256]),
        ];
        let gradients = shapes.map(|shape| {
            shape.map(|shape| Tensor::<4>::random(shape, Distribution::Default, &device))
        });
        let texts = [true, true, false, false];
        let found = side_by_side(gradients.to_vec(), &texts);
        let read = |tensor: &Tensor<4>| tensor.to_data();
        let before: Vec<_> = gradients.iter().map(|g| g.as_ref().map(read)).collect();
        let after: Vec<_> = found.each.iter().map(|g| g.as_ref().map(read)).collect();
        assert_eq!(after, before);

        let square = |index: usize| {
            let gradient = gradients[index].clone().expect("a gradient");
            gradient.square().sum().into_scalar::<f32>()
        };
        let squares = found.squares.into_iter();
        let squares: Vec<(f32, bool)> = squares
            .map(|(sum, text)| (sum.into_scalar::<f32>(), text))
            .collect();
        let expected = [(square(0), true), (square(2) + square(3), false)];
        for ((found, text), (sum, of_text)) in squares.iter().zip(expected) {
            assert!((found - sum).abs() < 1e-4 * sum, "{found} {sum}");
            assert_eq!(*text, of_text);
        }
        assert_eq!(squares.len(), 2);
    }
}
