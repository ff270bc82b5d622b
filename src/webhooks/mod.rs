//! Webhooks by Standard Webhooks: who wants to hear of what, and the task that sends messages.

mod guard;
mod sender;
mod signature;

use std::net::{IpAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::Duration;

pub use ipnet::IpNet;
use time::OffsetDateTime;
use tokio::sync::Notify;
use ureq::http::Uri;
use uuid::Uuid;

use crate::store::runs::RunState;
use crate::store::webhooks::{Delivery, DeliveryState, Webhook, WebhookSettings};
use crate::store::{Store, StoreError};

pub use sender::{SendSettings, Sender};

/// Kinds of a run's events besides changes of its state.
const RUN_KINDS: [&str; 8] = [
    "lora",
    "memory",
    "phase",
    "progress",
    "resumed",
    "rolled_back",
    "sample",
    "validation",
];
/// Those of a grid.
const GRID_KINDS: [&str; 2] = ["phase", "sample"];
/// Those of a captioning job.
const CAPTIONING_KINDS: [&str; 3] = ["image_failed", "phase", "progress"];
/// Longest address and description, in characters.
const MAX_URL_CHARS: usize = 2048;
const MAX_DESCRIPTION_CHARS: usize = 512;
/// The longest that an old secret stays in use.
pub const MAX_OVERLAP: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A value that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookProblem {
    /// Where, as a JSON Pointer.
    pub pointer: String,
    /// `invalid_value` or `out_of_range`.
    pub code: &'static str,
    /// What was found and what was expected.
    pub message: String,
}

/// Why a call has failed.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// There is no such webhook.
    #[error("there is no webhook {0}")]
    NotFound(Uuid),
    /// Values are wrong.
    #[error("{} values are wrong", .0.len())]
    Invalid(Vec<WebhookProblem>),
    /// The system has no randomness to give.
    #[error("the system gives no randomness: {0}")]
    Randomness(String),
    /// A background task has failed.
    #[error("a background task has failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// Rows.
    #[error(transparent)]
    Store(StoreError),
}

/// Every event type that there can be.
pub fn event_types() -> Vec<String> {
    let rests = |state: &RunState| matches!(state, RunState::Pausing | RunState::Paused);
    let of_runs = RunState::ALL.iter().map(|state| state.as_str());
    let of_others = RunState::ALL.iter().filter(|state| !rests(state));
    let of_others: Vec<&str> = of_others.map(|state| state.as_str()).collect();
    let types = |subject: &'static str, kinds: &[&str], states: Vec<&'static str>| {
        let words = states.into_iter().chain(kinds.iter().copied());
        words
            .map(|word| format!("{subject}.{word}"))
            .collect::<Vec<String>>()
    };
    let mut all = types("run", &RUN_KINDS, of_runs.collect());
    all.extend(types("grid", &GRID_KINDS, of_others.clone()));
    all.extend(types("captioning_job", &CAPTIONING_KINDS, of_others));
    all.sort();
    all
}

/// Makes and changes webhooks. Cloning is cheap.
#[derive(Clone)]
pub struct WebhookService {
    store: Store,
    allowed: Arc<[IpNet]>,
    wake: Arc<Notify>,
}

impl WebhookService {
    /// `allowed` are networks that may be called besides public ones; `wake` is what the sender waits for.
    pub fn new(store: Store, allowed: Vec<IpNet>, wake: Arc<Notify>) -> Self {
        Self {
            store,
            allowed: allowed.into(),
            wake,
        }
    }

    /// Makes a webhook with a new secret.
    ///
    /// # Errors
    /// [`WebhookError::Invalid`] with every wrong value.
    pub async fn create(&self, settings: WebhookSettings) -> Result<Webhook, WebhookError> {
        self.check(&settings).await?;
        let made = self.store.create_webhook(settings, secret()?).await;
        made.map_err(WebhookError::Store)
    }

    /// One webhook.
    ///
    /// # Errors
    /// [`WebhookError::NotFound`].
    pub async fn get(&self, id: Uuid) -> Result<Webhook, WebhookError> {
        self.store.webhook(id).await.map_err(named(id))
    }

    /// Webhooks in the order of making.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(
        &self,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Webhook>, WebhookError> {
        let found = self.store.webhooks(after, limit).await;
        found.map_err(WebhookError::Store)
    }

    /// Changes a webhook that is at revision `expected`. One that was disabled by its receiver can be enabled again.
    ///
    /// # Errors
    /// [`WebhookError::NotFound`], [`WebhookError::Invalid`], [`StoreError::Conflict`].
    pub async fn update(
        &self,
        id: Uuid,
        settings: WebhookSettings,
        expected: i64,
    ) -> Result<Webhook, WebhookError> {
        self.check(&settings).await?;
        let changed = self.store.update_webhook(id, settings, expected).await;
        self.wake.notify_one();
        changed.map_err(named(id))
    }

    /// Deletes a webhook with what was still to be sent.
    ///
    /// # Errors
    /// [`WebhookError::NotFound`], [`StoreError::Conflict`].
    pub async fn delete(&self, id: Uuid, expected: Option<i64>) -> Result<(), WebhookError> {
        let deleted = self.store.delete_webhook(id, expected).await;
        deleted.map_err(named(id))
    }

