//! `/v1/runs`: made, listed, followed, ended. Settings are in `run_settings`, the event stream in `events`.

use std::collections::HashMap;

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, post, route};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::auth;
use super::codes::Code;
use super::download::{self, Download};
use super::extract::{Json, Query};
use super::idempotency::{self, Created};
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{FieldError, Problem, ProblemBody};
use super::run_judging::RolledBack;
use super::run_provenance::Reproduction;
use super::run_settings::CreateRun;
use super::tagged::tagged;
use crate::runs::{self, Mismatch, NewRunRequest, Place, RunError, RunService, RunSpec};
use crate::store::runs as rows;
use crate::store::{Store, StoreError};

/// The most steps that one answer has.
const MAX_METRICS: u64 = 10_000;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(create_run)
        .service(list_runs)
        .service(get_run)
        .service(cancel_run)
        .service(delete_run)
        .service(list_metrics)
        .service(list_samples)
        .service(get_sample_content);
}

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

macro_rules! states {
    ($($state:ident)+) => {
        impl From<rows::RunState> for RunState {
            fn from(state: rows::RunState) -> Self {
                match state { $(rows::RunState::$state => Self::$state),+ }
            }
        }
        impl From<RunState> for rows::RunState {
            fn from(state: RunState) -> Self {
                match state { $(RunState::$state => Self::$state),+ }
            }
        }
    };
}
states!(Queued Preparing Running Saving Pausing Paused Cancelling Interrupted Succeeded Failed Cancelled);

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
    /// model or plugin) and others.
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
            settings: CreateRun::of(&run, spec),
            id: run.id,
            name: run.name,
            state: run.state.into(),
            dataset_id: run.dataset_id,
            base_model_id: run.base_model_id,
            device: run.device,
            attempt: run.attempt,
            phase: run.phase,
            progress: RunProgress {
                step: run.step,
                total_steps: run.total_steps,
                epoch: run.epoch,
                total_epochs: run.total_epochs,
                loss_average: run.loss_average,
                steps_per_s: run.steps_per_s,
                eta_s: run.eta_s,
                memory_bytes: run.memory_bytes,
            },
            queue_position: None,
            expected_start_at: None,
            waiting_for: run.wait.map(|wait| RunWait {
                code: wait.code,
                message: wait.message,
                needed_bytes: wait.needed_bytes,
            }),
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

/// Queue a training run.
///
/// Everything that can be checked is checked now: settings, device, base model, plugins, held-out images. Then a
/// worker process trains it; follow the run at `/v1/runs/{run_id}/events`. With an `Idempotency-Key` the same request
/// can be sent again safely.
#[utoipa::path(
    tag = "runs",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt")),
    request_body = CreateRun,
    responses(
        (status = 201, description = "The run, queued", body = Run, headers(("Location" = String))),
        (status = 404, description = "`dataset_not_found`, `model_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_settings`, `invalid_body`, `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs")]
pub async fn create_run(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    body: Json<CreateRun>,
) -> Result<HttpResponse, Problem> {
    let payload = body.into_inner();
    let mut asked = NewRunRequest::try_from(payload.clone())
        .map_err(|error| Problem::fields(Code::InvalidSettings, vec![error]))?;
    asked.api_key_id = auth::key_of(&request);
    let make = async move {
        let run = runs.create(asked).await?;
        let location = format!("/v1/runs/{}", run.id);
        let run = Run::of(run, None)?.placed(&runs.places().await?);
        Created::new(location, &run)
    };
    idempotency::once(&store, &request, "POST /v1/runs", &payload, make).await
}

/// Filters of the list of runs.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct RunQuery {
    /// How many at most.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// Only runs in this state.
    #[param(inline)]
    state: Option<RunState>,
    /// Only runs on this dataset.
    dataset_id: Option<Uuid>,
}

