//! `/v1/webhooks`: who hears of what, and what became of each message.

use std::time::Duration;

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, patch, post};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::{Json, Query};
use super::idempotency::{self, Created};
use super::page::{Page, PageQuery, PageRequest};
use super::patch::{MergePatch, check_if_match, etag, insisted_revision};
use super::problem::{FieldError, Problem, ProblemBody};
use crate::store::webhooks as rows;
use crate::store::{Store, StoreError};
use crate::webhooks::{MAX_OVERLAP, WebhookError, WebhookService};

/// How long an old secret stays in use when nobody says.
const OVERLAP_S: u64 = 24 * 60 * 60;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(create_webhook)
        .service(list_webhooks)
        .service(get_webhook)
        .service(update_webhook)
        .service(delete_webhook)
        .service(rotate_webhook)
        .service(ping_webhook)
        .service(list_deliveries);
}

/// What can be chosen of a webhook.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "url": "https://studio.example/hooks/lorasmith", "events": ["run.succeeded", "run.failed"],
    "description": "the studio's gallery", "enabled": true
}))]
pub struct CreateWebhook {
    /// Where messages go: https, and an address that is public or in `webhook_allowed_networks`.
    #[schema(max_length = 2048)]
    pub url: String,
    /// Event types, or `*` for all: `run.` and a state (`run.succeeded`), or `run.` and the kind of another event
    /// (`run.lora`, `run.sample`, `run.validation`, `run.progress`, `run.phase`, `run.memory`,
    /// `run.resumed`, `run.rolled_back`); `captioning_job.` and a state, `phase`, `progress` or `image_failed`; `grid.` and a
    /// state, `phase` or `sample`. Neither of the two is ever paused.
    #[schema(min_items = 1)]
    pub events: Vec<String>,
    /// For people.
    #[serde(default)]
    #[schema(max_length = 512)]
    pub description: String,
    /// Whether messages go out. Events of a time in which they do not are not told later.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub enabled: bool,
}

fn yes() -> bool {
    true
}

impl From<CreateWebhook> for rows::WebhookSettings {
    fn from(wire: CreateWebhook) -> Self {
        Self {
            url: wire.url,
            description: wire.description,
            events: wire.events,
            enabled: wire.enabled,
        }
    }
}

/// A merge-patch of a webhook.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"events": ["*"], "enabled": true}))]
#[expect(dead_code, reason = "describes the body; it is applied as a patch")]
pub struct WebhookPatch {
    url: Option<String>,
    events: Option<Vec<String>>,
    description: Option<String>,
    enabled: Option<bool>,
}

/// Somebody who hears of events.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c21-2222-7c30-a4b2-3d1f2f6f0a11", "url": "https://studio.example/hooks/lorasmith",
    "events": ["run.succeeded", "run.failed"], "description": "the studio's gallery", "enabled": true,
    "disabled_reason": null, "previous_secret_until": null, "created_at": "2026-11-25T06:40:00Z",
    "updated_at": "2026-11-25T06:40:00Z"
}))]
pub struct Webhook {
    pub id: Uuid,
    pub url: String,
    pub events: Vec<String>,
    pub description: String,
    pub enabled: bool,
    /// Why the service has stopped it: its receiver answered 410.
    pub disabled_reason: Option<String>,
    /// Until when messages are signed with the secret before, too.
    #[serde(with = "time::serde::rfc3339::option")]
    pub previous_secret_until: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
}

impl From<rows::Webhook> for Webhook {
    fn from(row: rows::Webhook) -> Self {
        let now = OffsetDateTime::now_utc();
        let previous = row.previous_secret.map(|(_, until)| until);
        Self {
            id: row.id,
            url: row.url,
            events: row.events,
            description: row.description,
            enabled: row.enabled,
            disabled_reason: row.disabled_reason,
            previous_secret_until: previous.filter(|until| *until > now),
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// A secret, shown this once.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c21-2222-7c30-a4b2-3d1f2f6f0a11", "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="
}))]
pub struct WebhookSecret {
    pub id: Uuid,
    /// What messages are signed with, by Standard Webhooks. It cannot be read again.
    pub secret: String,
}

