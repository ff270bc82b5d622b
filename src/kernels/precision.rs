//! The numbers that products are computed in.

use burn::tensor::{DType, FloatDType, Tensor};

use super::cpu::is_cpu;

/// What frozen layers and attention multiply in. Sums, norms, softmax statistics, adapters' weights and the optimizer
/// are f32 in all of them.
///
/// On the CPU values stay f32 in memory and are rounded as they are packed for the multiplying unit: to one bf16
/// (`Bf16`) or, for `Fp16`, to two (16 significant bits and the range of f32, so that no loss scaling is needed).
/// Where there is no such unit, products are in f32. On other devices values between layers are of the half-precision
/// type themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 24 significant bits.
    #[default]
    Fp32,
    /// 11 significant bits, up to 65 504.
    Fp16,
    /// 8 significant bits, the range of f32.
    Bf16,
}

impl Precision {
    /// The type of values between layers on devices other than the CPU.
    pub fn dtype(self) -> FloatDType {
        match self {
            Self::Fp32 => FloatDType::F32,
            Self::Fp16 => FloatDType::F16,
            Self::Bf16 => FloatDType::BF16,
        }
    }

    /// A value as layers take it.
    pub fn enter<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        let wanted = self.dtype();
        if self == Self::Fp32 || x.dtype() == DType::from(wanted) || is_cpu(&x.device()) {
            x
        } else {
            x.cast(wanted)
        }
    }
}

/// The value in f32.
pub fn widen<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.dtype() == DType::F32 {
        x
    } else {
        x.cast(FloatDType::F32)
    }
}

/// The value in the type of another.
pub fn narrow<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if dtype == DType::F32 {
        x
    } else {
        x.cast(FloatDType::from(dtype))
    }
}
