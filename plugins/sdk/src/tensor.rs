//! A tensor handle with operators. It is freed on the host when it is dropped, and cannot outlive its step.
#![expect(unsafe_code, reason = "calls the host's operation table")]

use std::ops::{Add, Div, Mul, Neg, Sub};

use lorasmith_abi::{ALL_AXES, Handle, LsHost, MAX_RANK, OK, Status};

use crate::{Error, Result};

/// A float32 tensor on the run's device.
///
/// Operations do not return errors: a failed one yields a dead tensor and makes the whole step fail, and whatever
/// ends a chain (an assignment, a read) returns the error. Operations are queued; only [`Tensor::read_scalar`] and
/// [`Tensor::read`] wait for the device.
#[derive(Debug)]
pub struct Tensor<'h> {
    host: &'h LsHost,
    handle: Handle,
    /// The parameters' own handles are not released.
    owned: bool,
}

impl Drop for Tensor<'_> {
    fn drop(&mut self) {
        if self.owned && self.handle != 0 {
            // SAFETY: the table outlives `'h`. A failure needs no handling: the step's end frees everything.
            let _ = unsafe { (self.host.release)(self.host.ctx, self.handle) };
        }
    }
}

impl<'h> Tensor<'h> {
    pub(crate) fn borrowed(host: &'h LsHost, handle: Handle) -> Self {
        Self {
            host,
            handle,
            owned: false,
        }
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle
    }

    /// The tensor that `call` writes the handle of; a dead one if it fails.
    pub(crate) fn made(host: &'h LsHost, call: impl FnOnce(*mut Handle) -> Status) -> Self {
        let mut handle = 0;
        if call(&raw mut handle) != OK {
            handle = 0;
        }
        Self {
            host,
            handle,
            owned: true,
        }
    }

    /// `|a|`
    #[must_use]
    pub fn abs(&self) -> Self {
        self.unary(self.host.abs)
    }

    /// -1, 0 or 1; 0 at 0.
    #[must_use]
    pub fn sign(&self) -> Self {
        self.unary(self.host.sign)
    }

    /// Square root.
    #[must_use]
    pub fn sqrt(&self) -> Self {
        self.unary(self.host.sqrt)
    }

    /// `1 / sqrt(a)`
    #[must_use]
    pub fn rsqrt(&self) -> Self {
        self.unary(self.host.rsqrt)
    }

    /// `a * a`
    #[must_use]
    pub fn square(&self) -> Self {
        self.unary(self.host.square)
    }

    /// `e^a`
    #[must_use]
    pub fn exp(&self) -> Self {
        self.unary(self.host.exp)
    }

    /// Natural logarithm.
    #[must_use]
    pub fn log(&self) -> Self {
        self.unary(self.host.log)
    }

    /// `a^exponent`
    #[must_use]
    pub fn powf(&self, exponent: f64) -> Self {
        self.scalar(self.host.pow_scalar, exponent)
    }

    /// `a^b`, element by element.
    #[must_use]
    pub fn pow(&self, exponent: &Self) -> Self {
        self.binary(self.host.pow, exponent)
    }

    /// The smaller of two, element by element.
    #[must_use]
    pub fn min(&self, other: &Self) -> Self {
        self.binary(self.host.min, other)
    }

    /// The larger of two, element by element.
    #[must_use]
    pub fn max(&self, other: &Self) -> Self {
        self.binary(self.host.max, other)
    }

    /// 1 where it is greater than `other`, else 0.
    #[must_use]
    pub fn greater(&self, other: &Self) -> Self {
        self.binary(self.host.greater, other)
    }

    /// 1 where it is greater than `number`, else 0.
    #[must_use]
    pub fn greater_than(&self, number: f64) -> Self {
        self.scalar(self.host.greater_scalar, number)
    }

    /// `min(max(a, low), high)`
    #[must_use]
    pub fn clamp(&self, low: f64, high: f64) -> Self {
        Self::made(self.host, |out| {
            // SAFETY: the table outlives `'h` and `out` is a local's address.
            unsafe { (self.host.clamp)(self.host.ctx, self.handle, low, high, out) }
        })
    }

