//! Checks of the operations on frozen weights: results, and gradients of their inputs.
//!
//! Every new shape is tuned for on its first use, which takes a software rasteriser a minute: few shapes, of a width
//! and a number of tokens that models have.

use burn::tensor::Tensor;

use super::inputs::{Inputs, Outputs, Traced, leaf};
use crate::kernels::{self, Geometry, Precision, Value};

/// Pictures or prompts at once.
pub const BATCH: usize = 2;
/// A prompt's length: not a multiple of any tile.
pub const TOKENS: usize = 77;
/// Length of a token's state.
pub const WIDTH: usize = 320;
/// Attention heads.
pub const HEADS: usize = 8;
/// Channels of a picture.
pub const CHANNELS: usize = 64;
/// Shape of a picture.
pub const PICTURE: [usize; 4] = [BATCH, CHANNELS, 16, 16];

pub fn linear(inputs: &mut Inputs) -> Outputs {
    let weight = inputs.weight([WIDTH, WIDTH]);
    linear_with(inputs, &weight)
}

/// f32 activations, f16 weights.
pub fn linear_of_halves(inputs: &mut Inputs) -> Outputs {
    let weight = inputs.stored_weight([WIDTH, WIDTH]);
    linear_with(inputs, &weight)
}

fn linear_with(inputs: &mut Inputs, weight: &Tensor<2>) -> Outputs {
    let x = leaf(inputs.normal([BATCH * TOKENS, WIDTH]));
    let bias = inputs.normal([WIDTH]);
    let y = kernels::linear(x.clone(), weight, Some(&bias), Precision::Fp32, Value::Read);
    let gradient = inputs.normal([BATCH * TOKENS, WIDTH]);
    Traced::new(y, gradient).gradient("x", &x).outputs()
}

/// Activations and weights in f16, the bias in f32 as models have it.
pub fn linear_in_halves(inputs: &mut Inputs) -> Outputs {
    let weight = inputs.halves([WIDTH, WIDTH], (WIDTH as f32).powf(-0.5));
    let bias = inputs.normal([WIDTH]);
    let x = leaf(inputs.halves([BATCH * TOKENS, WIDTH], 1.0));
    let y = kernels::linear(
        x.clone(),
        &weight,
        Some(&bias),
        Precision::Fp16,
        Value::Read,
    );
    let gradient = inputs.halves([BATCH * TOKENS, WIDTH], 1.0);
    Traced::new(y, gradient).gradient("x", &x).outputs()
}

pub fn conv(inputs: &mut Inputs, stride: usize) -> Outputs {
    let weight = inputs.weight([CHANNELS, CHANNELS, 3, 3]);
    conv_with(inputs, weight, stride)
}

/// f32 pictures, f16 weights.
pub fn conv_of_halves(inputs: &mut Inputs) -> Outputs {
    let weight = inputs.stored_weight([CHANNELS, CHANNELS, 3, 3]);
    conv_with(inputs, weight, 1)
}

/// A norm and the convolution behind it, values between them in f16.
pub fn conv_in_halves(inputs: &mut Inputs) -> Outputs {
    let weight = inputs.halves(
        [CHANNELS, CHANNELS, 3, 3],
        (9.0 * CHANNELS as f32).powf(-0.5),
    );
    let weight = kernels::order_by_taps(weight);
    let [bias, scale, shift] = [0; 3].map(|_| inputs.normal([CHANNELS]));
    let x = leaf(inputs.halves(PICTURE, 3.0));
    let normed = kernels::group_norm(x.clone(), &scale, &shift, 32, 1e-5, true);
    let geometry = Geometry {
        kernel: [3, 3],
        stride: [1, 1],
        padding: [1, 1],
    };
    let y = kernels::conv2d(
        normed,
        &weight,
        Some(&bias),
        geometry,
        Precision::Fp16,
        Value::Read,
    );
    let gradient = inputs.halves(PICTURE, 1.0);
    Traced::new(y, gradient).gradient("x", &x).outputs()
}

fn conv_with(inputs: &mut Inputs, weight: Tensor<4>, stride: usize) -> Outputs {
    let weight = kernels::order_by_taps(weight);
    let x = leaf(inputs.normal(PICTURE));
    let bias = inputs.normal([CHANNELS]);
    let geometry = Geometry {
        kernel: [3, 3],
        stride: [stride, stride],
        padding: [1, 1],
    };
    let y = kernels::conv2d(
        x.clone(),
        &weight,
        Some(&bias),
        geometry,
        Precision::Fp32,
        Value::Read,
    );
    let gradient = inputs.normal(y.dims());
    Traced::new(y, gradient).gradient("x", &x).outputs()
}

pub fn group_norm_silu(inputs: &mut Inputs) -> Outputs {
    let x = leaf(inputs.normal(PICTURE) * 3.0 + 1.0);
    let (weight, bias) = (inputs.normal([CHANNELS]), inputs.normal([CHANNELS]));
    let y = kernels::group_norm(x.clone(), &weight, &bias, 32, 1e-5, true);
    let gradient = inputs.normal(PICTURE);
    Traced::new(y, gradient).gradient("x", &x).outputs()
}

pub fn layer_norm(inputs: &mut Inputs) -> Outputs {
    let x = leaf(inputs.normal([BATCH, TOKENS, WIDTH]) * 3.0 + 1.0);
    let (weight, bias) = (inputs.normal([WIDTH]), inputs.normal([WIDTH]));
    let y = kernels::layer_norm(x.clone(), &weight, &bias, 1e-5);
    let gradient = inputs.normal([BATCH, TOKENS, WIDTH]);
    Traced::new(y, gradient).gradient("x", &x).outputs()
}

pub fn attention(inputs: &mut Inputs, causal: bool) -> Outputs {
    let shape = [BATCH, HEADS, TOKENS, WIDTH / HEADS];
    let [q, k, v] = [0; 3].map(|_| leaf(inputs.normal(shape)));
    let y = kernels::attention([&q, &k, &v].map(Clone::clone), causal, Precision::Fp32);
    Traced::new(y, inputs.normal(shape))
        .gradient("q", &q)
        .gradient("k", &k)
        .gradient("v", &v)
        .outputs()
}

pub fn geglu_in_halves(inputs: &mut Inputs) -> Outputs {
    let x = leaf(inputs.halves([BATCH, TOKENS, 2 * WIDTH], 1.0));
    let y = kernels::geglu(x.clone());
    let gradient = inputs.halves([BATCH, TOKENS, WIDTH], 1.0);
    Traced::new(y, gradient).gradient("x", &x).outputs()
}

pub fn geglu(inputs: &mut Inputs) -> Outputs {
    let x = leaf(inputs.normal([BATCH, TOKENS, 2 * WIDTH]));
    let y = kernels::geglu(x.clone());
    let gradient = inputs.normal([BATCH, TOKENS, WIDTH]);
    Traced::new(y, gradient).gradient("x", &x).outputs()
}
