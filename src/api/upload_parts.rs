//! `/v1/datasets/{dataset_id}/uploads`: uploads that come in parts, for large archives over lines that break.

use std::path::Path;

use actix_web::http::header::{self, HeaderMap};
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, post, put};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::Json;
use super::multipart::disk;
use super::page::Page;
use super::problem::{Problem, ProblemBody};
use super::twins::same_variants;
use super::uploads::{self, Upload};
use crate::datasets::DatasetService;
use crate::datasets::parts::{Announcement, MAX_PART_BYTES, MAX_PARTS, Part};
use crate::store::uploads as rows;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(create_upload)
        .service(list_uploads)
        .service(get_upload)
        .service(put_upload_part)
        .service(complete_upload)
        .service(delete_upload);
}

/// A file that will come in parts, and where its content goes.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "lumo.zip", "size_bytes": 3_221_225_472_i64}))]
pub struct CreateUpload {
    /// The file's name, as a form would give it.
    #[schema(min_length = 1, max_length = 255)]
    pub name: String,
    /// Of all parts together.
    #[schema(minimum = 1, maximum = 34359738368_i64)]
    pub size_bytes: u64,
    /// Of all parts together, in hex; compared when the upload is completed.
    #[schema(pattern = "^[0-9a-fA-F]{64}$")]
    pub sha256: Option<String>,
    /// As the fields of `POST /v1/datasets/{dataset_id}/images`.
    #[schema(min_length = 1, max_length = 128)]
    pub subset: Option<String>,
    #[schema(minimum = 1, maximum = 10000)]
    pub repeats: Option<u32>,
    pub is_reg: Option<bool>,
    #[schema(max_length = 1000)]
    pub instance_prompt: Option<String>,
    #[schema(max_length = 1000)]
    pub class_prompt: Option<String>,
    #[schema(pattern = "^#[0-9a-fA-F]{6}$")]
    pub background: Option<String>,
}

/// An upload that comes in parts.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c1e-8b01-7f12-9b34-1a2b3c4d5e6f", "dataset_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11",
    "name": "lumo.zip", "size_bytes": 3_221_225_472_i64, "sha256": null, "state": "open", "received_bytes": 67_108_864,
    "parts": [{"number": 1, "size_bytes": 67_108_864,
               "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}],
    "max_part_bytes": 1_073_741_824, "result": null,
    "created_at": "2026-11-28T06:40:00Z", "updated_at": "2026-11-28T06:41:12.5Z"
}))]
pub struct PartUpload {
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub name: String,
    pub size_bytes: u64,
    pub sha256: Option<String>,
    pub state: PartUploadState,
    /// Of the parts that are there.
    pub received_bytes: u64,
    /// The parts that are there, by number.
    pub parts: Vec<UploadPart>,
    /// Bytes that a part may have.
    pub max_part_bytes: u64,
    /// What became of the files, once it is completed.
    #[schema(value_type = Option<Upload>)]
    pub result: Option<Value>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When something last came. An upload is forgotten three days later.
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
}

/// `open`: parts may come. `completing`: they are put together and taken in.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PartUploadState {
    Open,
    Completing,
    Completed,
}

same_variants!(PartUploadState, rows::UploadState: Open, Completing, Completed);

/// A part that is there.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "number": 1, "size_bytes": 67_108_864,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
}))]
pub struct UploadPart {
    pub number: u32,
    pub size_bytes: u64,
    /// Of its content, in lower-case hex.
    pub sha256: String,
}

/// Begin an upload in parts.
///
/// For large archives over lines that break: send the parts one by one to `…/parts/{number}`, in any order, again where
/// it is needed, and complete it. Parts are on disk and outlive the service; an upload to which nothing comes for three
/// days is forgotten.
#[utoipa::path(
    tag = "images",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id")),
    request_body = CreateUpload,
    responses(
        (status = 201, description = "The upload", body = PartUpload, headers(("Location" = String))),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`too_many_uploads`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_upload`, `invalid_subset`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/datasets/{dataset_id}/uploads")]
pub async fn create_upload(
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
    body: Json<CreateUpload>,
) -> Result<HttpResponse, Problem> {
    let announcement = announcement(body.into_inner())?;
    let upload = datasets.announce(*dataset_id, announcement).await?;
    let location = format!("/v1/datasets/{dataset_id}/uploads/{}", upload.id);
    Ok(HttpResponse::Created()
        .insert_header((header::LOCATION, location))
        .json(PartUpload::of(upload, Vec::new())))
}

/// List a dataset's uploads in parts.
///
/// All of them on one page, oldest first, completed ones for three days.
#[utoipa::path(
    tag = "images",
    params(("dataset_id" = Uuid, Path, description = "The dataset's id")),
    responses(
        (status = 200, description = "The uploads", body = Page<PartUpload>),
        (status = 404, description = "`dataset_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/uploads")]
pub async fn list_uploads(
    datasets: Data<DatasetService>,
    dataset_id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let found = datasets.parted_uploads(*dataset_id).await?;
    let wire = |(upload, parts)| PartUpload::of(upload, parts);
    Ok(HttpResponse::Ok().json(Page {
        data: found.into_iter().map(wire).collect(),
        next_cursor: None,
    }))
}

/// Get an upload in parts.
///
/// With the parts that are there: who was interrupted sends the others. Once it is completed, with what became of the
/// files.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("upload_id" = Uuid, Path, description = "The upload's id"),
    ),
    responses(
        (status = 200, description = "The upload", body = PartUpload),
        (status = 404, description = "`dataset_not_found`, `upload_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/datasets/{dataset_id}/uploads/{upload_id}")]