    /// `yes` where this is not 0, else `no`.
    #[must_use]
    pub fn select(&self, yes: &Self, no: &Self) -> Self {
        Self::made(self.host, |out| {
            // SAFETY: the table outlives `'h` and `out` is a local's address.
            unsafe { (self.host.where_)(self.host.ctx, self.handle, yes.handle, no.handle, out) }
        })
    }

    /// `a + t (end - a)`, as `torch.lerp`.
    #[must_use]
    pub fn lerp(&self, end: &Self, t: f64) -> Self {
        Self::made(self.host, |out| {
            // SAFETY: the table outlives `'h` and `out` is a local's address.
            unsafe { (self.host.lerp)(self.host.ctx, self.handle, end.handle, t, out) }
        })
    }

    /// Matrix product over the last two axes.
    #[must_use]
    pub fn matmul(&self, other: &Self) -> Self {
        self.binary(self.host.matmul, other)
    }

    /// Exchanges two axes; negative ones count from the end.
    #[must_use]
    pub fn transpose(&self, axis0: i32, axis1: i32) -> Self {
        Self::made(self.host, |out| {
            // SAFETY: the table outlives `'h` and `out` is a local's address.
            unsafe { (self.host.transpose)(self.host.ctx, self.handle, axis0, axis1, out) }
        })
    }

    /// The same elements in row-major order under another shape.
    #[must_use]
    pub fn reshape(&self, shape: &[u64]) -> Self {
        Self::made(self.host, |out| {
            // SAFETY: the table outlives `'h`, `out` is a local's address, the shape has as many entries as it says.
            unsafe {
                (self.host.reshape)(
                    self.host.ctx,
                    self.handle,
                    shape.as_ptr(),
                    shape.len() as u32,
                    out,
                )
            }
        })
    }

    /// Sum over one axis, which stays with length 1.
    #[must_use]
    pub fn sum_axis(&self, axis: i32) -> Self {
        self.reduce(self.host.sum, axis)
    }

    /// Mean over one axis, which stays with length 1.
    #[must_use]
    pub fn mean_axis(&self, axis: i32) -> Self {
        self.reduce(self.host.mean, axis)
    }

    /// Largest element over one axis, which stays with length 1.
    #[must_use]
    pub fn max_axis(&self, axis: i32) -> Self {
        self.reduce(self.host.max_axis, axis)
    }

    /// Sum of all elements, rank 0.
    #[must_use]
    pub fn sum(&self) -> Self {
        self.sum_axis(ALL_AXES)
    }

    /// Mean of all elements, rank 0.
    #[must_use]
    pub fn mean(&self) -> Self {
        self.mean_axis(ALL_AXES)
    }

    /// Largest element, rank 0.
    #[must_use]
    pub fn max_all(&self) -> Self {
        self.max_axis(ALL_AXES)
    }

    /// Sum of the products with a tensor of the same shape, rank 0.
    #[must_use]
    pub fn dot(&self, other: &Self) -> Self {
        self.binary(self.host.dot, other)
    }

    /// Euclidean norm of all elements, rank 0.
    #[must_use]
    pub fn norm(&self) -> Self {
        self.unary(self.host.norm)
    }

    /// The dimensions.
    ///
    /// # Errors
    /// A dead tensor.
    pub fn shape(&self) -> Result<Vec<u64>> {
        let (mut dims, mut rank) = ([0_u64; MAX_RANK], 0_u32);
        // SAFETY: the table outlives `'h`; there is room for four dimensions.
        check(unsafe {
            (self.host.shape)(self.host.ctx, self.handle, dims.as_mut_ptr(), &raw mut rank)
        })?;
        Ok(dims[..(rank as usize).min(MAX_RANK)].to_vec())
    }

    /// Waits for the device and reads the only element.
    ///
    /// # Errors
    /// A dead tensor, or one with several elements.
    pub fn read_scalar(&self) -> Result<f64> {
        let mut value = 0.0;
        // SAFETY: the table outlives `'h` and the result goes to a local.
        check(unsafe { (self.host.read_scalar)(self.host.ctx, self.handle, &raw mut value) })?;
        Ok(value)
    }

