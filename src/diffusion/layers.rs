//! The frozen layers that the models are made of, and the slot in each for a trainable adapter.
//!
//! Weights stay in their stored precision and are widened to the input's where they are used. They are never tracked
//! by autodiff: a gradient flows through a layer to its input, and into an adapter, but never into a weight.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::Tensor;
use burn::tensor::activation;

use super::error::LoadError;
use super::weights::WeightsAt;
use crate::kernels::{self, Geometry, LowRank, Precision, Value};

/// A trainable change of a frozen layer.
pub trait Adapter: Send + Sync + Debug {
    /// The layer's output with the change; where nothing reads it, what needs no more may be left out.
    ///
    /// # Shapes
    /// - `x`: `[rows, d_in]`, as many rows of each of `samples` samples
    /// - output: `[rows, d_out]`
    fn linear(&self, layer: &Linear, x: Tensor<2>, samples: usize, value: Value) -> Tensor<2>;

    /// The same of a convolution.
    ///
    /// # Shapes
    /// - `x`: `[batch, c_in, height, width]`
    /// - output: `[batch, c_out, height', width']`
    fn conv(&self, layer: &Conv2d, x: Tensor<4>, value: Value) -> Tensor<4>;
}

/// A layer that an adapter can be put on.
#[derive(Debug)]
pub enum LayerMut<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// A convolution.
    Conv(&'a mut Conv2d),
}

/// Layers with their module paths, in the order of the reference implementation's `named_modules`.
pub type Layers<'a> = Vec<(String, LayerMut<'a>)>;

/// `y = x Wᵀ + b`
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[d_out, d_in]`, as stored.
    pub weight: Tensor<2>,
    /// `[d_out]`
    pub bias: Option<Tensor<1>>,
    precision: Precision,
    adapter: Option<Arc<dyn Adapter>>,
}

impl Linear {
    /// A layer of weights that are there already.
    pub fn new(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight,
            bias,
            precision: Precision::Fp32,
            adapter: None,
        }
    }

    /// Reads `weight` and, where there is one, `bias`; the sizes are those of the file.
    ///
    /// # Errors
    /// When `weight` is missing or not a matrix.
    pub fn load(weights: &WeightsAt<'_>) -> Result<Self, LoadError> {
        let shape = weights.shape("weight")?;
        let (out, input) = match shape[..] {
            // A single file may hold a linear layer as a 1x1 convolution.
            [out, input] | [out, input, 1, 1] => (out, input),
            _ => (0, 0),
        };
        Self::load_sized(weights, input, out)
    }

    /// Reads a layer of known sizes.
    ///
    /// # Errors
    /// When `weight` is missing or has another shape.
    pub fn load_sized(
        weights: &WeightsAt<'_>,
        d_in: usize,
        d_out: usize,
    ) -> Result<Self, LoadError> {
        let weight = weights.tensor("weight", [d_out, d_in])?;
        Ok(Self {
            precision: weights.precision(),
            ..Self::new(weight, optional_bias(weights, d_out)?)
        })
    }

    /// Length of an input row.
    pub fn d_in(&self) -> usize {
        self.weight.dims()[1]
    }

    /// Length of an output row.
    pub fn d_out(&self) -> usize {
        self.weight.dims()[0]
    }

    /// The layer with another precision.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// What the layer multiplies in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether there is an adapter on the layer.
    pub fn is_adapted(&self) -> bool {
        self.adapter.is_some()
    }

    /// Puts an adapter on the layer, or takes it off.
    pub fn set_adapter(&mut self, adapter: Option<Arc<dyn Adapter>>) {
        self.adapter = adapter;
    }

    /// # Shapes
    /// - `x`: `[.., d_in]`
    /// - output: `[.., d_out]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.forward_for(Value::Read, x)
    }

    /// The same, or the graph alone where nothing reads the output.
    pub fn forward_for<const D: usize>(&self, value: Value, x: Tensor<D>) -> Tensor<D> {
        let mut shape = x.dims();
        let rows = x.shape().num_elements() / self.d_in();
        let x = x.reshape([rows, self.d_in()]);
        let y = match &self.adapter {
            None => self.frozen(x, true, value),
            Some(adapter) => adapter.linear(self, x, shape[0], value),
        };
        shape[D - 1] = self.d_out();
        y.reshape(shape)
    }

    /// The layer without its adapter, with its bias or without.
    ///
    /// # Shapes
    /// - `x`: `[rows, d_in]`
    /// - output: `[rows, d_out]`
    pub fn frozen(&self, x: Tensor<2>, with_bias: bool, value: Value) -> Tensor<2> {
        let bias = self.bias.as_ref().filter(|_| with_bias);
        kernels::linear(x, &self.weight, bias, self.precision, value)
    }

    /// The same with a branch beside it, in one operation.
    pub fn branched(
        &self,
        x: Tensor<2>,
        branch: LowRank,
        with_bias: bool,
        value: Value,
    ) -> Tensor<2> {
        let bias = self.bias.as_ref().filter(|_| with_bias);
        kernels::linear_with_branch(x, &self.weight, bias, branch, self.precision, value)
    }
}

/// A two-dimensional convolution (cross-correlation, as everywhere in this field).
#[derive(Debug, Clone)]
pub struct Conv2d {
    /// `[c_out, c_in, kernel_h, kernel_w]`, as stored.
    pub weight: Tensor<4>,
    /// `[c_out]`
    pub bias: Option<Tensor<1>>,
    /// Step of the window, vertical and horizontal.
    pub stride: [usize; 2],
    /// Zeros around the image, vertical and horizontal.
    pub padding: [usize; 2],
    precision: Precision,
    adapter: Option<Arc<dyn Adapter>>,
}

