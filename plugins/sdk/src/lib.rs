//! Writes lorasmith plugins in safe Rust: optimizers and learning-rate schedules.
//!
//! A type deserialises from the settings, describes them as a JSON Schema and implements [`Optimizer`],
//! [`ElementwiseOptimizer`] or [`Schedule`]; [`export_plugin!`] makes a shared library's entry symbol of it.
//!
//! ```
//! use lorasmith_sdk::{ElementwiseOptimizer, Param, Result, schemars, serde};
//!
//! /// Settings of the optimizer.
//! #[derive(serde::Deserialize, schemars::JsonSchema)]
//! #[serde(crate = "lorasmith_sdk::serde", default, deny_unknown_fields)]
//! #[schemars(crate = "lorasmith_sdk::schemars")]
//! struct Momentum {
//!     /// Share of the former update that is kept.
//!     #[schemars(range(min = 0.0, max = 1.0))]
//!     momentum: f64,
//! }
//!
//! impl Default for Momentum {
//!     fn default() -> Self {
//!         Self { momentum: 0.9 }
//!     }
//! }
//!
//! impl ElementwiseOptimizer for Momentum {
//!     const ID: &'static str = "momentum";
//!     const SUMMARY: &'static str = "Gradient descent with momentum.";
//!
//!     fn update(&self, p: &Param<'_>) -> Result<()> {
//!         let buffer = p.state("momentum_buffer") * self.momentum + p.grad();
//!         p.set_value(&(p.value() - &buffer * p.lr()))?;
//!         p.set_state("momentum_buffer", &buffer)
//!     }
//! }
//!
//! lorasmith_sdk::export_plugin! { id: "momentum", optimizers: [Momentum], schedules: [] }
//! ```

#[doc(hidden)]
pub mod export;
mod optimizer;
mod schedule;
mod settings;
mod tensor;
pub mod testing;

pub use lorasmith_abi as abi;
pub use schemars;
pub use serde;

pub use optimizer::{ElementwiseOptimizer, Optimizer, Param, Step};
pub use schedule::{Run, Schedule};
pub use settings::{Beta, Epsilon};
pub use tensor::Tensor;

/// Why a callback gave up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The host refused an operation; it has the message.
    Host(abi::Status),
    /// The plugin's own reason, for the user.
    Message(String),
}

impl Error {
    /// An error with a message for the user.
    pub fn new(message: impl Into<String>) -> Self {
        Self::Message(message.into())
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host(status) => write!(f, "the host answered status {status}"),
            Self::Message(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

/// The result of a callback.
pub type Result<T> = std::result::Result<T, Error>;
