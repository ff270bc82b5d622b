//! What can go wrong with the tools. Every message names the file and the key, what was found and what was expected.

use std::path::{Path, PathBuf};

use crate::diffusion::LoadError;

/// A file that cannot be worked on, or a wish that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The file is no safetensors file, or lacks something.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is larger than what is worked on.
    #[error("{}: found {size_bytes} bytes, expected at most {max_bytes}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// A tensor is not what its name says.
    #[error("{}: `{key}`: found {found}, expected {expected}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its key, or the adapter's name.
        key: String,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// The file, or a part of it, is of a kind that this tool cannot work on.
    #[error("{}: {message}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What was found and what is expected.
        message: String,
    },
    /// A wish that makes no sense.
    #[error("{field}: {message}")]
    Option {
        /// What it is called.
        field: &'static str,
        /// What was found and what is expected.
        message: String,
    },
}

impl ToolError {
    pub(super) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn tensor(
        path: &Path,
        key: &str,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Tensor {
            path: path.to_owned(),
            key: key.to_owned(),
            found: found.into(),
            expected: expected.into(),
        }
    }

    pub(super) fn kind(path: &Path, message: impl Into<String>) -> Self {
        Self::Kind {
            path: path.to_owned(),
            message: message.into(),
        }
    }

    pub(super) fn option(field: &'static str, message: impl Into<String>) -> Self {
        Self::Option {
            field,
            message: message.into(),
        }
    }
}
