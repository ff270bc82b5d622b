//! Settings of a run about how it is judged, and their way to the domain: held-out images, early stopping, what to do
//! with numbers that are not finite, the average of the adapters.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::twins::same_variants;
use crate::runs::RolledBack as RolledBackRow;
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

/// What a run does when its loss, its gradients or its adapters are no longer finite numbers. What f16 overflows in is
/// no such case: `precision: fp16` leaves those steps out.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnNonFinite {
    /// It fails with `loss_not_finite` and says what to change.
    Fail,
    /// It goes back to its last resume point and on with half the learning rates, once; then it fails. The default, as
    /// nobody watches a run at night, and one that has gone back says so: event `rolled_back`, field `rolled_back`,
    /// `verdict`, and the LoRA's metadata. Where it goes back to depends on when it was last kept: give
    /// `resume.every_n_steps` where two runs are to be the same even then.
    #[default]
    HalveLr,
}

/// That a run's numbers were no longer finite, and where it went on.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "at_step": 312, "to_step": 280, "lr_factor": 0.5, "cause": "the loss was NaN and the gradient norm NaN"
}))]
pub struct RolledBack {
    /// The optimizer step in which they were found.
    pub at_step: u64,
    /// The step it went back to, and on from.
    pub to_step: u64,
    /// What its learning rates have been multiplied by since.
    pub lr_factor: f64,
    /// What was not finite.
    pub cause: String,
}

impl From<RolledBackRow> for RolledBack {
    fn from(row: RolledBackRow) -> Self {
        Self {
            lr_factor: row.lr_factor(),
            at_step: row.at_step,
            to_step: row.to_step,
            cause: row.cause,
        }
    }
}

same_variants!(OnNonFinite, domain::OnNonFinite: Fail, HalveLr);

/// An exponential moving average of the adapters: less noisy than the last step. Validation, previews and LoRA files are
/// of the average (`lorasmith_weights` in a file's metadata says `ema`); the training itself goes on without it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(example = json!({"decay": 0.999, "warm_up": true}))]
pub struct Ema {
    /// The share of the average that stays in each step: about `1 / (1 - decay)` steps count.
    #[schema(exclusive_minimum = 0, exclusive_maximum = 1)]
    pub decay: f64,
    /// Whether the decay rises to that, as `(1 + steps) / (10 + steps)`, so that short runs are averaged too.
    pub warm_up: bool,
}

impl Default for Ema {
    fn default() -> Self {
        domain::EmaSettings::default().into()
    }
}

impl From<Ema> for domain::EmaSettings {
    fn from(wire: Ema) -> Self {
        let Ema { decay, warm_up } = wire;
        Self { decay, warm_up }
    }
}

impl From<domain::EmaSettings> for Ema {
    fn from(domain: domain::EmaSettings) -> Self {
        let domain::EmaSettings { decay, warm_up } = domain;
        Self { decay, warm_up }
    }
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