/// List the runs.
///
/// In the order in which they were made.
#[utoipa::path(
    tag = "runs",
    params(RunQuery),
    responses(
        (status = 200, description = "A page of runs", body = Page<Run>),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs")]
pub async fn list_runs(
    runs: Data<RunService>,
    store: Data<Store>,
    query: Query<RunQuery>,
) -> Result<web::Json<Page<Run>>, Problem> {
    let RunQuery {
        limit,
        cursor,
        state,
        dataset_id,
    } = query.into_inner();
    let page = PageRequest::try_from(PageQuery { limit, cursor })?;
    let filter = rows::RunFilter {
        state: state.map(Into::into),
        dataset_id,
        base_model_id: None,
    };
    let found = runs.list(filter, page.after_id()?, page.rows()).await?;
    let ids: Vec<Uuid> = found.iter().map(|run| run.id).collect();
    let results = store.final_loras(&ids).await.map_err(RunError::from)?;
    let waits = found.iter().any(|run| run.state == rows::RunState::Queued);
    let places = if waits {
        runs.places().await?
    } else {
        HashMap::new()
    };
    let found: Vec<Run> = found
        .into_iter()
        .map(|run| {
            let lora = results.get(&run.id).copied();
            Ok(Run::of(run, lora)?.placed(&places))
        })
        .collect::<Result<_, Problem>>()?;
    Ok(web::Json(page.page(
        found,
        |run| run.id.to_string(),
        |run| run,
    )))
}

/// Read a run.
///
/// Its state, progress and settings; `lora_id` once it has succeeded. Give the `ETag` as `If-None-Match` when you ask
/// again: 304 says that nothing has changed. To hear of changes without asking there is `/v1/runs/{run_id}/events`.
#[utoipa::path(
    tag = "runs",
    params(
        ("run_id" = Uuid, Path),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what the client has"),
    ),
    responses(
        (status = 200, description = "The run", body = Run, headers(("ETag" = String))),
        (status = 304, description = "The client has it already", headers(("ETag" = String))),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}")]
pub async fn get_run(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let run = runs.get(id.into_inner()).await?;
    tagged(&request, &with_result(&runs, &store, run).await?.0)
}

/// The run with what other rows tell of it.
pub(super) async fn with_result(
    runs: &RunService,
    store: &Store,
    run: rows::Run,
) -> Result<web::Json<Run>, Problem> {
    if run.state == rows::RunState::Queued {
        return Ok(web::Json(Run::of(run, None)?.placed(&runs.places().await?)));
    }
    let lora = store.final_lora(run.id).await.map_err(RunError::from)?;
    Ok(web::Json(Run::of(run, lora.map(|lora| lora.id))?))
}

/// End a run early.
///
/// A waiting run ends at once, a training one after its current step. Asking again changes nothing. LoRA files that
/// were saved on the way stay.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The run, `cancelled` or `cancelling`", body = Run),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`illegal_transition`: it has succeeded or failed", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/cancel")]
pub async fn cancel_run(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<web::Json<Run>, Problem> {
    let run = runs.cancel(id.into_inner()).await?;
    with_result(&runs, &store, run).await
}

/// What goes with a run.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DeleteRunQuery {
    /// Also delete its LoRA files; without this a run that has some stays.
    #[serde(default)]
    #[param(default = false)]
    with_loras: bool,
}

/// Delete a run.
///
/// Only one that has ended, and that no other goes on from: its events, series, previews, log and resume points go.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), DeleteRunQuery),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`still_needed`: it has not ended, another goes on from it, or it has LoRA files", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/runs/{run_id}")]
pub async fn delete_run(
    runs: Data<RunService>,
    id: web::Path<Uuid>,
    query: Query<DeleteRunQuery>,
) -> Result<HttpResponse, Problem> {
    runs.delete(id.into_inner(), query.into_inner().with_loras)
        .await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Which steps of a series.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct MetricQuery {
    /// Only steps after this one.
    since: Option<u64>,
    /// Only steps that this number divides, and those with a validation loss.
    #[param(minimum = 1)]
    every: Option<u64>,
}

/// One optimizer step; step 0 is the measurement before the first.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "step": 120, "epoch": 3, "loss": 0.0981, "loss_average": 0.1043, "validation_loss": null, "validation_error": null, "lr_unet": 1e-4,
    "lr_text_encoder": 5e-5, "grad_norm": 0.41, "grad_norm_unet": 0.4, "grad_norm_text_encoder": 0.09, "step_time_s": 0.52,
    "images_per_s": 3.8, "eta_s": 145.6, "memory_bytes": 4123456789u64, "device_memory_bytes": 8123456789u64
}))]
pub struct MetricPoint {
    pub step: u64,
    pub epoch: u64,
    pub loss: Option<f64>,
    /// Mean loss of the last epoch.
    pub loss_average: Option<f64>,
    /// Loss on the held-out images.
    pub validation_loss: Option<f64>,
    /// Standard error of that loss: how far it would move with other pictures.
    pub validation_error: Option<f64>,
    pub lr_unet: Option<f64>,
    pub lr_text_encoder: Option<f64>,
    /// L2 norm of all gradients before clipping.
    pub grad_norm: Option<f64>,
    /// That of the UNet's adapters alone.
    pub grad_norm_unet: Option<f64>,
    /// That of the text encoder's adapters alone.
    pub grad_norm_text_encoder: Option<f64>,
    pub step_time_s: Option<f64>,
    /// Mean over the steps so far, without caching, previews and validation.
    pub images_per_s: Option<f64>,
    /// Expected time of the remaining steps.
    pub eta_s: Option<f64>,
    /// Memory of the worker's process.
    pub memory_bytes: Option<u64>,
    /// Memory of the device that is set aside for it; `null` on the CPU, and where the device does not tell.
    pub device_memory_bytes: Option<u64>,
}

