//! The CPU's side: matrix products and elementwise passes for the instruction set that is found at run time.
#![expect(
    unsafe_code,
    reason = "SIMD intrinsics, and results that threads write in disjoint parts"
)]

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod conv;
#[macro_use]
pub mod elementwise;
pub mod gemm;
mod instructions;
mod pack;
#[cfg(target_arch = "x86_64")]
mod parts;
mod patches;
mod rows;
mod tile;
mod unit;
mod view;
mod winograd;

pub(crate) use elementwise::vectorised;
use instructions::Level;
pub use pack::Strides;
pub use rows::rows;
pub use view::{View, is_cpu, tensor};

/// A pointer to memory that tasks write disjoint parts of.
#[derive(Debug)]
pub struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: whoever writes through it says why nobody else writes there.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    fn at(self, place: usize) -> *mut T {
        self.0.wrapping_add(place)
    }
}

/// The instruction set that matrix products on the CPU are computed with: `amx`, `avx512`, `avx2` or `portable`.
pub fn instruction_set() -> &'static str {
    Level::best().name()
}

/// Whether the AVX-512 parts that the kernels use are there.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512() -> bool {
    Level::best() >= Level::Avx512
}

/// Whether 256-bit vectors and fused multiply-add are there.
#[cfg(target_arch = "x86_64")]
pub fn has_avx2() -> bool {
    Level::best() >= Level::Avx2
}
