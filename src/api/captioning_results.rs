//! `/v1/datasets/{dataset_id}/captioning-jobs/{captioning_job_id}/results`: what a job has said of each image.

use actix_web::get;
use actix_web::web::{self, Data};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::Query;
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{Problem, ProblemBody};
use super::twins::same_variants;
use crate::runs::{RunError, RunService};
use crate::store::Store;
use crate::store::runs as rows;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(list_captioning_results);
}

/// What became of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CaptionOutcome {
    /// It has the caption; of a dry run, it would have.
    Captioned,
    /// It was left as it is.
    Skipped,
    /// There is no caption for it.
    Failed,
}

same_variants!(CaptionOutcome, rows::CaptionOutcome: Captioned, Skipped, Failed);

/// A tag and how sure the model is of it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CaptionTag {
    /// As the model's list has it.
    pub name: String,
    /// `general`, `character` or `rating`.
    pub category: String,
    /// From 0 to 1.
    pub confidence: f64,
}

/// What a job has said of an image.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "position": 12, "image_id": "019a9c1e-8a00-7c30-a4b2-3d1f2f6f0a11", "file_name": "lumo_12.png",
    "outcome": "captioned", "message": null, "caption": "lumo, solo, outdoors",
    "tags": [{"name": "solo", "category": "general", "confidence": 0.93}], "created_at": "2026-11-28T06:42:09.5Z"
}))]
pub struct CaptioningResult {
    /// In the job's order of images, from 0.
    pub position: u64,
    /// The image; it may have been deleted since.
    pub image_id: Uuid,
    pub file_name: String,
    pub outcome: CaptionOutcome,
    /// Why it was skipped or has failed.
    pub message: Option<String>,
    /// The whole caption that was written, or would be.
    pub caption: Option<String>,
    /// Of taggers: up to 200 tags from a confidence of 0.05 on, the surest first, so that thresholds can be chosen.
    pub tags: Vec<CaptionTag>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

impl TryFrom<rows::CaptionResult> for CaptioningResult {
    type Error = Problem;

    fn try_from(row: rows::CaptionResult) -> Result<Self, Problem> {
        let tags = row
            .tags
            .as_deref()
            .map_or(Ok(Vec::new()), serde_json::from_str);
        Ok(Self {
            position: row.position,
            image_id: row.image_id,
            file_name: row.file_name,
            outcome: row.outcome.into(),
            message: row.message,
            caption: row.caption,
            tags: tags.map_err(Problem::internal)?,
            created_at: row.created_at,
        })
    }
}

/// Which results.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ResultQuery {
    /// How many at most.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// Only those that have come to this.
    #[param(inline)]
    outcome: Option<CaptionOutcome>,
}

/// List what a captioning job has said.
///
/// Of each image that it has come to: the caption, or why there is none, and a tagger's tags with their confidences.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path), ("captioning_job_id" = Uuid, Path), ResultQuery),
    responses(
        (status = 200, description = "A page of results", body = Page<CaptioningResult>),
        (status = 404, description = "`dataset_not_found`, `captioning_job_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/captioning-jobs/{captioning_job_id}/results")]
pub async fn list_captioning_results(
    runs: Data<RunService>,
    store: Data<Store>,
    path: web::Path<(Uuid, Uuid)>,
    query: Query<ResultQuery>,
) -> Result<web::Json<Page<CaptioningResult>>, Problem> {
    let (dataset, id) = path.into_inner();
    let ResultQuery {
        limit,
        cursor,
        outcome,
    } = query.into_inner();
    let page = PageRequest::try_from(PageQuery { limit, cursor })?;
    let after = page.after.as_deref().map(position).transpose()?;
    let job = runs.captioning_job(dataset, id).await?;
    let found = store.caption_results(job.id, outcome.map(Into::into), after, page.rows());
    let found = found.await.map_err(RunError::from)?;
    let found: Vec<CaptioningResult> = found
        .into_iter()
        .map(TryInto::try_into)
        .collect::<Result<_, _>>()?;
    Ok(web::Json(page.page(
        found,
        |result| result.position.to_string(),
        |result| result,
    )))
}

fn position(cursor: &str) -> Result<u64, Problem> {
    let number = cursor
        .parse()
        .ok()
        .filter(|number| i64::try_from(*number).is_ok());
    number.ok_or_else(|| {
        let message = "expected the `next_cursor` of the page before";
        Problem::field(Code::InvalidCursor, "/cursor", "invalid_value", message)
    })
}
