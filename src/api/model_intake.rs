//! What `POST /v1/models` and `POST /v1/vaes` share: a path that is registered, or a file that is streamed into the model
//! folder.

use actix_web::http::header;
use actix_web::web;
use actix_web::{HttpRequest, HttpResponse};
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::fs::File;
use tokio::io::{AsyncWriteExt as _, BufWriter};
use utoipa::{IntoParams, ToSchema};

use super::codes::Code;
use super::decode;
use super::extract::read_json;
use super::idempotency::{self, Created};
use super::models::Model;
use super::multipart;
use super::problem::Problem;
use super::vaes::Vae;
use crate::datasets::limits::Limits;
use crate::models::{IntakeError, Kind, ModelCatalog, Taken};
use crate::store::Store;

/// The largest file; Stable Diffusion XL in 32 bits has 13 GB, but is published in 16.
pub const MAX_FILE_BYTES: u64 = 10 << 30;
/// What a form has around its file.
const MAX_FORM_BYTES: u64 = 1 << 20;
/// Bytes gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// Registers what lies in the model folder already.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"path": "sd15/v1-5-pruned-emaonly.safetensors"}))]
pub struct RegisterModel {
    /// Its path below the model folder.
    #[schema(min_length = 1, max_length = 1024)]
    pub path: String,
}

/// What a file is called that is sent without a form. A form has no schema in the documents: generators of clients write code
/// that does not compile where an operation takes JSON, bytes and a form. Its description tells of it.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UploadName {
    /// The file's name, with its ending; for `application/octet-stream` only.
    #[param(min_length = 1, max_length = 128)]
    pub name: Option<String>,
}

/// What tells two requests with the same idempotency key apart, as far as it is known before they are read.
#[derive(Serialize)]
struct Announced<'a> {
    content_type: &'a str,
    name: Option<&'a str>,
    length: Option<&'a str>,
    digest: Option<&'a str>,
}

/// Takes a model or a VAE in: 201 with what it is.
///
/// # Errors
/// 413, 415, 422 and 409 as the operations document.
pub async fn take_in(
    request: &HttpRequest,
    models: &ModelCatalog,
    store: &Store,
    (kind, name): (Kind, Option<String>),
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let scope = match kind {
        Kind::Model => "POST /v1/models",
        Kind::Vae => "POST /v1/vaes",
    };
    let content_type = text(request, header::CONTENT_TYPE).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let essence = essence.to_ascii_lowercase();
    let models = models.clone();
    if matches!(essence.as_str(), "" | "application/json") {
        let body = read_json(request, payload.into_inner(), &["application/json"]).await?;
        let body: RegisterModel = decode::from_json(body)
            .map_err(|error| Problem::fields(Code::InvalidBody, vec![error]))?;
        let path = body.path.clone();
        let run = async move {
            let taken =
                blocking(models.clone(), move |models| models.register(kind, &path)).await?;
            created(taken, &models)
        };
        return idempotency::once(store, request, scope, &body, run).await;
    }
    if !matches!(
        essence.as_str(),
        "application/octet-stream" | "multipart/form-data"
    ) {
        let detail = format!(
            "found the content type `{content_type}`, expected application/json, application/octet-stream or \
             multipart/form-data"
        );
        return Err(Problem::new(Code::UnsupportedMediaType, detail));
    }
    check_length(request)?;
    let announced = Announced {
        content_type: &essence,
        name: name.as_deref(),
        length: text(request, header::CONTENT_LENGTH),
        digest: text(request, header::HeaderName::from_static("content-digest")),
    };
    let (is_form, own) = (essence == "multipart/form-data", request.clone());
    let given = name.clone();
    let run = async move {
        let taken = if is_form {
            receive_form(&own, &models, kind, payload).await?
        } else {
            receive_bytes(&models, kind, given, payload).await?
        };
        created(taken, &models)
    };
    idempotency::once(store, request, scope, &announced, run).await
}

fn created(taken: Taken, models: &ModelCatalog) -> Result<Created, Problem> {
    match taken {
        Taken::Model(model) => {
            models.prepare_digest(&model.path);
            let location = format!("/v1/models/{}", model.id);
            Created::new(location, &Model::of(*model, models))
        }
        Taken::Vae(vae) => {
            models.prepare_digest(&vae.path);
            let location = format!("/v1/vaes/{}", vae.id);
            Created::new(location, &Vae::of(*vae, models))
        }
    }
}

fn text(request: &HttpRequest, name: header::HeaderName) -> Option<&str> {
    request.headers().get(name)?.to_str().ok()
}

