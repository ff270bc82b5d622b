//! `/v1/runs/{run_id}/events`: what happens in a run, as server-sent events.
//!
//! Events are rows with numbers, so a client that comes back misses nothing, and a worker on another machine is heard
//! as well as one on this.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use actix_web::http::header;
use actix_web::web::{self, Bytes, Data};
use actix_web::{HttpRequest, HttpResponse, get};
use futures_util::stream;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::Query;
use super::problem::{Problem, ProblemBody};
use crate::runs::{RunError, RunService, state};
use crate::store::Store;
use crate::store::runs::Event;

/// How often rows are looked at.
const POLL: Duration = Duration::from_millis(250);
/// After so long without an event a comment shows that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events read at once.
const BATCH: u64 = 500;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(stream_events);
}

/// Where to begin.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct EventQuery {
    /// Only events after this number; `Last-Event-ID` wins over it.
    after: Option<u64>,
}

/// Follow a run.
///
/// Server-sent events: `state`, `memory`, `phase`, `progress`, `validation`, `sample`, `lora`, each with JSON data and a
/// number as its id. All that has happened comes first, then what happens; the stream ends with the run. A client that
/// comes back with `Last-Event-ID` misses nothing; 204 tells it that there is nothing more to come.
///
/// `memory` comes once, before the model is loaded, in runs on the CPU: `estimated_peak_bytes` is the most that the
/// worker's process is expected to take, `available_bytes` what it may have, `null` where the system does not tell. The
/// phases `caching_latents` and `caching_text` tell how many pictures or captions are `done`, of how many in `total`,
/// and how many of them were `cached` by an earlier run.
#[utoipa::path(
    tag = "runs",
    params(
        ("run_id" = Uuid, Path),
        EventQuery,
        ("Last-Event-ID" = Option<u64>, Header, description = "The number of the last event that was seen"),
    ),
    responses(
        (status = 200, description = "The events", content_type = "text/event-stream", body = String),
        (status = 204, description = "The run has ended and everything was seen"),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/events")]
pub async fn stream_events(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    query: Query<EventQuery>,
) -> Result<HttpResponse, Problem> {
    let last = last_event_id(&request)?
        .or(query.into_inner().after)
        .unwrap_or(0);
    let run = runs.get(id.into_inner()).await?;
    let waiting = store
        .events(run.id, last, BATCH)
        .await
        .map_err(RunError::from)?;
    if waiting.is_empty() && state::has_ended(run.state) {
        return Ok(HttpResponse::NoContent().finish());
    }
    let subscription = Subscription {
        store: store.get_ref().clone(),
        run_id: run.id,
        last,
        waiting: waiting.into(),
        silent_since: Instant::now(),
        greeted: false,
    };
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "text/event-stream"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("x-accel-buffering", "no")) // proxies would hold events back
        .streaming(stream::try_unfold(subscription, Subscription::next)))
}

fn last_event_id(request: &HttpRequest) -> Result<Option<u64>, Problem> {
    let Some(value) = request.headers().get("last-event-id") else {
        return Ok(None);
    };
    let number = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok());
    number.map(Some).ok_or_else(|| {
        Problem::new(
            Code::InvalidHeader,
            "Last-Event-ID: expected the number of an event",
        )
    })
}

struct Subscription {
    store: Store,
    run_id: Uuid,
    last: u64,
    waiting: VecDeque<Event>,
    silent_since: Instant,
    greeted: bool,
}

impl Subscription {
    /// The next piece of the stream; `None` at its end.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, actix_web::Error> {
        if !self.greeted {
            self.greeted = true;
            return Ok(Some((Bytes::from_static(b"retry: 1000\n\n"), self)));
        }
        loop {
            if let Some(event) = self.waiting.pop_front() {
                self.last = event.seq;
                self.silent_since = Instant::now();
                let text = format!(
                    "id: {}\nevent: {}\ndata: {}\n\n",
                    event.seq, event.kind, event.data
                );
                return Ok(Some((Bytes::from(text), self)));
            }
            // The state is read before the events: what a run's end has written is then among them.
            let ended = self.run_has_ended().await?;
            self.waiting = self
                .store
                .events(self.run_id, self.last, BATCH)
                .await
                .map_err(Problem::internal)?
                .into();
            if !self.waiting.is_empty() {
                continue;
            }
            if ended {
                return Ok(None);
            }
            if self.silent_since.elapsed() >= KEEP_ALIVE {
                self.silent_since = Instant::now();
                return Ok(Some((Bytes::from_static(b": still here\n\n"), self)));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn run_has_ended(&self) -> Result<bool, Problem> {
        let state = self.store.run_state(self.run_id).await;
        Ok(state::has_ended(state.map_err(Problem::internal)?))
    }
}
