//! `/v1/datasets/{dataset_id}/captioning-jobs`: captions made by models, by a worker when the queue allows.

use actix_web::http::StatusCode;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, post};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::auth;
use super::captioning_settings::{BlipOptions, CaptionMode, Captioner, TaggerOptions};
use super::codes::Code;
use super::event_feed::EventFeed;
use super::events::{self, EventQuery, RunEvents};
use super::extract::{Json, Query};
use super::idempotency::{self, Created};
use super::limits::Limits;
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{Problem, ProblemBody};
use super::run_resource::{RunFailure, RunState};
use crate::captioning;
use crate::runs::{CaptioningRequest, CaptioningSpec, RunError, RunService};
use crate::store::Store;
use crate::store::runs::{CaptionCounts, Run};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(create_captioning_job)
        .service(list_captioning_jobs)
        .service(get_captioning_job)
        .service(cancel_captioning_job)
        .service(delete_captioning_job)
        .service(stream_captioning_events);
}

/// What is to be captioned, and how. Of `tagger` and `blip` only the one of the captioner may be there.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "captioner": "wd14", "model": "wd-vit-tagger-v3", "mode": "append", "prefix": "lumo, ",
    "tagger": {"general_threshold": 0.35, "character_threshold": 0.85, "exclude": ["simple background"]}
}))]
pub struct CreateCaptioningJob {
    pub captioner: Captioner,
    /// Name of a model of the captioner, see `GET /v1/captioners`; the first that is complete when absent.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 255)]
    pub model: Option<String>,
    /// What happens with captions that are there.
    #[serde(default)]
    pub mode: CaptionMode,
    /// Only images of this subset.
    #[serde(default)]
    pub subset_id: Option<Uuid>,
    /// Only these images; all when empty.
    #[serde(default)]
    #[schema(max_items = 50000)]
    pub image_ids: Vec<Uuid>,
    /// Comes before what is made, as it is: `lumo, `.
    #[serde(default)]
    #[schema(max_length = 1000)]
    pub prefix: String,
    /// Comes after it.
    #[serde(default)]
    #[schema(max_length = 1000)]
    pub suffix: String,
    /// Keeps results, and leaves captions as they are.
    #[serde(default)]
    pub dry_run: bool,
    /// Device of `blip`; that of the service when absent. Taggers run on the `cpu`.
    #[serde(default)]
    #[schema(max_length = 64)]
    pub device: Option<String>,
    /// Of `wd14` and `deepdanbooru`.
    #[serde(default)]
    pub tagger: Option<TaggerOptions>,
    /// Of `blip`.
    #[serde(default)]
    pub blip: Option<BlipOptions>,
}

impl TryFrom<CreateCaptioningJob> for CaptioningRequest {
    type Error = Problem;

    fn try_from(wire: CreateCaptioningJob) -> Result<Self, Problem> {
        let captioner = captioning::Captioner::from(wire.captioner);
        let odd = match captioner.tagger() {
            Some(_) => wire.blip.as_ref().map(|_| "/blip"),
            None => wire.tagger.as_ref().map(|_| "/tagger"),
        };
        if let Some(pointer) = odd {
            let message = format!("`{}` has no such settings", captioner.as_str());
            let code = Code::InvalidSettings;
            return Err(Problem::field(code, pointer, "unknown_field", message));
        }
        Ok(Self {
            captioner,
            model: wire.model,
            mode: wire.mode.into(),
            subset_id: wire.subset_id,
            image_ids: wire.image_ids,
            prefix: wire.prefix,
            suffix: wire.suffix,
            dry_run: wire.dry_run,
            device: wire.device,
            tagger: wire.tagger.unwrap_or_default().into(),
            blip: wire.blip.unwrap_or_default().into(),
        })
    }
}

