//! The host's side of the boundary: everything that a plugin hands over is checked here, once for all backends.
//!
//! A backend implements [`Tensors`] in safe code over tensors that are padded with ones to rank 4. [`Session`] adds
//! handles, shapes, states and the operation table, and is what one optimizer step runs in.

pub mod blocks;
mod memory;
mod ops;
mod report;
mod session;
mod shape;
mod states;
mod table;

pub use blocks::Code;
pub use memory::text_from_plugin;
pub use ops::{Binary, Reduce, Scalar, Tensors, Unary};
pub use report::Report;
pub use session::{HostParam, Session, StepInput};
pub use shape::{Dims, Shape};
pub use states::{StateValue, States};

use crate::Status;

/// Why the host refused or failed an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What the plugin is told.
    pub status: Status,
    /// What the user is told.
    pub message: String,
}

impl Fault {
    /// A fault with a message.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
}

/// The message of a caught panic.
pub fn panic_message(payload: &(dyn std::any::Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
