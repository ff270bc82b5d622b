//! `/v1/runs`: made, listed, read, ended. A run as clients see it is in `run_resource`, its settings in `run_settings`,
//! the event stream in `events`.

use std::collections::HashMap;

use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, post};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::auth;
use super::codes::Code;
use super::extract::{Json, Query};
use super::idempotency::{self, Created};
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{FieldError, Problem, ProblemBody};
use super::run_resource::{Run, RunState};
use super::run_settings::CreateRun;
use super::tagged::tagged;
use crate::captioning::CaptionError;
use crate::runs::{Mismatch, NewRunRequest, RunError, RunService};
use crate::store::Store;
use crate::store::runs as rows;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(create_run)
        .service(list_runs)
        .service(get_run)
        .service(cancel_run)
        .service(delete_run);
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
            RunError::CaptioningJobNotFound(_) => Self::new(Code::CaptioningJobNotFound, text),
            RunError::Captioner(CaptionError::Missing(_)) => {
                Self::new(Code::CaptionerModelMissing, text)
            }
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
            | RunError::Captioner(_)
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
