//! The operation table's tensors in burn: on whatever device the parameters are, in f32.

use std::sync::Arc;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Tensor, TensorData};
use lorasmith_abi::host::blocks::Quantized;
use lorasmith_abi::host::{Binary, Code, Dims, Reduce, Scalar, Tensors, Unary};

use super::blocks::BurnBlocks;

/// A tensor padded with ones on the left to rank 4.
pub type BurnTensor = Tensor<4>;

/// Operations on one device, each computed at once.
#[derive(Clone)]
pub struct BurnTensors {
    device: Device,
}

impl BurnTensors {
    /// New tensors are made on this device.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
        }
    }

    /// Takes the codes of an earlier run to the device.
    pub fn write_blocks(&self, quantized: Quantized) -> BurnBlocks {
        if self.is_cpu() {
            BurnBlocks::Host(Arc::new(quantized))
        } else {
            BurnBlocks::upload(&quantized, &self.device)
        }
    }

    /// Whether tensors are in the process's own memory.
    pub fn is_cpu(&self) -> bool {
        let device = self.device.clone().without_autodiff();
        matches!(device.as_dispatch(), DispatchDevice::Flex(_))
    }

    /// Ones and zeros of a comparison as numbers.
    fn numbers(mask: Tensor<4, burn::tensor::Bool>) -> BurnTensor {
        mask.float()
    }
}

/// Spreads axes of length 1.
fn spread(a: &BurnTensor, out: Dims) -> BurnTensor {
    if a.dims() == out {
        a.clone()
    } else {
        a.clone().expand(out)
    }
}

impl Tensors for BurnTensors {
    type Tensor = BurnTensor;
    type Blocks = BurnBlocks;

    fn unary(&self, op: Unary, a: &BurnTensor) -> Result<BurnTensor, String> {
        let a = a.clone();
        Ok(match op {
            Unary::Neg => a.neg(),
            Unary::Abs => a.abs(),
            Unary::Sign => a.sign(),
            Unary::Sqrt => a.sqrt(),
            Unary::Rsqrt => a.sqrt().recip(),
            Unary::Square => a.square(),
            Unary::Exp => a.exp(),
            Unary::Log => a.log(),
        })
    }

    fn binary(
        &self,
        op: Binary,
        a: &BurnTensor,
        b: &BurnTensor,
        out: Dims,
    ) -> Result<BurnTensor, String> {
        let (a, b) = (spread(a, out), spread(b, out));
        Ok(match op {
            Binary::Add => a + b,
            Binary::Sub => a - b,
            Binary::Mul => a * b,
            Binary::Div => a / b,
            Binary::Pow => a.powf(b),
            Binary::Min => a.min_pair(b),
            Binary::Max => a.max_pair(b),
            Binary::Greater => Self::numbers(a.greater(b)),
        })
    }

    fn scalar(&self, op: Scalar, a: &BurnTensor, s: f64) -> Result<BurnTensor, String> {
        let a = a.clone();
        Ok(match op {
            Scalar::Add => a.add_scalar(s),
            Scalar::Sub => a.sub_scalar(s),
            Scalar::ReverseSub => a.neg().add_scalar(s),
            Scalar::Mul => a.mul_scalar(s),
            Scalar::Div => a.div_scalar(s),
            Scalar::ReverseDiv => a.recip().mul_scalar(s),
            Scalar::Pow => a.powf_scalar(s),
            Scalar::Greater => Self::numbers(a.greater_elem(s)),
        })
    }

    fn clamp(&self, a: &BurnTensor, low: f64, high: f64) -> Result<BurnTensor, String> {
        Ok(a.clone().clamp(low, high))
    }

    fn select(
        &self,
        condition: &BurnTensor,
        a: &BurnTensor,
        b: &BurnTensor,
        out: Dims,
    ) -> Result<BurnTensor, String> {
        let chosen = spread(condition, out).not_equal_elem(0.0);
        Ok(spread(b, out).mask_where(chosen, spread(a, out)))
    }

    fn matmul(&self, a: &BurnTensor, b: &BurnTensor, _: Dims) -> Result<BurnTensor, String> {
        Ok(a.clone().matmul(b.clone()))
    }

    fn swap_axes(&self, a: &BurnTensor, axis0: usize, axis1: usize) -> Result<BurnTensor, String> {
        Ok(a.clone().swap_dims(axis0, axis1))
    }

    fn reshape(&self, a: &BurnTensor, dims: Dims) -> Result<BurnTensor, String> {
        Ok(a.clone().reshape(dims))
    }

    fn reduce(
        &self,
        op: Reduce,
        a: &BurnTensor,
        axis: Option<usize>,
    ) -> Result<BurnTensor, String> {
        let a = a.clone();
        Ok(match (op, axis) {
            (Reduce::Sum, Some(axis)) => a.sum_dim(axis),
            (Reduce::Mean, Some(axis)) => a.mean_dim(axis),
            (Reduce::Max, Some(axis)) => a.max_dim(axis),
            (Reduce::Sum, None) => a.sum().reshape([1, 1, 1, 1]),
            (Reduce::Mean, None) => a.mean().reshape([1, 1, 1, 1]),
            (Reduce::Max, None) => a.max().reshape([1, 1, 1, 1]),
        })
    }

