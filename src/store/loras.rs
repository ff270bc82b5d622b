//! Rows of LoRA files.

use std::collections::HashMap;

use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _,
    QuerySelect as _,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::rows::lora;
use super::runs::{signed, unsigned};
use super::{Store, StoreError, now_ms, time_of};

/// A trained LoRA file.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Its id.
    pub id: Uuid,
    /// The run that made it; none of a file that came from elsewhere, or that was made of others.
    pub run_id: Option<Uuid>,
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
    /// Loss on the run's held-out images.
    pub validation_loss: Option<f64>,
    /// Standard error of that loss.
    pub validation_error: Option<f64>,
    /// JSON: where it comes from, if no run has made it.
    pub origin: Option<String>,
    /// JSON: what was seen when it was read again.
    pub self_check: Option<String>,
}

/// A file that no run has made, already stored as a blob.
#[derive(Clone, Debug)]
pub struct OtherLora {
    /// Its id.
    pub id: Uuid,
    /// The name it is downloaded under.
    pub file_name: String,
    /// Digest of its content.
    pub sha256: String,
    /// Its size.
    pub size_bytes: u64,
    /// JSON: where it comes from.
    pub origin: String,
}

impl Store {
    /// Lists a file that no run has made.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_lora(&self, new: OtherLora) -> Result<Lora, StoreError> {
        let row = lora::ActiveModel {
            id: Set(new.id),
            run_id: Set(None),
            file_name: Set(new.file_name),
            step: Set(0),
            epoch: Set(0),
            is_final: Set(false),
            sha256: Set(new.sha256),
            size_bytes: Set(signed(new.size_bytes)),
            created_at_ms: Set(now_ms()),
            validation_loss: Set(None),
            validation_error: Set(None),
            origin: Set(Some(new.origin)),
            self_check: Set(None),
        };
        lora::Entity::insert(row)
            .exec_without_returning(&self.db)
            .await?;
        self.lora(new.id).await
    }

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

    /// Run to the file with the lowest validation loss, for those of `runs` that have one. Of several with the same
    /// loss it is the result, or else the first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn best_loras(&self, runs: &[Uuid]) -> Result<HashMap<Uuid, Uuid>, StoreError> {
        let rows: Vec<(Uuid, Uuid, f64)> = lora::Entity::find()
            .select_only()
            .columns([
                lora::Column::RunId,
                lora::Column::Id,
                lora::Column::ValidationLoss,
            ])
            .filter(lora::Column::RunId.is_in(runs.iter().copied()))
            .filter(lora::Column::ValidationLoss.is_not_null())
            .order_by_desc(lora::Column::IsFinal)
            .order_by_asc(lora::Column::Step)
            .into_tuple()
            .all(&self.db)
            .await?;
        let mut best: HashMap<Uuid, (Uuid, f64)> = HashMap::new();
        for (run, id, loss) in rows {
            let entry = best.entry(run).or_insert((id, loss));
            if loss < entry.1 {
                *entry = (id, loss);
            }
        }
        Ok(best.into_iter().map(|(run, (id, _))| (run, id)).collect())
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
        validation_loss: row.validation_loss,
        validation_error: row.validation_error,
        origin: row.origin,
        self_check: row.self_check,
    }
}
