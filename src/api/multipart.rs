//! `multipart/form-data` bodies, streamed to files: memory stays flat however large the upload is.

use std::io;
use std::path::Path;

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use futures_util::StreamExt as _;
use multer::{Constraints, Field, Multipart, SizeLimit};
use tokio::fs::File;
use tokio::io::{AsyncWriteExt as _, BufWriter};
use tokio_stream::wrappers::ReceiverStream;

use super::codes::Code;
use super::problem::Problem;
use crate::datasets::limits::Limits;
use crate::datasets::prepare::StagedFile;

/// Bytes of a text field.
const MAX_FIELD_BYTES: usize = 8 << 10;
/// Text fields in one form.
const MAX_FIELDS: usize = 32;
/// Bytes gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// A form whose files lie on disk, in the folder that was given.
#[derive(Debug, Default)]
pub struct Form {
    pub files: Vec<StagedFile>,
    /// Text fields in the order they came.
    pub fields: Vec<(String, String)>,
}

/// Receives a form. A part with a file name is a file, whatever the field is called; every other part is a text field.
///
/// # Errors
/// 415 without a boundary, 400 when the body breaks off, 413 above a limit. The caller drops the folder then.
pub async fn receive(
    request: &HttpRequest,
    payload: web::Payload,
    folder: &Path,
    limits: &Limits,
) -> Result<Form, Problem> {
    let constraints =
        Constraints::new().size_limit(SizeLimit::new().whole_stream(limits.request_bytes));
    let boundary = boundary(request)?;
    let mut parts = Multipart::with_constraints(bridge(payload), boundary, constraints);
    let mut form = Form::default();
    while let Some(part) = parts.next_field().await.map_err(refusal)? {
        let Some(name) = part.file_name().map(str::to_owned) else {
            if form.fields.len() == MAX_FIELDS {
                return Err(Problem::new(
                    Code::PayloadTooLarge,
                    format!("found more than {MAX_FIELDS} text fields"),
                ));
            }
            form.fields.push(read_field(part).await?);
            continue;
        };
        if form.files.len() == limits.files {
            return Err(Problem::new(
                Code::PayloadTooLarge,
                format!("found more than {} files", limits.files),
            ));
        }
        let path = folder.join(format!("upload-{}", form.files.len()));
        write_file(part, &name, &path, limits.archive_bytes).await?;
        form.files.push(StagedFile { name, path });
    }
    Ok(form)
}

fn boundary(request: &HttpRequest) -> Result<String, Problem> {
    let found = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    multer::parse_boundary(found).map_err(|_| {
        let detail = format!(
            "found the content type `{found}`, expected multipart/form-data with a boundary"
        );
        Problem::new(Code::UnsupportedMediaType, detail)
    })
}

/// multer wants a stream that may change threads, and actix's payload may not: a task on this thread feeds a channel.
fn bridge(mut payload: web::Payload) -> ReceiverStream<io::Result<web::Bytes>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    actix_web::rt::spawn(async move {
        while let Some(chunk) = payload.next().await {
            if sender.send(chunk.map_err(io::Error::other)).await.is_err() {
                break; // the form was refused, nobody reads on
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn read_field(mut part: Field<'_>) -> Result<(String, String), Problem> {
    let name = part.name().unwrap_or_default().to_owned();
    let mut bytes = Vec::new();
    while let Some(chunk) = part.chunk().await.map_err(refusal)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_FIELD_BYTES {
            let detail = format!(
                "the field `{name}` is larger than {MAX_FIELD_BYTES} bytes; files need a file name"
            );
            return Err(Problem::new(Code::PayloadTooLarge, detail));
        }
    }
    let text = String::from_utf8(bytes).map_err(|_| {
        Problem::field(
            Code::InvalidBody,
            &format!("/{name}"),
            "wrong_type",
            "the field is not UTF-8",
        )
    })?;
    Ok((name, text))
}

async fn write_file(
    mut part: Field<'_>,
    name: &str,
    path: &Path,
    limit: u64,
) -> Result<(), Problem> {
    let file = File::create_new(path).await.map_err(disk)?;
    let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
    let mut size = 0_u64;
    while let Some(chunk) = part.chunk().await.map_err(refusal)? {
        size += chunk.len() as u64;
        if size > limit {
            return Err(Problem::new(
                Code::PayloadTooLarge,
                format!("the file `{name}` is larger than {limit} bytes"),
            ));
        }
        file.write_all(&chunk).await.map_err(disk)?;
    }
    file.flush().await.map_err(disk)
}

fn refusal(error: multer::Error) -> Problem {
    let code = match error {
        multer::Error::StreamSizeExceeded { .. } | multer::Error::FieldSizeExceeded { .. } => {
            Code::PayloadTooLarge
        }
        _ => Code::MalformedMultipart,
    };
    Problem::new(code, error.to_string())
}

/// A full disk is worth telling apart: the client can do something about it.
pub fn disk(error: io::Error) -> Problem {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Problem::new(
            Code::StorageFull,
            "there is no room for the upload in the data folder",
        ),
        _ => Problem::internal(error),
    }
}
