//! Rows of LoRA files.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::rows::lora;
use super::runs::unsigned;
use super::{Store, StoreError, time_of};

/// A trained LoRA file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lora {
    /// Its id.
    pub id: Uuid,
    /// The run that made it.
    pub run_id: Uuid,
    /// The name it is downloaded under.
    pub file_name: String,
    /// Optimizer steps behind it.
    pub step: u64,
    /// Epoch it was saved in.
    pub epoch: u64,
    /// Whether it is the run's result, not one saved on the way.
    pub is_final: bool,
    /// Digest of its content.
    pub sha256: String,
    /// Its size.
    pub size_bytes: u64,
    /// When it was saved.
    pub created_at: OffsetDateTime,
}

impl Store {
    /// LoRA files in the order in which they were saved, after `after`; of one run, or of all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn loras(
        &self,
        run_id: Option<Uuid>,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Lora>, StoreError> {
        let mut query = lora::Entity::find()
            .order_by_asc(lora::Column::Id)
            .limit(limit);
        if let Some(run_id) = run_id {
            query = query.filter(lora::Column::RunId.eq(run_id));
        }
        if let Some(after) = after {
            query = query.filter(lora::Column::Id.gt(after));
        }
        Ok(query.all(&self.db).await?.into_iter().map(read).collect())
    }

    /// One LoRA file.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn lora(&self, id: Uuid) -> Result<Lora, StoreError> {
        let row = lora::Entity::find_by_id(id).one(&self.db).await?;
        row.map(read).ok_or(StoreError::NotFound)
    }

    /// The result of a run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn final_lora(&self, run_id: Uuid) -> Result<Option<Lora>, StoreError> {
        let row = lora::Entity::find()
            .filter(lora::Column::RunId.eq(run_id))
            .filter(lora::Column::IsFinal.eq(true))
            .one(&self.db)
            .await?;
        Ok(row.map(read))
    }

    /// Run to result, for those of `runs` that have one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn final_loras(&self, runs: &[Uuid]) -> Result<HashMap<Uuid, Uuid>, StoreError> {
        let rows: Vec<(Uuid, Uuid)> = lora::Entity::find()
            .select_only()
            .columns([lora::Column::RunId, lora::Column::Id])
            .filter(lora::Column::RunId.is_in(runs.iter().copied()))
            .filter(lora::Column::IsFinal.eq(true))
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().collect())
    }
}

fn read(row: lora::Model) -> Lora {
    Lora {
        id: row.id,
        run_id: row.run_id,
        file_name: row.file_name,
        step: unsigned(row.step),
        epoch: unsigned(row.epoch),
        is_final: row.is_final,
        sha256: row.sha256,
        size_bytes: unsigned(row.size_bytes),
        created_at: time_of(row.created_at_ms),
    }
}
