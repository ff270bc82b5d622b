//! Where a run's file comes from: what its workers have found, what has happened, and the record of it all.

use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, Set};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Event, records};
use crate::store::rows::{run, run_attempt, run_event};
use crate::store::{Store, StoreError, now_ms, time_of};

/// Events that say how far a run is, or what is kept elsewhere.
const PASSING: [&str; 6] = [
    "progress",
    "phase",
    "memory",
    "validation",
    "sample",
    "lora",
];

/// One worker's beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Its number, from 1.
    pub attempt: u32,
    /// What it found around it; JSON that `runs` wrote.
    pub facts: String,
    /// When it wrote that down.
    pub begun_at: OffsetDateTime,
}

impl Store {
    /// Notes what a worker has found around it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn note_attempt(
        &self,
        run_id: Uuid,
        attempt: u32,
        facts: String,
    ) -> Result<(), StoreError> {
        let row = run_attempt::ActiveModel {
            run_id: Set(run_id),
            attempt: Set(i32::try_from(attempt).unwrap_or(i32::MAX)),
            facts: Set(facts),
            begun_at_ms: Set(now_ms()),
        };
        run_attempt::Entity::insert(row)
            .exec_without_returning(&self.db)
            .await?;
        Ok(())
    }

    /// What the workers of a run have found, in their order.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn attempts(&self, run_id: Uuid) -> Result<Vec<Attempt>, StoreError> {
        let rows = run_attempt::Entity::find()
            .filter(run_attempt::Column::RunId.eq(run_id))
            .order_by_asc(run_attempt::Column::Attempt)
            .all(&self.db)
            .await?;
        let read = |row: run_attempt::Model| Attempt {
            attempt: u32::try_from(row.attempt).unwrap_or(0),
            facts: row.facts,
            begun_at: time_of(row.begun_at_ms),
        };
        Ok(rows.into_iter().map(read).collect())
    }

    /// What has happened to a run, without its progress and its results.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn history(&self, run_id: Uuid) -> Result<Vec<Event>, StoreError> {
        let rows = run_event::Entity::find()
            .filter(run_event::Column::RunId.eq(run_id))
            .filter(run_event::Column::Kind.is_not_in(PASSING))
            .order_by_asc(run_event::Column::Seq)
            .all(&self.db)
            .await?;
        rows.into_iter().map(records::event).collect()
    }

    /// The newest `progress` of a run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn last_progress(&self, run_id: Uuid) -> Result<Option<Event>, StoreError> {
        let row = run_event::Entity::find()
            .filter(run_event::Column::RunId.eq(run_id))
            .filter(run_event::Column::Kind.eq("progress"))
            .order_by_desc(run_event::Column::Seq)
            .one(&self.db)
            .await?;
        row.map(records::event).transpose()
    }

    /// Notes the record of a run, a blob; and of one that repeats another how that went.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn set_provenance(
        &self,
        run_id: Uuid,
        sha256: &str,
        reproduction: Option<String>,
    ) -> Result<(), StoreError> {
        run::Entity::update_many()
            .col_expr(
                run::Column::ProvenanceSha256,
                Expr::value(Some(sha256.to_owned())),
            )
            .col_expr(run::Column::Reproduction, Expr::value(reproduction))
            .filter(run::Column::Id.eq(run_id))
            .exec(&self.db)
            .await?;
        Ok(())
    }
}
