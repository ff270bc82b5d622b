//! What goes into a check and what comes out: the same random numbers on every device, and named results.

use burn::tensor::{DType, Device, FloatDType, Gradients, Tensor, TensorData};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use rand_distr::StandardNormal;
use sha2::{Digest, Sha256};

use crate::kernels;

/// Tensors to compare, by name; `None` for a gradient that did not arrive.
pub type Outputs = Vec<(String, Option<Tensor<1>>)>;

/// A source of tensors on one device.
pub struct Inputs {
    random: ChaCha12Rng,
    device: Device,
    /// What products of halves are computed in.
    half: FloatDType,
}

impl Inputs {
    /// The numbers depend on the check's name alone.
    pub fn new(check: &str, device: &Device, half: FloatDType) -> Self {
        Self {
            random: ChaCha12Rng::from_seed(Sha256::digest(check).into()),
            device: device.clone(),
            half,
        }
    }

    /// Standard normal numbers.
    pub fn normal<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let data = self.draw(shape, 1.0);
        Tensor::from_data(data, (&self.device, DType::F32))
    }

    /// Weights that keep the size of numbers: the first axis counts outputs.
    pub fn weight<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let data = self.draw(shape, scale(shape));
        Tensor::from_data(data, (&self.device, DType::F32))
    }

    /// The same as halves. They are rounded here, as shaders may round in either direction.
    pub fn stored_weight<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let data = self.draw(shape, scale(shape)).convert_dtype(DType::F16);
        Tensor::from_data(data, (&self.device, DType::F16))
    }

    /// Numbers that are halves, in the format that products of halves are computed in here.
    pub fn halves<const D: usize>(&mut self, shape: [usize; D], scale: f32) -> Tensor<D> {
        let data = self.draw(shape, scale);
        let rounded: Vec<f32> = data
            .iter::<f32>()
            .map(|value| f16::from_f32(value).to_f32())
            .collect();
        let dtype = DType::from(self.half);
        let data = TensorData::new(rounded, shape).convert_dtype(dtype);
        Tensor::from_data(data, (&self.device, dtype))
    }

    fn draw<const D: usize>(&mut self, shape: [usize; D], scale: f32) -> TensorData {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| scale * self.random.sample::<f32, _>(StandardNormal))
            .collect();
        TensorData::new(values, shape)
    }
}

/// `1 / sqrt(numbers that go into one output)`
fn scale<const D: usize>(shape: [usize; D]) -> f32 {
    let fan_in: usize = shape[1..].iter().product();
    (fan_in as f32).powf(-0.5)
}

/// A leaf of a new graph.
pub fn leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.autodiff().require_grad()
}

/// A result, and the gradients that have flown back from it.
pub struct Traced {
    outputs: Outputs,
    gradients: Gradients,
}

impl Traced {
    /// Begins the backward with the gradient of `output`.
    pub fn new<const D: usize>(output: Tensor<D>, gradient: Tensor<D>) -> Self {
        let value = output.clone().without_autodiff();
        Self {
            outputs: vec![("output".to_owned(), Some(flat(value)))],
            gradients: kernels::seed(output, gradient).backward(),
        }
    }

    /// Adds the gradient of a leaf.
    #[must_use]
    pub fn gradient<const D: usize>(mut self, of: &str, leaf: &Tensor<D>) -> Self {
        let gradient = leaf.grad_remove(&mut self.gradients).map(flat);
        self.outputs.push((format!("gradient of {of}"), gradient));
        self
    }

    /// What is to be compared.
    pub fn outputs(self) -> Outputs {
        self.outputs
    }
}

/// The elements in their order.
pub fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let count = tensor.shape().num_elements();
    tensor.reshape([count])
}
