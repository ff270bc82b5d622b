//! IA³: one factor for each output, or input, of a layer.

use burn::tensor::Tensor;

use super::additive::channels;
use crate::diffusion::layers::{Adapter, Conv2d, Linear};
use crate::kernels::{Value, narrow, widen};

/// `y = x (W · (1 + m · weight))ᵀ + b`, by columns of `W` for inputs, by rows for outputs; the bias is not scaled.
///
/// Liu et al. 2022, arXiv:2205.05638, as in LyCORIS.
#[derive(Debug)]
pub struct ScaleAdapter {
    /// As many numbers as the layer has outputs, or inputs.
    pub weight: Tensor<4>,
    /// Which of the two.
    pub on_input: bool,
    /// `m`
    pub multiplier: f64,
}

impl ScaleAdapter {
    fn factors(&self) -> Tensor<1> {
        let count = self.weight.shape().num_elements();
        let weight = self.weight.clone().reshape([count]);
        weight.mul_scalar(self.multiplier).add_scalar(1.0)
    }
}

fn scaled<const N: usize>(x: Tensor<N>, factors: Tensor<N>) -> Tensor<N> {
    let dtype = x.dtype();
    narrow(widen(x) * factors, dtype)
}

impl Adapter for ScaleAdapter {
    fn linear(&self, layer: &Linear, x: Tensor<2>, _samples: usize, value: Value) -> Tensor<2> {
        let factors = self.factors().unsqueeze();
        if self.on_input {
            return layer.frozen(scaled(x, factors), true, value);
        }
        let y = scaled(layer.frozen(x, false, Value::Read), factors);
        match &layer.bias {
            Some(bias) => {
                let bias = narrow(bias.clone(), y.dtype());
                y + bias.unsqueeze()
            }
            None => y,
        }
    }

    fn conv(&self, layer: &Conv2d, x: Tensor<4>, value: Value) -> Tensor<4> {
        let factors = channels(self.factors());
        if self.on_input {
            return layer.frozen(scaled(x, factors), true, value);
        }
        let y = scaled(layer.frozen(x, false, Value::Read), factors);
        match &layer.bias {
            Some(bias) => {
                let bias = narrow(bias.clone(), y.dtype());
                y + channels(bias)
            }
            None => y,
        }
    }
}