impl Conv2d {
    /// A convolution of weights that are there already.
    pub fn new(weight: Tensor<4>, bias: Option<Tensor<1>>, stride: usize, padding: usize) -> Self {
        Self::ordered(kernels::order_by_taps(weight), bias, stride, padding)
    }

    fn ordered(weight: Tensor<4>, bias: Option<Tensor<1>>, stride: usize, padding: usize) -> Self {
        Self {
            weight,
            bias,
            stride: [stride, stride],
            padding: [padding, padding],
            precision: Precision::Fp32,
            adapter: None,
        }
    }

    /// Reads a convolution with a square kernel, padded so that stride 1 keeps the size.
    ///
    /// # Errors
    /// When `weight` is missing or has another shape.
    pub fn load(
        weights: &WeightsAt<'_>,
        c_in: usize,
        c_out: usize,
        kernel: usize,
    ) -> Result<Self, LoadError> {
        let weight = weights.tensor("weight", [c_out, c_in, kernel, kernel])?;
        let bias = optional_bias(weights, c_out)?;
        let (stride, padding) = (1, kernel / 2);
        if weights.only_shapes() {
            // Ordered they would take memory, and nothing is computed with them.
            return Ok(Self::ordered(weight, bias, stride, padding));
        }
        Ok(Self {
            precision: weights.precision(),
            ..Self::new(weight, bias, stride, padding)
        })
    }

    /// The same with another stride and padding.
    #[must_use]
    pub fn with_geometry(mut self, stride: usize, padding: usize) -> Self {
        self.stride = [stride, stride];
        self.padding = [padding, padding];
        self
    }

    /// Input channels.
    pub fn c_in(&self) -> usize {
        self.weight.dims()[1]
    }

    /// Output channels.
    pub fn c_out(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Whether there is an adapter on the layer.
    pub fn is_adapted(&self) -> bool {
        self.adapter.is_some()
    }

    /// Puts an adapter on the layer, or takes it off.
    pub fn set_adapter(&mut self, adapter: Option<Arc<dyn Adapter>>) {
        self.adapter = adapter;
    }

    /// # Shapes
    /// - `x`: `[batch, c_in, height, width]`
    /// - output: `[batch, c_out, height', width']`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.forward_for(Value::Read, x)
    }

    /// The same, or the graph alone where nothing reads the output.
    pub fn forward_for(&self, value: Value, x: Tensor<4>) -> Tensor<4> {
        match &self.adapter {
            Some(adapter) => adapter.conv(self, x, value),
            None => self.frozen(x, true, value),
        }
    }

    /// The convolution without its adapter, with its bias or without.
    ///
    /// # Shapes
    /// As [`Self::forward`].
    pub fn frozen(&self, x: Tensor<4>, with_bias: bool, value: Value) -> Tensor<4> {
        let [_, _, kernel_height, kernel_width] = self.weight.dims();
        let geometry = Geometry {
            kernel: [kernel_height, kernel_width],
            stride: self.stride,
            padding: self.padding,
        };
        let bias = self.bias.as_ref().filter(|_| with_bias);
        kernels::conv2d(x, &self.weight, bias, geometry, self.precision, value)
    }
}

/// Group normalisation over channels and pixels.
///
/// `y = (x - mean) / sqrt(var + eps) * weight + bias`, mean and (biased) variance over each group of channels.
/// Wu & He 2018, arXiv:1803.08494.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Reads `weight` and `bias` of `channels` channels.
    ///
    /// # Errors
    /// When they are missing, or `groups` does not divide `channels`.
    pub fn load(
        weights: &WeightsAt<'_>,
        channels: usize,
        groups: usize,
        eps: f64,
    ) -> Result<Self, LoadError> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(LoadError::config(
                std::path::Path::new(weights.path()),
                format!("{groups} norm groups do not divide {channels} channels"),
            ));
        }
        Ok(Self {
            weight: weights.tensor_f32("weight", [channels])?,
            bias: weights.tensor_f32("bias", [channels])?,
            groups,
            eps,
        })
    }

    /// # Shapes
    /// - `x` and output: `[batch, channels, height, width]`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        kernels::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, false)
    }

    /// The norm and SiLU behind it, in one pass.
    ///
    /// # Shapes
    /// As [`Self::forward`].
    pub fn forward_silu(&self, x: Tensor<4>) -> Tensor<4> {
        kernels::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, true)
    }
}

/// Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias` of rows of length `d`.
    ///
    /// # Errors
    /// When they are missing or of another length.
    pub fn load(weights: &WeightsAt<'_>, d: usize, eps: f64) -> Result<Self, LoadError> {
        Ok(Self {
            weight: weights.tensor_f32("weight", [d])?,
            bias: weights.tensor_f32("bias", [d])?,
            eps,
        })
    }

    /// # Shapes
    /// - `x` and output: `[batch, tokens, d]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        kernels::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// `x * sigmoid(x)`
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activation::silu(x)
}

/// The activation between the two layers of a text encoder's MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`: OpenAI's CLIP.
    QuickGelu,
    /// `x * Φ(x)` with the error function: OpenCLIP.
    Gelu,
}

impl Activation {
    /// Applies it to each element.
    pub fn forward(self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::QuickGelu => kernels::quick_gelu(x),
            Self::Gelu => kernels::gelu(x),
        }
    }
}

fn optional_bias(weights: &WeightsAt<'_>, length: usize) -> Result<Option<Tensor<1>>, LoadError> {
    if weights.has("bias") {
        weights.tensor_f32("bias", [length]).map(Some)
    } else {
        Ok(None)
    }
}
