//! The low-rank branch beside a frozen layer.

use burn::tensor::Tensor;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;

use crate::diffusion::layers::{Adapter, Conv2d};
use crate::kernels::{LowRank, narrow, widen};

/// LoRA: `y + scale · up(down(x))` with a frozen layer's output `y`.
///
/// `down` has the layer's own kernel, stride and padding, `up` is 1×1. `scale` is `multiplier · alpha / rank`.
/// Hu et al. 2021, arXiv:2106.09685; convolutions as in LoCon (sd-scripts `networks/lora.py`).
#[derive(Debug)]
pub struct LoraAdapter {
    /// `[1, 1, rank, in]`, or `[rank, in, kh, kw]` for what files hold as a convolution.
    pub down: Tensor<4>,
    /// `[1, 1, out, rank]`, or `[out, rank, 1, 1]` for what files hold as a convolution.
    pub up: Tensor<4>,
    /// Width of the branch.
    pub rank: usize,
    /// Strength of the branch.
    pub scale: f64,
}

impl Adapter for LoraAdapter {
    fn branch(&self) -> LowRank {
        let columns = |tensor: &Tensor<4>| tensor.shape().num_elements() / self.rank;
        let (d_in, d_out) = (columns(&self.down), columns(&self.up));
        LowRank {
            down: self.down.clone().reshape([self.rank, d_in]),
            up: self.up.clone().reshape([d_out, self.rank]),
            scale: self.scale,
        }
    }

    /// # Shapes
    /// - `x`: `[batch, in, height, width]`
    /// - `y`: `[batch, out, height', width']`, the output of the layer
    fn conv(&self, layer: &Conv2d, x: Tensor<4>, y: Tensor<4>) -> Tensor<4> {
        let dtype = y.dtype();
        let [.., kernel_height, kernel_width] = self.down.dims();
        let x = widen(x); // adapters compute in f32 whatever the model computes in
        let hidden = if [kernel_height, kernel_width] == [1, 1]
            && layer.stride == [1, 1]
            && layer.padding == [0, 0]
        {
            pointwise(x, self.down.clone())
        } else {
            let options = ConvOptions::new(layer.stride, layer.padding, [1, 1], 1);
            conv2d(x, self.down.clone(), None, options)
        }; // [batch, rank, height', width']
        let delta = pointwise(hidden.mul_scalar(self.scale), self.up.clone());
        y + narrow(delta, dtype)
    }
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
