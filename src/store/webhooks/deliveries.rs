//! The queue of messages. A message is written in the transaction that writes its event, so that none is lost and none
//! tells of what did not happen; it is sent at least once, and those of a run in their order.

use std::time::Duration;

use sea_orm::sea_query::{Alias, Expr, ExprTrait as _, Query};
use sea_orm::{
    ColumnTrait as _, DatabaseTransaction, EntityTrait as _, QueryFilter as _, QueryOrder as _,
    QuerySelect as _, Set,
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::Webhook;
use crate::store::rows::{run, webhook, webhook_delivery as row};
use crate::store::{Store, StoreError, now_ms, time_of};

/// What has become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryState {
    /// Is to be sent, for the first time or again.
    Pending,
    /// Was taken.
    Delivered,
    /// Was given up.
    Failed,
}

impl DeliveryState {
    /// The word in rows and on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Failed => "failed",
        }
    }

    fn parse(word: &str) -> Self {
        match word {
            "delivered" => Self::Delivered,
            "failed" => Self::Failed,
            _ => Self::Pending,
        }
    }
}

/// A message and its fate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Its id; also of each attempt to send it.
    pub id: Uuid,
    /// Where it goes.
    pub webhook_id: Uuid,
    /// The run it tells of; none for a test.
    pub run_id: Option<Uuid>,
    /// What it tells: `run.succeeded`.
    pub event_type: String,
    /// The body, as it is signed.
    pub payload: String,
    /// What has become of it.
    pub state: DeliveryState,
    /// How often it was sent.
    pub attempts: u32,
    /// When it is sent next, while it is pending.
    pub next_attempt_at: OffsetDateTime,
    /// Status of the last answer.
    pub last_status: Option<u16>,
    /// Why the last attempt did not do.
    pub last_error: Option<String>,
    /// When it was written.
    pub created_at: OffsetDateTime,
    /// When it was taken or given up.
    pub finished_at: Option<OffsetDateTime>,
}

/// A message that is to be sent now, with its address.
#[derive(Clone, Debug)]
pub struct Due {
    /// The message.
    pub delivery: Delivery,
    /// Where it goes.
    pub webhook: Webhook,
}

/// How an attempt has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeliveryEnd {
    /// The receiver has it.
    Delivered,
    /// It is sent again at this time.
    Again(OffsetDateTime),
    /// It is not sent again.
    GivenUp,
}

/// What an event tells of, as the first word of its type, and the ids of that.
async fn subject(
    transaction: &DatabaseTransaction,
    id: Uuid,
) -> Result<Option<(&'static str, Value)>, StoreError> {
    let row: Option<(Option<Uuid>, Option<String>, Uuid)> = run::Entity::find_by_id(id)
        .select_only()
        .columns([
            run::Column::GridOf,
            run::Column::Captioner,
            run::Column::DatasetId,
        ])
        .into_tuple()
        .one(transaction)
        .await?;
    Ok(row.map(|row| match row {
        (Some(run), ..) => ("grid", json!({"grid_id": id, "run_id": run})),
        (None, Some(_), dataset) => (
            "captioning_job",
            json!({"captioning_job_id": id, "dataset_id": dataset}),
        ),
        (None, None, _) => ("run", json!({"run_id": id})),
    }))
}

/// Writes the messages of an event of a run, a grid or a captioning job, one for each webhook that wants it.
pub(in crate::store) async fn enqueue(
    transaction: &DatabaseTransaction,
    run_id: Uuid,
    seq: i64,
    kind: &str,
    data: &Value,
) -> Result<(), StoreError> {
    let hooks = webhook::Entity::find()
        .filter(webhook::Column::Enabled.eq(true))
        .all(transaction)
        .await?;
    if hooks.is_empty() {
        return Ok(());
    }
    let Some((word, mut data_of_message)) = subject(transaction, run_id).await? else {
        return Ok(());
    };
    let event_type = match (kind, data["state"].as_str()) {
        ("state", Some(state)) => format!("{word}.{state}"),
        _ => format!("{word}.{kind}"),
    };
    data_of_message["id"] = json!(seq);
    data_of_message["event"] = json!(kind);
    data_of_message["data"] = data.clone();
    let now = now_ms();
    let payload = json!({"type": event_type, "timestamp": text(now), "data": data_of_message});
    let payload = payload.to_string();
    for hook in hooks {
        let wanted = hook
            .events
            .split(' ')
            .any(|word| word == "*" || word == event_type);
        if wanted {
            let message = new(hook.id, Some(run_id), seq, &event_type, &payload, now);
            row::Entity::insert(message)
                .exec_without_returning(transaction)
                .await?;
        }
    }
    Ok(())
}

fn new(
    webhook_id: Uuid,
    run_id: Option<Uuid>,
    seq: i64,
    event_type: &str,
    payload: &str,
    now: i64,
) -> row::ActiveModel {
    row::ActiveModel {
        id: Set(Uuid::now_v7()),
        webhook_id: Set(webhook_id),
        run_id: Set(run_id),
        seq: Set(seq),
        event_type: Set(event_type.to_owned()),
        payload: Set(payload.to_owned()),
        state: Set(DeliveryState::Pending.as_str().to_owned()),
        attempts: Set(0),
        next_attempt_at_ms: Set(now),
        last_status: Set(None),
        last_error: Set(None),
        created_at_ms: Set(now),
        finished_at_ms: Set(None),
    }
}

fn text(ms: i64) -> String {
    time_of(ms).format(&Rfc3339).unwrap_or_default()
}

