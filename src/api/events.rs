//! `/v1/runs/{run_id}/events`: what happens in a run, as server-sent events or, by `Accept`, as JSON.
//!
//! Events are rows with numbers, so a client that comes back misses nothing, and a worker on another machine is heard
//! as well as one on this.

use std::collections::VecDeque;
use std::future::Future;
use std::time::{Duration, Instant};

use actix_web::http::header;
use actix_web::web::{self, Bytes, Data};
use actix_web::{HttpRequest, HttpResponse, get};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::timeout;
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::event_feed::{After, EventFeed, Frame, Tail};
use super::extract::Query;
use super::limits::Limits;
use super::problem::{Problem, ProblemBody};
use crate::runs::{RunError, RunService, state};
use crate::store::Store;
use crate::store::runs::{Event, Run};

/// After so long without an event a comment shows that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// The longest that a list waits for an event.
const MAX_WAIT_S: u64 = 30;
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
    /// Asks for JSON that waits so many seconds for the next event.
    #[param(minimum = 0, maximum = 30, default = 0)]
    wait: Option<u64>,
}

/// Something that has happened in a run.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": 7, "event": "state", "data": {"state": "running", "previous": "preparing", "attempt": 1},
    "created_at": "2026-11-25T06:42:09.5Z"
}))]
pub struct RunEvent {
    /// Its number within the run, from 1, without gaps.
    pub id: u64,
    /// `state`, `memory`, `phase`, `progress`, `validation`, `sample`, `lora`, `environment_changed` and others.
    pub event: String,
    /// What it says; depends on `event`.
    #[schema(value_type = Object)]
    pub data: Value,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// Events in their order.
#[derive(Serialize, ToSchema)]
pub struct RunEvents {
    pub data: Vec<RunEvent>,
    /// Give it as `?after=` to get what comes later; `null` when the run has ended and everything was seen.
    pub next_after: Option<u64>,
}

impl From<Event> for RunEvent {
    fn from(event: Event) -> Self {
        Self {
            id: event.seq,
            event: event.kind,
            data: event.data,
            created_at: event.created_at,
        }
    }
}

/// Follow a run.
///
/// Server-sent events: `state`, `memory`, `phase`, `progress`, `validation`, `sample`, `lora`, `resumed`, `rolled_back`,
/// each with JSON data and a number as its id. All that has happened comes first, then what happens; the stream ends with the run. A client that
/// comes back with `Last-Event-ID` misses nothing; 204 tells it that there is nothing more to come.
///
/// With `Accept: application/json` or `?wait=` the answer is a list of at most 500 events after `?after=`. With `?wait=`
/// it comes when there is an event, or empty after so many seconds; `next_after` is `null` at the end of the run's story.
///
/// `memory` comes once, before the model is loaded: `estimated_peak_bytes` is the most that the run is expected to take
/// of the machine's memory on the CPU, else of the device's, `available_bytes` what it may have, `null` where nobody
/// tells; `optimizer_state_bytes` and `ema_bytes` are parts of the estimate. The phases `caching_latents` and `caching_text` tell how many pictures or captions are `done`, of how many in
/// `total`, and how many of them were `cached` by an earlier run.
///
/// `rolled_back` says that loss or adapters were no longer finite `at_step`, and that the run goes on from `to_step`
/// with half the learning rates: `progress` and results follow from the step after that again.
///
/// `environment_changed` says that the run goes on with another device, driver, instruction set or version of the
/// program than it began with: the bits of its result are then those of neither.
#[utoipa::path(
    tag = "runs",
    operation_id = "list_events",
    params(
        ("run_id" = Uuid, Path),
        EventQuery,
        ("Last-Event-ID" = Option<u64>, Header, description = "The number of the last event that was seen"),
    ),
    responses(
        (status = 200, description = "The events", content(
            (RunEvents = "application/json"),
            (String = "text/event-stream", example = json!("id: 7\nevent: state\ndata: {\"state\":\"running\",\"previous\":\"preparing\",\"attempt\":1}\n\n")),
        )),
        (status = 204, description = "As a stream: the run has ended and everything was seen"),
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
    feed: Data<EventFeed>,
    limits: Data<Limits>,
    id: web::Path<Uuid>,
    query: Query<EventQuery>,
) -> Result<HttpResponse, Problem> {
    let run = runs.get(id.into_inner());
    follow(&request, &store, &feed, &limits, query.into_inner(), run).await
}

/// The events of what `found` finds among the runs.
pub(super) async fn follow(
    request: &HttpRequest,
    store: &Store,
    feed: &EventFeed,
    limits: &Limits,
    query: EventQuery,
    found: impl Future<Output = Result<Run, RunError>>,
) -> Result<HttpResponse, Problem> {
    let EventQuery { after, wait } = query;
    let as_list = wants_json(request, wait.is_some());
    let wait = wait.unwrap_or(0);
    if wait > MAX_WAIT_S {
        let message = format!("found {wait}, expected 0 to {MAX_WAIT_S}");
        return Err(Problem::field(
            Code::InvalidQuery,
            "/wait",
            "out_of_range",
            message,
        ));
    }
    let last = last_event_id(request)?.or(after).unwrap_or(0);
    let place = limits.stream()?;
    let run = found.await?;
    if as_list {
        let wait = Duration::from_secs(wait);
        return Ok(HttpResponse::Ok()
            .insert_header((header::CACHE_CONTROL, "no-store"))
            .json(list_events(store, feed, run.id, last, wait).await?));
    }
    let waiting = rows(store, run.id, last).await?;
    if waiting.is_empty() && state::has_ended(run.state) {
        return Ok(HttpResponse::NoContent().finish());
    }
    let seen = waiting.back().map_or(last, |frame| frame.seq);
    let subscription = Subscription {
        store: store.clone(),
        tail: feed.subscribe(run.id, seen),
        feed: feed.clone(),
        run_id: run.id,
        last,
        waiting,
        silent_since: Instant::now(),
        greeted: false,
        _place: place,
    };
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "text/event-stream"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("x-accel-buffering", "no")) // proxies would hold events back
        .streaming(stream::try_unfold(subscription, Subscription::next)))
}

