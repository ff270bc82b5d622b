//! How much at once: requests per second for each key or address, requests and event streams at the same time.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actix_web::body::{EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage as _, web};
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

use super::codes::Code;
use super::problem::Problem;
use crate::access::Caller;

/// When to come back after too much at the same time.
const PAUSE: Duration = Duration::from_secs(1);
/// Keys and addresses that have been quiet are forgotten after so many requests.
const FORGET_EVERY: u64 = 10_000;
/// Unknown keys that an address may try per second, and at once. Keys cannot be guessed; each try costs a query.
const TRIES_PER_S: u32 = 10;
const TRIES_BURST: u32 = 50;

/// The settings of the limits; 0 is none.
#[derive(Clone, Copy, Debug)]
pub struct LimitSettings {
    /// Average of one key or address.
    pub requests_per_s: u32,
    /// Requests that may come at once before the average counts.
    pub burst: u32,
    /// Requests worked on.
    pub concurrent: usize,
    /// Open streams.
    pub streams: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Client {
    /// The key of the settings.
    Configured,
    Key(Uuid),
    Address(Option<IpAddr>),
}

/// The limits of a service. Cloning is cheap, and shares them.
#[derive(Clone)]
pub struct Limits {
    rate: Option<Arc<DefaultKeyedRateLimiter<Client>>>,
    tries: Option<Arc<DefaultKeyedRateLimiter<Client>>>,
    requests: Option<Arc<Semaphore>>,
    streams: Option<Arc<Semaphore>>,
    seen: Arc<AtomicU64>,
}

impl Limits {
    /// Limits that nothing counts against yet.
    pub fn new(settings: LimitSettings) -> Self {
        let semaphore = |size: usize| {
            (size > 0).then(|| Arc::new(Semaphore::new(size.min(Semaphore::MAX_PERMITS))))
        };
        Self {
            rate: limiter(settings.requests_per_s, settings.burst),
            tries: limiter(TRIES_PER_S, TRIES_BURST),
            requests: semaphore(settings.concurrent),
            streams: semaphore(settings.streams),
            seen: Arc::default(),
        }
    }

    /// A place for an event stream, held as long as the stream is open.
    ///
    /// # Errors
    /// 503 when all are taken.
    pub fn stream(&self) -> Result<Option<OwnedSemaphorePermit>, Problem> {
        take(self.streams.as_ref(), "event streams")
    }

    /// # Errors
    /// 429 when an address has tried too many keys that nobody has.
    pub fn try_key(&self, address: Option<IpAddr>) -> Result<(), Problem> {
        check(
            self.tries.as_ref(),
            Client::Address(address),
            "unknown keys",
        )
    }

    fn count(&self, client: Client) -> Result<(), Problem> {
        if self.seen.fetch_add(1, Ordering::Relaxed) % FORGET_EVERY == FORGET_EVERY - 1 {
            for limiter in [&self.rate, &self.tries].into_iter().flatten() {
                limiter.retain_recent();
            }
        }
        check(self.rate.as_ref(), client, "requests")
    }
}

fn limiter(per_s: u32, burst: u32) -> Option<Arc<DefaultKeyedRateLimiter<Client>>> {
    let (per_s, burst) = (NonZeroU32::new(per_s)?, NonZeroU32::new(burst)?);
    let quota = Quota::per_second(per_s).allow_burst(burst);
    Some(Arc::new(RateLimiter::keyed(quota)))
}

fn check(
    limiter: Option<&Arc<DefaultKeyedRateLimiter<Client>>>,
    client: Client,
    what: &str,
) -> Result<(), Problem> {
    let Some(limiter) = limiter else {
        return Ok(());
    };
    limiter.check_key(&client).map_err(|early| {
        let wait = early.wait_time_from(DefaultClock::default().now());
        let detail = format!("too many {what}; come back in {:.1} s", wait.as_secs_f64());
        later(Code::TooManyRequests, detail, wait)
    })
}

fn take(
    semaphore: Option<&Arc<Semaphore>>,
    what: &str,
) -> Result<Option<OwnedSemaphorePermit>, Problem> {
    let Some(semaphore) = semaphore else {
        return Ok(None);
    };
    let permit = semaphore.clone().try_acquire_owned();
    permit.map(Some).map_err(|_| {
        let detail = format!("as many {what} as allowed are open");
        later(Code::Overloaded, detail, PAUSE)
    })
}

fn later(code: Code, detail: String, wait: Duration) -> Problem {
    let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
    Problem::new(code, detail).with_header(header::RETRY_AFTER, HeaderValue::from(seconds))
}

/// Lets a request through, or answers 429 or 503. Runs after the key was recognised.
///
/// # Errors
/// Those of the service further in.
pub async fn guard<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    match admit(&request) {
        Ok(permit) => {
            let answer = next.call(request).await;
            drop(permit); // the head is made; a body on its way does no work
            Ok(answer?.map_into_left_body())
        }
        Err(problem) => {
            let answer = problem.response(Some(request.path()));
            Ok(request.into_response(answer).map_into_right_body())
        }
    }
}

fn admit(request: &ServiceRequest) -> Result<Option<OwnedSemaphorePermit>, Problem> {
    let path = request.match_info().as_str();
    if matches!(path, "/livez" | "/readyz") {
        return Ok(None); // a busy service is alive
    }
    let Some(limits) = request.app_data::<web::Data<Limits>>() else {
        return Ok(None);
    };
    let caller = request.extensions().get::<Caller>().cloned();
    limits.count(match caller {
        Some(Caller { key_id: None, .. }) => Client::Configured,
        Some(Caller {
            key_id: Some(id), ..
        }) => Client::Key(id),
        None => Client::Address(address_of(request)),
    })?;
    if path.starts_with("/v1/runs/") && path.ends_with("/events") {
        return Ok(None); // it takes a place among the streams
    }
    take(limits.requests.as_ref(), "requests")
}

/// Where a request comes from; behind a proxy, the proxy.
pub fn address_of(request: &ServiceRequest) -> Option<IpAddr> {
    request.peer_addr().map(|peer| peer.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests_per_s: u32, burst: u32, streams: usize) -> Limits {
        Limits::new(LimitSettings {
            requests_per_s,
            burst,
            concurrent: 0,
            streams,
        })
    }

    #[test]
    fn each_key_has_its_own_quota() {
        let limits = limits(1, 2, 0);
        let (a, b) = (Client::Key(Uuid::nil()), Client::Address(None));
        for _ in 0..2 {
            limits.count(a).expect("within the burst");
        }
        let refused = limits.count(a).expect_err("beyond it");
        assert_eq!(refused.code(), Code::TooManyRequests);
        let answer = refused.response(None);
        assert_eq!(
            answer.headers().get(header::RETRY_AFTER),
            Some(&HeaderValue::from_static("1"))
        );
        limits.count(b).expect("another client");
        let open = super::tests::limits(0, 0, 0);
        for _ in 0..1000 {
            open.count(a).expect("no limit");
        }
    }

    #[test]
    fn a_closed_stream_makes_room() {
        let limits = limits(0, 0, 1);
        let first = limits.stream().expect("room");
        assert_eq!(
            limits.stream().expect_err("none left").code(),
            Code::Overloaded
        );
        drop(first);
        assert!(limits.stream().expect("room again").is_some());
    }
}
