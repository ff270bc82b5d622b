//! Forward and backward of a model part by part.
//!
//! Every part has an autodiff graph of its own. A part keeps either that graph or its inputs alone; from the inputs
//! the graph is made again when the backward comes to it, with the same operations on the same values: gradients are
//! equal to the bit, and only one part's activations exist at a time. Chen et al. 2016, arXiv:1604.06174.

use burn::tensor::{Gradients, Tensor};

use crate::kernels::seed;

/// What a forward keeps for a backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The graph of every part: fastest.
    Graphs,
    /// The inputs of every part, which runs again in the backward: a third slower, a fraction of the memory.
    Inputs,
}

/// A part that was run, as the backward needs it.
#[derive(Debug)]
pub struct Kept<I, const D: usize> {
    /// Untracked with [`Keep::Inputs`], leaves with [`Keep::Graphs`].
    inputs: I,
    /// The result in its graph, where that was kept.
    output: Option<Tensor<D>>,
}

/// The inputs of a part.
pub trait Inputs: Clone {
    /// The same values, those whose gradient is wanted as leaves of a new graph.
    fn leaves(self) -> Self;
}

impl<I: Inputs, const D: usize> Kept<I, D> {
    /// Runs a part; the result is not tracked.
    pub fn run(keep: Keep, inputs: I, part: impl Fn(I) -> Tensor<D>) -> (Tensor<D>, Self) {
        match keep {
            Keep::Graphs => {
                let inputs = inputs.leaves();
                let output = part(inputs.clone());
                let value = output.clone().without_autodiff();
                let output = Some(output);
                (value, Self { inputs, output })
            }
            Keep::Inputs => {
                let value = part(inputs.clone()).without_autodiff();
                let output = None;
                (value, Self { inputs, output })
            }
        }
    }

    /// The gradients of everything in the part's graph, and the leaves to ask for those of the inputs.
    pub fn backward(self, gradient: Tensor<D>, part: impl Fn(I) -> Tensor<D>) -> (Gradients, I) {
        let (inputs, output) = match self.output {
            Some(output) => (self.inputs, output),
            None => {
                let inputs = self.inputs.leaves();
                let output = part(inputs.clone());
                (inputs, output)
            }
        };
        (seed(output, gradient).backward(), inputs)
    }
}

/// The tensor as a leaf of a new graph where its gradient is wanted.
pub fn leaf_if<const D: usize>(wanted: bool, tensor: Tensor<D>) -> Tensor<D> {
    if wanted {
        tensor.autodiff().require_grad()
    } else {
        tensor
    }
}
