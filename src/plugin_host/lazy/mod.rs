//! The operation table's tensors as expressions: what a plugin composes is remembered, and computed when the step is
//! over, all parameters and states at once.
//!
//! On the CPU that is a single pass over memory, in parallel ([`cpu`]); on other devices parameters whose expressions
//! are alike are computed as one long tensor ([`device`]). Products of matrices, reductions along an axis and what is read
//! are computed at once, with burn; reductions to one number wait for each other ([`reduced`]).

mod cpu;
mod device;
mod fused;
mod numbers;
mod probe;
mod program;
mod reduced;
mod settle;
mod stepwise;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Tensor};
use lorasmith_abi::host::{Binary, Code, Dims, Reduce, Scalar, Tensors, Unary};

use super::blocks::BurnBlocks;
use super::tensors::{BurnTensor, BurnTensors};
use numbers::Numbers;
pub use probe::{Probed, probe};
use program::{Job, Made, Root, compile};
use reduced::Batch;
pub use settle::settle;

/// No expression is deeper: what is below is computed first. Bounds the recursion over it.
const MAX_DEPTH: u32 = 64;

/// A tensor that need not be computed yet. Cloning shares it.
#[derive(Clone)]
pub struct LazyTensor(Arc<Node>);

struct Node {
    dims: Dims,
    depth: u32,
    expression: Expression,
    value: OnceLock<BurnTensor>,
}

/// Where a tensor's elements are in a long one that holds those of other parameters, too.
#[derive(Clone)]
struct Part {
    whole: Arc<Tensor<1>>,
    first: usize,
}

enum Expression {
    /// The value is there.
    Leaf,
    /// So is this one, but it has not been taken out of the long tensor.
    Part(Part),
    /// One number everywhere.
    Full(f32),
    Unary(Unary, LazyTensor),
    Scalar(Scalar, LazyTensor, f32),
    Binary(Binary, LazyTensor, LazyTensor),
    Clamp(LazyTensor, f32, f32),
    Select(LazyTensor, LazyTensor, LazyTensor),
    /// Values of codes.
    Decoded(BurnBlocks, Code),
    /// One number of all elements, and what waits with it.
    Reduced(Reduce, LazyTensor, Batch),
}

impl LazyTensor {
    /// A tensor whose elements are there.
    pub fn leaf(tensor: BurnTensor) -> Self {
        let dims = tensor.dims();
        Self(Arc::new(Node {
            dims,
            depth: 0,
            expression: Expression::Leaf,
            value: OnceLock::from(tensor),
        }))
    }

    fn part(whole: &Arc<Tensor<1>>, first: usize, dims: Dims) -> Self {
        let whole = Arc::clone(whole);
        Self::new(dims, 0, Expression::Part(Part { whole, first }))
    }

    fn new(dims: Dims, depth: u32, expression: Expression) -> Self {
        Self(Arc::new(Node {
            dims,
            depth,
            expression,
            value: OnceLock::new(),
        }))
    }

    fn dims(&self) -> Dims {
        self.0.dims
    }

    fn elements(&self) -> usize {
        self.0.dims.iter().product()
    }

    /// Whether nothing is left to compute and nothing else is kept alive.
    fn is_leaf(&self) -> bool {
        matches!(self.0.expression, Expression::Leaf | Expression::Part(_))
    }

    /// Addresses tell expressions apart while they live.
    fn address(&self) -> usize {
        Arc::as_ptr(&self.0) as usize
    }
}

/// What a program works on, or has made.
#[expect(clippy::large_enum_variant, reason = "there are few at a time")]
enum Data {
    Values(BurnTensor),
    Codes(BurnBlocks),
}

/// A tensor in 8 bits per element that need not be computed yet. Cloning shares it.
#[derive(Clone)]
pub struct LazyBlocks(Arc<BlocksNode>);

struct BlocksNode {
    /// What is to be rounded; `None` when the value was there from the start.
    source: Option<LazyTensor>,
    code: Code,
    value: OnceLock<BurnBlocks>,
}