/// A series by step.
#[derive(Serialize, ToSchema)]
pub struct MetricSeries {
    pub data: Vec<MetricPoint>,
    /// Give it as `?since=` to get the rest; `null` at the end of the series.
    pub next_since: Option<u64>,
}

/// Read the series of a run.
///
/// Loss, learning rates, gradient norms, time, speed and memory of each optimizer step, at most 10 000 in one answer. With
/// `Accept: text/csv` the same as a table.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), MetricQuery),
    responses(
        (status = 200, description = "The series", content(
            (MetricSeries = "application/json"),
            (String = "text/csv", example = json!("step,epoch,loss,loss_average,validation_loss,validation_error,lr_unet,lr_text_encoder,grad_norm,grad_norm_unet,grad_norm_text_encoder,step_time_s,images_per_s,eta_s,memory_bytes,device_memory_bytes\n120,3,0.0981,0.1043,,,0.0001,0.00005,0.41,0.4,0.09,0.52,3.8,145.6,4123456789,8123456789\n")),
        )),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/metrics")]
pub async fn list_metrics(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    query: Query<MetricQuery>,
) -> Result<HttpResponse, Problem> {
    let MetricQuery { since, every } = query.into_inner();
    if every == Some(0) {
        let message = "found 0, expected 1 or more";
        return Err(Problem::field(
            Code::InvalidQuery,
            "/every",
            "out_of_range",
            message,
        ));
    }
    let run = runs.get(id.into_inner()).await?;
    let found = store.metrics(run.id, since, every, MAX_METRICS + 1).await;
    let mut data: Vec<MetricPoint> = found
        .map_err(RunError::from)?
        .into_iter()
        .map(Into::into)
        .collect();
    let more = data.len() as u64 > MAX_METRICS;
    data.truncate(MAX_METRICS as usize);
    let next_since = if more {
        data.last().map(|point| point.step)
    } else {
        None
    };
    Ok(if wants_csv(&request) {
        HttpResponse::Ok()
            .content_type("text/csv; charset=utf-8")
            .body(csv(&data))
    } else {
        HttpResponse::Ok().json(MetricSeries { data, next_since })
    })
}

impl From<rows::Metric> for MetricPoint {
    fn from(row: rows::Metric) -> Self {
        Self {
            step: row.step,
            epoch: row.epoch,
            loss: row.loss,
            loss_average: row.loss_average,
            validation_loss: row.validation_loss,
            validation_error: row.validation_error,
            lr_unet: row.lr_unet,
            lr_text_encoder: row.lr_text_encoder,
            grad_norm: row.grad_norm,
            grad_norm_unet: row.grad_norm_unet,
            grad_norm_text_encoder: row.grad_norm_text_encoder,
            step_time_s: row.step_time_s,
            images_per_s: row.images_per_s,
            eta_s: row.eta_s,
            memory_bytes: row.memory_bytes,
            device_memory_bytes: row.device_memory_bytes,
        }
    }
}

fn wants_csv(request: &HttpRequest) -> bool {
    let accept = request.headers().get(header::ACCEPT);
    accept
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with("text/csv"))
}

