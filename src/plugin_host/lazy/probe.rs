//! An update of the kind that optimizers compose, for the check of a device.

use burn::tensor::{Device, Tensor};
use lorasmith_abi::host::{Binary, Code, Scalar, Tensors as _, Unary};

use super::program::Root;
use super::{LazyTensor, LazyTensors};

/// What an update has made of one parameter.
#[derive(Debug)]
pub struct Probed {
    /// The new value.
    pub value: Tensor<4>,
    /// The new moment.
    pub moment: Tensor<4>,
    /// The moment, rounded to 8 bits and back.
    pub rounded: Tensor<4>,
}

/// One step of Adam's kind with a moment of 8 bits and one that is not kept, for all parameters at once.
///
/// # Shapes
/// - `values`, `gradients` and results: any, the same for each parameter
pub fn probe(values: &[Tensor<4>], gradients: &[Tensor<4>]) -> Result<Vec<Probed>, String> {
    let device = values.first().map_or_else(Device::default, Tensor::device);
    let tensors = LazyTensors::new(&device);
    let mut bundles = Vec::with_capacity(values.len());
    for (value, gradient) in values.iter().zip(gradients) {
        let [value, gradient] = [value, gradient].map(|tensor| LazyTensor::leaf(tensor.clone()));
        bundles.push(roots(&tensors, &value, &gradient)?);
    }
    let mut results = Vec::with_capacity(values.len());
    for made in tensors.compute(&bundles)? {
        let mut made = made.into_iter();
        let mut next = || made.next().ok_or("a result is missing");
        let value = next()?.values().ok_or("no value")?;
        let moment = next()?.values().ok_or("no moment")?;
        let codes = next()?.codes().ok_or("no codes")?;
        results.push(Probed {
            value: tensors.value(&value)?,
            rounded: tensors
                .eager
                .dequantize(&codes, Code::Signed, moment.dims())?,
            moment: tensors.value(&moment)?,
        });
    }
    Ok(results)
}

fn roots(
    tensors: &LazyTensors,
    value: &LazyTensor,
    gradient: &LazyTensor,
) -> Result<Vec<Root>, String> {
    let dims = value.dims();
    let clipped = tensors.clamp(gradient, -2.0, 2.0)?;
    let moment = tensors.scalar(Scalar::Mul, &clipped, 0.1)?;
    let square = tensors.unary(Unary::Square, &clipped)?;
    let spread = tensors.scalar(Scalar::Add, &tensors.unary(Unary::Sqrt, &square)?, 0.5)?;
    let step = tensors.binary(Binary::Div, &moment, &spread, dims)?;
    let back = tensors.scalar(Scalar::Mul, &tensors.unary(Unary::Sign, value)?, 0.01)?;
    let ahead = tensors.scalar(Scalar::Greater, gradient, 0.0)?;
    let step = tensors.select(&ahead, &step, &back, dims)?;
    let kept = tensors.scalar(Scalar::Mul, value, 0.99)?;
    let value = tensors.binary(Binary::Sub, &kept, &step, dims)?;
    let codes = Root::Codes(moment.clone(), Code::Signed);
    Ok(vec![Root::Values(value), Root::Values(moment), codes])
}