/// A secret to be replaced.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"overlap_s": 86400}))]
pub struct RotateWebhook {
    /// How long messages carry signatures with both secrets, in seconds.
    #[serde(default = "overlap_s")]
    #[schema(default = 86400, maximum = 604800)]
    pub overlap_s: u64,
}

fn overlap_s() -> u64 {
    OVERLAP_S
}

/// What has become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryState {
    /// Is to be sent, for the first time or again.
    Pending,
    /// Was answered with a status of 200 to 299.
    Delivered,
    /// Was given up.
    Failed,
}

impl From<DeliveryState> for rows::DeliveryState {
    fn from(state: DeliveryState) -> Self {
        match state {
            DeliveryState::Pending => Self::Pending,
            DeliveryState::Delivered => Self::Delivered,
            DeliveryState::Failed => Self::Failed,
        }
    }
}

/// A message and its fate.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c22-3333-7c30-a4b2-3d1f2f6f0a11", "webhook_id": "019a9c21-2222-7c30-a4b2-3d1f2f6f0a11",
    "run_id": "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11", "event_type": "run.succeeded", "state": "pending", "attempts": 1,
    "next_attempt_at": "2026-11-25T06:50:05Z", "last_status": 503, "last_error": "answered 503",
    "created_at": "2026-11-25T06:50:00Z", "finished_at": null
}))]
pub struct Delivery {
    /// In the message's `webhook-id` with `msg_` before it; the same in every attempt.
    pub id: Uuid,
    pub webhook_id: Uuid,
    /// The run that it tells of; `null` for a captioning job, a grid and a test.
    pub run_id: Option<Uuid>,
    pub event_type: String,
    pub state: DeliveryState,
    pub attempts: u32,
    /// While it is pending.
    #[serde(with = "time::serde::rfc3339::option")]
    pub next_attempt_at: Option<OffsetDateTime>,
    /// Status of the last answer.
    pub last_status: Option<u16>,
    /// Why the last attempt did not do.
    pub last_error: Option<String>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
}

impl From<rows::Delivery> for Delivery {
    fn from(row: rows::Delivery) -> Self {
        let state = match row.state {
            rows::DeliveryState::Pending => DeliveryState::Pending,
            rows::DeliveryState::Delivered => DeliveryState::Delivered,
            rows::DeliveryState::Failed => DeliveryState::Failed,
        };
        Self {
            id: row.id,
            webhook_id: row.webhook_id,
            run_id: row.run_id.filter(|_| row.event_type.starts_with("run.")),
            event_type: row.event_type,
            state,
            attempts: row.attempts,
            next_attempt_at: (state == DeliveryState::Pending).then_some(row.next_attempt_at),
            last_status: row.last_status,
            last_error: row.last_error,
            created_at: row.created_at,
            finished_at: row.finished_at,
        }
    }
}

/// Ask to be told of events.
///
/// Messages are sent by [Standard Webhooks](https://www.standardwebhooks.com): a POST of
/// `{"type", "timestamp", "data": {"run_id", "id", "event", "data"}}` with `webhook-id`, `webhook-timestamp` and
/// `webhook-signature`; those of captioning jobs have `captioning_job_id` and `dataset_id`, those of grids `grid_id` and
/// `run_id`. Each comes at least once, those of a run in their order; what is not answered with a status of
/// 200 to 299 is sent again with growing pauses. Redirects are not followed, and 410 disables the webhook. The answer
/// has the secret; it is not shown again. An `Idempotency-Key` is not taken, as answers with secrets are not kept.
#[utoipa::path(
    tag = "webhooks",
    request_body = CreateWebhook,
    responses(
        (status = 201, description = "The webhook's id and secret", body = WebhookSecret, headers(("Location" = String))),
        (status = 422, description = "`invalid_webhook`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/webhooks")]
