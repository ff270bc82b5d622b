//! What a run is to do: checked once, when it is made; kept as JSON; read by its worker.

use serde::{Deserialize, Serialize};

use time::OffsetDateTime;

use crate::dataloader::{BucketSettings, ColorCorrection};
use crate::training::TrainSettings;

/// The folder of a run's resume points, below its own.
pub const RESUME: &str = "resume";

/// Everything that was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// Device: `auto`, `cpu`, `vulkan:0`.
    pub device: String,
    /// Id of the base model.
    pub base_model_id: String,
    /// How it is trained.
    pub settings: TrainSettings,
    /// Sizes of the pictures.
    pub buckets: BucketSettings,
    /// When it was asked for; the LoRA files tell it.
    #[serde(with = "time::serde::timestamp", default = "epoch")]
    pub recorded_at: OffsetDateTime,
}

fn epoch() -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH
}

/// One image of the dataset as it was when the run was made: later edits do not change a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotImage {
    /// Its id.
    pub id: String,
    /// Digest of its file.
    pub sha256: String,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// What the text encoder is told of it.
    pub caption: String,
    /// Name of its subset.
    pub subset: String,
    /// How often it appears in an epoch.
    pub repeats: u32,
    /// Whether it shows the class in general.
    pub regularization: bool,
    /// What it is laid on where it is transparent: `#rrggbb`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<String>,
    /// What is done to its colours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color_correction: Option<ColorCorrection>,
}