/// A captioner that goes through images of a dataset.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c23-4400-7c30-a4b2-3d1f2f6f0a11", "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11",
    "captioner": "wd14", "model": "wd-vit-tagger-v3", "mode": "append", "subset_id": null, "prefix": "lumo, ",
    "suffix": "", "dry_run": false,
    "tagger": {"general_threshold": 0.35, "character_threshold": 0.85, "rating": "none", "keep_underscores": false,
               "exclude": ["simple background"], "order": "confidence", "characters_first": false, "max_tags": 200,
               "separator": ", "},
    "blip": null, "state": "running", "phase": "captioning", "device": "cpu (AMD EPYC)", "attempt": 1,
    "images": 240, "images_done": 96, "captioned": 95, "skipped": 0, "failed": 1,
    "current_image_id": "019a9c1e-8a00-7c30-a4b2-3d1f2f6f0a11", "images_per_s": 1.4, "eta_s": 102.9, "error": null,
    "created_at": "2026-11-28T06:42:00Z", "started_at": "2026-11-28T06:42:01Z", "finished_at": null
}))]
pub struct CaptioningJob {
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub captioner: Captioner,
    /// The model's name.
    pub model: String,
    pub mode: CaptionMode,
    pub subset_id: Option<Uuid>,
    pub prefix: String,
    pub suffix: String,
    pub dry_run: bool,
    /// Of `wd14` and `deepdanbooru`, with every default.
    pub tagger: Option<TaggerOptions>,
    /// Of `blip`, with every default.
    pub blip: Option<BlipOptions>,
    /// As of a run: it waits as `queued` for its turn, captions in `running`, is queued again by itself when it has lost
    /// its worker, and ends as `succeeded`, `failed` or `cancelled`.
    pub state: RunState,
    /// What its worker does: `loading`, `captioning`.
    pub phase: Option<String>,
    /// What it runs on, once it does.
    pub device: Option<String>,
    /// How many workers have begun it.
    pub attempt: u32,
    /// Images of the job.
    pub images: u64,
    /// Those that have a result.
    pub images_done: u64,
    /// Those whose caption was made; of a dry run, without being written.
    pub captioned: u64,
    /// Those that were left as they are.
    pub skipped: u64,
    /// Those that could not be captioned; the others go on.
    pub failed: u64,
    /// The image that it is at, while it captions.
    pub current_image_id: Option<Uuid>,
    pub images_per_s: Option<f64>,
    /// Expected time to the end.
    pub eta_s: Option<f64>,
    /// Why it failed: `captioner_model_missing`, `model_unusable`, `captioning_failed` (no image could be captioned),
    /// `device_unusable`, `worker_lost` and others.
    pub error: Option<RunFailure>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub started_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
}

impl CaptioningJob {
    async fn of(runs: &RunService, store: &Store, row: Run) -> Result<Self, Problem> {
        let counts = store.caption_counts(&[row.id]).await;
        let counts = counts.map_err(RunError::from)?;
        let counts = counts.get(&row.id).copied().unwrap_or_default();
        let now = runs.captioning_now(&row).await?;
        Self::with(row, counts, now)
    }

    fn with(row: Run, counts: CaptionCounts, now: Option<Uuid>) -> Result<Self, Problem> {
        let spec: CaptioningSpec = serde_json::from_str(&row.spec).map_err(Problem::internal)?;
        let word = row.captioner.as_deref().unwrap_or_default();
        let captioner = captioning::Captioner::parse(word)
            .ok_or_else(|| Problem::internal(format!("the captioner `{word}` of a row")))?;
        let tags = captioner.tagger().is_some();
        Ok(Self {
            id: row.id,
            dataset_id: row.dataset_id,
            captioner: captioner.into(),
            model: spec.model,
            mode: spec.mode.into(),
            subset_id: spec.subset_id,
            prefix: spec.prefix,
            suffix: spec.suffix,
            dry_run: spec.dry_run,
            tagger: tags.then(|| spec.tagger.into()),
            blip: (!tags).then(|| spec.blip.into()),
            state: row.state.into(),
            phase: row.phase,
            device: row.device,
            attempt: row.attempt,
            images: row.total_steps.unwrap_or(0),
            images_done: counts.captioned + counts.skipped + counts.failed,
            captioned: counts.captioned,
            skipped: counts.skipped,
            failed: counts.failed,
            current_image_id: now,
            images_per_s: row.steps_per_s,
            eta_s: row.eta_s,
            error: row.error_code.map(|code| RunFailure {
                code,
                message: row.error_message.unwrap_or_default(),
            }),
            created_at: row.created_at,
            started_at: row.started_at,
            finished_at: row.finished_at,
        })
    }
}

