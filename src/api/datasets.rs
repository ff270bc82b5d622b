//! `/v1/datasets` and their subsets. Images are in `images`.

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, patch, post};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::captioning::{SubsetAugment, SubsetCaptions};
use super::codes::Code;
use super::colors::ColorCorrection;
use super::extract::{Json, Query};
use super::idempotency::{self, Created};
use super::page::{Page, PageQuery, PageRequest};
use super::patch::{MergePatch, check_if_match, etag, insisted_revision};
use super::problem::{FieldError, Problem, ProblemBody};
use crate::datasets::{DatasetError, DatasetService, InvalidField};
use crate::store::datasets as rows;
use crate::store::{Store, StoreError};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(create_dataset)
        .service(list_datasets)
        .service(get_dataset)
        .service(update_dataset)
        .service(delete_dataset)
        .service(list_subsets)
        .service(get_subset)
        .service(update_subset);
}

/// What a new dataset is made from.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "lumo"}))]
pub struct CreateDataset {
    /// 1 to 128 characters; need not be unique.
    #[schema(min_length = 1, max_length = 128)]
    pub name: String,
}

/// A named set of subsets.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11", "name": "lumo", "subsets": 2, "images": 40, "reg_images": 20,
    "captioned_images": 40, "color_correction": null, "created_at": "2026-11-25T06:40:00Z", "updated_at": "2026-11-25T06:41:12.5Z"
}))]
pub struct Dataset {
    pub id: Uuid,
    pub name: String,
    /// How many subsets it has.
    pub subsets: u64,
    /// How many images it has, those for regularization included.
    pub images: u64,
    /// How many images are for regularization.
    pub reg_images: u64,
    /// How many images have a caption.
    pub captioned_images: u64,
    /// What is done to the colours of images that say nothing themselves.
    pub color_correction: Option<ColorCorrection>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When the dataset, a subset or an image last changed.
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
}

/// The part of a dataset that PATCH changes.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"color_correction": "grey_world"}))]
pub struct DatasetPatch {
    /// 1 to 128 characters; need not be unique.
    #[schema(required = false, min_length = 1, max_length = 128)]
    pub name: String,
    /// What is done to the colours of images that say nothing themselves; `null` leaves them as they are.
    pub color_correction: Option<ColorCorrection>,
}

/// A concept, or the regularization of one.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c1e-7b5f-7d21-8c43-5e6f7a8b9c0d", "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11",
    "name": "10_lumo", "repeats": 10, "is_reg": false, "instance_prompt": "lumo", "class_prompt": null,
    "captions": {
        "shuffle_captions": true, "caption_separator": null, "keep_tokens": 1, "keep_tokens_separator": null,
        "secondary_separator": null, "caption_dropout_rate": null, "caption_dropout_every_n_epochs": null,
        "caption_tag_dropout_rate": null, "caption_prefix": null, "caption_suffix": null, "enable_wildcards": null,
        "token_warmup_min": null, "token_warmup_step": null
    },
    "augment": {"flip_aug": true, "color_aug": null, "random_crop": null},
    "images": 20, "captioned_images": 20, "created_at": "2026-11-25T06:40:02Z"
}))]
pub struct Subset {
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub name: String,
    /// How often an epoch shows each image.
    pub repeats: u32,
    /// Whether the images only keep what the model knew before.
    pub is_reg: bool,
    /// The caption of images that have none.
    pub instance_prompt: Option<String>,
    /// The caption of regularization images that have none.
    pub class_prompt: Option<String>,
    /// What becomes of its captions in training, where that differs from the run's `captions`.
    pub captions: SubsetCaptions,
    /// What becomes of its pictures in training, where that differs from the run's `augment`.
    pub augment: SubsetAugment,
    pub images: u64,
    pub captioned_images: u64,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// The part of a subset that PATCH changes.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "repeats": 5, "class_prompt": null, "captions": {"shuffle_captions": true, "keep_tokens": 1}, "augment": {"flip_aug": false}
}))]
pub struct SubsetPatch {
    /// 1 to 128 characters, unique in its dataset, usable as a folder's name.
    #[schema(required = false, min_length = 1, max_length = 128)]
    pub name: String,
    /// 1 to 10000.
    #[schema(required = false, minimum = 1, maximum = 10000)]
    pub repeats: u32,
    #[schema(required = false)]
    pub is_reg: bool,
    /// At most 1000 characters in one line; `null` removes it.
    pub instance_prompt: Option<String>,
    /// At most 1000 characters in one line; `null` removes it.
    pub class_prompt: Option<String>,
    /// Only what is given changes; `null` is as the run has it.
    #[serde(default)]
    pub captions: SubsetCaptions,
    /// Only what is given changes; `null` is as the run has it.
    #[serde(default)]
    pub augment: SubsetAugment,
}

