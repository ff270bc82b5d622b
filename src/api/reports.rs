//! `/v1/datasets/{dataset_id}/report`: what speaks against training on a dataset, for programs and for people.

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, get};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::extract::Query;
use super::framing::{framing_query, in_range};
use super::problem::{Problem, ProblemBody};
use super::tagged::tagged;
use super::twins::same_variants;
use crate::preparation::PreparationService;
use crate::preparation::report as domain;

/// When a client may ask again for a report that is not complete.
const AGAIN_S: &str = "2";
/// A page shows what it holds and runs nothing.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(get_report).service(get_report_page);
}

framing_query! {
    /// The run that is planned.
    ReportQuery {
        /// `batch_size` of the run.
        #[param(minimum = 1, maximum = 1024, default = 1)]
        batch_size: Option<u32>,
        /// `max_token_length` of the run: 75, 150 or 225.
        #[param(minimum = 75, maximum = 225, multiple_of = 75, default = 75)]
        max_token_length: Option<u32>,
        /// What is to be learned; how many images it takes depends on it.
        #[param(inline)]
        kind: Option<Subject>,
    }
}

/// What a LoRA is to learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// A person, a mascot, a thing: 10 to 30 images.
    Character,
    /// A way of drawing: 20 to 50 images.
    Style,
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The result will most likely suffer.
    Serious,
    /// Worth a look before hours are spent.
    Warning,
    /// Good to know.
    Info,
}

same_variants!(Subject, domain::Subject: Character, Style);
same_variants!(Severity, domain::Severity: Serious, Warning, Info);

/// What was found; nothing of it keeps a run from being made.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11", "complete": true, "images": 20, "reg_images": 0,
    "measured_images": 20, "serious": 0, "warnings": 1, "infos": 0,
    "findings": [{
        "code": "blurred", "severity": "warning",
        "message": "1 image is blurred, or empty (variance of the Laplacian below 100): the LoRA learns the blur, too.",
        "advice": "Replace them by sharper ones, or delete them. Soft backgrounds behind a sharp subject are fine.",
        "image_count": 1,
        "images": [{"image_id": "019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f", "file_name": "lumo_00.png", "subset": "10_lumo", "detail": "sharpness 23"}]
    }],
    "buckets": [{"width_px": 512, "height_px": 512, "images": 20, "images_per_epoch": 200, "lonely": false}],
    "tags": [{"tag": "lumo", "images": 20}]
}))]
pub struct DatasetReport {
    pub dataset_id: Uuid,
    /// Whether every picture was measured; if not, duplicates, blur and exposure are of those that were.
    pub complete: bool,
    pub images: u64,
    /// Those for regularization among them.
    pub reg_images: u64,
    pub measured_images: u64,
    /// Findings of each severity.
    pub serious: u64,
    pub warnings: u64,
    pub infos: u64,
    /// The gravest first.
    pub findings: Vec<Finding>,
    /// The sizes that a run would train at; empty when there is nothing to train on.
    pub buckets: Vec<ReportBucket>,
    /// The 50 most frequent tags: what is between commas, in lower case.
    pub tags: Vec<ReportTag>,
}

/// Something that speaks against training on the dataset as it is.
#[derive(Serialize, ToSchema)]
pub struct Finding {
    /// `no_images`, `unreadable`, `exact_duplicates`, `near_duplicates`, `blurred`, `below_resolution`, `underexposed`,
    /// `overexposed`, `crop_loss`, `lonely_bucket`, `caption_missing`, `caption_too_long`, `instance_prompt_missing`,
    /// `instance_prompt_in_regularization`, `tag_baked_in`, `tags_inseparable`, `too_few_images` or `many_images`.
    pub code: String,
    pub severity: Severity,
    /// What was found.
    pub message: String,
    /// What to do.
    pub advice: String,
    /// How many images it is about; `images` names at most 500.
    pub image_count: u64,
    pub images: Vec<FindingImage>,
}

/// An image that a finding is about.
#[derive(Serialize, ToSchema)]
pub struct FindingImage {
    pub image_id: Uuid,
    pub file_name: String,
    pub subset: String,
    /// What the finding goes by, in words.
    pub detail: Option<String>,
}

/// A size of pictures.
#[derive(Serialize, ToSchema)]
pub struct ReportBucket {
    pub width_px: u32,
    pub height_px: u32,
    pub images: u64,
    /// Images × repeats; regularization images are as many as the others.
    pub images_per_epoch: u64,
    /// Whether it does not fill a batch, or has one image alone while there are other buckets.
    pub lonely: bool,
}

/// A tag and the images that have it.
#[derive(Serialize, ToSchema)]
pub struct ReportTag {
    pub tag: String,
    pub images: u64,
}

