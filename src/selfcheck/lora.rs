//! Checks of LoRA gradients, through the layers and adapters that training uses.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::inputs::{Inputs, Outputs, Traced, leaf};
use super::layers::{BATCH, CHANNELS, HEADS, PICTURE, TOKENS, WIDTH};
use crate::diffusion::attention::{attention, merge_heads, split_heads};
use crate::diffusion::layers::{Conv2d, Linear};
use crate::kernels::{self, Precision};
use crate::networks::adapters::{Additive, LowRankDelta};

const RANK: usize = 16;
/// Blocks on top of each other: a fault of the backward grows with the depth.
const DEPTH: usize = 3;
/// Forward and backward are done as often: the later ones get the memory that the first has left.
const PASSES: usize = 2;

/// Trained tensors by name.
type Leaves = Vec<(String, Tensor<4>)>;

pub fn linear(inputs: &mut Inputs) -> Outputs {
    let mut leaves = Leaves::new();
    let layer = adapted_linear(inputs, "layer", [WIDTH, WIDTH], &mut leaves);
    let x = leaf(inputs.normal([BATCH, TOKENS, WIDTH]));
    let y = layer.forward(x.clone());
    let gradient = inputs.normal(y.dims());
    with_leaves(Traced::new(y, gradient).gradient("x", &x), &leaves).outputs()
}

pub fn conv(inputs: &mut Inputs) -> Outputs {
    let bias = inputs.normal([CHANNELS]);
    let weight = inputs.weight([CHANNELS, CHANNELS, 3, 3]);
    let mut layer = Conv2d::new(weight, Some(bias), 1, 1);
    let down = leaf(inputs.weight([RANK, CHANNELS, 3, 3]));
    let up = leaf(inputs.weight([CHANNELS, RANK, 1, 1]));
    layer.set_adapter(Some(adapter(&down, &up)));
    let x = leaf(inputs.normal(PICTURE));
    let y = layer.forward(x.clone());
    let gradient = inputs.normal(y.dims());
    Traced::new(y, gradient)
        .gradient("x", &x)
        .gradient("down", &down)
        .gradient("up", &up)
        .outputs()
}

/// A text encoder's blocks whose LoRA alone is trained, with their input as a leaf of the graph or as a constant.
pub fn blocks(inputs: &mut Inputs, tracked: bool) -> Outputs {
    let mut leaves = Leaves::new();
    let blocks: Vec<Block> = (0..DEPTH)
        .map(|index| Block::new(inputs, index, Precision::Fp32, &mut leaves))
        .collect();
    let x = inputs.normal([BATCH, TOKENS, WIDTH]);
    let x = if tracked { leaf(x) } else { x };
    let gradient = inputs.normal([BATCH, TOKENS, WIDTH]);
    let mut outputs = Outputs::new();
    for _ in 0..PASSES {
        let y = blocks.iter().fold(x.clone(), |x, block| block.forward(x));
        let traced = Traced::new(y, gradient.clone());
        let traced = if tracked {
            traced.gradient("x", &x)
        } else {
            traced
        };
        outputs.extend(with_leaves(traced, &leaves).outputs());
    }
    outputs
}

/// One such block with its values in f16, its LoRA in f32.
pub fn block_in_halves(inputs: &mut Inputs) -> Outputs {
    let mut leaves = Leaves::new();
    let block = Block::new(inputs, 0, Precision::Fp16, &mut leaves);
    let x = leaf(inputs.halves([BATCH, TOKENS, WIDTH], 1.0));
    let gradient = inputs.halves([BATCH, TOKENS, WIDTH], 1.0);
    let traced = Traced::new(block.forward(x.clone()), gradient).gradient("x", &x);
    with_leaves(traced, &leaves).outputs()
}

/// `x + attention(norm(x))`, then `x + fc2(quick_gelu(fc1(norm(x))))`.
struct Block {
    norms: [[Tensor<1>; 2]; 2],
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    fc1: Linear,
    fc2: Linear,
    precision: Precision,
}

impl Block {
    fn new(inputs: &mut Inputs, index: usize, precision: Precision, leaves: &mut Leaves) -> Self {
        let norms = [0; 2].map(|_| [inputs.normal([WIDTH]) * 0.1 + 1.0, inputs.normal([WIDTH])]);
        let mut layer = |name: &str, d_in, d_out| {
            let name = format!("{index}.{name}");
            let layer = adapted_linear(inputs, &name, [d_in, d_out], leaves);
            layer.with_precision(precision)
        };
        Self {
            norms,
            q_proj: layer("q_proj", WIDTH, WIDTH),
            k_proj: layer("k_proj", WIDTH, WIDTH),
            v_proj: layer("v_proj", WIDTH, WIDTH),
            out_proj: layer("out_proj", WIDTH, WIDTH),
            fc1: layer("fc1", WIDTH, 2 * WIDTH),
            fc2: layer("fc2", 2 * WIDTH, WIDTH),
            precision,
        }
    }

    /// # Shapes
    /// - `x` and output: `[batch, tokens, d]`
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let normed = self.norm(0, x.clone());
        let [q, k, v] = [&self.q_proj, &self.k_proj, &self.v_proj]
            .map(|layer| split_heads(layer.forward(normed.clone()), HEADS));
        let x = x + self
            .out_proj
            .forward(merge_heads(attention([q, k, v], true, self.precision)));
        let normed = self.norm(1, x.clone());
        x + self
            .fc2
            .forward(kernels::quick_gelu(self.fc1.forward(normed)))
    }

    fn norm(&self, index: usize, x: Tensor<3>) -> Tensor<3> {
        let [weight, bias] = &self.norms[index];
        kernels::layer_norm(x, weight, bias, 1e-5)
    }
}

/// A frozen layer with a LoRA, whose tensors become leaves. Its `up` is not zero, as it is when a training begins:
/// `down` would have no gradient.
fn adapted_linear(
    inputs: &mut Inputs,
    name: &str,
    [d_in, d_out]: [usize; 2],
    leaves: &mut Leaves,
) -> Linear {
    let bias = inputs.normal([d_out]);
    let mut layer = Linear::new(inputs.weight([d_out, d_in]), Some(bias));
    let down = leaf(inputs.weight([RANK, d_in]).reshape([1, 1, RANK, d_in]));
    let up = leaf(inputs.weight([d_out, RANK]).reshape([1, 1, d_out, RANK]));
    layer.set_adapter(Some(adapter(&down, &up)));
    leaves.push((format!("{name}.down"), down));
    leaves.push((format!("{name}.up"), up));
    layer
}

fn adapter(down: &Tensor<4>, up: &Tensor<4>) -> Arc<Additive<LowRankDelta>> {
    let delta = LowRankDelta {
        down: down.clone(),
        core: None,
        up: up.clone(),
        rank: RANK,
        alpha: 0.5 * RANK as f64,
        masks: None,
    };
    Arc::new(Additive {
        delta,
        multiplier: 1.0,
        lengths: None,
        outputs: None,
    })
}

fn with_leaves(traced: Traced, leaves: &Leaves) -> Traced {
    leaves
        .iter()
        .fold(traced, |traced, (name, leaf)| traced.gradient(name, leaf))
}
