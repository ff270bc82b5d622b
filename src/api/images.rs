//! `/v1/datasets/{dataset_id}/images`: metadata, captions and content. Uploads are in `uploads`.

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, patch, route};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::auth;
use super::codes::Code;
use super::colors::ColorCorrection;
use super::download::{self, Download};
use super::extract::Query;
use super::page::{Page, PageQuery, PageRequest};
use super::patch::{MergePatch, check_if_match, etag, insisted_revision};
use super::problem::{Problem, ProblemBody};
use crate::datasets::DatasetService;
use crate::store::datasets as rows;

/// The most characters that are looked for.
const MAX_WORDS_CHARS: usize = 1000;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(list_images)
        .service(get_image)
        .service(update_image)
        .service(delete_image)
        .service(get_image_content);
}

/// An image and its caption.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c1e-8a01-7f12-9b34-1a2b3c4d5e6f", "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11",
    "subset_id": "019a9c1e-7b5f-7d21-8c43-5e6f7a8b9c0d", "subset": "10_lumo", "file_name": "lumo_00.png",
    "caption": "lumo, a small robot", "color_correction": null, "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "media_type": "image/png", "size_bytes": 5120, "width_px": 64, "height_px": 64,
    "has_alpha": false, "background": null, "mask_sha256": null, "created_at": "2026-11-25T06:40:02Z", "updated_at": "2026-11-25T06:40:02Z"
}))]
pub struct Image {
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub subset_id: Uuid,
    /// The subset's name.
    pub subset: String,
    pub file_name: String,
    /// `null` without a caption; the subset's prompt is used then.
    pub caption: Option<String>,
    /// What is done to its colours; `null` leaves it to the dataset.
    pub color_correction: Option<ColorCorrection>,
    /// Of the content, in lower-case hex.
    pub sha256: String,
    pub media_type: String,
    pub size_bytes: u64,
    /// As a viewer shows it: after the EXIF orientation.
    pub width_px: u32,
    pub height_px: u32,
    /// Whether any pixel is not wholly opaque.
    pub has_alpha: bool,
    /// What it is laid on where it is transparent, as the upload said; `null` drops alpha, as sd-scripts does.
    pub background: Option<String>,
    /// Of its mask, in lower-case hex; `null` without one.
    pub mask_sha256: Option<String>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
}

/// The part of an image that PATCH changes.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"caption": "lumo, a small robot, smiling"}))]
pub struct ImagePatch {
    /// At most 256 KiB. Of several lines a run uses the first, or with `enable_wildcards` one of them each time. `null`
    /// removes the caption. Of a regularization image it must not name an instance prompt of the dataset.
    pub caption: Option<String>,
    /// What is done to its colours before it is trained on; `null` leaves it to the dataset. The file stays as it is.
    pub color_correction: Option<ColorCorrection>,
}

/// Which images.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ImageQuery {
    /// How many at most.
    #[param(minimum = 1, maximum = 200, default = 50)]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    pub cursor: Option<String>,
    /// Only images of this subset.
    pub subset_id: Option<Uuid>,
    /// Only images whose caption has this tag, in capitals or not.
    #[param(max_length = 1000)]
    pub tag: Option<String>,
    /// Only images with this text in the caption or the file name, in capitals or not.
    #[param(max_length = 1000)]
    pub text: Option<String>,
    /// Only images with (`true`) or without a caption.
    pub captioned: Option<bool>,
}