impl LazyBlocks {
    /// Codes that are there.
    pub fn ready(blocks: BurnBlocks, code: Code) -> Self {
        Self(Arc::new(BlocksNode {
            source: None,
            code,
            value: OnceLock::from(blocks),
        }))
    }
}

/// Operations on one device.
pub struct LazyTensors {
    eager: BurnTensors,
    reductions: Batch,
    numbers: Numbers,
}

impl LazyTensors {
    /// Tensors are on this device.
    pub fn new(device: &Device) -> Self {
        Self::over(&BurnTensors::new(device))
    }

    fn over(eager: &BurnTensors) -> Self {
        Self {
            eager: eager.clone(),
            reductions: Batch::default(),
            numbers: Numbers::default(),
        }
    }

    /// The elements, computed now if they were not.
    pub fn value(&self, a: &LazyTensor) -> Result<BurnTensor, String> {
        if let Some(value) = a.0.value.get() {
            return Ok(value.clone());
        }
        let value = match &a.0.expression {
            Expression::Part(Part { whole, first }) => {
                let own = Tensor::clone(whole).narrow(0, *first, a.elements());
                own.reshape(a.dims())
            }
            Expression::Reduced(..) => reduced::reduce(self, a)?,
            _ => {
                let mut made = self.compute(&[vec![Root::Values(a.clone())]])?;
                let made = made.pop().and_then(|mut made| made.pop());
                let value = made.and_then(Made::values);
                self.value(&value.ok_or("nothing was computed")?)?
            }
        };
        Ok(a.0.value.get_or_init(|| value).clone())
    }

    /// The codes, computed now if they were not.
    pub fn codes(&self, blocks: &LazyBlocks) -> Result<BurnBlocks, String> {
        if let Some(value) = blocks.0.value.get() {
            return Ok(value.clone());
        }
        let source = blocks.0.source.clone().ok_or("codes of nothing")?;
        let mut made = self.compute(&[vec![Root::Codes(source, blocks.0.code)]])?;
        let made = made.pop().and_then(|mut made| made.pop());
        let value = made.and_then(Made::codes);
        let value = value.ok_or("nothing was computed")?;
        Ok(blocks.0.value.get_or_init(|| value).clone())
    }

    /// Computes bundles of roots; those of a bundle have one shape.
    fn compute(&self, bundles: &[Vec<Root>]) -> Result<Vec<Vec<Made>>, String> {
        let jobs: Result<Vec<Job>, String> =
            bundles.iter().map(|roots| compile(self, roots)).collect();
        if self.eager.is_cpu() {
            cpu::run(&jobs?)
        } else {
            device::run(&self.eager, &jobs?)
        }
    }

    /// Takes the codes of an earlier run to the device.
    pub fn write_blocks(
        &self,
        quantized: lorasmith_abi::host::blocks::Quantized,
        code: Code,
    ) -> LazyBlocks {
        LazyBlocks::ready(self.eager.write_blocks(quantized), code)
    }

    /// A node over `inputs`, which are computed first where it would become too deep.
    fn node<const N: usize>(
        &self,
        dims: Dims,
        inputs: [&LazyTensor; N],
        expression: impl FnOnce([LazyTensor; N]) -> Expression,
    ) -> Result<LazyTensor, String> {
        let deepest = inputs.iter().map(|input| input.0.depth).max().unwrap_or(0);
        if deepest < MAX_DEPTH {
            let inputs = inputs.map(LazyTensor::clone);
            return Ok(self.numbers.known(dims, deepest + 1, expression(inputs)));
        }
        let mut leaves = Vec::with_capacity(N);
        for input in inputs {
            leaves.push(LazyTensor::leaf(self.value(input)?));
        }
        let leaves = leaves
            .try_into()
            .map_err(|_| "as many leaves as inputs".to_owned())?;
        Ok(LazyTensor::new(dims, 1, expression(leaves)))
    }
}