/// Make a dataset.
///
/// It is empty: upload images to `/v1/datasets/{dataset_id}/images` next. With an `Idempotency-Key` the same request
/// can be sent again safely; the first answer is replayed for 24 hours.
#[utoipa::path(
    tag = "datasets",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt")),
    request_body = CreateDataset,
    responses(
        (status = 201, description = "The dataset", body = Dataset, headers(("Location" = String))),
        (status = 409, description = "`idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_dataset`, `invalid_body`, `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/datasets")]
pub async fn create_dataset(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    store: Data<Store>,
    body: Json<CreateDataset>,
) -> Result<HttpResponse, Problem> {
    let payload = body.into_inner();
    let name = payload.name.clone();
    let run = async move {
        let made = datasets.create(&name).await?;
        let location = format!("/v1/datasets/{}", made.id);
        Created::new(location, &Dataset::of(made, rows::DatasetCounts::default()))
    };
    idempotency::once(&store, &request, "POST /v1/datasets", &payload, run).await
}

/// List datasets.
///
/// Oldest first, page by page.
#[utoipa::path(
    tag = "datasets",
    params(PageQuery),
    responses(
        (status = 200, description = "A page of datasets", body = Page<Dataset>),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets")]
pub async fn list_datasets(
    datasets: Data<DatasetService>,
    query: Query<PageQuery>,
) -> Result<HttpResponse, Problem> {
    let page = PageRequest::try_from(query.into_inner())?;
    let rows = datasets.list(page.after_id()?, page.rows()).await?;
    let wire = |(dataset, counts)| Dataset::of(dataset, counts);
    Ok(HttpResponse::Ok().json(page.page(rows, |(dataset, _)| dataset.id.to_string(), wire)))
}

/// Get a dataset.
///
/// With the number of its images. The ETag changes with everything in the dataset.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id")),
    responses(
        (status = 200, description = "The dataset", body = Dataset, headers(("ETag" = String))),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}")]
pub async fn get_dataset(
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let (dataset, counts) = datasets.get(*dataset_id).await?;
    Ok(HttpResponse::Ok()
        .insert_header((header::ETAG, etag(dataset.revision)))
        .json(Dataset::of(dataset, counts)))
}

/// Change a dataset.
///
/// A JSON merge-patch: its name, and what is done to the colours of its images before they are trained on. No file is
/// changed, and a run that was made keeps what it was made with.
#[utoipa::path(
    tag = "datasets",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag that the change is based on"),
    ),
    request_body(content = DatasetPatch, content_type = "application/merge-patch+json"),
    responses(
        (status = 200, description = "The dataset", body = Dataset, headers(("ETag" = String))),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_dataset`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[patch("/datasets/{dataset_id}")]
pub async fn update_dataset(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
    patch: MergePatch,
) -> Result<HttpResponse, Problem> {
    let (dataset, _) = datasets.get(*dataset_id).await?;
    let expected = insisted_revision(&request, dataset.revision)?;
    let DatasetPatch {
        name,
        color_correction,
    } = patch.apply_to(&DatasetPatch {
        name: dataset.name,
        color_correction: dataset.color_correction.map(Into::into),
    })?;
    let (dataset, counts) = datasets
        .update(
            *dataset_id,
            &name,
            color_correction.map(Into::into),
            expected,
        )
        .await?;
    Ok(HttpResponse::Ok()
        .insert_header((header::ETAG, etag(dataset.revision)))
        .json(Dataset::of(dataset, counts)))
}

/// Delete a dataset.
///
/// Its subsets, images and captions go with it. A dataset that a run refers to stays: delete the runs first.
#[utoipa::path(
    tag = "datasets",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what is to be deleted"),
    ),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`dataset_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/datasets/{dataset_id}")]
pub async fn delete_dataset(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let (dataset, _) = datasets.get(*dataset_id).await?;
    let expected = insisted_revision(&request, dataset.revision)?;
    datasets.delete(*dataset_id, expected).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// List the subsets of a dataset.
///
/// All of them on one page, oldest first. A subset comes into being when images are uploaded to it.
#[utoipa::path(
    tag = "datasets",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id")),
    responses(
        (status = 200, description = "The subsets", body = Page<Subset>),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/subsets")]
pub async fn list_subsets(
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let subsets = datasets.subsets(*dataset_id).await?;
    let data = subsets
        .into_iter()
        .map(|(subset, counts)| Subset::of(subset, counts));
    Ok(HttpResponse::Ok().json(Page {
        data: data.collect(),
        next_cursor: None,
    }))
}

/// Get a subset.
///
/// Its ETag guards a later PATCH.
#[utoipa::path(
    tag = "datasets",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("subset_id" = Uuid, Path, description = "The subset's id"),
    ),
    responses(
        (status = 200, description = "The subset", body = Subset, headers(("ETag" = String))),
        (status = 404, description = "`dataset_not_found`, `subset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/subsets/{subset_id}")]
pub async fn get_subset(
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, subset_id) = path.into_inner();
    let (subset, counts) = datasets.subset(dataset_id, subset_id).await?;
    Ok(subset_answer(subset, counts))
}

/// Change a subset.
///
/// A JSON merge-patch: repeats, regularization, prompts, name, and what training does with captions and pictures. `null`
/// removes a prompt, or leaves a setting to the run. Runs that were made before keep what they were made with.
#[utoipa::path(
    tag = "datasets",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("subset_id" = Uuid, Path, description = "The subset's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag that the change is based on"),
    ),
    request_body(content = SubsetPatch, content_type = "application/merge-patch+json"),
    responses(
        (status = 200, description = "The subset", body = Subset, headers(("ETag" = String))),
        (status = 404, description = "`dataset_not_found`, `subset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`subset_exists`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_subset`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[patch("/datasets/{dataset_id}/subsets/{subset_id}")]
pub async fn update_subset(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
    patch: MergePatch,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, subset_id) = path.into_inner();
    let (subset, counts) = datasets.subset(dataset_id, subset_id).await?;
    check_if_match(&request, &etag(subset.revision))?;
    let settings = patch.apply_to(&SubsetPatch::of(&subset))?.into();
    let subset = datasets
        .update_subset(subset_id, &settings, subset.revision)
        .await?;
    Ok(subset_answer(subset, counts))
}

fn subset_answer(subset: rows::Subset, counts: rows::SubsetCounts) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((header::ETAG, etag(subset.revision)))
        .json(Subset::of(subset, counts))
}

