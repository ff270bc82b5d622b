//! Training of a LoRA: the loop written out, and the parts that it is made of.

#[cfg(test)]
mod cache_tests;
pub mod data;
pub mod ema;
#[cfg(test)]
mod ema_tests;
#[cfg(test)]
mod goldens;
pub mod guard;
#[cfg(test)]
mod guard_tests;
pub mod judge;
pub mod loss;
pub mod loss_scale;
pub mod memory;
#[cfg(test)]
mod network_tests;
pub mod noise;
pub mod objective;
#[cfg(test)]
mod objective_tests;
pub mod optimizer;
mod position;
#[cfg(test)]
mod precision_tests;
pub mod previews;
pub mod progress;
pub mod random;
pub mod record;
pub mod resume;
pub mod settings;
pub mod step;
pub mod text;
pub mod timesteps;
pub mod train;
#[cfg(test)]
mod train_tests;
pub mod validation;
pub mod variation;

pub use data::TrainingSet;
pub use loss::{HuberSchedule, LossKind, LossSettings};
pub use memory::Workload;
pub use noise::NoiseSettings;
pub use optimizer::{
    LrScheduler, Optimizer, OptimizerError, ParamUpdate, ParamValue, StateDtype, StateTensor,
};
pub use progress::{Control, Phase, ProgressSink, Report, StepReport, Wishes};
pub use resume::{ResumeError, ResumeFolder};
pub use settings::{
    ComputePrecision, EarlyStopping, EmaSettings, GradientCheckpointing, OnNonFinite, PluginChoice,
    ResumeSettings, SamplePrompt, SampleSettings, SaveSettings, SettingProblem, TrainLength,
    TrainSettings, ValidationSettings,
};
pub use step::{Conditioning, MicroBatch, StepOutput, StepTimes, Trainer};
pub use timesteps::TimestepSettings;
pub use train::{Length, RunPlace, TrainOutcome, planned_steps, train};

use crate::dataloader::DataError;
use crate::diffusion::LoadError;
use crate::networks::NetworkError;

/// Why a training ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A setting is out of range.
    #[error(transparent)]
    Settings(#[from] SettingProblem),
    /// A part of the base model cannot be loaded.
    #[error(transparent)]
    Model(#[from] LoadError),
    /// An image cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The adapters or their files cannot be used.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The optimizer or the schedule gave up.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    /// There is no image to train on.
    #[error("the training set is empty")]
    NoImages,
    /// A held-out image is not in the dataset.
    #[error("validation.image_ids: the dataset has no image {id}")]
    UnknownImage {
        /// The id that was asked for.
        id: String,
    },
    /// An image's latents are not finite.
    #[error("image {id}: the VAE's latents are not finite")]
    LatentsNotFinite {
        /// The image.
        id: String,
    },
    /// The loss, the gradients or the adapters are not finite.
    #[error("{0}")]
    NotFinite(Box<guard::NonFinite>),
    /// A resume point cannot be written, read or used.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// No parameter has a gradient.
    #[error("no adapter receives a gradient")]
    NothingToTrain,
    /// The device did not hand over a result.
    #[error("reading from the device: {0}")]
    Device(String),
    /// A file that was saved is not what loaders of the base model expect.
    #[error("the saved file has failed its self-check and is not offered: {0}")]
    SelfCheck(String),
    /// The base model's files cannot be read for their hashes.
    #[error("{path}: {source}")]
    BaseModel {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The surroundings asked for it.
    #[error("stopped after {step} steps")]
    Stopped {
        /// Optimizer steps done.
        step: u64,
    },
}

impl From<guard::NonFinite> for TrainError {
    fn from(found: guard::NonFinite) -> Self {
        Self::NotFinite(Box::new(found))
    }
}
