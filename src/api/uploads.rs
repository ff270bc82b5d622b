//! `POST /v1/datasets/{dataset_id}/images`: files come in, and each is answered for.

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, post};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::decode;
use super::multipart;
use super::problem::{Problem, ProblemBody};
use crate::datasets::{BackgroundError, DatasetService, SubsetChoice, report};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(upload_images);
}

/// The form of an upload.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents a body that is streamed")]
pub struct UploadForm {
    /// Images (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF), `.txt` or `.caption` files named like their image,
    /// `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder), sd-scripts' dataset settings (`*.toml`), and zip,
    /// tar and tar.gz of all that, in kohya layout (`10_my_concept/…`, `reg/1_dog/…`) or not. As many as needed; every
    /// part with a file name is a file.
    #[schema(value_type = Vec<String>, format = Binary)]
    file: Vec<String>,
    /// The subset of files whose folder names none; `default` if it is not given.
    subset: Option<String>,
    /// How often an epoch shows each image.
    #[schema(minimum = 1, maximum = 10000)]
    repeats: Option<u32>,
    /// Whether the images are for regularization.
    is_reg: Option<bool>,
    /// The caption of images that have none.
    instance_prompt: Option<String>,
    /// The caption of regularization images that have none.
    class_prompt: Option<String>,
    /// What transparent images are laid on, as `#rrggbb`. Without it alpha is dropped, as sd-scripts does, and the
    /// colours that lie under it are trained on.
    #[schema(pattern = "^#[0-9a-fA-F]{6}$", example = "#ffffff")]
    background: Option<String>,
}

/// The text fields of the form.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UploadFields {
    pub subset: Option<String>,
    pub repeats: Option<u32>,
    pub is_reg: Option<bool>,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    pub background: Option<String>,
}

/// What became of an upload.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "files": [
        {"name": "a.png", "kind": "image", "outcome": "accepted", "image_id": "019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f",
         "subset": "default", "remarks": []},
        {"name": "b.png", "kind": "image", "outcome": "refused",
         "problem": {"code": "truncated", "message": "the file ends before the image does"}, "remarks": []}
    ],
    "summary": {"images": 1, "captions": 0, "duplicates": 0, "refused": 1, "warnings": 0}
}))]
pub struct Upload {
    /// One for every file, those inside of archives included.
    pub files: Vec<UploadedFile>,
    pub summary: UploadSummary,
}

/// One file of an upload and its fate.
#[derive(Serialize, ToSchema)]
pub struct UploadedFile {
    /// As the upload, or the archive in it, named the file.
    pub name: String,
    pub kind: UploadedKind,
    pub outcome: UploadOutcome,
    /// The new image, the one that was there already, or the one that the caption belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_id: Option<Uuid>,
    /// The name of the image's subset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subset: Option<String>,
    /// Why the file was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<UploadRemark>,
    /// What its owner should know although the file was taken.
    pub remarks: Vec<UploadRemark>,
}

/// Told by the content; for captions also by the name.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum UploadedKind {
    Image,
    Caption,
    /// What of an image counts in the loss: a picture named `a.mask.png` beside `a.png`, or `masks/a.png`.
    Mask,
    Archive,
    /// `metadata.jsonl`, `metadata.csv`, or sd-scripts' dataset settings.
    Metadata,
    Other,
}

/// `duplicate`: the subset has this content already. `ignored`: what operating systems leave behind.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum UploadOutcome {
    Accepted,
    Duplicate,
    Refused,
    Ignored,
}

/// A stable word and a sentence.
#[derive(Serialize, ToSchema)]
pub struct UploadRemark {
    pub code: String,
    pub message: String,
}

/// Counts over all files.
#[derive(Serialize, ToSchema)]
pub struct UploadSummary {
    /// New images.
    pub images: usize,
    /// Captions that belong to an image now.
    pub captions: usize,
    pub duplicates: usize,
    pub refused: usize,
    /// Remarks on files that were taken.
    pub warnings: usize,
}