/// Refused before anything of it is read, where its length is told.
fn check_length(request: &HttpRequest) -> Result<(), Problem> {
    let length = text(request, header::CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
    match length {
        Some(length) if length > MAX_FILE_BYTES + MAX_FORM_BYTES => Err(too_large()),
        _ => Ok(()),
    }
}

async fn receive_form(
    request: &HttpRequest,
    models: &ModelCatalog,
    kind: Kind,
    payload: web::Payload,
) -> Result<Taken, Problem> {
    let received = blocking(models.clone(), ModelCatalog::receive).await?;
    let limits = Limits {
        request_bytes: MAX_FILE_BYTES + MAX_FORM_BYTES,
        archive_bytes: MAX_FILE_BYTES,
        files: 1,
        ..Limits::default()
    };
    let form = multipart::receive(request, payload, received.folder(), &limits).await?;
    if let Some((field, _)) = form.fields.first() {
        let pointer = format!("/{field}");
        let message = "the form has a file and no other field";
        return Err(Problem::field(
            Code::InvalidBody,
            &pointer,
            "unknown_field",
            message,
        ));
    }
    let Some(file) = form.files.into_iter().next() else {
        let message = "found no file, expected one with a file name";
        return Err(Problem::field(
            Code::InvalidBody,
            "/file",
            "missing_field",
            message,
        ));
    };
    blocking(models.clone(), move |models| {
        models.take_in(kind, received, &file.path, &file.name)
    })
    .await
}

async fn receive_bytes(
    models: &ModelCatalog,
    kind: Kind,
    name: Option<String>,
    mut payload: web::Payload,
) -> Result<Taken, Problem> {
    let Some(name) = name else {
        let message = "expected the file's name for a body of application/octet-stream";
        return Err(Problem::field(
            Code::InvalidQuery,
            "/name",
            "missing_field",
            message,
        ));
    };
    let wanted = name.clone();
    let received = blocking(models.clone(), move |models| {
        models.check_name(kind, &wanted)?; // before gigabytes are received for nothing
        models.receive()
    })
    .await?;
    let path = received.folder().join("upload-0");
    let file = File::create_new(&path).await.map_err(disk)?;
    let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
    let mut size = 0_u64;
    while let Some(chunk) = payload.next().await {
        let chunk = chunk.map_err(|error| {
            Problem::new(Code::MalformedBody, format!("the body broke off: {error}"))
        })?;
        size += chunk.len() as u64;
        if size > MAX_FILE_BYTES {
            return Err(too_large());
        }
        file.write_all(&chunk).await.map_err(disk)?;
    }
    file.flush().await.map_err(disk)?;
    drop(file);
    blocking(models.clone(), move |models| {
        models.take_in(kind, received, &path, &name)
    })
    .await
}

/// Files are looked at on a thread that may wait.
pub async fn blocking<T: Send + 'static>(
    models: ModelCatalog,
    work: impl FnOnce(&ModelCatalog) -> Result<T, IntakeError> + Send + 'static,
) -> Result<T, Problem> {
    let done = web::block(move || work(&models)).await;
    Ok(done.map_err(Problem::internal)??)
}

fn too_large() -> Problem {
    let detail = format!("the file is larger than {MAX_FILE_BYTES} bytes");
    Problem::new(Code::PayloadTooLarge, detail)
}

fn no_room() -> Problem {
    Problem::new(
        Code::StorageFull,
        "there is no room for the upload in the model folder",
    )
}

fn disk(error: std::io::Error) -> Problem {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => no_room(),
        _ => Problem::internal(error),
    }
}

impl From<IntakeError> for Problem {
    fn from(error: IntakeError) -> Self {
        let text = error.to_string();
        match error {
            IntakeError::Name(_) => Self::field(Code::InvalidModel, "/name", "invalid_value", text),
            IntakeError::Path(_) => Self::field(Code::InvalidModel, "/path", "invalid_value", text),
            IntakeError::Missing(_) => Self::field(Code::InvalidModel, "/path", "not_found", text),
            IntakeError::Refused(_) => Self::new(Code::InvalidModel, text),
            IntakeError::Exists(_) => Self::new(Code::ModelExists, text),
            IntakeError::NotUploaded(_) => Self::new(Code::ModelNotUploaded, text),
            full if full.is_storage_full() => no_room(),
            IntakeError::Folder(_) | IntakeError::Io { .. } => Self::internal(text),
        }
    }
}