/// Numbers of a plugin are rounded to float32.
fn rounded(number: f64) -> f32 {
    number as f32
}

impl Tensors for LazyTensors {
    type Tensor = LazyTensor;
    type Blocks = LazyBlocks;

    fn unary(&self, op: Unary, a: &LazyTensor) -> Result<LazyTensor, String> {
        self.node(a.dims(), [a], |[a]| Expression::Unary(op, a))
    }

    fn binary(
        &self,
        op: Binary,
        a: &LazyTensor,
        b: &LazyTensor,
        out: Dims,
    ) -> Result<LazyTensor, String> {
        self.node(out, [a, b], |[a, b]| Expression::Binary(op, a, b))
    }

    fn scalar(&self, op: Scalar, a: &LazyTensor, s: f64) -> Result<LazyTensor, String> {
        self.node(a.dims(), [a], |[a]| Expression::Scalar(op, a, rounded(s)))
    }

    fn clamp(&self, a: &LazyTensor, low: f64, high: f64) -> Result<LazyTensor, String> {
        self.node(a.dims(), [a], |[a]| {
            Expression::Clamp(a, rounded(low), rounded(high))
        })
    }

    fn select(
        &self,
        condition: &LazyTensor,
        a: &LazyTensor,
        b: &LazyTensor,
        out: Dims,
    ) -> Result<LazyTensor, String> {
        self.node(out, [condition, a, b], |[condition, a, b]| {
            Expression::Select(condition, a, b)
        })
    }

    fn matmul(&self, a: &LazyTensor, b: &LazyTensor, out: Dims) -> Result<LazyTensor, String> {
        let (a, b) = (self.value(a)?, self.value(b)?);
        self.eager.matmul(&a, &b, out).map(LazyTensor::leaf)
    }

    fn swap_axes(&self, a: &LazyTensor, axis0: usize, axis1: usize) -> Result<LazyTensor, String> {
        let a = self.value(a)?;
        self.eager.swap_axes(&a, axis0, axis1).map(LazyTensor::leaf)
    }

    fn reshape(&self, a: &LazyTensor, dims: Dims) -> Result<LazyTensor, String> {
        let a = self.value(a)?;
        self.eager.reshape(&a, dims).map(LazyTensor::leaf)
    }

    fn reduce(
        &self,
        op: Reduce,
        a: &LazyTensor,
        axis: Option<usize>,
    ) -> Result<LazyTensor, String> {
        if axis.is_none() && !self.eager.is_cpu() {
            let batch = self.reductions.clone();
            let node = self.node([1; 4], [a], |[a]| Expression::Reduced(op, a, batch))?;
            self.reductions.add(&node);
            return Ok(node);
        }
        let a = self.value(a)?;
        self.eager.reduce(op, &a, axis).map(LazyTensor::leaf)
    }

    fn full(&self, dims: Dims, value: f64) -> Result<LazyTensor, String> {
        Ok(self
            .numbers
            .known(dims, 0, Expression::Full(rounded(value))))
    }

    fn read(&self, a: &LazyTensor) -> Result<Vec<f32>, String> {
        self.eager.read(&self.value(a)?)
    }

    fn write(&self, data: Vec<f32>, dims: Dims) -> Result<LazyTensor, String> {
        self.eager.write(data, dims).map(LazyTensor::leaf)
    }

    fn quantize(&self, a: &LazyTensor, code: Code) -> Result<LazyBlocks, String> {
        Ok(LazyBlocks(Arc::new(BlocksNode {
            source: Some(a.clone()),
            code,
            value: OnceLock::new(),
        })))
    }

    fn dequantize(
        &self,
        blocks: &LazyBlocks,
        code: Code,
        dims: Dims,
    ) -> Result<LazyTensor, String> {
        let blocks = self.codes(blocks)?;
        Ok(LazyTensor::new(dims, 0, Expression::Decoded(blocks, code)))
    }

    fn log(&self, level: u32, message: &str) {
        super::library::log(level, message);
    }
}