/// What a client accepts decides; one that takes anything wants a list when it says how long it waits.
fn wants_json(request: &HttpRequest, waits: bool) -> bool {
    let accept = request.headers().get(header::ACCEPT);
    let accept = accept
        .and_then(|value| value.to_str().ok())
        .unwrap_or("*/*");
    accept.starts_with("application/json") || (waits && !accept.contains("text/event-stream"))
}

/// The events after `last`, or those that come within `wait`.
async fn list_events(
    store: &Store,
    feed: &EventFeed,
    run_id: Uuid,
    last: u64,
    wait: Duration,
) -> Result<RunEvents, Problem> {
    let began = Instant::now();
    let mut tail = None;
    loop {
        // The state is read before the events: what a run's end has written is then among them.
        let state = store.run_state(run_id).await.map_err(RunError::from)?;
        let found = store.events(run_id, last, BATCH).await;
        let found = found.map_err(RunError::from)?;
        let ended = state::has_ended(state);
        let left = wait.saturating_sub(began.elapsed());
        if found.is_empty() && !ended && !left.is_zero() {
            let watched = tail.get_or_insert_with(|| feed.subscribe(run_id, last));
            if let Ok(Err(_)) = timeout(left, watched.changed()).await {
                tail = None;
            }
            continue;
        }
        let whole = (found.len() as u64) < BATCH;
        let newest = found.last().map_or(last, |event| event.seq);
        return Ok(RunEvents {
            data: found.into_iter().map(Into::into).collect(),
            next_after: (!(ended && whole)).then_some(newest),
        });
    }
}

fn last_event_id(request: &HttpRequest) -> Result<Option<u64>, Problem> {
    let Some(value) = request.headers().get("last-event-id") else {
        return Ok(None);
    };
    let number = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .filter(|number| i64::try_from(*number).is_ok());
    number.map(Some).ok_or_else(|| {
        Problem::new(
            Code::InvalidHeader,
            "Last-Event-ID: expected the number of an event",
        )
    })
}

struct Subscription {
    store: Store,
    feed: EventFeed,
    tail: watch::Receiver<Tail>,
    run_id: Uuid,
    last: u64,
    waiting: VecDeque<Frame>,
    silent_since: Instant,
    greeted: bool,
    /// Among the streams that may be open.
    _place: Option<OwnedSemaphorePermit>,
}

impl Subscription {
    /// The next piece of the stream; `None` at its end.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, actix_web::Error> {
        if !self.greeted {
            self.greeted = true;
            return Ok(Some((Bytes::from_static(b"retry: 1000\n\n"), self)));
        }
        loop {
            if let Some(frame) = self.waiting.pop_front() {
                self.last = frame.seq;
                self.silent_since = Instant::now();
                return Ok(Some((frame.text, self)));
            }
            let after = self.tail.borrow_and_update().after(self.last);
            match after {
                After::Frames(frames) => self.waiting = frames,
                After::Rows => {
                    self.waiting = rows(&self.store, self.run_id, self.last).await?;
                    if self.waiting.is_empty() {
                        return Ok(None); // the run is gone
                    }
                }
                After::End => return Ok(None),
                After::Nothing => {
                    let silence = KEEP_ALIVE.saturating_sub(self.silent_since.elapsed());
                    match timeout(silence, self.tail.changed()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => self.tail = self.feed.subscribe(self.run_id, self.last),
                        Err(_) => {
                            self.silent_since = Instant::now();
                            return Ok(Some((Bytes::from_static(b": still here\n\n"), self)));
                        }
                    }
                }
            }
        }
    }
}

/// Events after `last` as they are sent.
async fn rows(store: &Store, run_id: Uuid, last: u64) -> Result<VecDeque<Frame>, Problem> {
    let events = store.events(run_id, last, BATCH).await;
    let events = events.map_err(RunError::from)?;
    Ok(events.iter().map(Frame::from).collect())
}
