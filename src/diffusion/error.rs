//! What can go wrong while a model is read. Every message names the file and the key or field.

use std::io;
use std::path::{Path, PathBuf};

use super::pickle::PickleError;

/// A model that cannot be read, or that this program does not know.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// The path is neither a diffusers folder nor a single file.
    #[error("{path} is not a Stable Diffusion model: {reason}")]
    NotAModel { path: PathBuf, reason: String },
    /// A model of a kind that is recognised, but not handled.
    #[error("{path}: found {found}; {expected}")]
    Unsupported {
        path: PathBuf,
        found: String,
        expected: String,
    },
    /// The header of a safetensors file is broken or exceeds a limit.
    #[error("{path}: invalid safetensors file: {reason}")]
    Header { path: PathBuf, reason: String },
    /// A checkpoint of torch is broken, exceeds a limit, or wants something done.
    #[error("{path}: not a readable torch checkpoint: {source}")]
    Checkpoint { path: PathBuf, source: PickleError },
    /// Two files of one component hold the same tensor.
    #[error("tensor `{key}` is stored twice, in {first} and in {second}")]
    DuplicateKey {
        key: String,
        first: PathBuf,
        second: PathBuf,
    },
    /// A tensor that the architecture needs is not there.
    #[error("{path}: tensor `{key}` is missing")]
    MissingKey { path: PathBuf, key: String },
    /// A tensor has another shape than the architecture needs.
    #[error("{path}: tensor `{key}` has shape {found:?}, expected {expected:?}")]
    Shape {
        path: PathBuf,
        key: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    /// A tensor is stored in a number format that is not a float.
    #[error(
        "{path}: tensor `{key}` is stored as {found}, expected a float of 8, 16, 32 or 64 bits"
    )]
    Dtype {
        path: PathBuf,
        key: String,
        found: String,
    },
    /// A configuration file is not what it should be.
    #[error("{path}: {reason}")]
    Config { path: PathBuf, reason: String },
    /// The tokenizer's vocabulary is not a CLIP vocabulary.
    #[error("{path}: invalid tokenizer: {reason}")]
    Tokenizer { path: PathBuf, reason: String },
}

impl LoadError {
    /// An I/O error with the file it happened on.
    pub fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    /// A configuration file with a wrong value; name the field in `reason`.
    pub fn config(path: &Path, reason: impl Into<String>) -> Self {
        Self::Config {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