    /// Gives a webhook another secret; messages carry signatures with both until `overlap` is over.
    ///
    /// # Errors
    /// [`WebhookError::NotFound`], [`StoreError::Conflict`].
    pub async fn rotate(&self, id: Uuid, overlap: Duration) -> Result<Webhook, WebhookError> {
        let webhook = self.get(id).await?;
        let until = OffsetDateTime::now_utc() + overlap.min(MAX_OVERLAP);
        let rotated = self.store.rotate_webhook(&webhook, secret()?, until).await;
        rotated.map_err(named(id))
    }

    /// Sends a message of type `ping`.
    ///
    /// # Errors
    /// [`WebhookError::NotFound`].
    pub async fn ping(&self, id: Uuid) -> Result<Delivery, WebhookError> {
        self.get(id).await?;
        let queued = self.store.ping_webhook(id).await.map_err(named(id))?;
        self.wake.notify_one();
        Ok(queued)
    }

    /// What was sent, and what is to be.
    ///
    /// # Errors
    /// [`WebhookError::NotFound`].
    pub async fn deliveries(
        &self,
        id: Uuid,
        state: Option<DeliveryState>,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Delivery>, WebhookError> {
        self.get(id).await?;
        let found = self.store.deliveries(id, state, after, limit).await;
        found.map_err(WebhookError::Store)
    }

    async fn check(&self, settings: &WebhookSettings) -> Result<(), WebhookError> {
        let mut problems = Vec::new();
        let mut report = |pointer: String, code, message| {
            problems.push(WebhookProblem {
                pointer,
                code,
                message,
            });
        };
        let length = settings.description.chars().count();
        if length > MAX_DESCRIPTION_CHARS {
            let message =
                format!("has {length} characters, expected at most {MAX_DESCRIPTION_CHARS}");
            report("/description".to_owned(), "out_of_range", message);
        }
        let known = event_types();
        if settings.events.is_empty() {
            let message = "is empty, expected `*` or event types".to_owned();
            report("/events".to_owned(), "out_of_range", message);
        }
        for (index, word) in settings.events.iter().enumerate() {
            if word != "*" && !known.contains(word) {
                let message = format!(
                    "found `{word}`, expected `*` or one of {}",
                    known.join(", ")
                );
                report(format!("/events/{index}"), "invalid_value", message);
            }
        }
        let (url, allowed) = (settings.url.clone(), self.allowed.clone());
        let checked = tokio::task::spawn_blocking(move || check_url(&url, &allowed)).await?;
        if let Err(message) = checked {
            report("/url".to_owned(), "invalid_value", message);
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(WebhookError::Invalid(problems))
        }
    }
}

/// Asks for the name's addresses too: a wrong one is told now, and not by a message that never comes. A name that is
/// not known now may be so later.
fn check_url(url: &str, allowed: &[IpNet]) -> Result<(), String> {
    if url.chars().count() > MAX_URL_CHARS {
        return Err(format!("is longer than {MAX_URL_CHARS} characters"));
    }
    let wrong =
        || format!("found `{url}`, expected an address such as https://studio.example/hooks");
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(wrong());
    };
    if !matches!(scheme, "http" | "https") || authority.as_str().contains('@') {
        return Err(wrong());
    }
    let encrypted = scheme == "https";
    if !encrypted && allowed.is_empty() {
        return Err(
            "found http, expected https; `webhook_allowed_networks` names networks without it"
                .to_owned(),
        );
    }
    let host = authority.host().trim_matches(['[', ']']);
    let port = authority
        .port_u16()
        .unwrap_or(if encrypted { 443 } else { 80 });
    let found: Vec<IpAddr> = match (host, port).to_socket_addrs() {
        Ok(found) => found.map(|address| address.ip()).collect(),
        Err(_) => return Ok(()),
    };
    if found.is_empty()
        || found
            .iter()
            .any(|ip| guard::may_call(*ip, encrypted, allowed))
    {
        return Ok(());
    }
    Err(format!(
        "`{host}` is at {}, which messages may not go to; `webhook_allowed_networks` can allow it",
        found[0]
    ))
}

fn secret() -> Result<String, WebhookError> {
    signature::new_secret().map_err(|error| WebhookError::Randomness(error.to_string()))
}

fn named(id: Uuid) -> impl Fn(StoreError) -> WebhookError {
    move |error| match error {
        StoreError::NotFound => WebhookError::NotFound(id),
        other => WebhookError::Store(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        let local = ["127.0.0.0/8".parse().expect("a network")];
        for (url, allowed, right) in [
            ("https://1.1.1.1/hook", &[][..], true),
            ("https://127.0.0.1/hook", &[][..], false),
            ("https://[::1]/hook", &[][..], false),
            (
                "https://169.254.169.254/latest/meta-data",
                &local[..],
                false,
            ),
            ("http://1.1.1.1/hook", &[][..], false),
            ("http://127.0.0.1:9/hook", &local[..], true),
            ("https://user@1.1.1.1/", &[][..], false),
            ("ftp://1.1.1.1/", &[][..], false),
            ("/hook", &[][..], false),
            ("not an address", &[][..], false),
        ] {
            let checked = check_url(url, allowed);
            assert_eq!(checked.is_ok(), right, "{url}: {checked:?}");
        }
    }
}
