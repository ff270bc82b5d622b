//! LoRA, and LoCon on convolutions.

use burn::tensor::Tensor;

use super::additive::Ways;
use super::dropout::Masks;
use super::{Delta, conv_like, pointwise, through_core};
use crate::diffusion::layers::{Conv2d, Linear};
use crate::kernels::{self, LowRank, Precision, Value, narrow, widen};
use crate::networks::form::Form;
use crate::networks::targets::Target;

/// `scale · up · down`, with `scale = alpha / rank`.
///
/// `down` has the layer's own kernel, stride and padding, `up` is 1×1; with a core `down` is 1×1 and the core has the
/// kernel. Hu et al. 2021, arXiv:2106.09685; convolutions as in LoCon (sd-scripts `networks/lora.py`).
#[derive(Debug)]
pub struct LowRankDelta {
    /// `[1, 1, rank, in]`, or `[rank, in, kh, kw]` for what files hold as a convolution.
    pub down: Tensor<4>,
    /// `[rank, rank, kh, kw]`, if there is one.
    pub core: Option<Tensor<4>>,
    /// `[1, 1, out, rank]`, or `[out, rank, 1, 1]` for what files hold as a convolution.
    pub up: Tensor<4>,
    /// Width of the branch.
    pub rank: usize,
    /// Numerator of its strength.
    pub alpha: f64,
    /// What is left out between the two.
    pub masks: Option<Masks>,
}

impl LowRankDelta {
    /// Of a layer's tensors.
    pub fn new(target: &Target, tensors: &[Tensor<4>], masks: Option<Masks>) -> Option<Self> {
        let mut tensors = tensors.iter().cloned();
        let down = tensors.next()?;
        let core = match target.form {
            Form::LowRank { core: true } => Some(tensors.next()?),
            _ => None,
        };
        Some(Self {
            down,
            core,
            up: tensors.next()?,
            rank: target.rank,
            alpha: target.alpha,
            masks,
        })
    }

    fn scale(&self, strength: f64) -> f64 {
        strength * self.alpha / self.rank as f64
    }

    /// `[rank, in]`
    fn down_matrix(&self) -> Tensor<2> {
        let columns = self.down.shape().num_elements() / self.rank;
        self.down.clone().reshape([self.rank, columns])
    }

    /// `down`, behind the core where there is one: `[rank, in · kh · kw]`
    fn inner(&self) -> Tensor<2> {
        match &self.core {
            None => self.down_matrix(),
            Some(core) => through_core(core.clone(), self.down_matrix()),
        }
    }

    /// `[out, rank]`
    fn outer(&self) -> Tensor<2> {
        let rows = self.up.shape().num_elements() / self.rank;
        self.up.clone().reshape([rows, self.rank])
    }

    /// `‖ΔW‖²` from products of the rank's size: `[1]`
    pub fn norm_square(&self) -> Tensor<1> {
        let (inner, outer) = (self.inner(), self.outer());
        let inner = inner.clone().matmul(inner.transpose());
        let outer = outer.clone().transpose().matmul(outer);
        (inner * outer).sum().mul_scalar(self.scale(1.0).powi(2))
    }

    fn branch(&self, strength: f64) -> LowRank {
        LowRank {
            down: self.down_matrix(),
            up: self.outer(),
            scale: self.scale(strength),
        }
    }

    /// The branch of a linear layer with masks between its matrices.
    fn masked(&self, masks: &Masks, x: Tensor<2>, samples: usize) -> Tensor<2> {
        let middle = x.matmul(self.down_matrix().transpose()); // [rows, rank]
        let ([rows, rank], device) = (middle.dims(), middle.device());
        let middle = match masks.neurons([rows, rank], &device) {
            Some(mask) => middle * mask,
            None => middle,
        };
        let middle = match masks.ranks(samples, rank, &device) {
            Some(mask) => {
                let each = rows / samples.max(1);
                let mask = mask.reshape([samples, 1, rank]);
                (middle.reshape([samples, each, rank]) * mask).reshape([rows, rank])
            }
            None => middle,
        };
        middle.matmul(self.outer().transpose())
    }

    fn middle(&self, layer: &Conv2d, x: Tensor<4>) -> Tensor<4> {
        let middle = match &self.core {
            None => conv_like(layer, x, self.down.clone()),
            Some(core) => conv_like(layer, pointwise(x, self.down.clone()), core.clone()),
        }; // [batch, rank, height', width']
        let Some(masks) = &self.masks else {
            return middle;
        };
        let (shape, device) = (middle.dims(), middle.device());
        let middle = match masks.neurons(shape, &device) {
            Some(mask) => middle * mask,
            None => middle,
        };
        match masks.ranks(shape[0], self.rank, &device) {
            Some(mask) => middle * mask.reshape([shape[0], self.rank, 1, 1]),
            None => middle,
        }
    }
}

impl Delta for LowRankDelta {
    fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        let middle = x.matmul(self.down_matrix().transpose());
        let middle = middle.mul_scalar(self.scale(1.0));
        middle.matmul(self.outer().transpose())
    }

    fn conv(&self, layer: &Conv2d, x: Tensor<4>) -> Tensor<4> {
        let middle = self.middle(layer, x).mul_scalar(self.scale(1.0));
        pointwise(middle, self.up.clone())
    }

    fn weight(&self) -> Tensor<2> {
        self.outer()
            .matmul(self.inner())
            .mul_scalar(self.scale(1.0))
    }

    /// `2 s Σ up · (W downᵀ) + s² Σ (up · down downᵀ) · up`: nothing of the weight's size is made.
    fn squares(&self, weight: Tensor<2>) -> Tensor<1> {
        let (inner, outer, scale) = (self.inner(), self.outer(), self.scale(1.0));
        let [rows, _] = outer.dims();
        let met = kernels::linear(inner.clone(), &weight, None, Precision::Fp32, Value::Read); // [rank, out]
        let cross = met.transpose().mul_scalar(2.0 * scale);
        let gram = inner.clone().matmul(inner.transpose()); // [rank, rank]
        let own = outer.clone().matmul(gram).mul_scalar(scale * scale);
        ((cross + own) * outer).sum_dim(1).reshape([rows])
    }

    fn beside_linear(&self, layer: &Linear, x: Tensor<2>, ways: Ways<'_>) -> Tensor<2> {
        if let Some(masks) = &self.masks {
            let y = layer.frozen(x.clone(), ways.with_bias, ways.value);
            let dtype = y.dtype();
            let delta = self.masked(masks, widen(x), ways.samples);
            return y + narrow(delta.mul_scalar(self.scale(ways.strength)), dtype);
        }
        let mut branch = self.branch(ways.strength);
        if let Some(outputs) = ways.outputs {
            let [rows] = outputs.dims();
            branch.up = branch.up * outputs.clone().reshape([rows, 1]);
        }
        layer.branched(x, branch, ways.with_bias, ways.value)
    }

    fn beside_conv(&self, layer: &Conv2d, x: Tensor<4>, ways: Ways<'_>) -> Tensor<4> {
        let y = layer.frozen(x.clone(), ways.with_bias, ways.value);
        let dtype = y.dtype();
        // Adapters compute in f32 whatever the model computes in.
        let middle = self.middle(layer, widen(x));
        let middle = middle.mul_scalar(self.scale(ways.strength));
        let delta = pointwise(middle, self.up.clone());
        let delta = match ways.outputs {
            Some(outputs) => delta * super::additive::channels(outputs.clone()),
            None => delta,
        };
        y + narrow(delta, dtype)
    }
}
