//! A run as clients see it: state, progress, place in the queue, end.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::problem::Problem;
use super::run_judging::RolledBack;
use super::run_provenance::Reproduction;
use super::run_settings::CreateRun;
use super::twins::same_variants;
use crate::runs::{self, Place, RunSpec};
use crate::store::runs as rows;

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Waits for a worker.
    Queued,
    /// Loads the model and encodes pictures.
    Preparing,
    /// Trains.
    Running,
    /// Writes the LoRA, measures and draws with it.
    Saving,
    /// Leaves the device after the current step, as it was asked to.
    Pausing,
    /// Rests without a device until it is resumed.
    Paused,
    /// Ends after the current step, as it was asked to.
    Cancelling,
    /// Has lost its worker; is queued again by itself, and goes on where it was last kept.
    Interrupted,
    /// Done; `lora_id` has the result.
    Succeeded,
    /// Ended with `error`.
    Failed,
    /// Ended as it was asked to.
    Cancelled,
}

same_variants!(
    RunState, rows::RunState:
    Queued, Preparing, Running, Saving, Pausing, Paused, Cancelling, Interrupted, Succeeded, Failed, Cancelled
);

/// A training run.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11", "name": "lumo", "state": "running",
    "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11", "base_model_id": "6d2a1f8b0c9e4a57",
    "device": "vulkan:0 (AMD Radeon RX 7900 XTX)", "attempt": 1, "phase": "training",
    "progress": {"step": 120, "total_steps": 400, "epoch": 3, "total_epochs": 10, "loss_average": 0.1043,
                 "steps_per_s": 1.9, "eta_s": 147.4, "memory_bytes": 4123456789u64},
    "queue_position": null, "expected_start_at": null,
    "verdict": "validation loss fell from 0.124 to 0.0980 ± 0.00310 and was still falling at step 100, which is the best",
    "early_stop": null, "rolled_back": null, "continued_from": null, "api_key_id": "019a9c1d-2b10-7c30-a4b2-3d1f2f6f0a11", "error": null, "lora_id": null, "created_at": "2026-11-25T06:42:00Z", "started_at": "2026-11-25T06:42:01Z",
    "finished_at": null,
    "settings": {
        "name": "lumo", "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11", "base_model": "6d2a1f8b0c9e4a57",
        "network": {"kind": "lora", "rank": 32, "alpha": 16.0}, "unet_lr": 1e-4, "text_encoder_lr": 5e-5,
        "max_train_epochs": 10, "batch_size": 2, "resolution": {"width_px": 512, "height_px": 512}
    }
}))]
pub struct Run {
    pub id: Uuid,
    pub name: String,
    pub state: RunState,
    pub dataset_id: Uuid,
    pub base_model_id: String,
    /// The device it is trained on, once a worker has opened it.
    pub device: Option<String>,
    /// How many workers have begun it: one more after each crash and each pause.
    pub attempt: u32,
    /// What the worker does: `checking_device`, `loading`, `caching_latents`, `caching_text`, `training`, `validating`,
    /// `sampling`, `saving`.
    pub phase: Option<String>,
    pub progress: RunProgress,
    /// Its place among the queued runs, from 1; `null` when it is not queued. A run for another device may begin before.
    pub queue_position: Option<u64>,
    /// When a worker may take it, by what earlier runs have told of their speed, to 10 seconds; `null` when it is not
    /// queued, or when one before it has no known end.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expected_start_at: Option<OffsetDateTime>,
    /// What it waits for while it is `interrupted`.
    pub waiting_for: Option<RunWait>,
    /// The step at which it would go on after a crash or a pause; `null` before the first such point.
    pub resumable_step: Option<u64>,
    /// What its validations say, in words; `null` without any.
    pub verdict: Option<String>,
    /// Why `early_stopping` ends it before its last step.
    pub early_stop: Option<String>,
    /// That its numbers were no longer finite, and where it went on; `null` when they always were.
    pub rolled_back: Option<RolledBack>,
    /// The run that this one makes longer.
    pub continued_from: Option<Uuid>,
    /// The API key that has made it; `null` for the one of the settings, and where nobody needs a key.
    pub api_key_id: Option<Uuid>,
    /// Whether its result is that of the run that it repeats; `null` when it repeats none.
    pub reproduction: Option<Reproduction>,
    /// Why it failed.
    pub error: Option<RunFailure>,
    /// The result; see `/v1/loras/{lora_id}`.
    pub lora_id: Option<Uuid>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
    /// What was asked for, every default filled in; sent to `POST /v1/runs` it starts the same run again.
    pub settings: CreateRun,
}

