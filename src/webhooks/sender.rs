//! The task that sends messages: at least once, those of a run in their order, again with growing pauses where a
//! receiver does not answer. The queue is in the database, so that a restart loses nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt as _;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use ureq::Agent;
use ureq::unversioned::transport::DefaultConnector;
use uuid::Uuid;

use super::IpNet;
use super::guard::GuardedResolver;
use super::signature::sign;
use crate::store::webhooks::{Delivery, DeliveryEnd, Due, Webhook};
use crate::store::{Store, StoreError};

/// How often the queue is looked at when nothing wakes the task.
const PERIOD: Duration = Duration::from_millis(500);
/// How long a receiver may take.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Nobody else sends a message within this time, which is longer than an attempt.
const LEASE: Duration = Duration::from_secs(60);
/// Messages under way, in all and to one receiver: one that is slow must not hold the others up.
const AT_ONCE: usize = 16;
const AT_ONCE_EACH: usize = 4;
/// The longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_secs(6 * 60 * 60);
/// Each pause is so many times the one before.
const GROWTH: f64 = 3.0;
/// How much a pause varies, so that receivers that come back are not met by all at once.
const JITTER: f64 = 0.2;

/// How messages are sent.
#[derive(Clone, Debug)]
pub struct SendSettings {
    /// Networks that may be called besides public ones.
    pub allowed: Vec<IpNet>,
    /// The first pause after a failure.
    pub first_pause: Duration,
    /// When a message is given up, counted from its event.
    pub give_up_after: Duration,
}

/// The sending task.
pub struct Sender {
    store: Store,
    agent: Agent,
    settings: SendSettings,
    wake: Arc<Notify>,
    /// Messages under way, for each receiver.
    under_way: HashMap<Uuid, usize>,
    tasks: JoinSet<Uuid>,
}

/// What a receiver has said.
struct Answer {
    status: Option<u16>,
    error: Option<String>,
    retry_after: Option<Duration>,
}

