//! `/v1/runs:plan`: what a run would do and take, without starting it.

use actix_web::post;
use actix_web::web::{self, Data};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::Json;
use super::framing::query_string;
use super::problem::{Problem, ProblemBody};
use super::run_resource::RunFailure;
use super::run_settings::CreateRun;
use crate::runs as domain;
use crate::runs::{NewRunRequest, RunService};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(plan_run);
}

/// What a run would do: `images_per_epoch` / `batch_size`, rounded up in each bucket, are `batches_per_epoch`; those /
/// `gradient_accumulation_steps`, rounded up, are `steps_per_epoch`; and those × `epochs` are `total_steps`, unless the
/// length was given in steps.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "device": "cpu", "images": 20, "images_per_epoch": 200, "batch_size": 2, "batches_per_epoch": 101,
    "gradient_accumulation_steps": 1, "steps_per_epoch": 101, "epochs": 10, "total_steps": 1010,
    "subsets": [{"name": "10_lumo", "regularization": false, "images": 20, "repeats": 10, "images_per_epoch": 200}],
    "formula": "10_lumo: 20 × 10 = 200; together 200 images an epoch; / batch size 2, rounded up in each bucket, = 101 batches = 101 steps an epoch; 10 epochs: 1010 steps",
    "buckets": [
        {"width_px": 448, "height_px": 576, "images": 1, "images_per_epoch": 9, "batches_per_epoch": 5},
        {"width_px": 512, "height_px": 512, "images": 19, "images_per_epoch": 191, "batches_per_epoch": 96}
    ],
    "memory": {
        "estimated_peak_bytes": 5213456789u64, "available_bytes": 12345678901u64,
        "optimizer_state_bytes": 150994944, "ema_bytes": 0,
        "savings": [{"change": "`gradient_checkpointing: blocks`", "estimated_peak_bytes": 2913456789u64,
                     "saved_bytes": 2300000000u64}]
    },
    "refusal": null,
    "report_url": "/v1/datasets/019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11/report?width_px=512&height_px=512&buckets=true&min_px=256&max_px=1024&step_px=64&no_upscale=false&crop=centre&batch_size=2&max_token_length=75",
    "duration": {"expected_s": 4545.0, "step_time_s": 4.5, "run_id": "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11"}
}))]
pub struct RunPlan {
    /// The id of the device that it would run on now.
    pub device: String,
    /// Images that it would train on.
    pub images: u64,
    /// Images × repeats; regularization images are as many as the others.
    pub images_per_epoch: u64,
    pub batch_size: u64,
    pub batches_per_epoch: u64,
    pub gradient_accumulation_steps: u64,
    pub steps_per_epoch: u64,
    /// The last one is cut off where `max_train_steps` ends.
    pub epochs: u64,
    /// Optimizer steps.
    pub total_steps: u64,
    /// What an epoch shows of each subset; held-out images are left out.
    pub subsets: Vec<PlannedSubset>,
    /// How the steps come about, in numbers: images × repeats / batch size × epochs.
    pub formula: String,
    pub buckets: Vec<PlannedBucket>,
    /// Of the machine on the CPU, else of the device; `null` when the model cannot be measured.
    pub memory: Option<PlannedMemory>,
    /// Why a worker would refuse the run now, such as `memory_budget`; `null` when nothing is known against it.
    pub refusal: Option<RunFailure>,
    /// The report on the dataset with these settings: what speaks against training on it as it is.
    pub report_url: String,
    /// `null` as long as no run of the same base model, device and resolution has told its step time.
    pub duration: Option<PlannedDuration>,
}

/// What an epoch shows of a subset.
#[derive(Serialize, ToSchema)]
pub struct PlannedSubset {
    pub name: String,
    /// Regularization images are balanced as sd-scripts does: as many an epoch as there are others, those that are left
    /// over are not used, missing ones are shown again.
    pub regularization: bool,
    pub images: u64,
    pub repeats: u32,
    /// Images × repeats; of regularization, what is left or repeated for the balance.
    pub images_per_epoch: u64,
}

/// A size of pictures, and what has it.
#[derive(Serialize, ToSchema)]
pub struct PlannedBucket {
    pub width_px: u32,
    pub height_px: u32,
    /// Images of this size.
    pub images: u64,
    /// Images × repeats.
    pub images_per_epoch: u64,
    pub batches_per_epoch: u64,
}

/// What the run takes of the memory that its tensors are in.
#[derive(Serialize, ToSchema)]
pub struct PlannedMemory {
    pub estimated_peak_bytes: u64,
    /// Free now; `null` where the system, or the GPU's driver, does not tell.
    pub available_bytes: Option<u64>,
    /// What the optimizer keeps from step to step; part of the peak.
    pub optimizer_state_bytes: u64,
    /// What the moving average of the adapters takes; part of the peak.
    pub ema_bytes: u64,
    /// What would take less.
    pub savings: Vec<MemorySaving>,
}

