//! Training runs: what may be asked for, the queue, the process of each run, and its end.

mod attempt;
mod beginning;
pub mod captioning;
mod crash;
mod folders;
mod grid;
mod grid_drawing;
mod liveness;
pub mod memory;
mod origin;
mod pace;
mod pinned;
mod plan;
mod provenance;
mod queue;
mod repeat;
mod reporter;
mod reproduction;
mod room;
pub mod service;
pub mod spec;
pub mod state;
pub mod supervisor;
pub mod tensorboard;
pub mod worker;

pub use crate::store::runs::Room;
pub use crate::training::guard::RolledBack;
pub use captioning::{BlipChoice, CaptioningRequest, CaptioningSpec, Sampling};
pub use crash::STORAGE_FULL;
pub use folders::sweep_folders;
pub use grid::{GridRequest, GridSpec};
pub use origin::Difference;
pub use pace::Pace;
pub use pinned::{ComparedWith, DatasetDiff, PinnedDataset};
pub use plan::{PlannedBucket, PlannedMemory, PlannedSubset, RunPlan};
pub use queue::{Place, room};
pub use reproduction::{Mismatch, Reproduction};
pub use service::{Extension, NewRunRequest, RunError, RunProblem, RunService};
pub use spec::{RunSpec, SnapshotDataset, SnapshotImage, SnapshotSubset};
pub use supervisor::{Supervisor, WorkerCommand};
pub use worker::{CacheFolder, WorkerEnd, WorkerParts, work};

/// The settings of a run as the domain has them, for those who speak to this module.
pub mod settings {
    pub use crate::dataloader::{
        Augment, BucketSettings, CaptionSettings, ColorCorrection, CropMode,
    };
    pub use crate::diffusion::PredictionType;
    pub use crate::diffusion::samplers::SamplerKind;
    pub use crate::networks::settings::{BlockSettings, DropoutSettings, LoraPlus};
    pub use crate::networks::{InitFrom, NetworkKind, NetworkSettings, Preset, SavePrecision};
    pub use crate::training::{
        ComputePrecision, EarlyStopping, EmaSettings, GradientCheckpointing, HuberSchedule,
        LossKind, LossSettings, NoiseSettings, OnNonFinite, PluginChoice, ResumeSettings,
        SamplePrompt, SampleSettings, SaveSettings, TimestepSettings, TrainLength, TrainSettings,
        ValidationSettings,
    };
}