/// Upload images and captions.
///
/// Images, caption files and archives, in any number and order; the body is streamed to disk. Files are judged by their
/// content, one by one: what is wrong with one keeps none of the others out, and what was done to one is remarked. A
/// caption whose image is in the dataset already replaces that image's caption. A picture `a.mask.png` beside `a.png`, or
/// `masks/a.png`, is that image's mask, for runs with `loss.masked`. Archives may lie in archives. For large ones over bad
/// lines there are uploads in parts: `POST /v1/datasets/{dataset_id}/uploads`.
#[utoipa::path(
    tag = "images",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id")),
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "No new image came of it", body = Upload),
        (status = 201, description = "There are new images", body = Upload, headers(("Location" = String))),
        (status = 400, description = "`malformed_multipart`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "`payload_too_large`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 415, description = "`unsupported_media_type`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`nothing_uploaded`, `invalid_subset`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/datasets/{dataset_id}/images")]
pub async fn upload_images(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    datasets.exists(*dataset_id).await?; // before gigabytes are received for nothing
    let scratch = datasets.scratch()?;
    let form = multipart::receive(&request, payload, scratch.path(), datasets.limits()).await?;
    let choice = choice(form.fields)?;
    let (files, summary) = datasets
        .ingest(*dataset_id, form.files, choice, scratch)
        .await?;
    let mut answer = if summary.images > 0 {
        HttpResponse::Created()
    } else {
        HttpResponse::Ok()
    };
    if summary.images > 0 {
        answer.insert_header((
            header::LOCATION,
            format!("/v1/datasets/{dataset_id}/images"),
        ));
    }
    Ok(answer.json(Upload::of(files, summary)))
}

/// Empty fields are what an HTML form sends for those that were left out.
fn choice(fields: Vec<(String, String)>) -> Result<SubsetChoice, Problem> {
    let given = fields.into_iter().filter(|(_, text)| !text.is_empty());
    let fields = decode::from_pairs(given.collect())
        .map_err(|error| Problem::fields(Code::InvalidBody, vec![error]))?;
    subset_choice(fields)
}

/// What an upload says about its subset.
pub(super) fn subset_choice(fields: UploadFields) -> Result<SubsetChoice, Problem> {
    let background = fields.background.as_deref().map(str::parse).transpose();
    let background = background.map_err(|error: BackgroundError| {
        Problem::field(
            Code::InvalidSubset,
            "/background",
            "invalid_value",
            error.to_string(),
        )
    })?;
    Ok(SubsetChoice {
        background,
        name: fields.subset,
        repeats: fields.repeats,
        is_reg: fields.is_reg,
        instance_prompt: fields.instance_prompt,
        class_prompt: fields.class_prompt,
    })
}

impl Upload {
    pub(super) fn of(files: Vec<report::FileReport>, summary: report::Summary) -> Self {
        Self {
            files: files.into_iter().map(UploadedFile::from).collect(),
            summary: UploadSummary {
                images: summary.images,
                captions: summary.captions,
                duplicates: summary.duplicates,
                refused: summary.refused,
                warnings: summary.warnings,
            },
        }
    }
}

impl From<report::FileReport> for UploadedFile {
    fn from(file: report::FileReport) -> Self {
        let (outcome, image_id, subset, problem) = match file.outcome {
            report::Outcome::Accepted { image_id, subset } => {
                (UploadOutcome::Accepted, image_id, subset, None)
            }
            report::Outcome::Duplicate { image_id, subset } => {
                (UploadOutcome::Duplicate, Some(image_id), Some(subset), None)
            }
            report::Outcome::Refused(remark) => {
                (UploadOutcome::Refused, None, None, Some(remark.into()))
            }
            report::Outcome::Ignored => (UploadOutcome::Ignored, None, None, None),
        };
        Self {
            name: file.name,
            kind: file.kind.into(),
            outcome,
            image_id,
            subset,
            problem,
            remarks: file.remarks.into_iter().map(UploadRemark::from).collect(),
        }
    }
}

impl From<report::FileKind> for UploadedKind {
    fn from(kind: report::FileKind) -> Self {
        match kind {
            report::FileKind::Image => Self::Image,
            report::FileKind::Caption => Self::Caption,
            report::FileKind::Mask => Self::Mask,
            report::FileKind::Archive => Self::Archive,
            report::FileKind::Metadata => Self::Metadata,
            report::FileKind::Other => Self::Other,
        }
    }
}

impl From<report::Remark> for UploadRemark {
    fn from(remark: report::Remark) -> Self {
        Self {
            code: remark.code.to_owned(),
            message: remark.message,
        }
    }
}
