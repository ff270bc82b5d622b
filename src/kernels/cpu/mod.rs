//! The CPU's side: matrix products and elementwise passes for the instruction set that is found at run time.
#![expect(
    unsafe_code,
    reason = "SIMD intrinsics, and results that threads write in disjoint parts"
)]

pub mod attention;
pub mod conv;
pub mod elementwise;
pub mod gemm;
mod pack;
mod patches;
mod tile;
mod view;

pub use pack::Strides;
pub use view::{View, is_cpu, tensor};

/// The instruction set that matrix products on the CPU are computed with: `avx512`, `avx2` or `portable`.
pub fn instruction_set() -> &'static str {
    tile::Tile::best().isa
}

/// Whether the AVX-512 parts that the kernels use are there.
#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512dq")
}
