//! The plainest tensors: a vector and a shape, one loop per operation. Meant to be right, not fast.

use std::rc::Rc;

use lorasmith_abi::host::blocks::Quantized;
use lorasmith_abi::host::{Binary, Code, Dims, Reduce, Scalar, Tensors, Unary};

/// A row-major tensor.
#[derive(Debug, Clone)]
pub struct CpuTensor {
    dims: Dims,
    values: Rc<[f32]>,
}

impl CpuTensor {
    /// A tensor of these elements.
    ///
    /// # Errors
    /// Another number of elements than the shape has.
    pub fn new(values: Vec<f32>, dims: Dims) -> Result<Self, String> {
        if values.len() != dims.iter().product::<usize>() {
            return Err(format!("{} elements for shape {dims:?}", values.len()));
        }
        Ok(Self {
            dims,
            values: values.into(),
        })
    }

    /// The elements.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    fn map(&self, f: impl Fn(f32) -> f32) -> Self {
        Self {
            dims: self.dims,
            values: self.values.iter().map(|&x| f(x)).collect(),
        }
    }

    /// The element at a position of a shape that this one broadcasts to.
    fn at(&self, position: Dims) -> f32 {
        let mut offset = 0;
        for (&dim, index) in self.dims.iter().zip(position) {
            offset = offset * dim + if dim == 1 { 0 } else { index };
        }
        self.values[offset]
    }
}

/// A tensor whose elements are computed from their positions.
fn from_positions(dims: Dims, f: impl Fn(Dims) -> f32) -> CpuTensor {
    let elements: usize = dims.iter().product();
    let values = (0..elements).map(|offset| {
        let mut rest = offset;
        let mut position = [0; 4];
        for axis in (0..4).rev() {
            position[axis] = rest % dims[axis];
            rest /= dims[axis];
        }
        f(position)
    });
    CpuTensor {
        dims,
        values: values.collect(),
    }
}

fn sign(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

/// Tensors in the host's memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuTensors;

impl Tensors for CpuTensors {
    type Tensor = CpuTensor;
    type Blocks = Rc<Quantized>;

    fn unary(&self, op: Unary, a: &CpuTensor) -> Result<CpuTensor, String> {
        Ok(a.map(match op {
            Unary::Neg => |x: f32| -x,
            Unary::Abs => f32::abs,
            Unary::Sign => sign,
            Unary::Sqrt => f32::sqrt,
            Unary::Rsqrt => |x: f32| 1.0 / x.sqrt(),
            Unary::Square => |x: f32| x * x,
            Unary::Exp => f32::exp,
            Unary::Log => f32::ln,
        }))
    }

    fn binary(
        &self,
        op: Binary,
        a: &CpuTensor,
        b: &CpuTensor,
        out: Dims,
    ) -> Result<CpuTensor, String> {
        let f: fn(f32, f32) -> f32 = match op {
            Binary::Add => |x, y| x + y,
            Binary::Sub => |x, y| x - y,
            Binary::Mul => |x, y| x * y,
            Binary::Div => |x, y| x / y,
            Binary::Pow => f32::powf,
            Binary::Min => f32::min,
            Binary::Max => f32::max,
            Binary::Greater => |x, y| f32::from(u8::from(x > y)),
        };
        Ok(from_positions(out, |at| f(a.at(at), b.at(at))))
    }

    fn scalar(&self, op: Scalar, a: &CpuTensor, s: f64) -> Result<CpuTensor, String> {
        let s = s as f32;
        Ok(a.map(|x| match op {
            Scalar::Add => x + s,
            Scalar::Sub => x - s,
            Scalar::ReverseSub => s - x,
            Scalar::Mul => x * s,
            Scalar::Div => x / s,
            Scalar::ReverseDiv => s / x,
            Scalar::Pow => x.powf(s),
            Scalar::Greater => f32::from(u8::from(x > s)),
        }))
    }

    fn clamp(&self, a: &CpuTensor, low: f64, high: f64) -> Result<CpuTensor, String> {
        Ok(a.map(|x| x.clamp(low as f32, high as f32)))
    }

    fn select(
        &self,
        condition: &CpuTensor,
        a: &CpuTensor,
        b: &CpuTensor,
        out: Dims,
    ) -> Result<CpuTensor, String> {
        Ok(from_positions(out, |at| {
            if condition.at(at) == 0.0 {
                b.at(at)
            } else {
                a.at(at)
            }
        }))
    }

    fn matmul(&self, a: &CpuTensor, b: &CpuTensor, out: Dims) -> Result<CpuTensor, String> {
        let inner = a.dims[3];
        Ok(from_positions(out, |[i, j, row, column]| {
            (0..inner)
                .map(|k| a.at([i, j, row, k]) * b.at([i, j, k, column]))
                .sum()
        }))
    }

    fn swap_axes(&self, a: &CpuTensor, axis0: usize, axis1: usize) -> Result<CpuTensor, String> {
        let mut dims = a.dims;
        dims.swap(axis0, axis1);
        Ok(from_positions(dims, |mut at| {
            at.swap(axis0, axis1);
            a.at(at)
        }))
    }

    fn reshape(&self, a: &CpuTensor, dims: Dims) -> Result<CpuTensor, String> {
        CpuTensor::new(a.values.to_vec(), dims)
    }

    fn reduce(&self, op: Reduce, a: &CpuTensor, axis: Option<usize>) -> Result<CpuTensor, String> {
        let (flat, axis) = match axis {
            Some(axis) => (a.clone(), axis),
            None => (self.reshape(a, [1, 1, 1, a.values.len()])?, 3),
        };
        let length = flat.dims[axis];
        let mut dims = flat.dims;
        dims[axis] = 1;
        Ok(from_positions(dims, |at| {
            let along = (0..length).map(|index| {
                let mut position = at;
                position[axis] = index;
                flat.at(position)
            });
            match op {
                Reduce::Sum => along.sum(),
                Reduce::Mean => along.sum::<f32>() / length as f32,
                Reduce::Max => along.fold(f32::NEG_INFINITY, f32::max),
            }
        }))
    }

    fn full(&self, dims: Dims, value: f64) -> Result<CpuTensor, String> {
        Ok(from_positions(dims, |_| value as f32))
    }

    fn read(&self, a: &CpuTensor) -> Result<Vec<f32>, String> {
        Ok(a.values.to_vec())
    }

    fn write(&self, data: Vec<f32>, dims: Dims) -> Result<CpuTensor, String> {
        CpuTensor::new(data, dims)
    }

    fn quantize(&self, a: &CpuTensor, code: Code) -> Result<Rc<Quantized>, String> {
        Ok(Rc::new(code.quantize(&a.values)))
    }

    fn dequantize(
        &self,
        blocks: &Rc<Quantized>,
        code: Code,
        dims: Dims,
    ) -> Result<CpuTensor, String> {
        CpuTensor::new(code.dequantize(blocks), dims)
    }

    fn log(&self, level: u32, message: &str) {
        eprintln!("plugin log, level {level}: {message}");
    }
}