pub async fn create_webhook(
    webhooks: Data<WebhookService>,
    body: Json<CreateWebhook>,
) -> Result<HttpResponse, Problem> {
    let made = webhooks.create(body.into_inner().into()).await?;
    Ok(HttpResponse::Created()
        .insert_header((header::LOCATION, format!("/v1/webhooks/{}", made.id)))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .json(WebhookSecret {
            id: made.id,
            secret: made.secret,
        }))
}

/// List the webhooks.
///
/// In the order in which they were made, without their secrets.
#[utoipa::path(
    tag = "webhooks",
    params(PageQuery),
    responses(
        (status = 200, description = "A page of webhooks", body = Page<Webhook>),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/webhooks")]
pub async fn list_webhooks(
    webhooks: Data<WebhookService>,
    query: Query<PageQuery>,
) -> Result<web::Json<Page<Webhook>>, Problem> {
    let page = PageRequest::try_from(query.into_inner())?;
    let found = webhooks.list(page.after_id()?, page.rows()).await?;
    Ok(web::Json(page.page(
        found,
        |webhook| webhook.id.to_string(),
        Webhook::from,
    )))
}

/// Read a webhook.
///
/// Its address and events, and why it was stopped.
#[utoipa::path(
    tag = "webhooks",
    params(("webhook_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The webhook", body = Webhook, headers(("ETag" = String))),
        (status = 404, description = "`webhook_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/webhooks/{webhook_id}")]
pub async fn get_webhook(
    webhooks: Data<WebhookService>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    Ok(answer(webhooks.get(id.into_inner()).await?))
}

fn answer(webhook: rows::Webhook) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((header::ETAG, etag(webhook.revision)))
        .json(Webhook::from(webhook))
}

