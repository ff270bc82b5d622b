//! What a tensor backend implements, in safe code and without any checks of its own.

use super::{Code, Dims};

/// An operation on one tensor, element by element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unary {
    /// `-a`
    Neg,
    /// `|a|`
    Abs,
    /// -1, 0 or 1
    Sign,
    /// Square root.
    Sqrt,
    /// `1 / sqrt(a)`
    Rsqrt,
    /// `a * a`
    Square,
    /// `e^a`
    Exp,
    /// Natural logarithm.
    Log,
}

impl Unary {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; 8] = [
        Self::Neg,
        Self::Abs,
        Self::Sign,
        Self::Sqrt,
        Self::Rsqrt,
        Self::Square,
        Self::Exp,
        Self::Log,
    ];
}

/// An operation on two tensors, element by element with broadcasting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Binary {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`
    Div,
    /// `a^b`
    Pow,
    /// The smaller one.
    Min,
    /// The larger one.
    Max,
    /// 1 where `a > b`, else 0.
    Greater,
}

impl Binary {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; 8] = [
        Self::Add,
        Self::Sub,
        Self::Mul,
        Self::Div,
        Self::Pow,
        Self::Min,
        Self::Max,
        Self::Greater,
    ];
}

/// An operation on a tensor and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// `a + s`
    Add,
    /// `a - s`
    Sub,
    /// `s - a`
    ReverseSub,
    /// `a * s`
    Mul,
    /// `a / s`
    Div,
    /// `s / a`
    ReverseDiv,
    /// `a^s`
    Pow,
    /// 1 where `a > s`, else 0.
    Greater,
}

impl Scalar {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; 8] = [
        Self::Add,
        Self::Sub,
        Self::ReverseSub,
        Self::Mul,
        Self::Div,
        Self::ReverseDiv,
        Self::Pow,
        Self::Greater,
    ];
}

/// A reduction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reduce {
    /// Sum.
    Sum,
    /// Arithmetic mean.
    Mean,
    /// Largest element.
    Max,
}

impl Reduce {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; 3] = [Self::Sum, Self::Mean, Self::Max];
}

/// Float32 tensors of rank 4 on some device.
///
/// [`super::Session`] has checked every argument: dimensions broadcast, axes exist, sizes are bounded. An error is
/// the device's. A panic inside is caught and becomes an error too.
pub trait Tensors {
    /// A tensor; cloning shares the data.
    type Tensor: Clone;
    /// The elements of a tensor in 8 bits each; cloning shares the data.
    type Blocks: Clone;

    /// One tensor, element by element.
    fn unary(&self, op: Unary, a: &Self::Tensor) -> Result<Self::Tensor, String>;
    /// Two tensors that broadcast to `out`.
    fn binary(
        &self,
        op: Binary,
        a: &Self::Tensor,
        b: &Self::Tensor,
        out: Dims,
    ) -> Result<Self::Tensor, String>;
    /// A tensor and a number.
    fn scalar(&self, op: Scalar, a: &Self::Tensor, s: f64) -> Result<Self::Tensor, String>;
    /// `min(max(a, low), high)`
    fn clamp(&self, a: &Self::Tensor, low: f64, high: f64) -> Result<Self::Tensor, String>;
    /// `a` where `condition` is not 0, else `b`; the three broadcast to `out`.
    fn select(
        &self,
        condition: &Self::Tensor,
        a: &Self::Tensor,
        b: &Self::Tensor,
        out: Dims,
    ) -> Result<Self::Tensor, String>;
    /// Matrix product over the last two axes; `out` is the shape of the result.
    fn matmul(&self, a: &Self::Tensor, b: &Self::Tensor, out: Dims)
    -> Result<Self::Tensor, String>;
    /// Exchanges two axes.
    fn swap_axes(
        &self,
        a: &Self::Tensor,
        axis0: usize,
        axis1: usize,
    ) -> Result<Self::Tensor, String>;
    /// The same number of elements under another shape.
    fn reshape(&self, a: &Self::Tensor, dims: Dims) -> Result<Self::Tensor, String>;
    /// Over one axis, or all; reduced axes stay with length 1.
    fn reduce(
        &self,
        op: Reduce,
        a: &Self::Tensor,
        axis: Option<usize>,
    ) -> Result<Self::Tensor, String>;
    /// One value everywhere.
    fn full(&self, dims: Dims, value: f64) -> Result<Self::Tensor, String>;
    /// Waits for the device and copies the elements to the host.
    fn read(&self, a: &Self::Tensor) -> Result<Vec<f32>, String>;
    /// A tensor of these elements, whose number is the product of `dims`.
    fn write(&self, data: Vec<f32>, dims: Dims) -> Result<Self::Tensor, String>;
    /// Rounds each element to a code of its block: see [`super::blocks`].
    fn quantize(&self, a: &Self::Tensor, code: Code) -> Result<Self::Blocks, String>;
    /// The values of the codes, under the shape that was quantised.
    fn dequantize(
        &self,
        blocks: &Self::Blocks,
        code: Code,
        dims: Dims,
    ) -> Result<Self::Tensor, String>;
    /// A line for the service's log; `level` is one of the `LOG_*` constants.
    fn log(&self, level: u32, message: &str);
}