/// How far a run has come.
#[derive(Serialize, ToSchema)]
pub struct RunProgress {
    /// Optimizer steps done.
    pub step: u64,
    pub total_steps: Option<u64>,
    /// From 1; 0 before the first.
    pub epoch: u64,
    pub total_epochs: Option<u64>,
    /// Mean loss of the last epoch.
    pub loss_average: Option<f64>,
    pub steps_per_s: Option<f64>,
    /// Expected time to the end of training, in seconds.
    pub eta_s: Option<f64>,
    /// Memory of the worker's process.
    pub memory_bytes: Option<u64>,
}

/// What an interrupted run waits for; it goes on by itself.
#[derive(Serialize, ToSchema)]
pub struct RunWait {
    /// A stable word: `storage_full`, there is no room left in the data folder.
    pub code: String,
    pub message: String,
    /// How much room there has to be.
    pub needed_bytes: u64,
}

/// Why a run failed.
#[derive(Serialize, ToSchema)]
pub struct RunFailure {
    /// A stable word: `loss_not_finite` (the loss, the gradients or the adapters were no longer finite; the message says
    /// at which step, and what to change), `model_unusable`, `device_unusable`, `device_failed_self_check`,
    /// `plugin_failed`, `image_unusable`, `memory_budget` (the run would not fit into memory; the message says what to
    /// change), `memory_limit` (it has outgrown it), `worker_lost` (its workers die without coming further),
    /// `resume_refused` (what it was kept for has changed), `inputs_changed` (what it repeats was made with another base
    /// model or plugin), `lora_failed_self_check` (a saved file is not what its base model expects, and is not offered) and
    /// others.
    pub code: String,
    pub message: String,
}

impl Run {
    pub(super) fn of(run: rows::Run, lora_id: Option<Uuid>) -> Result<Self, Problem> {
        let spec: RunSpec = serde_json::from_str(&run.spec).map_err(Problem::internal)?;
        let rolled_back: Option<runs::RolledBack> = run
            .rolled_back
            .as_deref()
            .map(serde_json::from_str)
            .transpose()
            .map_err(Problem::internal)?;
        Ok(Self {
            reproduction: Reproduction::of(&run)?,
            progress: RunProgress::of(&run),
            settings: CreateRun::of(&run, spec),
            id: run.id,
            name: run.name,
            state: run.state.into(),
            dataset_id: run.dataset_id,
            base_model_id: run.base_model_id,
            device: run.device,
            attempt: run.attempt,
            phase: run.phase,
            queue_position: None,
            expected_start_at: None,
            waiting_for: run.wait.map(Into::into),
            resumable_step: run.kept_step,
            verdict: run.verdict,
            early_stop: run.early_stop,
            rolled_back: rolled_back.map(Into::into),
            continued_from: run.continued_from,
            api_key_id: run.api_key_id,
            error: run.error_code.map(|code| RunFailure {
                code,
                message: run.error_message.unwrap_or_default(),
            }),
            lora_id,
            created_at: run.created_at,
            started_at: run.started_at,
            finished_at: run.finished_at,
        })
    }

    /// The run with its place in the queue.
    pub(super) fn placed(mut self, places: &HashMap<Uuid, Place>) -> Self {
        // It may have been taken between the two queries.
        if self.state == RunState::Queued
            && let Some(place) = places.get(&self.id)
        {
            self.queue_position = Some(place.position);
            self.expected_start_at = place.expected_start_at;
        }
        self
    }
}

impl RunProgress {
    fn of(run: &rows::Run) -> Self {
        Self {
            step: run.step,
            total_steps: run.total_steps,
            epoch: run.epoch,
            total_epochs: run.total_epochs,
            loss_average: run.loss_average,
            steps_per_s: run.steps_per_s,
            eta_s: run.eta_s,
            memory_bytes: run.memory_bytes,
        }
    }
}

impl From<rows::Wait> for RunWait {
    fn from(wait: rows::Wait) -> Self {
        Self {
            code: wait.code,
            message: wait.message,
            needed_bytes: wait.needed_bytes,
        }
    }
}
