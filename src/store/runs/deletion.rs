//! Rows of runs and LoRA files go; their blobs stay until a sweep.

use sea_orm::{
    ColumnTrait as _, DatabaseTransaction, EntityTrait as _, QueryFilter as _, QuerySelect as _,
};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::{RunState, state_of, words};
use crate::store::rows::{lora, run, run_sample};
use crate::store::{Store, StoreError};

/// Why something stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StillNeeded {
    /// Its run has not ended.
    NotEnded(RunState),
    /// This run goes on from it, and has not ended.
    ContinuedBy(Uuid),
    /// This run repeats it, and has not ended.
    ReproducedBy(Uuid),
    /// This grid of its LoRA files has not ended.
    DrawnBy(Uuid),
    /// It has so many LoRA files, which would go with it.
    HasLoras(usize),
}

impl Store {
    /// Deletes a run that is in one of the states `ended`, with its events, metrics and samples; with its LoRA files
    /// when `with_loras` says so. Otherwise tells what it is still needed for.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; or when the database fails.
    pub async fn delete_run(
        &self,
        id: Uuid,
        ended: &[RunState],
        with_loras: bool,
    ) -> Result<Option<StillNeeded>, StoreError> {
        let write = self.begin().await?;
        if let Some(needed) = still_needed(&write, id, ended).await? {
            return Ok(Some(needed));
        }
        let loras: Vec<String> = lora::Entity::find()
            .select_only()
            .column(lora::Column::Sha256)
            .filter(lora::Column::RunId.eq(id))
            .into_tuple()
            .all(&write)
            .await?;
        if !(loras.is_empty() || with_loras) {
            return Ok(Some(StillNeeded::HasLoras(loras.len())));
        }
        let mut drawn: Vec<Uuid> = run::Entity::find()
            .select_only()
            .column(run::Column::Id)
            .filter(run::Column::GridOf.eq(id))
            .into_tuple()
            .all(&write)
            .await?;
        drawn.push(id);
        let samples: Vec<String> = run_sample::Entity::find()
            .select_only()
            .column(run_sample::Column::Sha256)
            .filter(run_sample::Column::RunId.is_in(drawn.iter().copied()))
            .into_tuple()
            .all(&write)
            .await?;
        let record: Option<Option<String>> = run::Entity::find_by_id(id)
            .select_only()
            .column(run::Column::ProvenanceSha256)
            .into_tuple()
            .one(&write)
            .await?;
        let record = record.flatten().into_iter().collect();
        self.make_young([loras, samples, record].concat()).await?;
        run::Entity::delete_many()
            .filter(run::Column::Id.is_in(drawn))
            .exec(&write)
            .await?;
        write.commit().await?;
        Ok(None)
    }

    /// Deletes a LoRA file; or tells what it is still needed for.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; or when the database fails.
    pub async fn delete_lora(
        &self,
        id: Uuid,
        ended: &[RunState],
    ) -> Result<Option<StillNeeded>, StoreError> {
        let write = self.begin().await?;
        let row = lora::Entity::find_by_id(id).one(&write).await?;
        let row = row.ok_or(StoreError::NotFound)?;
        if let Some(run_id) = row.run_id
            && let Some(needed) = still_needed(&write, run_id, ended).await?
        {
            return Ok(Some(needed));
        }
        self.make_young(vec![row.sha256]).await?;
        lora::Entity::delete_by_id(id).exec(&write).await?;
        write.commit().await?;
        Ok(None)
    }

    /// A blob that loses its last name stays for a while: somebody may be reading it.
    async fn make_young(&self, digests: Vec<String>) -> Result<(), StoreError> {
        let blobs = self.blobs.clone();
        spawn_blocking(move || digests.iter().try_for_each(|sha256| blobs.touch(sha256))).await?
    }
}

/// Whether a run works still, or another goes on from it.
async fn still_needed(
    write: &DatabaseTransaction,
    id: Uuid,
    ended: &[RunState],
) -> Result<Option<StillNeeded>, StoreError> {
    let state: Option<String> = run::Entity::find_by_id(id)
        .select_only()
        .column(run::Column::State)
        .into_tuple()
        .one(write)
        .await?;
    let state = state_of(id, &state.ok_or(StoreError::NotFound)?)?;
    if !ended.contains(&state) {
        return Ok(Some(StillNeeded::NotEnded(state)));
    }
    let continued: Option<Uuid> = run::Entity::find()
        .select_only()
        .column(run::Column::Id)
        .filter(run::Column::ContinuedFrom.eq(id))
        .filter(run::Column::State.is_not_in(words(ended)))
        .into_tuple()
        .one(write)
        .await?;
    if let Some(run) = continued {
        return Ok(Some(StillNeeded::ContinuedBy(run)));
    }
    let reproduced: Option<Uuid> = run::Entity::find()
        .select_only()
        .column(run::Column::Id)
        .filter(run::Column::ReproductionOf.eq(id))
        .filter(run::Column::State.is_not_in(words(ended)))
        .into_tuple()
        .one(write)
        .await?;
    if let Some(run) = reproduced {
        return Ok(Some(StillNeeded::ReproducedBy(run)));
    }
    let drawn: Option<Uuid> = run::Entity::find()
        .select_only()
        .column(run::Column::Id)
        .filter(run::Column::GridOf.eq(id))
        .filter(run::Column::State.is_not_in(words(ended)))
        .into_tuple()
        .one(write)
        .await?;
    Ok(drawn.map(StillNeeded::DrawnBy))
}