/// Change a webhook.
///
/// A JSON merge-patch: address, events, description, `enabled`. One that was stopped goes on with `enabled: true`; what
/// was pending then is sent.
#[utoipa::path(
    tag = "webhooks",
    params(
        ("webhook_id" = Uuid, Path),
        ("If-Match" = Option<String>, Header, description = "The ETag that the change is based on"),
    ),
    request_body(content = WebhookPatch, content_type = "application/merge-patch+json"),
    responses(
        (status = 200, description = "The webhook", body = Webhook, headers(("ETag" = String))),
        (status = 404, description = "`webhook_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_webhook`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[patch("/webhooks/{webhook_id}")]
pub async fn update_webhook(
    request: HttpRequest,
    webhooks: Data<WebhookService>,
    id: web::Path<Uuid>,
    patch: MergePatch,
) -> Result<HttpResponse, Problem> {
    let found = webhooks.get(*id).await?;
    check_if_match(&request, &etag(found.revision))?;
    let changed = patch.apply_to(&CreateWebhook {
        url: found.url,
        events: found.events,
        description: found.description,
        enabled: found.enabled,
    })?;
    let changed = webhooks.update(*id, changed.into(), found.revision).await?;
    Ok(answer(changed))
}

/// Delete a webhook.
///
/// Messages that were not sent yet go with it.
#[utoipa::path(
    tag = "webhooks",
    params(
        ("webhook_id" = Uuid, Path),
        ("If-Match" = Option<String>, Header, description = "The ETag of what is to be deleted"),
    ),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`webhook_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/webhooks/{webhook_id}")]
pub async fn delete_webhook(
    request: HttpRequest,
    webhooks: Data<WebhookService>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let found = webhooks.get(*id).await?;
    let expected = insisted_revision(&request, found.revision)?;
    webhooks.delete(*id, expected).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Give a webhook another secret.
///
/// For `overlap_s` seconds messages carry signatures with the old and the new one, so that receivers can change over.
#[utoipa::path(
    tag = "webhooks",
    params(("webhook_id" = Uuid, Path)),
    request_body = RotateWebhook,
    responses(
        (status = 200, description = "The new secret", body = WebhookSecret),
        (status = 404, description = "`webhook_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`: it was changed at the same time", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_webhook`, `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/webhooks/{webhook_id}/rotate")]
pub async fn rotate_webhook(
    webhooks: Data<WebhookService>,
    id: web::Path<Uuid>,
    body: Json<RotateWebhook>,
) -> Result<HttpResponse, Problem> {
    let overlap = Duration::from_secs(body.into_inner().overlap_s);
    if overlap > MAX_OVERLAP {
        let (found, most) = (overlap.as_secs(), MAX_OVERLAP.as_secs());
        let message = format!("found {found}, expected at most {most}");
        return Err(Problem::field(
            Code::InvalidWebhook,
            "/overlap_s",
            "out_of_range",
            message,
        ));
    }
    let rotated = webhooks.rotate(*id, overlap).await?;
    Ok(HttpResponse::Ok()
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .json(WebhookSecret {
            id: rotated.id,
            secret: rotated.secret,
        }))
}

/// Send a test message.
///
/// Of type `ping`; `GET /v1/webhooks/{webhook_id}/deliveries` tells what became of it. A webhook that is not enabled
/// gets it once it is.
#[utoipa::path(
    tag = "webhooks",
    params(
        ("webhook_id" = Uuid, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt"),
    ),
    responses(
        (status = 202, description = "The message, pending", body = Delivery, headers(("Location" = String))),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`webhook_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/webhooks/{webhook_id}/ping")]
pub async fn ping_webhook(
    request: HttpRequest,
    webhooks: Data<WebhookService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let id = id.into_inner();
    let scope = format!("POST /v1/webhooks/{id}/ping");
    let make = async move {
        let queued = webhooks.ping(id).await?;
        let mut created = Created::new(
            format!("/v1/webhooks/{id}/deliveries"),
            &Delivery::from(queued),
        )?;
        created.status = actix_web::http::StatusCode::ACCEPTED;
        Ok(created)
    };
    idempotency::once(&store, &request, &scope, &(), make).await
}

/// Filters of the list of deliveries.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DeliveryQuery {
    /// How many at most.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// Only messages in this state.
    #[param(inline)]
    state: Option<DeliveryState>,
}

/// List what was sent to a webhook.
///
/// And what is to be sent, in the order of the events. Messages that were taken or given up are forgotten after 30 days.
#[utoipa::path(
    tag = "webhooks",
    params(("webhook_id" = Uuid, Path), DeliveryQuery),
    responses(
        (status = 200, description = "A page of messages", body = Page<Delivery>),
        (status = 404, description = "`webhook_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/webhooks/{webhook_id}/deliveries")]
pub async fn list_deliveries(
    webhooks: Data<WebhookService>,
    id: web::Path<Uuid>,
    query: Query<DeliveryQuery>,
) -> Result<web::Json<Page<Delivery>>, Problem> {
    let DeliveryQuery {
        limit,
        cursor,
        state,
    } = query.into_inner();
    let page = PageRequest::try_from(PageQuery { limit, cursor })?;
    let state = state.map(Into::into);
    let found = webhooks.deliveries(*id, state, page.after_id()?, page.rows());
    Ok(web::Json(page.page(
        found.await?,
        |delivery| delivery.id.to_string(),
        Delivery::from,
    )))
}

impl From<WebhookError> for Problem {
    fn from(error: WebhookError) -> Self {
        let text = error.to_string();
        match error {
            WebhookError::NotFound(_) => Self::new(Code::WebhookNotFound, text),
            WebhookError::Invalid(problems) => {
                let fields = problems
                    .into_iter()
                    .map(|problem| FieldError::new(problem.pointer, problem.code, problem.message));
                Self::fields(Code::InvalidWebhook, fields.collect())
            }
            WebhookError::Store(StoreError::Conflict { .. }) => {
                Self::new(Code::PreconditionFailed, text)
            }
            WebhookError::Randomness(_) | WebhookError::Task(_) | WebhookError::Store(_) => {
                Self::internal(text)
            }
        }
    }
}
