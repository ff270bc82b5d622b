//! What can be asked of a run besides its end: to rest and go on, to save or draw now, to become longer.

use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, post};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::auth;
use super::codes::Code;
use super::extract::Json;
use super::idempotency::{self, Created};
use super::problem::{Problem, ProblemBody};
use super::run_resource::Run;
use super::runs::with_result;
use crate::runs::{Extension, RunService};
use crate::store::Store;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(pause_run)
        .service(resume_run)
        .service(save_run)
        .service(sample_run)
        .service(extend_run);
}

/// Pause a run.
///
/// A waiting run rests at once: it is held back, others pass it, and `resume` releases it. A training one finishes its step, is kept exactly as it is, and gives its device back:
/// it is `pausing` until then. Asking again changes nothing.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The run, `paused` or `pausing`", body = Run),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`illegal_transition`: it is saving, cancelling, or has ended", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/pause")]
pub async fn pause_run(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<web::Json<Run>, Problem> {
    let run = runs.pause(id.into_inner()).await?;
    with_result(&runs, &store, run).await
}

/// Resume a paused run.
///
/// It is queued, at the place that its priority and its age give it, and computes what it would have computed without the pause: on the CPU to the bit.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The run, queued", body = Run),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`illegal_transition`: it is not paused", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/resume")]
pub async fn resume_run(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<web::Json<Run>, Problem> {
    let run = runs.resume(id.into_inner()).await?;
    with_result(&runs, &store, run).await
}

/// Save a LoRA now.
///
/// After the current step a LoRA file is written, named by its step; the event `lora` tells it. What is asked for twice
/// before that is done once.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path)),
    responses(
        (status = 202, description = "It will be done after the current step", body = Run),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`run_not_training`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/save")]
pub async fn save_run(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let run = runs.save(id.into_inner()).await?;
    let run = with_result(&runs, &store, run).await?;
    Ok(HttpResponse::Accepted().json(run.into_inner()))
}

/// Draw the previews now.
///
/// After the current step the run's prompts are drawn; the event `sample` tells each picture. What is asked for twice
/// before that is done once.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path)),
    responses(
        (status = 202, description = "It will be done after the current step", body = Run),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`run_not_training`, `no_prompts`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/sample")]
pub async fn sample_run(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let run = runs.sample(id.into_inner()).await?;
    let run = with_result(&runs, &store, run).await?;
    Ok(HttpResponse::Accepted().json(run.into_inner()))
}

/// How much longer a run is to be: by `steps` or by `epochs`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"epochs": 2}))]
pub struct ExtendRun {
    /// More optimizer steps.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 10000000)]
    pub steps: Option<u64>,
    /// More epochs, instead of `steps`.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 1000000)]
    pub epochs: Option<u64>,
}

impl TryFrom<ExtendRun> for Extension {
    type Error = Problem;

    fn try_from(wire: ExtendRun) -> Result<Self, Problem> {
        let wrong = |message| Problem::field(Code::InvalidBody, "", "invalid_value", message);
        let extension = match (wire.steps, wire.epochs) {
            (Some(steps), None) => Self::Steps(steps),
            (None, Some(epochs)) => Self::Epochs(epochs),
            _ => return Err(wrong("expected either `steps` or `epochs`")),
        };
        match extension {
            Self::Steps(0) | Self::Epochs(0) => Err(wrong("found 0, expected 1 or more")),
            more => Ok(more),
        }
    }
}

/// Train a finished run further.
///
/// A run that has succeeded never changes again: this makes a new one (`continued_from` names the old) with the same
/// settings, pictures and captions, that goes on where the old one has ended. With a learning rate that does not depend
/// on the length the result is that of a run that was longer from the beginning. What is needed for that is kept with a
/// succeeded run for some days (`extendable_days`).
#[utoipa::path(
    tag = "runs",
    params(
        ("run_id" = Uuid, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt"),
    ),
    request_body = ExtendRun,
    responses(
        (status = 201, description = "The new run, queued", body = Run, headers(("Location" = String))),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`not_extendable`: it has not succeeded, or what it needs is gone; `idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_body`, `invalid_settings`, `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/extend")]
pub async fn extend_run(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    body: Json<ExtendRun>,
) -> Result<HttpResponse, Problem> {
    let payload = body.into_inner();
    let extension = Extension::try_from(payload.clone())?;
    let (id, key) = (id.into_inner(), auth::key_of(&request));
    let make = async move {
        let run = runs.extend(id, extension, key).await?;
        let location = format!("/v1/runs/{}", run.id);
        let run = Run::of(run, None)?.placed(&runs.places().await?);
        Created::new(location, &run)
    };
    let scope = format!("POST /v1/runs/{id}/extend");
    idempotency::once(&store, &request, &scope, &payload, make).await
}