impl Sender {
    /// A task that has not begun.
    pub fn new(store: Store, settings: SendSettings, wake: Arc<Notify>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None) // a proxy would look names up by itself, past the guard
            .timeout_global(Some(TIMEOUT))
            .user_agent(concat!("lorasmith/", env!("CARGO_PKG_VERSION")))
            .build();
        let resolver = GuardedResolver::new(settings.allowed.clone());
        Self {
            store,
            agent: Agent::with_parts(config, DefaultConnector::default(), resolver),
            settings,
            wake,
            under_way: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Sends until the task is aborted; a message under way then is sent again later.
    pub async fn run(mut self) {
        loop {
            let begun = match self.begin_some().await {
                Ok(begun) => begun,
                Err(error) => {
                    tracing::error!(%error, "messages to webhooks wait for the database");
                    0
                }
            };
            if begun > 0 && self.tasks.len() < AT_ONCE {
                continue;
            }
            tokio::select! {
                Some(done) = self.tasks.join_next() => self.note(done.ok()),
                () = self.wake.notified() => {}
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }

    fn note(&mut self, receiver: Option<Uuid>) {
        match receiver.and_then(|id| self.under_way.get_mut(&id)) {
            Some(count) => *count = count.saturating_sub(1),
            // A task that has panicked does not say whose it was.
            None if self.tasks.is_empty() => self.under_way.clear(),
            None => {}
        }
        self.under_way.retain(|_, count| *count > 0);
    }

    async fn begin_some(&mut self) -> Result<usize, StoreError> {
        if self.tasks.len() >= AT_ONCE {
            return Ok(0);
        }
        let mut begun = 0;
        for due in self.store.due_deliveries(4 * AT_ONCE as u64).await? {
            let count = self.under_way.entry(due.webhook.id).or_default();
            if *count >= AT_ONCE_EACH || self.tasks.len() >= AT_ONCE {
                continue;
            }
            if !self.store.claim_delivery(&due.delivery, LEASE).await? {
                continue;
            }
            *count += 1;
            begun += 1;
            let attempt = Attempt {
                store: self.store.clone(),
                agent: self.agent.clone(),
                settings: self.settings.clone(),
            };
            self.tasks.spawn(attempt.make(due));
        }
        Ok(begun)
    }
}

struct Attempt {
    store: Store,
    agent: Agent,
    settings: SendSettings,
}

impl Attempt {
    async fn make(self, due: Due) -> Uuid {
        let Due { delivery, webhook } = due;
        let id = webhook.id;
        let (agent, hook, message) = (self.agent.clone(), webhook, delivery.clone());
        let sent = tokio::task::spawn_blocking(move || post(&agent, &hook, &message)).await;
        let answer = sent.unwrap_or_else(|error| Answer::none(error.to_string()));
        if let Err(error) = self.finish(id, &delivery, &answer).await {
            tracing::error!(%error, "what became of a message was not noted; it will be sent again");
        }
        id
    }

    async fn finish(
        &self,
        webhook: Uuid,
        delivery: &Delivery,
        answer: &Answer,
    ) -> Result<(), StoreError> {
        let end = match answer.status {
            Some(200..=299) => DeliveryEnd::Delivered,
            Some(410) => {
                let reason = "the receiver answered 410 Gone";
                self.store.disable_webhook(webhook, reason).await?;
                DeliveryEnd::GivenUp
            }
            _ => self.again(delivery, answer.retry_after),
        };
        let error = answer.error.as_deref();
        self.store
            .finish_attempt(delivery.id, &end, answer.status, error)
            .await
    }

    fn again(&self, delivery: &Delivery, retry_after: Option<Duration>) -> DeliveryEnd {
        let now = OffsetDateTime::now_utc();
        if now - delivery.created_at >= self.settings.give_up_after {
            return DeliveryEnd::GivenUp;
        }
        let spread = rand::rng().random_range(1.0 - JITTER..1.0 + JITTER);
        let own = pause(self.settings.first_pause, delivery.attempts).mul_f64(spread);
        let wanted = retry_after.unwrap_or_default().min(MAX_PAUSE);
        DeliveryEnd::Again(now + own.max(wanted))
    }
}

/// The pause after an attempt that had `earlier` ones before it.
fn pause(first: Duration, earlier: u32) -> Duration {
    let seconds = first.as_secs_f64() * GROWTH.powf(f64::from(earlier.min(64)));
    Duration::from_secs_f64(seconds.min(MAX_PAUSE.as_secs_f64()))
}

impl Answer {
    fn none(error: String) -> Self {
        Self {
            status: None,
            error: Some(error),
            retry_after: None,
        }
    }
}

fn post(agent: &Agent, webhook: &Webhook, delivery: &Delivery) -> Answer {
    let now = OffsetDateTime::now_utc();
    let (id, time) = (format!("msg_{}", delivery.id), now.unix_timestamp());
    let previous = webhook
        .previous_secret
        .iter()
        .filter(|(_, until)| *until > now)
        .map(|(secret, _)| secret);
    let signatures: Vec<String> = std::iter::once(&webhook.secret)
        .chain(previous)
        .filter_map(|secret| sign(secret, &id, time, &delivery.payload))
        .collect();
    let sent = agent
        .post(&webhook.url)
        .header("content-type", "application/json")
        .header("webhook-id", &id)
        .header("webhook-timestamp", time.to_string())
        .header("webhook-signature", signatures.join(" "))
        .send(delivery.payload.as_bytes());
    match sent {
        Ok(answer) => {
            let status = answer.status().as_u16();
            let retry_after = answer.headers().get("retry-after");
            let retry_after = retry_after.and_then(|value| value.to_str().ok()?.parse().ok());
            Answer {
                status: Some(status),
                error: (!(200..300).contains(&status)).then(|| format!("answered {status}")),
                retry_after: retry_after.map(Duration::from_secs),
            }
        }
        Err(error) => Answer::none(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let first = Duration::from_secs(5);
        let pauses: Vec<u64> = (0..9).map(|n| pause(first, n).as_secs()).collect();
        assert_eq!(pauses, [5, 15, 45, 135, 405, 1215, 3645, 10935, 21600]);
        assert_eq!(pause(first, u32::MAX), MAX_PAUSE);
    }
}
