//! `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a POST that is sent again replays its first answer.

use std::future::Future;

use actix_web::http::StatusCode;
use actix_web::http::header::{self, HeaderName};
use actix_web::{HttpMessage as _, HttpRequest, HttpResponse, HttpResponseBuilder};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::codes::Code;
use super::problem::Problem;
use crate::access::Caller;
use crate::store::Store;
use crate::store::idempotency::{Idempotency, KeptAnswer};

pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Tells a replayed answer from a first one.
pub const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

const MAX_KEY_BYTES: usize = 255;

/// What a POST handler answers when it has made something.
#[derive(Clone, Debug)]
pub struct Created {
    pub status: StatusCode,
    pub location: String,
    pub body: Value,
}

impl Created {
    /// 201 with a resource.
    ///
    /// # Errors
    /// 500 when the resource is no JSON.
    pub fn new(location: String, body: &impl Serialize) -> Result<Self, Problem> {
        Ok(Self {
            status: StatusCode::CREATED,
            location,
            body: serde_json::to_value(body).map_err(Problem::internal)?,
        })
    }
}

/// Runs `run` once for each idempotency key of an API key. Without the header it simply runs.
///
/// `scope` is the method and path, to which the caller is added; `payload` what the request asks for, in its checked form, so that spaces and the
/// order of fields make no difference. The work is not broken off when the client hangs up: it may have had effects.
///
/// # Errors
/// 400 for an unusable key, 409 while the first request runs, 422 when the key was used with another payload; and
/// those of `run`, after which the key is free again.
pub async fn once<F>(
    store: &Store,
    request: &HttpRequest,
    scope: &str,
    payload: &impl Serialize,
    run: F,
) -> Result<HttpResponse, Problem>
where
    F: Future<Output = Result<Created, Problem>> + 'static,
{
    let Some(key) = key_of(request)? else {
        return Ok(answer(&keep(run.await?), false));
    };
    let scope = &scope_of(request, scope);
    let payload = serde_json::to_vec(payload).map_err(Problem::internal)?;
    let sha256 = hex::encode(Sha256::digest(payload));
    let claim = store.begin_idempotent(&key, scope, &sha256).await;
    match claim.map_err(Problem::internal)? {
        Idempotency::Replay(kept) => Ok(answer(&kept, true)),
        Idempotency::Running => Err(Problem::new(
            Code::IdempotencyKeyInUse,
            "the first request with this key has not been answered yet; try again later",
        )),
        Idempotency::OtherPayload => Err(Problem::new(
            Code::IdempotencyKeyReused,
            "the key was used with another body within the last 24 hours",
        )),
        Idempotency::Fresh => {
            let first = first(store.clone(), key, scope.to_owned(), run);
            let kept = actix_web::rt::spawn(first).await;
            Ok(answer(&kept.map_err(Problem::internal)??, false))
        }
    }
}

async fn first<F>(store: Store, key: String, scope: String, run: F) -> Result<KeptAnswer, Problem>
where
    F: Future<Output = Result<Created, Problem>>,
{
    match run.await {
        Ok(created) => {
            let kept = keep(created);
            // The work is done whether or not the answer can be kept.
            if let Err(error) = store.finish_idempotent(&key, &scope, &kept).await {
                tracing::error!(%error, "an answer could not be kept under its idempotency key");
            }
            Ok(kept)
        }
        Err(problem) => {
            if let Err(error) = store.abandon_idempotent(&key, &scope).await {
                tracing::error!(%error, "an idempotency key could not be given up");
            }
            Err(problem)
        }
    }
}

fn key_of(request: &HttpRequest) -> Result<Option<String>, Problem> {
    let Some(value) = request.headers().get(IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    let usable = |key: &&str| {
        (1..=MAX_KEY_BYTES).contains(&key.len())
            && key.bytes().all(|byte| matches!(byte, b' '..=b'~'))
    };
    let key = value.to_str().ok().map(str::trim).filter(usable);
    key.map(|key| Some(key.to_owned())).ok_or_else(|| {
        let detail = format!("Idempotency-Key: expected 1 to {MAX_KEY_BYTES} ASCII characters");
        Problem::new(Code::InvalidHeader, detail)
    })
}

/// What an idempotency key is unique in: nobody gets at an answer that was given to another API key.
fn scope_of(request: &HttpRequest, operation: &str) -> String {
    match request.extensions().get::<Caller>() {
        None => operation.to_owned(),
        Some(Caller { key_id: None, .. }) => format!("configured {operation}"),
        Some(Caller {
            key_id: Some(id), ..
        }) => format!("{id} {operation}"),
    }
}

fn keep(created: Created) -> KeptAnswer {
    KeptAnswer {
        status: created.status.as_u16(),
        location: created.location,
        body: created.body.to_string(),
    }
}

fn answer(kept: &KeptAnswer, replayed: bool) -> HttpResponse {
    let status = StatusCode::from_u16(kept.status).unwrap_or(StatusCode::CREATED);
    let mut answer = HttpResponseBuilder::new(status);
    answer
        .insert_header((header::LOCATION, kept.location.as_str()))
        .insert_header(header::ContentType::json());
    if replayed {
        answer.insert_header((IDEMPOTENCY_REPLAYED, "true"));
    }
    answer.body(kept.body.clone())
}