    /// Waits for the device and copies all elements. Slow.
    ///
    /// # Errors
    /// A dead tensor, or the device.
    pub fn read(&self) -> Result<Vec<f32>> {
        let elements = self.shape()?.iter().product::<u64>();
        let mut values = vec![0.0; elements as usize];
        // SAFETY: the table outlives `'h`; there is room for `elements` floats.
        check(unsafe {
            (self.host.read)(self.host.ctx, self.handle, values.as_mut_ptr(), elements)
        })?;
        Ok(values)
    }

    fn unary(&self, op: lorasmith_abi::UnaryFn) -> Self {
        // SAFETY: the table outlives `'h` and `out` is a local's address.
        Self::made(self.host, |out| unsafe {
            op(self.host.ctx, self.handle, out)
        })
    }

    fn binary(&self, op: lorasmith_abi::BinaryFn, other: &Self) -> Self {
        // SAFETY: the table outlives `'h` and `out` is a local's address.
        Self::made(self.host, |out| unsafe {
            op(self.host.ctx, self.handle, other.handle, out)
        })
    }

    fn scalar(&self, op: lorasmith_abi::ScalarFn, number: f64) -> Self {
        // SAFETY: the table outlives `'h` and `out` is a local's address.
        Self::made(self.host, |out| unsafe {
            op(self.host.ctx, self.handle, number, out)
        })
    }

    fn reduce(&self, op: lorasmith_abi::ReduceFn, axis: i32) -> Self {
        // SAFETY: the table outlives `'h` and `out` is a local's address.
        Self::made(self.host, |out| unsafe {
            op(self.host.ctx, self.handle, axis, out)
        })
    }
}

/// A status as a result.
pub(crate) fn check(status: Status) -> Result<()> {
    match status {
        OK => Ok(()),
        status => Err(Error::Host(status)),
    }
}

impl<'h> Neg for &Tensor<'h> {
    type Output = Tensor<'h>;

    fn neg(self) -> Tensor<'h> {
        self.unary(self.host.neg)
    }
}

impl<'h> Neg for Tensor<'h> {
    type Output = Self;

    fn neg(self) -> Self {
        -&self
    }
}

/// An operator between tensors, references and numbers, in all combinations.
macro_rules! operator {
    ($Trait:ident, $method:ident, $op:ident, $scalar:ident, $reverse:ident) => {
        operator!(@tensors $Trait, $method, $op, Tensor<'h>, Tensor<'h>);
        operator!(@tensors $Trait, $method, $op, Tensor<'h>, &Tensor<'h>);
        operator!(@tensors $Trait, $method, $op, &Tensor<'h>, Tensor<'h>);
        operator!(@tensors $Trait, $method, $op, &Tensor<'h>, &Tensor<'h>);
        operator!(@numbers $Trait, $method, $scalar, $reverse, Tensor<'h>, f32);
        operator!(@numbers $Trait, $method, $scalar, $reverse, Tensor<'h>, f64);
        operator!(@numbers $Trait, $method, $scalar, $reverse, &Tensor<'h>, f32);
        operator!(@numbers $Trait, $method, $scalar, $reverse, &Tensor<'h>, f64);
    };
    (@tensors $Trait:ident, $method:ident, $op:ident, $Left:ty, $Right:ty) => {
        impl<'h> $Trait<$Right> for $Left {
            type Output = Tensor<'h>;

            fn $method(self, other: $Right) -> Tensor<'h> {
                self.binary(self.host.$op, &other)
            }
        }
    };
    (@numbers $Trait:ident, $method:ident, $scalar:ident, $reverse:ident, $Tensor:ty, $Number:ty) => {
        impl<'h> $Trait<$Number> for $Tensor {
            type Output = Tensor<'h>;

            fn $method(self, number: $Number) -> Tensor<'h> {
                self.scalar(self.host.$scalar, f64::from(number))
            }
        }

        impl<'h> $Trait<$Tensor> for $Number {
            type Output = Tensor<'h>;

            fn $method(self, tensor: $Tensor) -> Tensor<'h> {
                tensor.scalar(tensor.host.$reverse, f64::from(self))
            }
        }
    };
}

operator!(Add, add, add, add_scalar, add_scalar);
operator!(Sub, sub, sub, sub_scalar, rsub_scalar);
operator!(Mul, mul, mul, mul_scalar, mul_scalar);
operator!(Div, div, div, div_scalar, rdiv_scalar);
