//! Adapters on frozen layers: what each kind computes beside its layer, or in its place.

mod additive;
mod dropout;
mod hadamard;
mod kronecker;
mod low_rank;
mod scale;

use std::sync::Arc;

use burn::tensor::Tensor;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;

use crate::diffusion::layers::{Adapter, Conv2d};
use crate::networks::form::Form;
use crate::networks::settings::DropoutSettings;
use crate::networks::targets::Target;

pub use self::additive::{Additive, Delta, Lengths};
pub use self::dropout::{Masks, Place};
pub use self::low_rank::LowRankDelta;

use self::hadamard::HadamardDelta;
use self::kronecker::KroneckerDelta;
use self::scale::ScaleAdapter;

/// What decides an adapter besides its tensors.
#[derive(Debug, Clone, Copy)]
pub struct Moment<'a> {
    /// Factor of its strength.
    pub multiplier: f64,
    /// What is left out, and where the run is.
    pub dropout: Option<(&'a DropoutSettings, Place)>,
}

/// The adapter of a layer from its tensors, in the order of [`Target::tensors`]; `None` where it is left out at this
/// moment. `squares` are the squared lengths of the weight's rows, where the adapter trains lengths.
pub fn build(
    target: &Target,
    tensors: &[Tensor<4>],
    squares: Option<&Tensor<1>>,
    moment: Moment<'_>,
) -> Option<Arc<dyn Adapter>> {
    let masks = moment
        .dropout
        .map(|(settings, place)| Masks::new(*settings, place, &target.name));
    if masks.as_ref().is_some_and(Masks::leaves_out) {
        return None;
    }
    let multiplier = moment.multiplier;
    let (factors, lengths) = match (tensors.split_last(), squares) {
        (Some((last, factors)), Some(squares)) if target.dora => {
            let lengths = Lengths {
                scale: last.clone(),
                squares: squares.clone(),
            };
            (factors, Some(lengths))
        }
        _ => (tensors, None),
    };
    let d_out = target.shape.d_out();
    // LoRA leaves out what is between its matrices, the other kinds outputs of the change of the weight.
    let inner = matches!(target.form, Form::LowRank { .. }) && !target.dora;
    let outputs = masks
        .as_ref()
        .filter(|_| !inner)
        .and_then(|masks| masks.outputs(d_out, &factors.first()?.device()));
    Some(match target.form {
        Form::Scale { on_input } => Arc::new(ScaleAdapter {
            weight: factors.first()?.clone(),
            on_input,
            multiplier,
        }),
        Form::LowRank { .. } => Arc::new(Additive {
            delta: LowRankDelta::new(target, factors, masks.filter(|_| inner))?,
            multiplier,
            lengths,
            outputs,
        }),
        Form::Hadamard { core } => Arc::new(Additive {
            delta: HadamardDelta::new(target, core, factors)?,
            multiplier,
            lengths,
            outputs,
        }),
        Form::Kronecker(form) => Arc::new(Additive {
            delta: KroneckerDelta::new(target, form, factors)?,
            multiplier,
            lengths,
            outputs,
        }),
    })
}

/// What an adapter adds to its layer's weight, as a matrix: `[out, in · kh · kw]`; `None` for one that adds nothing.
pub fn weight_delta(target: &Target, tensors: &[Tensor<4>]) -> Option<Tensor<2>> {
    match target.form {
        Form::Scale { .. } => None,
        Form::LowRank { .. } => Some(LowRankDelta::new(target, tensors, None)?.weight()),
        Form::Hadamard { core } => Some(HadamardDelta::new(target, core, tensors)?.weight()),
        Form::Kronecker(form) => Some(KroneckerDelta::new(target, form, tensors)?.weight()),
    }
}

/// `‖ΔW‖²` of what an adapter adds to its layer's weight: `[1]`; `None` for one that adds nothing.
pub fn norm_square(target: &Target, tensors: &[Tensor<4>]) -> Option<Tensor<1>> {
    match target.form {
        Form::Scale { .. } => None,
        Form::LowRank { .. } => Some(LowRankDelta::new(target, tensors, None)?.norm_square()),
        Form::Kronecker(form) => Some(KroneckerDelta::new(target, form, tensors)?.norm_square()),
        Form::Hadamard { .. } => Some(weight_delta(target, tensors)?.square().sum()),
    }
}

/// What each tensor of an adapter is multiplied with, so that what it adds becomes `ratio` times as long.
///
/// sd-scripts shares the ratio between the two matrices of a LoRA, LyCORIS between all of a LoKr, and has it on one
/// matrix of the others.
pub fn norm_factors(target: &Target, ratio: f64) -> Vec<f64> {
    let tensors = target.tensors();
    let plain = target.form == Form::LowRank { core: false } && !target.dora;
    let shared = matches!(target.form, Form::Kronecker(_));
    let sharing = tensors.iter().filter(|t| t.suffix != "dora_scale").count();
    let factor = |suffix: &str| match suffix {
        "dora_scale" => 1.0,
        _ if plain => ratio.sqrt(),
        _ if shared => ratio.powf(1.0 / sharing as f64),
        "lora_up.weight" | "hada_w1_a" => ratio,
        _ => 1.0,
    };
    tensors.iter().map(|tensor| factor(tensor.suffix)).collect()
}

/// A convolution of a layer's own geometry with a weight that may be tracked.
fn conv_like(layer: &Conv2d, x: Tensor<4>, weight: Tensor<4>) -> Tensor<4> {
    let [.., height, width] = weight.dims();
    if [height, width] == [1, 1] && layer.stride == [1, 1] && layer.padding == [0, 0] {
        return pointwise(x, weight);
    }
    let options = ConvOptions::new(layer.stride, layer.padding, [1, 1], 1);
    conv2d(x, weight, None, options)
}

/// A 1×1 convolution as a matrix product: its gradients are products too, and those are faster than the
/// transposed convolutions that a general convolution needs.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - `weight`: `[out, in, 1, 1]`
/// - output: `[batch, out, height, width]`
fn pointwise(x: Tensor<4>, weight: Tensor<4>) -> Tensor<4> {
    let [batch, c_in, height, width] = x.dims();
    let [c_out, ..] = weight.dims();
    let x = x.reshape([batch, c_in, height * width]);
    let weight = weight.reshape([1, c_out, c_in]);
    let y = weight.matmul(x); // [batch, out, height * width]
    y.reshape([batch, c_out, height, width])
}

/// A matrix behind a core that has the kernel: `Σ_j core[i, j] · matrix[j]`.
///
/// # Shapes
/// - `core`: `[i, j, kh, kw]`
/// - `matrix`: `[j, n]`
/// - output: `[i, n · kh · kw]`
fn through_core(core: Tensor<4>, matrix: Tensor<2>) -> Tensor<2> {
    let ([i, j, height, width], [_, n]) = (core.dims(), matrix.dims());
    let taps = core.permute([0, 2, 3, 1]).reshape([i * height * width, j]);
    let product = taps.matmul(matrix).reshape([i, height, width, n]);
    product
        .permute([0, 3, 1, 2])
        .reshape([i, n * height * width])
}