impl Dataset {
    fn of(dataset: rows::Dataset, counts: rows::DatasetCounts) -> Self {
        Self {
            id: dataset.id,
            name: dataset.name,
            subsets: counts.subsets,
            images: counts.images,
            reg_images: counts.reg_images,
            captioned_images: counts.captioned_images,
            color_correction: dataset.color_correction.map(Into::into),
            created_at: dataset.created_at,
            updated_at: dataset.updated_at,
        }
    }
}

impl Subset {
    fn of(subset: rows::Subset, counts: rows::SubsetCounts) -> Self {
        Self {
            id: subset.id,
            dataset_id: subset.dataset_id,
            name: subset.name,
            repeats: subset.repeats,
            is_reg: subset.is_reg,
            instance_prompt: subset.instance_prompt,
            class_prompt: subset.class_prompt,
            captions: subset.training.captions.into(),
            augment: subset.training.augment.into(),
            images: counts.images,
            captioned_images: counts.captioned_images,
            created_at: subset.created_at,
        }
    }
}

impl SubsetPatch {
    fn of(subset: &rows::Subset) -> Self {
        Self {
            name: subset.name.clone(),
            repeats: subset.repeats,
            is_reg: subset.is_reg,
            instance_prompt: subset.instance_prompt.clone(),
            class_prompt: subset.class_prompt.clone(),
            captions: subset.training.captions.clone().into(),
            augment: subset.training.augment.into(),
        }
    }
}

