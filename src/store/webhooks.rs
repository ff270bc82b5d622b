//! Rows of webhooks. Deliveries, the queue of what is to be sent to them, are in `deliveries`.

mod deliveries;

use sea_orm::sea_query::Expr;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _,
    QuerySelect as _, Set,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::rows::webhook as row;
use super::{Store, StoreError, now_ms, time_of};

pub(super) use deliveries::enqueue;
pub use deliveries::{Delivery, DeliveryEnd, DeliveryState, Due};

/// Somebody who wants to hear of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    /// Its id.
    pub id: Uuid,
    /// Where messages go.
    pub url: String,
    /// What its owner says of it.
    pub description: String,
    /// Event types it wants; `*` for all.
    pub events: Vec<String>,
    /// Whether messages go out.
    pub enabled: bool,
    /// Why not, when the service has decided that.
    pub disabled_reason: Option<String>,
    /// What messages are signed with.
    pub secret: String,
    /// The secret before, and until when messages are signed with it too.
    pub previous_secret: Option<(String, OffsetDateTime)>,
    /// Counts changes.
    pub revision: i64,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When it was changed.
    pub updated_at: OffsetDateTime,
}

/// What can be chosen of a webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookSettings {
    /// See [`Webhook::url`].
    pub url: String,
    /// See [`Webhook::description`].
    pub description: String,
    /// See [`Webhook::events`].
    pub events: Vec<String>,
    /// See [`Webhook::enabled`].
    pub enabled: bool,
}

impl Store {
    /// Makes a webhook.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn create_webhook(
        &self,
        settings: WebhookSettings,
        secret: String,
    ) -> Result<Webhook, StoreError> {
        let now = now_ms();
        let made = row::ActiveModel {
            id: Set(Uuid::now_v7()),
            url: Set(settings.url),
            description: Set(settings.description),
            events: Set(settings.events.join(" ")),
            enabled: Set(settings.enabled),
            disabled_reason: Set(None),
            secret: Set(secret),
            previous_secret: Set(None),
            previous_secret_until_ms: Set(None),
            revision: Set(1),
            created_at_ms: Set(now),
            updated_at_ms: Set(now),
        };
        Ok(read(made.insert(&self.db).await?))
    }

    /// One webhook.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn webhook(&self, id: Uuid) -> Result<Webhook, StoreError> {
        let found = row::Entity::find_by_id(id).one(&self.db).await?;
        found.map(read).ok_or(StoreError::NotFound)
    }

    /// Webhooks in the order of making, after `after`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn webhooks(
        &self,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Webhook>, StoreError> {
        let mut query = row::Entity::find()
            .order_by_asc(row::Column::Id)
            .limit(limit);
        if let Some(after) = after {
            query = query.filter(row::Column::Id.gt(after));
        }
        Ok(query.all(&self.db).await?.into_iter().map(read).collect())
    }

    /// Changes a webhook that is at revision `expected`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Conflict`].
    pub async fn update_webhook(
        &self,
        id: Uuid,
        settings: WebhookSettings,
        expected: i64,
    ) -> Result<Webhook, StoreError> {
        let change = row::ActiveModel {
            url: Set(settings.url),
            description: Set(settings.description),
            events: Set(settings.events.join(" ")),
            enabled: Set(settings.enabled),
            disabled_reason: Set(None),
            ..Default::default()
        };
        self.change_webhook(id, change, expected).await
    }

    /// Gives a webhook another secret; the one it has stays in use until `overlap_until`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Conflict`].
    pub async fn rotate_webhook(
        &self,
        webhook: &Webhook,
        secret: String,
        overlap_until: OffsetDateTime,
    ) -> Result<Webhook, StoreError> {
        let until = (overlap_until.unix_timestamp_nanos() / 1_000_000) as i64;
        let change = row::ActiveModel {
            secret: Set(secret),
            previous_secret: Set(Some(webhook.secret.clone())),
            previous_secret_until_ms: Set(Some(until)),
            ..Default::default()
        };
        self.change_webhook(webhook.id, change, webhook.revision)
            .await
    }

    /// Stops a webhook that has said that it is gone.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn disable_webhook(&self, id: Uuid, reason: &str) -> Result<(), StoreError> {
        row::Entity::update_many()
            .col_expr(row::Column::Enabled, Expr::value(false))
            .col_expr(row::Column::DisabledReason, Expr::value(Some(reason)))
            .col_expr(row::Column::UpdatedAtMs, Expr::value(now_ms()))
            .col_expr(
                row::Column::Revision,
                sea_orm::sea_query::ExprTrait::add(Expr::col(row::Column::Revision), 1),
            )
            .filter(row::Column::Id.eq(id))
            .exec(&self.db)
            .await?;
        Ok(())
    }

    /// Deletes a webhook with its deliveries.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Conflict`].
    pub async fn delete_webhook(&self, id: Uuid, expected: Option<i64>) -> Result<(), StoreError> {
        let mut query = row::Entity::delete_many().filter(row::Column::Id.eq(id));
        if let Some(expected) = expected {
            query = query.filter(row::Column::Revision.eq(expected));
        }
        if query.exec(&self.db).await?.rows_affected > 0 {
            return Ok(());
        }
        let found = self.webhook(id).await?.revision;
        let expected = expected.unwrap_or(found);
        Err(StoreError::Conflict { expected, found })
    }

    async fn change_webhook(
        &self,
        id: Uuid,
        mut change: row::ActiveModel,
        expected: i64,
    ) -> Result<Webhook, StoreError> {
        change.revision = Set(expected + 1);
        change.updated_at_ms = Set(now_ms());
        let changed = row::Entity::update_many()
            .set(change)
            .filter(row::Column::Id.eq(id))
            .filter(row::Column::Revision.eq(expected))
            .exec(&self.db)
            .await?;
        let webhook = self.webhook(id).await?;
        if changed.rows_affected == 0 {
            let found = webhook.revision;
            return Err(StoreError::Conflict { expected, found });
        }
        Ok(webhook)
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn read(row: row::Model) -> Webhook {
    let previous = row.previous_secret.zip(row.previous_secret_until_ms);
    Webhook {
        id: row.id,
        url: row.url,
        description: row.description,
        events: words(&row.events),
        enabled: row.enabled,
        disabled_reason: row.disabled_reason,
        secret: row.secret,
        previous_secret: previous.map(|(secret, until)| (secret, time_of(until))),
        revision: row.revision,
        created_at: time_of(row.created_at_ms),
        updated_at: time_of(row.updated_at_ms),
    }
}
