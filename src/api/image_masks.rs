//! `/v1/datasets/{dataset_id}/images/{image_id}/mask`: what of an image counts in the loss.

use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, put, route};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::download::{self, Download};
use super::images::{Image, image_answer};
use super::patch::insisted_revision;
use super::problem::{Problem, ProblemBody};
use super::upload_parts::{announced_length, receive};
use crate::datasets::DatasetService;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(put_image_mask)
        .service(get_image_mask)
        .service(delete_image_mask);
}

/// Give an image a mask.
///
/// The body is a picture of the image's size, or of its aspect ratio: white counts, black does not, grey counts in part
/// (the red channel on black, as sd-scripts takes it). It is kept as a grey PNG. A run with `loss.masked` uses it in place
/// of the image's own transparency, cut and flipped as the image. A run that has begun keeps what it began with.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of the image that is to be changed"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "The image", body = Image, headers(("ETag" = String))),
        (status = 400, description = "`malformed_body`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 411, description = "`length_required`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "`payload_too_large`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_mask`: no picture, or of another shape than the image", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[put("/datasets/{dataset_id}/images/{image_id}/mask")]
pub async fn put_image_mask(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let image = datasets.image(dataset_id, image_id).await?;
    let expected = insisted_revision(&request, image.revision)?;
    let most = datasets.limits().image_bytes;
    let size_bytes = announced_length(request.headers(), most, Code::InvalidMask)?;
    let scratch = datasets.scratch()?;
    let written = scratch.path().join("mask");
    receive(payload, &written, size_bytes).await?;
    let image = datasets.set_mask(&image, written, expected).await?;
    Ok(image_answer(image))
}

/// Download an image's mask.
///
/// A grey PNG, with ranges, validators and its digest.
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
        (status = 200, description = "The mask", content_type = "image/png", headers(("ETag" = String), ("Repr-Digest" = String))),
        (status = 206, description = "The wanted range", content_type = "image/png", headers(("Content-Range" = String))),
        (status = 304, description = "The client has it already"),
        (status = 404, description = "`dataset_not_found`, `image_not_found`, `mask_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 416, description = "`range_not_satisfiable`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[route(
    "/datasets/{dataset_id}/images/{image_id}/mask",
    method = "GET",
    method = "HEAD"
)]
pub async fn get_image_mask(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let image = datasets.image(dataset_id, image_id).await?;
    let Some(sha256) = image.mask_sha256 else {
        let detail = format!("the image {image_id} has no mask");
        return Err(Problem::new(Code::MaskNotFound, detail));
    };
    let stem = match image.file_name.rsplit_once('.') {
        Some((stem, _)) if !stem.is_empty() => stem,
        _ => &image.file_name,
    };
    let file = Download {
        path: &datasets.mask_path(&sha256),
        sha256: &sha256,
        media_type: "image/png",
        file_name: &format!("{stem}.mask.png"),
        inline: true,
    };
    download::serve(&request, file).await
}

/// Take an image's mask away.
///
/// Its transparency counts again. Runs that have begun keep the mask. An image without one stays as it is.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("image_id" = Uuid, Path, description = "The image's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of the image that is to be changed"),
    ),
    responses(
        (status = 204, description = "It has no mask"),
        (status = 404, description = "`dataset_not_found`, `image_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/datasets/{dataset_id}/images/{image_id}/mask")]
pub async fn delete_image_mask(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, image_id) = path.into_inner();
    let image = datasets.image(dataset_id, image_id).await?;
    let expected = insisted_revision(&request, image.revision)?;
    datasets.remove_mask(&image, expected).await?;
    Ok(HttpResponse::NoContent().finish())
}
