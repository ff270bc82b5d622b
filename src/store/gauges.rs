//! Counts for those who watch the service.

use sea_orm::{EntityTrait as _, QuerySelect as _};

use super::rows::{run, webhook_delivery};
use super::runs::trainings;
use super::{Store, StoreError};

impl Store {
    /// How many runs there are in each state that any is in.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_runs_by_state(&self) -> Result<Vec<(String, i64)>, StoreError> {
        let counts = trainings(run::Entity::find())
            .select_only()
            .column(run::Column::State)
            .column_as(sea_orm::ColumnTrait::count(&run::Column::Id), "count")
            .group_by(run::Column::State)
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(counts)
    }

    /// How many messages to webhooks there are in each state that any is in.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_deliveries_by_state(&self) -> Result<Vec<(String, i64)>, StoreError> {
        let counts = webhook_delivery::Entity::find()
            .select_only()
            .column(webhook_delivery::Column::State)
            .column_as(
                sea_orm::ColumnTrait::count(&webhook_delivery::Column::Id),
                "count",
            )
            .group_by(webhook_delivery::Column::State)
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(counts)
    }
}