impl From<SubsetPatch> for rows::SubsetSettings {
    fn from(patch: SubsetPatch) -> Self {
        Self {
            name: patch.name,
            repeats: patch.repeats,
            is_reg: patch.is_reg,
            instance_prompt: patch.instance_prompt,
            class_prompt: patch.class_prompt,
            training: rows::SubsetTraining {
                captions: patch.captions.into(),
                augment: patch.augment.into(),
            },
        }
    }
}

impl From<DatasetError> for Problem {
    fn from(error: DatasetError) -> Self {
        let code = match &error {
            DatasetError::DatasetNotFound(_) => Code::DatasetNotFound,
            DatasetError::SubsetNotFound(_) => Code::SubsetNotFound,
            DatasetError::ImageNotFound(_) => Code::ImageNotFound,
            DatasetError::InUse => Code::DatasetInUse,
            DatasetError::Changed { .. } => Code::PreconditionFailed,
            DatasetError::InvalidDataset(fields) => return wrong(Code::InvalidDataset, fields),
            DatasetError::InvalidSubset(fields) => return wrong(Code::InvalidSubset, fields),
            DatasetError::SubsetExists(_) => Code::SubsetExists,
            DatasetError::Caption(error) => {
                let message = error.to_string();
                return Problem::field(Code::InvalidCaption, "/caption", "invalid_value", message);
            }
            DatasetError::Mask(_) => Code::InvalidMask,
            DatasetError::UploadNotFound(_) => Code::UploadNotFound,
            DatasetError::InvalidUpload(fields) => return wrong(Code::InvalidUpload, fields),
            DatasetError::TooManyUploads(_) => Code::TooManyUploads,
            DatasetError::UploadNotOpen => Code::UploadNotOpen,
            DatasetError::UploadIncomplete(_) => Code::UploadIncomplete,
            DatasetError::ChecksumMismatch { .. } => Code::ChecksumMismatch,
            DatasetError::InstancePrompt(_) => {
                let message = error.to_string();
                let code = Code::InstancePromptInRegularization;
                return Problem::field(code, "/caption", "invalid_value", message);
            }
            DatasetError::NothingToUndo(_) => Code::NothingToUndo,
            DatasetError::NothingUploaded => Code::NothingUploaded,
            DatasetError::Io(_) | DatasetError::Task(_) | DatasetError::Store(_) => {
                return internal(error);
            }
        };
        Problem::new(code, error.to_string())
    }
}

fn wrong(code: Code, fields: &[InvalidField]) -> Problem {
    let field = |wrong: &InvalidField| {
        FieldError::new(format!("/{}", wrong.field), wrong.code, &wrong.message)
    };
    Problem::fields(code, fields.iter().map(field).collect())
}

/// A full disk is the one failure of ours that a client can do something about.
fn internal(error: DatasetError) -> Problem {
    match error {
        DatasetError::Io(source) | DatasetError::Store(StoreError::Io { source, .. }) => {
            super::multipart::disk(source)
        }
        error => Problem::internal(error),
    }
}