/// The columns of the table, in the order of the fields.
const COLUMNS: &str = "step,epoch,loss,loss_average,validation_loss,validation_error,lr_unet,lr_text_encoder,grad_norm,\
                       grad_norm_unet,grad_norm_text_encoder,step_time_s,images_per_s,eta_s,memory_bytes,\
                       device_memory_bytes\n";

fn csv(points: &[MetricPoint]) -> String {
    let mut text = COLUMNS.to_owned();
    let number = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    let bytes = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
    for point in points {
        let cells = [
            point.step.to_string(),
            point.epoch.to_string(),
            number(point.loss),
            number(point.loss_average),
            number(point.validation_loss),
            number(point.validation_error),
            number(point.lr_unet),
            number(point.lr_text_encoder),
            number(point.grad_norm),
            number(point.grad_norm_unet),
            number(point.grad_norm_text_encoder),
            number(point.step_time_s),
            number(point.images_per_s),
            number(point.eta_s),
            bytes(point.memory_bytes),
            bytes(point.device_memory_bytes),
        ];
        text.push_str(&cells.join(","));
        text.push('\n');
    }
    text
}

/// A preview picture.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c1f-5a00-7c30-a4b2-3d1f2f6f0a11", "run_id": "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11", "step": 200,
    "prompt_index": 0, "prompt": "lumo, blue background", "seed": 1, "width_px": 512, "height_px": 512,
    "size_bytes": 412345, "sha256": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
    "created_at": "2026-11-25T06:44:00Z"
}))]
pub struct Sample {
    pub id: Uuid,
    pub run_id: Uuid,
    /// Optimizer steps behind it; 0 shows the base model.
    pub step: u64,
    /// Position in `settings.samples.prompts`.
    pub prompt_index: u32,
    pub prompt: String,
    pub seed: u64,
    pub width_px: u32,
    pub height_px: u32,
    pub size_bytes: u64,
    pub sha256: String,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

impl From<rows::Sample> for Sample {
    fn from(row: rows::Sample) -> Self {
        Self {
            id: row.id,
            run_id: row.run_id,
            step: row.step,
            prompt_index: row.prompt_index,
            prompt: row.prompt,
            seed: row.seed,
            width_px: row.width_px,
            height_px: row.height_px,
            size_bytes: row.size_bytes,
            sha256: row.sha256,
            created_at: row.created_at,
        }
    }
}

/// List the preview pictures of a run.
///
/// In the order in which they were drawn.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), PageQuery),
    responses(
        (status = 200, description = "A page of samples", body = Page<Sample>),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/samples")]
pub async fn list_samples(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    query: Query<PageQuery>,
) -> Result<web::Json<Page<Sample>>, Problem> {
    let page = PageRequest::try_from(query.into_inner())?;
    let run = runs.get(id.into_inner()).await?;
    let found = store.samples(run.id, page.after_id()?, page.rows()).await;
    let found = found.map_err(RunError::from)?;
    Ok(web::Json(page.page(
        found,
        |sample| sample.id.to_string(),
        Sample::from,
    )))
}

/// Download a preview picture.
///
/// A PNG, with ETag and ranges.
#[utoipa::path(
    method(get, head),
    tag = "runs",
    params(("run_id" = Uuid, Path), ("sample_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The picture", content_type = "image/png", body = Vec<u8>),
        (status = 206, description = "The wanted part"),
        (status = 304, description = "The client has it already"),
        (status = 404, description = "`sample_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 416, description = "`range_not_satisfiable`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[route(
    "/runs/{run_id}/samples/{sample_id}/content",
    method = "GET",
    method = "HEAD"
)]
pub async fn get_sample_content(
    request: HttpRequest,
    store: Data<Store>,
    ids: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (run_id, id) = ids.into_inner();
    let sample = store
        .sample(run_id, id)
        .await
        .map_err(|error| match error {
            StoreError::NotFound => Problem::new(
                Code::SampleNotFound,
                format!("run {run_id} has no sample {id}"),
            ),
            other => Problem::internal(other),
        })?;
    let file = Download {
        path: &store.blobs().path(&sample.sha256),
        sha256: &sample.sha256,
        media_type: "image/png",
        file_name: &format!("step-{}-prompt-{}.png", sample.step, sample.prompt_index),
        inline: true,
    };
    download::serve(&request, file).await
}

impl From<RunError> for Problem {
    fn from(error: RunError) -> Self {
        let text = error.to_string();
        match error {
            RunError::NotFound(_) => Self::new(Code::RunNotFound, text),
            RunError::DatasetNotFound(_) => Self::new(Code::DatasetNotFound, text),
            RunError::ModelNotFound(_) => Self::new(Code::ModelNotFound, text),
            RunError::IllegalTransition { .. } => Self::new(Code::IllegalTransition, text),
            RunError::Invalid(problems) => {
                let fields = problems.into_iter().map(|problem| {
                    FieldError::new(on_the_wire(&problem.pointer), problem.code, problem.message)
                });
                Self::fields(Code::InvalidSettings, fields.collect())
            }
            RunError::NotTraining(_) => Self::new(Code::RunNotTraining, text),
            RunError::StillNeeded(_) => Self::new(Code::StillNeeded, text),
            RunError::NoPrompts => Self::new(Code::NoPrompts, text),
            RunError::NotExtendable(_) => Self::new(Code::NotExtendable, text),
            RunError::GridNotFound(_) => Self::new(Code::GridNotFound, text),
            RunError::NotReproducible(_) => Self::new(Code::NotReproducible, text),
            RunError::InputsChanged(found) => {
                let field =
                    |found: Mismatch| FieldError::new(found.pointer, "changed", found.message);
                Self::fields(Code::InputsChanged, found.into_iter().map(field).collect())
            }
            RunError::Store(error) if error.is_storage_full() => {
                let detail = "there is no room left in the data folder";
                Self::new(Code::StorageFull, detail)
            }
            RunError::Models(_)
            | RunError::Task(_)
            | RunError::Spec(_)
            | RunError::Resume(_)
            | RunError::Store(_) => Self::internal(text),
        }
    }
}

/// The domain's pointer as the client knows the field.
fn on_the_wire(pointer: &str) -> String {
    match pointer {
        "/output_name" => "/name",
        "/length/steps" => "/max_train_steps",
        "/length/epochs" => "/max_train_epochs",
        "/prediction" => "/prediction_type",
        "/buckets/width_px" => "/resolution/width_px",
        "/buckets/height_px" => "/resolution/height_px",
        same => same,
    }
    .to_owned()
}
