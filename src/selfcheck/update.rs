//! What is done with all adapters at once: gradients put behind one another, and an optimizer's update in one kernel.

use burn::tensor::Tensor;

use super::inputs::{Inputs, Outputs, flat};
use crate::kernels::together::{copied_together, places};
use crate::plugin_host::{Probed, probe};

/// One of several blocks of codes, one that is no whole block, more than one launch copies.
const SHAPES: [[usize; 4]; 5] = [
    [1, 1, 16, 320],
    [1, 1, 320, 16],
    [1, 1, 4, 33],
    [8, 16, 3, 3],
    [1, 1, 1, 1],
];
const COPIES: usize = 8;

pub fn gradients(inputs: &mut Inputs) -> Outputs {
    let shapes = SHAPES.iter().cycle().take(SHAPES.len() * COPIES);
    let tensors: Vec<Tensor<1>> = shapes.map(|&shape| flat(inputs.normal(shape))).collect();
    let (begins, length) = places(tensors.iter().map(|tensor| tensor.dims()[0]));
    let whole = copied_together(tensors, &begins, length);
    vec![("gradients".to_owned(), whole)]
}

pub fn optimizer(inputs: &mut Inputs) -> Outputs {
    outputs(inputs, |made| {
        [("value", made.value), ("moment", made.moment)].to_vec()
    })
}

/// A number halfway between two codes may become either.
pub fn codes(inputs: &mut Inputs) -> Outputs {
    outputs(inputs, |made| vec![("rounded moment", made.rounded)])
}

/// Tensors of what an update makes.
fn outputs(
    inputs: &mut Inputs,
    tensors: impl Fn(Probed) -> Vec<(&'static str, Tensor<4>)>,
) -> Outputs {
    let values = SHAPES.map(|shape| inputs.normal(shape));
    let gradients = SHAPES.map(|shape| inputs.normal(shape));
    let made = probe(&values, &gradients).unwrap_or_else(|error| panic!("{error}"));
    let all = made.into_iter().zip(0..).flat_map(|(made, number)| {
        let named = tensors(made).into_iter();
        named.map(move |(name, tensor)| (format!("{name} {number}"), Some(flat(tensor))))
    });
    all.collect()
}