/// List the images of a dataset.
///
/// Oldest first, page by page; those of a subset, with a tag or a text, with or without a caption.
#[utoipa::path(
    tag = "images",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id"), ImageQuery),
    responses(
        (status = 200, description = "A page of images", body = Page<Image>),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/images")]
pub async fn list_images(
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
    query: Query<ImageQuery>,
) -> Result<HttpResponse, Problem> {
    let ImageQuery {
        limit,
        cursor,
        subset_id,
        tag,
        text,
        captioned,
    } = query.into_inner();
    for (pointer, words) in [("/tag", &tag), ("/text", &text)] {
        let found = words.as_ref().map_or(0, |words| words.chars().count());
        if found > MAX_WORDS_CHARS {
            let message = format!("found {found} characters, expected at most {MAX_WORDS_CHARS}");
            return Err(Problem::field(
                Code::InvalidQuery,
                pointer,
                "out_of_range",
                message,
            ));
        }
    }
    let filter = rows::ImageFilter {
        subset_id,
        captioned,
        tag,
        text,
    };
    let page = PageRequest::try_from(PageQuery { limit, cursor })?;
    let rows = datasets
        .images(*dataset_id, &filter, page.after_id()?, page.rows())
        .await?;
    Ok(HttpResponse::Ok().json(page.page(rows, |image| image.id.to_string(), Image::from)))
}

/// Get an image's metadata.
///
/// Its ETag guards a later PATCH; the picture itself is at `/content`.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
    ),
    responses(
        (status = 200, description = "The image", body = Image, headers(("ETag" = String))),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/images/{image_id}")]
pub async fn get_image(
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    Ok(image_answer(datasets.image(dataset_id, image_id).await?))
}

/// Change an image's caption or colour correction.
///
/// A JSON merge-patch; `null` removes either. A run that has begun keeps what it began with. How a colour correction
/// looks is told beforehand by `…/preview?color_correction=…`.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag that the change is based on"),
    ),
    request_body(content = ImagePatch, content_type = "application/merge-patch+json"),
    responses(
        (status = 200, description = "The image", body = Image, headers(("ETag" = String))),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_caption`, `invalid_body`, `instance_prompt_in_regularization`: the caption of a regularization image would name an instance prompt", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[patch("/datasets/{dataset_id}/images/{image_id}")]
pub async fn update_image(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
    patch: MergePatch,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let image = datasets.image(dataset_id, image_id).await?;
    check_if_match(&request, &etag(image.revision))?;
    let key = auth::key_of(&request);
    let before = ImagePatch {
        caption: image.caption.clone(),
        color_correction: image.color_correction.map(Into::into),
    };
    let after = patch.apply_to(&before)?;
    let update = rows::ImageUpdate {
        caption: after.caption,
        color_correction: after.color_correction.map(Into::into),
    };
    let image = datasets
        .update_image(&image, update, Some(image.revision), key)
        .await?;
    Ok(image_answer(image))
}

/// Delete an image.
///
/// Its caption goes with it. Runs that have begun keep their own copy.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what is to be deleted"),
    ),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/datasets/{dataset_id}/images/{image_id}")]
pub async fn delete_image(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let image = datasets.image(dataset_id, image_id).await?;
    let expected = insisted_revision(&request, image.revision)?;
    datasets.delete_image(image.id, expected).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Download an image.
///
/// The file as it was uploaded, with ranges, validators and its digest.
#[utoipa::path(
    method(get, head),
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
        ("Range" = Option<String>, Header, description = "One range of bytes"),
        ("If-None-Match" = Option<String>, Header, description = "ETags the client has already"),
    ),
    responses(
        (status = 200, description = "The file", content_type = "image/*", headers(("ETag" = String), ("Repr-Digest" = String))),
        (status = 206, description = "The wanted range", content_type = "image/*", headers(("Content-Range" = String))),
        (status = 304, description = "The client has it already"),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 416, description = "`range_not_satisfiable`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[route(
    "/datasets/{dataset_id}/images/{image_id}/content",
    method = "GET",
    method = "HEAD"
)]
pub async fn get_image_content(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let image = datasets.image(dataset_id, image_id).await?;
    let file = Download {
        path: &datasets.content_path(&image),
        sha256: &image.sha256,
        media_type: &image.media_type,
        file_name: &image.file_name,
        inline: true,
    };
    download::serve(&request, file).await
}

pub(super) fn image_answer(image: rows::Image) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((header::ETAG, etag(image.revision)))
        .json(Image::from(image))
}

impl From<rows::Image> for Image {
    fn from(image: rows::Image) -> Self {
        Self {
            id: image.id,
            dataset_id: image.dataset_id,
            subset_id: image.subset_id,
            subset: image.subset_name,
            file_name: image.file_name,
            caption: image.caption,
            color_correction: image.color_correction.map(Into::into),
            sha256: image.sha256,
            media_type: image.media_type,
            size_bytes: image.size_bytes,
            width_px: image.width_px,
            height_px: image.height_px,
            has_alpha: image.has_alpha,
            background: image.background,
            mask_sha256: image.mask_sha256,
            created_at: image.created_at,
            updated_at: image.updated_at,
        }
    }
}