pub async fn get_upload(
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, upload_id) = path.into_inner();
    let (upload, parts) = datasets.parted_upload(dataset_id, upload_id).await?;
    Ok(HttpResponse::Ok().json(PartUpload::of(upload, parts)))
}

/// Send a part of an upload.
///
/// The body is the part's bytes, at most 1 GiB. The same number again replaces the part: what was broken off is sent
/// again, in any order and from several connections. `Content-Digest: sha-256=:…:` (RFC 9530) is compared.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("upload_id" = Uuid, Path, description = "The upload's id"),
        ("number" = u32, Path, description = "The part's number, from 1", minimum = 1, maximum = 10000, example = 1),
        ("Content-Digest" = Option<String>, Header, description = "`sha-256=:BASE64:` of the part"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "The part", body = UploadPart),
        (status = 400, description = "`malformed_body`, `invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`dataset_not_found`, `upload_not_found`, `not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`upload_not_open`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 411, description = "`length_required`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "`payload_too_large`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`checksum_mismatch`, `invalid_upload`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[put("/datasets/{dataset_id}/uploads/{upload_id}/parts/{number}")]
pub async fn put_upload_part(
    request: HttpRequest,
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid, u32)>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, upload_id, number) = path.into_inner();
    let (upload, _) = datasets.parted_upload(dataset_id, upload_id).await?;
    if !(1..=MAX_PARTS).contains(&number) {
        let detail = format!("found part {number}, expected 1 to {MAX_PARTS}");
        return Err(Problem::new(Code::InvalidUpload, detail));
    }
    let most = MAX_PART_BYTES.min(upload.size_bytes);
    let size_bytes = announced_length(request.headers(), most, Code::InvalidUpload)?;
    let expected = content_digest(request.headers())?;
    let scratch = datasets.scratch()?;
    let written = scratch.path().join("part");
    let digest = receive(payload, &written, size_bytes).await?;
    if expected.is_some_and(|expected| expected != digest) {
        let found = hex::encode(digest);
        let detail = format!("found the SHA-256 {found}, expected what Content-Digest says");
        return Err(Problem::new(Code::ChecksumMismatch, detail));
    }
    let part = Part {
        number,
        size_bytes,
        sha256: hex::encode(digest),
    };
    let part = datasets.keep_part(&upload, part, written).await?;
    Ok(HttpResponse::Ok().json(UploadPart::from(part)))
}

/// Complete an upload in parts.
///
/// The parts are put together and taken in like any other upload, and the answer says what became of each file. It is
/// kept for three days: asked again, it is the same. The work goes on when the line breaks; until it is done another
/// request is a 409.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("upload_id" = Uuid, Path, description = "The upload's id"),
    ),
    responses(
        (status = 200, description = "What became of the files", body = Upload),
        (status = 404, description = "`dataset_not_found`, `upload_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`upload_incomplete`, `upload_not_open`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`checksum_mismatch`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/datasets/{dataset_id}/uploads/{upload_id}/complete")]
pub async fn complete_upload(
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, upload_id) = path.into_inner();
    let answer = datasets
        .complete_upload(dataset_id, upload_id, |files, summary| {
            // Words and numbers always have a JSON.
            serde_json::to_string(&Upload::of(files, summary)).unwrap_or_default()
        })
        .await?;
    Ok(HttpResponse::Ok()
        .content_type("application/json")
        .body(answer))
}