/// Caption images by a model.
///
/// A captioner goes through images of the dataset: `blip` writes sentences, `wd14` and `deepdanbooru` tags. The job waits
/// in the queue of the runs and is worked on by a process of its own. Captions are written as it goes, and a job that has
/// lost its worker goes on where it was; an image that cannot be captioned is reported and the others go on.
///
/// Models are not part of the service: a 409 `captioner_model_missing` says which files belong where.
#[utoipa::path(
    tag = "datasets",
    params(
        ("dataset_id" = Uuid, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt"),
    ),
    request_body = CreateCaptioningJob,
    responses(
        (status = 202, description = "The job, queued", body = CaptioningJob, headers(("Location" = String))),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`captioner_model_missing`, `idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_settings`: a setting out of its range or of another captioner, an unknown subset or image; `invalid_body`, `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/datasets/{dataset_id}/captioning-jobs")]
pub async fn create_captioning_job(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    body: Json<CreateCaptioningJob>,
) -> Result<HttpResponse, Problem> {
    let payload = body.into_inner();
    let (dataset, asked) = (
        id.into_inner(),
        CaptioningRequest::try_from(payload.clone())?,
    );
    let rows = store.clone();
    let key = auth::key_of(&request);
    let make = async move {
        let row = runs.caption(dataset, asked, key).await?;
        let location = format!("/v1/datasets/{dataset}/captioning-jobs/{}", row.id);
        let job = CaptioningJob::of(&runs, &rows, row).await?;
        Ok(Created {
            status: StatusCode::ACCEPTED,
            ..Created::new(location, &job)?
        })
    };
    let scope = format!("POST /v1/datasets/{dataset}/captioning-jobs");
    idempotency::once(&store, &request, &scope, &payload, make).await
}

/// List the captioning jobs of a dataset.
///
/// In the order in which they were asked for.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path), PageQuery),
    responses(
        (status = 200, description = "A page of jobs", body = Page<CaptioningJob>),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/captioning-jobs")]
pub async fn list_captioning_jobs(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    query: Query<PageQuery>,
) -> Result<web::Json<Page<CaptioningJob>>, Problem> {
    let page = PageRequest::try_from(query.into_inner())?;
    let found = runs.captioning_jobs(id.into_inner(), page.after_id()?, page.rows());
    let found = found.await?;
    let ids: Vec<Uuid> = found.iter().map(|row| row.id).collect();
    let counts = store.caption_counts(&ids).await.map_err(RunError::from)?;
    let mut jobs = Vec::with_capacity(found.len());
    for row in found {
        let counts = counts.get(&row.id).copied().unwrap_or_default();
        let now = runs.captioning_now(&row).await?;
        jobs.push(CaptioningJob::with(row, counts, now)?);
    }
    Ok(web::Json(page.page(
        jobs,
        |job| job.id.to_string(),
        |job| job,
    )))
}

/// Read a captioning job.
///
/// Its state, and how far it is.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path), ("captioning_job_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The job", body = CaptioningJob),
        (status = 404, description = "`dataset_not_found`, `captioning_job_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/captioning-jobs/{captioning_job_id}")]
pub async fn get_captioning_job(
    runs: Data<RunService>,
    store: Data<Store>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<web::Json<CaptioningJob>, Problem> {
    let (dataset, id) = path.into_inner();
    let row = runs.captioning_job(dataset, id).await?;
    Ok(web::Json(CaptioningJob::of(&runs, &store, row).await?))
}

/// Cancel a captioning job.
///
/// A waiting one ends at once, one that captions after the current images. Captions that are written stay. Asking again
/// changes nothing.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path), ("captioning_job_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The job, `cancelled` or `cancelling`", body = CaptioningJob),
        (status = 404, description = "`dataset_not_found`, `captioning_job_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`illegal_transition`: it has succeeded or failed", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/datasets/{dataset_id}/captioning-jobs/{captioning_job_id}/cancel")]
pub async fn cancel_captioning_job(
    runs: Data<RunService>,
    store: Data<Store>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<web::Json<CaptioningJob>, Problem> {
    let (dataset, id) = path.into_inner();
    let row = runs.cancel_captioning(dataset, id).await?;
    Ok(web::Json(CaptioningJob::of(&runs, &store, row).await?))
}

/// Delete a captioning job.
///
/// With its results; captions stay. Jobs that have ended go with their dataset.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path), ("captioning_job_id" = Uuid, Path)),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "`dataset_not_found`, `captioning_job_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`still_needed`: it has not ended", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/datasets/{dataset_id}/captioning-jobs/{captioning_job_id}")]
pub async fn delete_captioning_job(
    runs: Data<RunService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset, id) = path.into_inner();
    runs.delete_captioning(dataset, id).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Follow a captioning job.
///
/// As the events of a run: `state`, `phase`, `progress` (`done`, `total`, `images_per_s`, `eta_s`) and `image_failed`
/// (`image_id`, `file_name`, `message`), as a stream or a list.
#[utoipa::path(
    tag = "datasets",
    operation_id = "list_captioning_events",
    params(
        ("dataset_id" = Uuid, Path),
        ("captioning_job_id" = Uuid, Path),
        EventQuery,
        ("Last-Event-ID" = Option<u64>, Header, description = "The number of the last event that was seen"),
    ),
    responses(
        (status = 200, description = "The events", content(
            (RunEvents = "application/json"),
            (String = "text/event-stream", example = json!("id: 7\nevent: progress\ndata: {\"done\":12,\"total\":240,\"images_per_s\":1.4,\"eta_s\":162.9}\n\n")),
        )),
        (status = 204, description = "As a stream: the job has ended and everything was seen"),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`dataset_not_found`, `captioning_job_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/captioning-jobs/{captioning_job_id}/events")]
pub async fn stream_captioning_events(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    feed: Data<EventFeed>,
    limits: Data<Limits>,
    path: web::Path<(Uuid, Uuid)>,
    query: Query<EventQuery>,
) -> Result<HttpResponse, Problem> {
    let (dataset, id) = path.into_inner();
    let job = runs.captioning_job(dataset, id);
    events::follow(&request, &store, &feed, &limits, query.into_inner(), job).await
}
