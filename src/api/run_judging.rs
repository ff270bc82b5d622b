//! Settings of a run about how it is judged, and their way to the domain: held-out images, early stopping.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::runs::settings as domain;

/// Loss on images that are not trained on, at fixed noise and timesteps: before the first step, after the last and at
/// each saved LoRA, and as often as `every_n_steps` says.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Validation {
    /// Images of the dataset to hold out; no validation without, unless `fraction` is given.
    pub image_ids: Vec<Uuid>,
    /// Instead of `image_ids`: this share of the images, regularization aside, chosen by the run's `seed`.
    #[schema(exclusive_minimum = 0, maximum = 0.9)]
    pub fraction: Option<f64>,
    /// Also every so many optimizer steps.
    #[schema(minimum = 1)]
    pub every_n_steps: Option<u64>,
}

/// Ends the run when its validation loss no longer falls: it succeeds, with the LoRA of that moment as its result.
/// Validations before the first step, by `every_n_steps` and at files that `save` asks for count.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"patience": 5, "min_delta": 0.001}))]
pub struct EarlyStopping {
    /// So many validations in a row without an improvement.
    #[schema(minimum = 1, maximum = 1000000)]
    pub patience: u64,
    /// An improvement lowers the best loss by more than this.
    #[serde(default)]
    #[schema(minimum = 0)]
    pub min_delta: f64,
}

impl From<Validation> for domain::ValidationSettings {
    fn from(wire: Validation) -> Self {
        Self {
            image_ids: wire.image_ids.iter().map(ToString::to_string).collect(),
            fraction: wire.fraction,
            every_n_steps: wire.every_n_steps,
        }
    }
}

impl From<domain::ValidationSettings> for Validation {
    fn from(domain: domain::ValidationSettings) -> Self {
        Self {
            image_ids: domain
                .image_ids
                .iter()
                .filter_map(|id| id.parse().ok())
                .collect(),
            fraction: domain.fraction,
            every_n_steps: domain.every_n_steps,
        }
    }
}

impl From<EarlyStopping> for domain::EarlyStopping {
    fn from(wire: EarlyStopping) -> Self {
        Self {
            patience: wire.patience,
            min_delta: wire.min_delta,
        }
    }
}

impl From<domain::EarlyStopping> for EarlyStopping {
    fn from(domain: domain::EarlyStopping) -> Self {
        Self {
            patience: domain.patience,
            min_delta: domain.min_delta,
        }
    }
}
