//! The preview pictures of a run: listed and downloaded.

use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, get, route};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::download::{self, Download};
use super::extract::Query;
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{Problem, ProblemBody};
use crate::runs::{RunError, RunService};
use crate::store::runs as rows;
use crate::store::{Store, StoreError};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(list_samples).service(get_sample_content);
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
