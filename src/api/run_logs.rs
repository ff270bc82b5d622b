//! `/v1/runs/{run_id}/logs`: what the workers of a run have written.

use std::io::{ErrorKind, SeekFrom};
use std::path::{Path, PathBuf};

use actix_web::http::header::{self, HeaderName};
use actix_web::web::{self, Data};
use actix_web::{HttpResponse, get};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use utoipa::IntoParams;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::Query;
use super::problem::{Problem, ProblemBody};
use crate::runs::RunService;

/// The most that one answer has.
const MAX_BYTES: u64 = 1 << 20;
const MAX_LINES: u64 = 10_000;

/// Where to go on reading.
pub const NEXT_AFTER: HeaderName = HeaderName::from_static("x-next-after");

/// The folder with a file for each run, as the supervisor writes them.
#[derive(Clone, Debug)]
pub struct LogFolder(pub PathBuf);

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(get_run_logs);
}

/// Which part of a log.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct LogQuery {
    /// Only what comes after this byte: `x-next-after` of the answer before.
    after: Option<u64>,
    /// Only so many lines from the end; not together with `after`.
    #[param(minimum = 1, maximum = 10000)]
    tail: Option<u64>,
}

/// Read the log of a run.
///
/// Plain text, what its workers have written in all attempts; at most 1 MiB in one answer. `?tail=` takes the last
/// lines, `?after=` goes on from a byte; `x-next-after` of an answer says where the next one begins. A run that no worker
/// has begun has an empty log.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), LogQuery),
    responses(
        (
            status = 200, description = "The log", content_type = "text/plain", body = String,
            headers(("x-next-after" = u64, description = "The number of the last byte of this answer, from 1")),
            example = json!("{\"timestamp\":\"2026-11-25T06:42:01Z\",\"level\":\"INFO\",\"message\":\"loading\"}\n"),
        ),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/logs")]
pub async fn get_run_logs(
    runs: Data<RunService>,
    folder: Data<LogFolder>,
    id: web::Path<Uuid>,
    query: Query<LogQuery>,
) -> Result<HttpResponse, Problem> {
    let LogQuery { after, tail } = query.into_inner();
    let wrong = |field: &str, code: &str, message: String| {
        Err(Problem::field(Code::InvalidQuery, field, code, message))
    };
    if after.is_some() && tail.is_some() {
        let message = "cannot be given together with `after`".to_owned();
        return wrong("/tail", "invalid_value", message);
    }
    if let Some(lines) = tail
        && !(1..=MAX_LINES).contains(&lines)
    {
        let message = format!("found {lines}, expected 1 to {MAX_LINES}");
        return wrong("/tail", "out_of_range", message);
    }
    let run = runs.get(id.into_inner()).await?;
    let file = folder.0.join(format!("run-{}.log", run.id));
    let part = read(&file, after.unwrap_or(0), tail).await;
    let (text, next) =
        part.map_err(|error| Problem::internal(format!("{}: {error}", file.display())))?;
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "text/plain; charset=utf-8"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((NEXT_AFTER, next))
        .body(text))
}

/// A part of the file, and where it ends.
async fn read(file: &Path, after: u64, tail: Option<u64>) -> std::io::Result<(Vec<u8>, u64)> {
    let mut file = match tokio::fs::File::open(file).await {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((Vec::new(), after)),
        Err(error) => return Err(error),
    };
    let size = file.metadata().await?.len();
    let start = match tail {
        Some(_) => size.saturating_sub(MAX_BYTES),
        None => after.min(size),
    };
    file.seek(SeekFrom::Start(start)).await?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).await?;
    let next = start + bytes.len() as u64;
    if let Some(lines) = tail {
        bytes.drain(..start_of_tail(&bytes, lines));
    }
    Ok((bytes, next))
}

/// Where the last `lines` lines begin.
fn start_of_tail(bytes: &[u8], lines: u64) -> usize {
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let ends = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    let mut before = ends.map(|(index, _)| index + 1);
    let skipped = usize::try_from(lines - 1).unwrap_or(usize::MAX);
    before.nth(skipped).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_is_read_in_parts() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("run.log");
        let part = async |after, tail| {
            let (text, next) = read(&file, after, tail).await.expect("readable");
            (String::from_utf8(text).expect("UTF-8"), next)
        };
        assert_eq!(part(0, None).await, (String::new(), 0));
        std::fs::write(&file, "one\ntwo\nthree\n").expect("written");
        assert_eq!(part(0, None).await, ("one\ntwo\nthree\n".to_owned(), 14));
        assert_eq!(part(4, None).await, ("two\nthree\n".to_owned(), 14));
        assert_eq!(part(99, None).await, (String::new(), 14));
        assert_eq!(part(0, Some(1)).await, ("three\n".to_owned(), 14));
        assert_eq!(part(0, Some(2)).await, ("two\nthree\n".to_owned(), 14));
        assert_eq!(part(0, Some(9)).await, ("one\ntwo\nthree\n".to_owned(), 14));
    }
}