impl Store {
    /// Writes a message that tests a webhook.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn ping_webhook(&self, id: Uuid) -> Result<Delivery, StoreError> {
        let now = now_ms();
        let payload = json!({"type": "ping", "timestamp": text(now), "data": {"webhook_id": id}});
        let message = new(id, None, 0, "ping", &payload.to_string(), now);
        let row = row::Entity::insert(message)
            .exec_with_returning(&self.db)
            .await?;
        Ok(read(row))
    }

    /// Messages to be sent now, the oldest first; of each run and webhook only the next one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn due_deliveries(&self, limit: u64) -> Result<Vec<Due>, StoreError> {
        let earlier = Alias::new("earlier");
        let of = |column: row::Column| Expr::col((earlier.clone(), column));
        let own = |column: row::Column| Expr::col((row::Entity, column));
        let blocked = Query::select()
            .expr(Expr::val(1))
            .from_as(row::Entity, earlier.clone())
            .and_where(of(row::Column::WebhookId).eq(own(row::Column::WebhookId)))
            .and_where(of(row::Column::RunId).eq(own(row::Column::RunId)))
            .and_where(of(row::Column::State).eq(DeliveryState::Pending.as_str()))
            .and_where(of(row::Column::Seq).lt(own(row::Column::Seq)))
            .to_owned();
        let enabled = Query::select()
            .column(webhook::Column::Id)
            .from(webhook::Entity)
            .and_where(Expr::col(webhook::Column::Enabled).eq(true))
            .to_owned();
        let rows = row::Entity::find()
            .filter(row::Column::State.eq(DeliveryState::Pending.as_str()))
            .filter(row::Column::NextAttemptAtMs.lte(now_ms()))
            .filter(own(row::Column::WebhookId).in_subquery(enabled))
            .filter(Expr::exists(blocked).not())
            .order_by_asc(row::Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?;
        let mut due = Vec::new();
        for row in rows {
            match self.webhook(row.webhook_id).await {
                Ok(webhook) => due.push(Due {
                    delivery: read(row),
                    webhook,
                }),
                Err(StoreError::NotFound) => {} // deleted meanwhile, and its messages with it
                Err(error) => return Err(error),
            }
        }
        Ok(due)
    }

    /// Takes a message to send it, so that nobody else does until `lease` is over; `false` when somebody has.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn claim_delivery(
        &self,
        delivery: &Delivery,
        lease: Duration,
    ) -> Result<bool, StoreError> {
        let until = now_ms() + i64::try_from(lease.as_millis()).unwrap_or(i64::MAX / 2);
        let attempts = i32::try_from(delivery.attempts).unwrap_or(i32::MAX);
        let taken = row::Entity::update_many()
            .col_expr(
                row::Column::Attempts,
                Expr::value(attempts.saturating_add(1)),
            )
            .col_expr(row::Column::NextAttemptAtMs, Expr::value(until))
            .filter(row::Column::Id.eq(delivery.id))
            .filter(row::Column::State.eq(DeliveryState::Pending.as_str()))
            .filter(row::Column::Attempts.eq(attempts))
            .exec(&self.db)
            .await?;
        Ok(taken.rows_affected > 0)
    }

    /// Notes how an attempt has ended.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn finish_attempt(
        &self,
        id: Uuid,
        end: &DeliveryEnd,
        status: Option<u16>,
        error: Option<&str>,
    ) -> Result<(), StoreError> {
        let now = now_ms();
        let mut change = row::ActiveModel {
            last_status: Set(status.map(i32::from)),
            last_error: Set(error.map(str::to_owned)),
            ..Default::default()
        };
        let state = match end {
            DeliveryEnd::Delivered => DeliveryState::Delivered,
            DeliveryEnd::GivenUp => DeliveryState::Failed,
            DeliveryEnd::Again(at) => {
                let at = (at.unix_timestamp_nanos() / 1_000_000) as i64;
                change.next_attempt_at_ms = Set(at);
                DeliveryState::Pending
            }
        };
        change.state = Set(state.as_str().to_owned());
        if state != DeliveryState::Pending {
            change.finished_at_ms = Set(Some(now));
        }
        row::Entity::update_many()
            .set(change)
            .filter(row::Column::Id.eq(id))
            .exec(&self.db)
            .await?;
        Ok(())
    }

    /// Messages of a webhook in the order of writing, after `after`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn deliveries(
        &self,
        webhook_id: Uuid,
        state: Option<DeliveryState>,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Delivery>, StoreError> {
        let mut query = row::Entity::find()
            .filter(row::Column::WebhookId.eq(webhook_id))
            .order_by_asc(row::Column::Id)
            .limit(limit);
        if let Some(state) = state {
            query = query.filter(row::Column::State.eq(state.as_str()));
        }
        if let Some(after) = after {
            query = query.filter(row::Column::Id.gt(after));
        }
        Ok(query.all(&self.db).await?.into_iter().map(read).collect())
    }

    /// Forgets messages that were taken or given up longer ago than `age`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_deliveries(&self, age: Duration) -> Result<u64, StoreError> {
        let before = now_ms() - i64::try_from(age.as_millis()).unwrap_or(i64::MAX / 2);
        let gone = row::Entity::delete_many()
            .filter(row::Column::FinishedAtMs.lt(before))
            .exec(&self.db)
            .await?;
        Ok(gone.rows_affected)
    }
}

fn read(row: row::Model) -> Delivery {
    Delivery {
        id: row.id,
        webhook_id: row.webhook_id,
        run_id: row.run_id,
        event_type: row.event_type,
        payload: row.payload,
        state: DeliveryState::parse(&row.state),
        attempts: u32::try_from(row.attempts).unwrap_or(0),
        next_attempt_at: time_of(row.next_attempt_at_ms),
        last_status: row
            .last_status
            .and_then(|status| u16::try_from(status).ok()),
        last_error: row.last_error,
        created_at: time_of(row.created_at_ms),
        finished_at: row.finished_at_ms.map(time_of),
    }
}
