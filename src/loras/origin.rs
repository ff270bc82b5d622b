//! Where a LoRA file comes from that no run has made; a row keeps it as JSON.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Where a file comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    pub kind: OriginKind,
    /// What it was made of.
    #[serde(default)]
    pub sources: Vec<Source>,
}

/// Ways in which a file comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OriginKind {
    Uploaded,
    Merged,
    Resized,
    Converted,
}

/// A file that another was made of, as it was then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    pub lora_id: Uuid,
    pub file_name: String,
    pub sha256: String,
    /// How much of it was taken.
    pub strength: Option<f64>,
}
