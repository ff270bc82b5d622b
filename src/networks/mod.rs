//! Adapters of all kinds: which layers get one, how it changes their output, and the files that it lives in.

pub mod adapters;
pub mod beginning;
mod blocks;
mod filter;
mod form;
pub mod format;
#[cfg(test)]
mod golden_tests;
mod initial;
pub mod lora;
pub mod metadata;
mod reading;
pub mod settings;
pub mod targets;

use std::path::PathBuf;

pub use adapters::Place;
pub use filter::pattern;
pub use form::Form;
pub use format::{HostTensor, LoraFile, SavedLora};
pub use lora::{Leaves, LoraNetwork, Parameter, shape_of as layer_shape};
pub use settings::{InitFrom, NetworkKind, NetworkSettings, Preset, SavePrecision, TrainParts};
pub use targets::{LayerShape, Naming, Rules, Target, planned_targets};

/// What can go wrong with adapters and their files.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A setting is out of range.
    #[error("network.{field} {message}")]
    Settings {
        /// Name of the setting, with `/` between the names of objects.
        field: String,
        /// What was found and expected.
        message: String,
    },
    /// The model has no layer that the settings cover.
    #[error("no layer of the model gets an adapter")]
    NoTargets,
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is larger than any sensible LoRA.
    #[error("{}: {size_bytes} bytes, expected at most {max_bytes}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// A file is not a LoRA in safetensors format.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was found.
        message: String,
    },
    /// A file has an adapter for a layer that the model lacks.
    #[error("{key}: the model has no layer of this name")]
    UnknownModule {
        /// The key.
        key: String,
    },
    /// A file's adapters are not those of the settings.
    #[error("the LoRA to begin with {message}")]
    OtherAdapters {
        /// The first difference.
        message: String,
    },
    /// A file has a tensor that is no part of an adapter, or not of one of this kind.
    #[error(
        "{key}: no tensor of a LoRA, LoHa, LoKr or IA³ adapter, or of another kind than the rest of this one"
    )]
    UnknownKey {
        /// The key.
        key: String,
    },
    /// Half of an adapter is missing.
    #[error("{key} is missing")]
    Incomplete {
        /// The key.
        key: String,
    },
    /// A tensor does not fit its layer.
    #[error("{key}: shape {found:?}, expected {expected}")]
    Shape {
        /// The key.
        key: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// The shape that the layer needs.
        expected: String,
    },
    /// The device did not hand over a tensor.
    #[error("reading from the device: {0}")]
    Device(String),
}