/// Report on a dataset before training.
///
/// Duplicates, blur, exposure, sizes and crops, captions and tags, seen with the settings of a run: each finding with its
/// severity, its images and what to do. It warns, and keeps nothing from being trained.
///
/// Pictures are measured once, after their upload. A request measures what is missing for up to three seconds; if that was
/// not enough, the answer is a 202 with what is known so far, the rest is measured in the background, and the same
/// request will find more. With `Accept: text/html` it is a page with thumbnails, as at `/report.html`.
#[utoipa::path(
    tag = "datasets",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ReportQuery,
        ("If-None-Match" = Option<String>, Header, description = "ETags the client has already"),
    ),
    responses(
        (status = 200, description = "The report", content((DatasetReport = "application/json"), (String = "text/html", example = json!("<!doctype html>\n<html lang=\"en\">…</html>\n"))), headers(("ETag" = String))),
        (status = 202, description = "The report as far as pictures are measured", content((DatasetReport = "application/json"), (String = "text/html", example = json!("<!doctype html>\n<html lang=\"en\">…</html>\n"))), headers(("Retry-After" = String))),
        (status = 304, description = "The client has it already"),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/report")]
pub async fn get_report(
    request: HttpRequest,
    preparation: Data<PreparationService>,
    dataset_id: web::Path<Uuid>,
    query: Query<ReportQuery>,
) -> Result<HttpResponse, Problem> {
    let settings = query.into_inner().settings()?;
    if wants_page(&request) {
        return page(&preparation, *dataset_id, settings).await;
    }
    let report = preparation.report(*dataset_id, settings).await?;
    let report = DatasetReport::from(report);
    if report.complete {
        return tagged(&request, &report);
    }
    Ok(HttpResponse::Accepted()
        .insert_header((header::RETRY_AFTER, AGAIN_S))
        .json(report))
}

/// Show the report on a dataset.
///
/// The same as a page for people: it holds its style and its thumbnails, and can be kept or sent as one file.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id"), ReportQuery),
    responses(
        (status = 200, description = "The page", content((String = "text/html", example = json!("<!doctype html>\n<html lang=\"en\">…</html>\n")))),
        (status = 202, description = "The page as far as pictures are measured; it loads again by itself", content((String = "text/html", example = json!("<!doctype html>\n<html lang=\"en\">…</html>\n"))), headers(("Retry-After" = String))),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/report.html")]
pub async fn get_report_page(
    preparation: Data<PreparationService>,
    dataset_id: web::Path<Uuid>,
    query: Query<ReportQuery>,
) -> Result<HttpResponse, Problem> {
    let settings = query.into_inner().settings()?;
    page(&preparation, *dataset_id, settings).await
}

async fn page(
    preparation: &PreparationService,
    dataset_id: Uuid,
    settings: domain::ReportSettings,
) -> Result<HttpResponse, Problem> {
    let (page, complete) = preparation.report_page(dataset_id, settings).await?;
    let mut answer = match complete {
        true => HttpResponse::Ok(),
        false => HttpResponse::Accepted(),
    };
    if !complete {
        answer.insert_header((header::RETRY_AFTER, AGAIN_S));
    }
    Ok(answer
        .insert_header((header::CONTENT_SECURITY_POLICY, PAGE_POLICY))
        .insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((header::CACHE_CONTROL, "private, no-cache"))
        .content_type("text/html; charset=utf-8")
        .body(page))
}

/// Browsers name HTML first; programs that name it at all want it.
fn wants_page(request: &HttpRequest) -> bool {
    let accept = request.headers().get(header::ACCEPT);
    let accept = accept
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let kinds = accept
        .split(',')
        .map(|kind| kind.split(';').next().unwrap_or_default().trim());
    let first = kinds
        .into_iter()
        .find(|kind| matches!(*kind, "text/html" | "application/json" | "*/*"));
    first == Some("text/html")
}

impl ReportQuery {
    fn settings(self) -> Result<domain::ReportSettings, Problem> {
        let tokens = in_range("max_token_length", self.max_token_length, 75, 75..=225)?;
        let tokens = if tokens % 75 == 0 {
            tokens
        } else {
            let message = format!("found {tokens}, expected 75, 150 or 225");
            return Err(Problem::field(
                super::codes::Code::InvalidQuery,
                "/max_token_length",
                "invalid_value",
                message,
            ));
        };
        Ok(domain::ReportSettings {
            buckets: self.framing(),
            batch_size: in_range("batch_size", self.batch_size, 1, 1..=1024)? as usize,
            max_token_length: tokens as usize,
            kind: self.kind.map(Into::into),
        })
    }
}

impl From<domain::Report> for DatasetReport {
    fn from(report: domain::Report) -> Self {
        let of = |severity| {
            let findings = report.findings.iter();
            findings
                .filter(|finding| finding.severity == severity)
                .count() as u64
        };
        Self {
            dataset_id: report.dataset_id,
            complete: report.complete,
            images: report.images,
            reg_images: report.reg_images,
            measured_images: report.measured_images,
            serious: of(domain::Severity::Serious),
            warnings: of(domain::Severity::Warning),
            infos: of(domain::Severity::Info),
            findings: report.findings.into_iter().map(Into::into).collect(),
            buckets: report.buckets.into_iter().map(Into::into).collect(),
            tags: report
                .tags
                .into_iter()
                .map(|domain::TagUse { tag, images }| ReportTag { tag, images })
                .collect(),
        }
    }
}

impl From<domain::Finding> for Finding {
    fn from(finding: domain::Finding) -> Self {
        let image = |image: domain::FindingImage| FindingImage {
            image_id: image.image_id,
            file_name: image.file_name,
            subset: image.subset,
            detail: image.detail,
        };
        Self {
            code: finding.code.as_str().to_owned(),
            severity: finding.severity.into(),
            message: finding.message,
            advice: finding.advice,
            image_count: finding.image_count,
            images: finding.images.into_iter().map(image).collect(),
        }
    }
}

impl From<domain::BucketUse> for ReportBucket {
    fn from(bucket: domain::BucketUse) -> Self {
        Self {
            width_px: bucket.width_px,
            height_px: bucket.height_px,
            images: bucket.images,
            images_per_epoch: bucket.images_per_epoch,
            lonely: bucket.lonely,
        }
    }
}
