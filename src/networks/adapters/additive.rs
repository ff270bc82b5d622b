//! Adapters that add something to their layer's weight, and those that give the sum's rows trained lengths (DoRA).

use std::fmt::Debug;

use burn::tensor::Tensor;

use crate::diffusion::layers::{Adapter, Conv2d, Linear};
use crate::kernels::{Value, narrow, widen};

/// torch's `finfo(float32).eps`, which LyCORIS adds to a length before it divides by it.
const LENGTH_EPSILON: f64 = f32::EPSILON as f64;
/// Rows of zeros have a length, too.
const LEAST_SQUARE: f64 = 1e-30;

/// A change of a weight, as a function of what goes into the layer.
pub trait Delta: Debug + Send + Sync {
    /// `x ΔWᵀ`, in f32.
    ///
    /// # Shapes
    /// - `x`: `[rows, d_in]`
    /// - output: `[rows, d_out]`
    fn linear(&self, x: Tensor<2>) -> Tensor<2>;

    /// The same of a convolution, with the layer's stride and padding.
    fn conv(&self, layer: &Conv2d, x: Tensor<4>) -> Tensor<4>;

    /// `ΔW`: `[out, in · kh · kw]`
    fn weight(&self) -> Tensor<2>;

    /// `‖W + ΔW‖² − ‖W‖²` of each row: `[out]`.
    fn squares(&self, weight: Tensor<2>) -> Tensor<1> {
        let (weight, delta) = (widen(weight), self.weight());
        let sum = (weight.mul_scalar(2.0) + delta.clone()) * delta;
        let [rows, _] = sum.dims();
        sum.sum_dim(1).reshape([rows])
    }

    /// The layer with the change.
    fn beside_linear(&self, layer: &Linear, x: Tensor<2>, ways: Ways<'_>) -> Tensor<2> {
        let y = layer.frozen(x.clone(), ways.with_bias, ways.value);
        let dtype = y.dtype();
        let delta = self.linear(widen(x));
        let delta = match ways.outputs {
            Some(outputs) => delta * outputs.clone().unsqueeze(),
            None => delta,
        };
        y + narrow(times(delta, ways.strength), dtype)
    }

    /// The same of a convolution.
    fn beside_conv(&self, layer: &Conv2d, x: Tensor<4>, ways: Ways<'_>) -> Tensor<4> {
        let y = layer.frozen(x.clone(), ways.with_bias, ways.value);
        let dtype = y.dtype();
        let delta = self.conv(layer, widen(x));
        let delta = match ways.outputs {
            Some(outputs) => delta * channels(outputs.clone()),
            None => delta,
        };
        y + narrow(times(delta, ways.strength), dtype)
    }
}

/// How a change is put on its layer.
#[derive(Debug, Clone, Copy)]
pub struct Ways<'a> {
    /// Whether the layer's bias is added.
    pub with_bias: bool,
    /// Rows that belong to one sample are as many as the rest.
    pub samples: usize,
    /// Zero for each output that is not changed, `[out]`.
    pub outputs: Option<&'a Tensor<1>>,
    /// Factor of the change.
    pub strength: f64,
    /// Whether the layer's own output is read.
    pub value: Value,
}

/// The trained lengths of a weight's rows.
#[derive(Debug)]
pub struct Lengths {
    /// `[out, 1, 1, 1]`, or `[1, 1, out, 1]` of a linear layer.
    pub scale: Tensor<4>,
    /// `‖W‖²` of each row of the frozen weight: `[out]`.
    pub squares: Tensor<1>,
}

/// `y = x (W + m ΔW)ᵀ + b`, or with lengths `y = x (W + m (W' − W))ᵀ + b` where
/// `W' = scale · (W + ΔW) / ‖W + ΔW‖`, by rows.
///
/// Rows are scaled behind the product, so that no changed weight exists as a whole. Lengths are differentiated through,
/// as LyCORIS does.
#[derive(Debug)]
pub struct Additive<D> {
    /// The change.
    pub delta: D,
    /// `m`
    pub multiplier: f64,
    /// Of DoRA.
    pub lengths: Option<Lengths>,
    /// Zero for each output that is not changed at this moment, `[out]`.
    pub outputs: Option<Tensor<1>>,
}

impl<D: Delta> Additive<D> {
    /// Lengths are factors of the output without its bias, and their gradients read it.
    fn ways(&self, samples: usize, value: Value) -> Ways<'_> {
        let plain = self.lengths.is_none();
        Ways {
            with_bias: plain,
            samples,
            outputs: self.outputs.as_ref(),
            strength: if plain { self.multiplier } else { 1.0 },
            value: if plain { value } else { Value::Read },
        }
    }

    /// What each row of the changed weight is scaled by: `[out]`.
    fn gains(&self, lengths: &Lengths, weight: Tensor<2>) -> Tensor<1> {
        let change = self.delta.squares(weight);
        let change = match &self.outputs {
            Some(outputs) => change * outputs.clone(),
            None => change,
        };
        let squares = (lengths.squares.clone() + change).clamp_min(LEAST_SQUARE);
        let count = lengths.squares.dims()[0];
        let scale = lengths.scale.clone().reshape([count]);
        scale / squares.sqrt().add_scalar(LENGTH_EPSILON)
    }

    fn between<const N: usize>(&self, base: impl FnOnce() -> Tensor<N>, y: Tensor<N>) -> Tensor<N> {
        if self.multiplier == 1.0 {
            return y;
        }
        let base = widen(base());
        base.clone() + (y - base).mul_scalar(self.multiplier)
    }
}

impl<D: Delta> Adapter for Additive<D> {
    fn linear(&self, layer: &Linear, x: Tensor<2>, samples: usize, value: Value) -> Tensor<2> {
        let ways = self.ways(samples, value);
        let Some(lengths) = &self.lengths else {
            return self.delta.beside_linear(layer, x, ways);
        };
        let changed = self.delta.beside_linear(layer, x.clone(), ways);
        let dtype = changed.dtype();
        let gains = self.gains(lengths, layer.weight.clone());
        let y = widen(changed) * gains.unsqueeze();
        let y = self.between(|| layer.frozen(x, false, Value::Read), y);
        let y = match &layer.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        };
        narrow(y, dtype)
    }

    fn conv(&self, layer: &Conv2d, x: Tensor<4>, value: Value) -> Tensor<4> {
        let ways = self.ways(x.dims()[0], value);
        let Some(lengths) = &self.lengths else {
            return self.delta.beside_conv(layer, x, ways);
        };
        let changed = self.delta.beside_conv(layer, x.clone(), ways);
        let dtype = changed.dtype();
        let [c_out, c_in, height, width] = layer.weight.dims();
        let weight = layer.weight.clone().reshape([c_out, c_in * height * width]);
        let y = widen(changed) * channels(self.gains(lengths, weight));
        let y = self.between(|| layer.frozen(x, false, Value::Read), y);
        let y = match &layer.bias {
            Some(bias) => y + channels(bias.clone()),
            None => y,
        };
        narrow(y, dtype)
    }
}

/// `[c]` as `[1, c, 1, 1]`
pub(super) fn channels(values: Tensor<1>) -> Tensor<4> {
    let [count] = values.dims();
    values.reshape([1, count, 1, 1])
}

fn times<const N: usize>(x: Tensor<N>, factor: f64) -> Tensor<N> {
    if factor == 1.0 {
        x
    } else {
        x.mul_scalar(factor)
    }
}
