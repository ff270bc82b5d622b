//! LoRA files that are kept: those of runs, those that were uploaded, and those that the tools have made of others.

mod origin;
mod service;

/// What requests to the tools are made of.
pub mod tools {
    pub use crate::diffusion::Family;
    pub use crate::lora_tools::inspect::{Inspection, Norms};
    pub use crate::lora_tools::merge::{MAX_FILES, MAX_STRENGTH};
    pub use crate::lora_tools::resize::{Resizing, Rule, RuleName};
    pub use crate::lora_tools::{Convention, Conversion, Method};
    pub use crate::networks::SavePrecision;
}

pub use crate::lora_tools::Checked;
pub use origin::{Origin, OriginKind, Source};
pub use service::{LoraService, MAX_UPLOAD_BYTES, MergeRequest, Work};

use uuid::Uuid;

use crate::lora_tools::ToolError;
use crate::store::{StoreError, is_storage_full};

/// Why a file was not made.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// There is no such file.
    #[error("there is no LoRA {0}")]
    NotFound(Uuid),
    /// All places for work on files are taken.
    #[error("other LoRA files are being worked on")]
    Busy,
    /// The file is none that can be worked on, or not in this way. Names files as the client knows them.
    #[error("{0}")]
    Unusable(String),
    /// A wish that makes no sense.
    #[error("{field}: {message}")]
    Option {
        /// The field of the request.
        field: &'static str,
        /// What was found and expected.
        message: String,
    },
    /// There is no room for the result.
    #[error("there is no room for the file in the data folder")]
    StorageFull,
    /// A failure of ours.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A failure of ours.
    #[error("{0}")]
    Failed(String),
}

impl From<ToolError> for LoraError {
    fn from(error: ToolError) -> Self {
        match error {
            ToolError::Option { field, message } => Self::Option { field, message },
            ToolError::Io { source, .. } if is_storage_full(&source) => Self::StorageFull,
            ToolError::Io { .. } => Self::Failed(error.to_string()),
            error => Self::Unusable(error.to_string()),
        }
    }
}