/// Give up an upload in parts.
///
/// Its parts are removed. Images of a completed one stay; only its answer is forgotten.
#[utoipa::path(
    tag = "images",
    params(
        ("dataset_id" = Uuid, Path, description = "The dataset's id"),
        ("upload_id" = Uuid, Path, description = "The upload's id"),
    ),
    responses(
        (status = 204, description = "Removed"),
        (status = 404, description = "`dataset_not_found`, `upload_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`upload_not_open`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/datasets/{dataset_id}/uploads/{upload_id}")]
pub async fn delete_upload(
    datasets: Data<DatasetService>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (dataset_id, upload_id) = path.into_inner();
    datasets.abandon_upload(dataset_id, upload_id).await?;
    Ok(HttpResponse::NoContent().finish())
}

fn announcement(body: CreateUpload) -> Result<Announcement, Problem> {
    let choice = uploads::subset_choice(uploads::UploadFields {
        subset: body.subset,
        repeats: body.repeats,
        is_reg: body.is_reg,
        instance_prompt: body.instance_prompt,
        class_prompt: body.class_prompt,
        background: body.background,
    })?;
    Ok(Announcement {
        name: body.name,
        size_bytes: body.size_bytes,
        sha256: body.sha256,
        choice,
    })
}

/// How long the body will be, before anything of it is read; `empty` is the problem of one without a byte.
pub(super) fn announced_length(
    headers: &HeaderMap,
    most: u64,
    empty: Code,
) -> Result<u64, Problem> {
    let text = headers.get(header::CONTENT_LENGTH);
    let length = text.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let Some(length) = length else {
        let detail = "found no Content-Length, expected one";
        return Err(Problem::new(Code::LengthRequired, detail));
    };
    if length == 0 {
        return Err(Problem::new(empty, "the body is empty"));
    }
    if length > most {
        let detail = format!("found {length} bytes, expected at most {most}");
        return Err(Problem::new(Code::PayloadTooLarge, detail));
    }
    Ok(length)
}

/// The SHA-256 that the client has computed; other digests are left alone, as RFC 9530 wants it.
fn content_digest(headers: &HeaderMap) -> Result<Option<[u8; 32]>, Problem> {
    let Some(value) = headers.get("content-digest") else {
        return Ok(None);
    };
    let wrong = || {
        let detail = "found another Content-Digest, expected sha-256=:BASE64:";
        Problem::new(Code::InvalidHeader, detail)
    };
    let text = value.to_str().map_err(|_| wrong())?;
    for member in text.split(',') {
        let Some(digest) = member.trim().strip_prefix("sha-256=") else {
            continue;
        };
        let digest = digest.strip_prefix(':').and_then(|d| d.strip_suffix(':'));
        let bytes = BASE64_STANDARD.decode(digest.ok_or_else(wrong)?);
        let bytes = bytes.map_err(|_| wrong())?;
        return bytes.try_into().map(Some).map_err(|_| wrong());
    }
    Ok(None)
}

/// Writes a body to a file; its SHA-256.
pub(super) async fn receive(
    mut payload: web::Payload,
    path: &Path,
    expected: u64,
) -> Result<[u8; 32], Problem> {
    let mut file = File::create_new(path).await.map_err(disk)?;
    let mut hasher = Sha256::new();
    let mut size = 0_u64;
    while let Some(chunk) = payload.next().await {
        let chunk = chunk.map_err(|error| Problem::new(Code::MalformedBody, error.to_string()))?;
        size += chunk.len() as u64;
        hasher.update(&chunk);
        file.write_all(&chunk).await.map_err(disk)?;
    }
    file.flush().await.map_err(disk)?;
    if size != expected {
        let detail = format!("found {size} bytes, expected {expected}");
        return Err(Problem::new(Code::MalformedBody, detail));
    }
    Ok(hasher.finalize().into())
}

impl PartUpload {
    fn of(upload: rows::PartedUpload, parts: Vec<Part>) -> Self {
        let answer = upload.answer.as_deref();
        Self {
            id: upload.id,
            dataset_id: upload.dataset_id,
            name: upload.name,
            size_bytes: upload.size_bytes,
            sha256: upload.sha256,
            state: upload.state.into(),
            received_bytes: parts.iter().map(|part| part.size_bytes).sum(),
            parts: parts.into_iter().map(UploadPart::from).collect(),
            max_part_bytes: MAX_PART_BYTES,
            result: answer.and_then(|answer| serde_json::from_str(answer).ok()),
            created_at: upload.created_at,
            updated_at: upload.updated_at,
        }
    }
}

impl From<Part> for UploadPart {
    fn from(part: Part) -> Self {
        Self {
            number: part.number,
            size_bytes: part.size_bytes,
            sha256: part.sha256,
        }
    }
}
