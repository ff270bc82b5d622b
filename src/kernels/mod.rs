//! The operations that diffusion models spend their time and memory in, each with a backward of its own.
//!
//! Everywhere: frozen weights have no gradient, are widened where they are used and are never copied as a whole;
//! nothing is kept for the backward that can be had from the input. On the CPU the operations are ours ([`cpu`]), on
//! other devices they are made of burn's.

pub mod attention;
pub mod conv;
mod cpu;
pub mod gate;
pub mod hadamard;
pub mod linear;
pub mod norm;
mod operation;
mod precision;
mod seed;
pub mod together;

pub use attention::attention;
pub use conv::{Geometry, conv2d, order_by_taps};
pub(crate) use cpu::vectorised;
#[cfg(target_arch = "x86_64")]
pub(crate) use cpu::{has_avx2, has_avx512};
pub use cpu::{instruction_set, is_cpu};
pub use gate::{geglu, gelu, quick_gelu};
pub use hadamard::Hadamard;
pub use linear::{LowRank, linear, linear_with_branch};
pub use norm::{group_norm, layer_norm};
pub use operation::Value;
pub use precision::{Precision, narrow, widen};
pub use seed::seed;