/// A change of the settings that takes less memory.
#[derive(Serialize, ToSchema)]
pub struct MemorySaving {
    /// What to change.
    pub change: String,
    /// The estimate after it.
    pub estimated_peak_bytes: u64,
    pub saved_bytes: u64,
}

/// How long the training would take, besides loading, encoding, previews and validation.
#[derive(Serialize, ToSchema)]
pub struct PlannedDuration {
    pub expected_s: f64,
    /// Expected time of an optimizer step.
    pub step_time_s: f64,
    /// The run that has told its time; one of the same batches where there is one, else scaled by the images of a step.
    pub run_id: Uuid,
}

/// Plan a run.
///
/// Takes what `POST /v1/runs` takes and starts nothing: how long the run would be, in which sizes, what memory it would
/// take and what would take less, how long it would last. A request that `POST /v1/runs` would refuse is refused here in
/// the same words; what only its worker would refuse is told as `refusal`.
#[utoipa::path(
    tag = "runs",
    request_body = CreateRun,
    responses(
        (status = 200, description = "What the run would do", body = RunPlan),
        (status = 404, description = "`dataset_not_found`, `model_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_settings`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs:plan")]
pub async fn plan_run(
    runs: Data<RunService>,
    body: Json<CreateRun>,
) -> Result<web::Json<RunPlan>, Problem> {
    let asked = NewRunRequest::try_from(body.into_inner())
        .map_err(|error| Problem::fields(Code::InvalidSettings, vec![error]))?;
    let batch_size = asked.settings.batch_size as u64;
    let accumulated = asked.settings.gradient_accumulation_steps as u64;
    let report_url = format!(
        "/v1/datasets/{}/report?{}&batch_size={batch_size}&max_token_length={}",
        asked.dataset_id,
        query_string(&asked.buckets),
        asked.settings.max_token_length,
    );
    let plan = runs.plan(asked).await?;
    let plan = RunPlan::of(plan, batch_size, accumulated, report_url);
    Ok(web::Json(plan))
}

impl RunPlan {
    fn of(
        plan: domain::RunPlan,
        batch_size: u64,
        gradient_accumulation_steps: u64,
        report_url: String,
    ) -> Self {
        Self {
            formula: plan.formula(batch_size, gradient_accumulation_steps),
            device: plan.device,
            images: plan.images,
            images_per_epoch: plan.images_per_epoch,
            batch_size,
            batches_per_epoch: plan.batches_per_epoch,
            gradient_accumulation_steps,
            steps_per_epoch: plan.steps_per_epoch,
            epochs: plan.epochs,
            total_steps: plan.total_steps,
            subsets: plan.subsets.into_iter().map(Into::into).collect(),
            buckets: plan.buckets.into_iter().map(Into::into).collect(),
            memory: plan.memory.map(Into::into),
            refusal: plan.refusal.map(|failure| RunFailure {
                code: failure.code,
                message: failure.message,
            }),
            report_url,
            duration: plan.pace.map(|pace| PlannedDuration {
                expected_s: pace.step_time_s * plan.total_steps as f64,
                step_time_s: pace.step_time_s,
                run_id: pace.run_id,
            }),
        }
    }
}

impl From<domain::PlannedSubset> for PlannedSubset {
    fn from(subset: domain::PlannedSubset) -> Self {
        Self {
            name: subset.name,
            regularization: subset.regularization,
            images: subset.images,
            repeats: subset.repeats,
            images_per_epoch: subset.images_per_epoch,
        }
    }
}

impl From<domain::PlannedBucket> for PlannedBucket {
    fn from(bucket: domain::PlannedBucket) -> Self {
        Self {
            width_px: bucket.width_px,
            height_px: bucket.height_px,
            images: bucket.images,
            images_per_epoch: bucket.images_per_epoch,
            batches_per_epoch: bucket.batches_per_epoch,
        }
    }
}

impl From<domain::PlannedMemory> for PlannedMemory {
    fn from(memory: domain::PlannedMemory) -> Self {
        let peak = memory.estimated_peak_bytes;
        let savings = memory.remedies.into_iter().map(|remedy| MemorySaving {
            change: remedy.change,
            estimated_peak_bytes: remedy.peak_bytes,
            saved_bytes: peak.saturating_sub(remedy.peak_bytes),
        });
        Self {
            estimated_peak_bytes: peak,
            available_bytes: memory.available_bytes,
            optimizer_state_bytes: memory.optimizer_state_bytes,
            ema_bytes: memory.ema_bytes,
            savings: savings.collect(),
        }
    }
}