    fn full(&self, dims: Dims, value: f64) -> Result<BurnTensor, String> {
        Ok(Tensor::full(dims, value, (&self.device, DType::F32)))
    }

    fn read(&self, a: &BurnTensor) -> Result<Vec<f32>, String> {
        a.clone()
            .try_into_vec_as::<f32>()
            .map_err(|error| format!("reading from the device: {error}"))
    }

    fn write(&self, data: Vec<f32>, dims: Dims) -> Result<BurnTensor, String> {
        Ok(Tensor::from_data(
            TensorData::new(data, dims),
            (&self.device, DType::F32),
        ))
    }

    fn quantize(&self, a: &BurnTensor, code: Code) -> Result<BurnBlocks, String> {
        if self.is_cpu() {
            Ok(BurnBlocks::Host(Arc::new(code.quantize(&self.read(a)?))))
        } else {
            Ok(BurnBlocks::quantize(a, code))
        }
    }

    fn dequantize(
        &self,
        blocks: &BurnBlocks,
        code: Code,
        dims: Dims,
    ) -> Result<BurnTensor, String> {
        match blocks {
            BurnBlocks::Host(quantized) => self.write(code.dequantize(quantized), dims),
            blocks => blocks.dequantize(code, dims),
        }
    }

    fn log(&self, level: u32, message: &str) {
        super::library::log(level, message);
    }
}

#[cfg(test)]
mod tests {
    use lorasmith_sdk::testing::{CpuTensor, CpuTensors};

    use super::*;

    /// Every operation against the plain loops of the SDK's test host.
    #[test]
    fn operations_are_those_of_the_test_host() {
        let device = Device::flex();
        let (burn, plain) = (BurnTensors::new(&device), CpuTensors);
        let values: Vec<f32> = (0..12).map(|i| (i as f32 * 0.7).sin() + 0.1).collect();
        let positive: Vec<f32> = values.iter().map(|value| value.abs() + 0.5).collect();
        let dims = [1, 2, 2, 3];
        let make = |values: &[f32], dims: Dims| {
            let a = burn.write(values.to_vec(), dims).expect("a tensor");
            (a, CpuTensor::new(values.to_vec(), dims).expect("a tensor"))
        };
        let same = |what: &str, a: Result<BurnTensor, String>, b: Result<CpuTensor, String>| {
            let (a, b) = (
                burn.read(&a.expect("done")).expect("read"),
                b.expect("done"),
            );
            assert_eq!(a.len(), b.values().len(), "{what}");
            for (a, b) in a.iter().zip(b.values()) {
                // Functions may differ in the last bits.
                assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{what}: {a} {b}");
            }
        };
        let (x, x_plain) = make(&values, dims);
        let (p, p_plain) = make(&positive, dims);
        let (row, row_plain) = make(&[0.5, 2.0, -1.0], [1, 1, 1, 3]);
        for op in Unary::ALL {
            same(
                &format!("{op:?}"),
                burn.unary(op, &p),
                plain.unary(op, &p_plain),
            );
        }
        same(
            "sign",
            burn.unary(Unary::Sign, &x),
            plain.unary(Unary::Sign, &x_plain),
        );
        for op in Binary::ALL {
            let (a, b) = (
                burn.binary(op, &p, &row, dims),
                plain.binary(op, &p_plain, &row_plain, dims),
            );
            same(&format!("{op:?}"), a, b);
        }
        for op in Scalar::ALL {
            same(
                &format!("{op:?}"),
                burn.scalar(op, &p, 1.5),
                plain.scalar(op, &p_plain, 1.5),
            );
        }
        for op in Reduce::ALL {
            for axis in [None, Some(1), Some(3)] {
                let what = format!("{op:?} {axis:?}");
                same(
                    &what,
                    burn.reduce(op, &x, axis),
                    plain.reduce(op, &x_plain, axis),
                );
            }
        }
        same(
            "clamp",
            burn.clamp(&x, -0.2, 0.4),
            plain.clamp(&x_plain, -0.2, 0.4),
        );
        same(
            "swap",
            burn.swap_axes(&x, 2, 3),
            plain.swap_axes(&x_plain, 2, 3),
        );
        let (m, m_plain) = make(&values[..6], [1, 1, 3, 2]);
        let out = [1, 2, 2, 2];
        same(
            "matmul",
            burn.matmul(&x, &m, out),
            plain.matmul(&x_plain, &m_plain, out),
        );
        let (c, c_plain) = make(&[0.0, 1.0, 0.0], [1, 1, 1, 3]);
        same(
            "select",
            burn.select(&c, &x, &p, dims),
            plain.select(&c_plain, &x_plain, &p_plain, dims),
        );
        same("full", burn.full(dims, 0.25), plain.full(dims, 0.25));
    }
}
