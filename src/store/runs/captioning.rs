//! Captioning jobs: their rows among those of runs, and what they have said of each image. Captions and results are
//! written in one transaction, so that a job that goes on does nothing twice and leaves nothing out.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _, Set,
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Run, append, find, read, signed, unsigned};
use crate::store::datasets::change_captions;
use crate::store::rows::{captioning_result as row, run};
use crate::store::{Store, StoreError, now_ms, time_of};

/// What became of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CaptionOutcome {
    /// It has the caption; of a dry run, it would have.
    Captioned,
    /// It was left as it is.
    Skipped,
    /// There is no caption for it.
    Failed,
}

impl CaptionOutcome {
    const ALL: [Self; 3] = [Self::Captioned, Self::Skipped, Self::Failed];

    /// The word in rows and on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Captioned => "captioned",
            Self::Skipped => "skipped",
            Self::Failed => "failed",
        }
    }
}

/// How many images have come to what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptionCounts {
    /// See [`CaptionOutcome::Captioned`].
    pub captioned: u64,
    /// See [`CaptionOutcome::Skipped`].
    pub skipped: u64,
    /// See [`CaptionOutcome::Failed`].
    pub failed: u64,
}

/// What a job has said of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct CaptionResult {
    /// In the job's list of images, from 0.
    pub position: u64,
    /// The image; it may be gone.
    pub image_id: Uuid,
    /// Its name.
    pub file_name: String,
    /// What became of it.
    pub outcome: CaptionOutcome,
    /// Why it was skipped or has failed.
    pub message: Option<String>,
    /// The caption that was written, or would be.
    pub caption: Option<String>,
    /// Tags with their probabilities; JSON that `runs` wrote.
    pub tags: Option<String>,
    /// When.
    pub created_at: OffsetDateTime,
}

/// A result that is to be written.
#[derive(Clone, Debug)]
pub struct JobResult {
    /// See [`CaptionResult::position`].
    pub position: u64,
    /// See [`CaptionResult::image_id`].
    pub image_id: Uuid,
    /// See [`CaptionResult::file_name`].
    pub file_name: String,
    /// See [`CaptionResult::tags`].
    pub tags: Option<String>,
}

/// How far a job has come.
#[derive(Clone, Copy, Debug, Default)]
pub struct JobProgress {
    /// Images that have a result.
    pub done: u64,
    /// Images of the job.
    pub total: u64,
    /// Speed of its worker.
    pub images_per_s: Option<f64>,
    /// Expected time to the end.
    pub eta_s: Option<f64>,
}

/// What is said of an image: what became of it, why, and its caption.
type Said = (CaptionOutcome, Option<String>, Option<String>);

impl Store {
    /// Writes results and captions; `false`, and nothing is written, when the job is no longer the worker's.
    ///
    /// `decide` gets the index of a result and the caption that the image has at that moment, or `None` when it is gone;
    /// the caption of an image that is [`CaptionOutcome::Captioned`] becomes its own, unless this is a dry run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn record_captions(
        &self,
        job: &Run,
        owner: &str,
        dry_run: bool,
        results: Vec<JobResult>,
        progress: JobProgress,
        decide: impl Fn(usize, Option<Option<&str>>) -> Said,
    ) -> Result<bool, StoreError> {
        let transaction = self.begin().await?;
        let held = run::Entity::update_many()
            .set(run::ActiveModel {
                step: Set(signed(progress.done)),
                furthest_step: Set(signed(progress.done)),
                steps_per_s: Set(progress.images_per_s),
                eta_s: Set(progress.eta_s),
                updated_at_ms: Set(now_ms()),
                ..Default::default()
            })
            .filter(run::Column::Id.eq(job.id))
            .filter(run::Column::LeaseOwner.eq(owner))
            .exec(&transaction)
            .await?;
        if held.rows_affected == 0 {
            return Ok(false);
        }
        let ids: Vec<Uuid> = results.iter().map(|result| result.image_id).collect();
        let mut said: Vec<Said> = Vec::with_capacity(results.len());
        change_captions(&transaction, job.dataset_id, &ids, |index, present| {
            let now = decide(index, present);
            let written = now
                .2
                .clone()
                .filter(|_| !dry_run && now.0 == CaptionOutcome::Captioned);
            said.push(now);
            written
        })
        .await?;
        let mut rows = Vec::with_capacity(results.len());
        for (result, (outcome, message, caption)) in results.into_iter().zip(said) {
            if outcome == CaptionOutcome::Failed {
                let data = json!({
                    "image_id": result.image_id, "file_name": result.file_name, "message": message,
                });
                append(&transaction, job.id, "image_failed", &data).await?;
            }
            rows.push(row::ActiveModel {
                job_id: Set(job.id),
                position: Set(signed(result.position)),
                image_id: Set(result.image_id),
                file_name: Set(result.file_name),
                outcome: Set(outcome.as_str().to_owned()),
                message: Set(message),
                caption: Set(caption),
                tags: Set(result.tags),
                created_at_ms: Set(now_ms()),
            });
        }
        if !rows.is_empty() {
            row::Entity::insert_many(rows)
                .exec_without_returning(&transaction)
                .await?;
        }
        let data = told(&progress);
        append(&transaction, job.id, "progress", &data).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// How many images of a job have a result: all before this position.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn captioned_until(&self, job: Uuid) -> Result<u64, StoreError> {
        let last: Option<Option<i64>> = row::Entity::find()
            .select_only()
            .column_as(row::Column::Position.max(), "last")
            .filter(row::Column::JobId.eq(job))
            .into_tuple()
            .one(&self.db)
            .await?;
        Ok(last.flatten().map_or(0, |last| unsigned(last) + 1))
    }

    /// How many images of these jobs have come to what; a job without results has no entry.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn caption_counts(
        &self,
        jobs: &[Uuid],
    ) -> Result<HashMap<Uuid, CaptionCounts>, StoreError> {
        let rows: Vec<(Uuid, String, i64)> = row::Entity::find()
            .select_only()
            .columns([row::Column::JobId, row::Column::Outcome])
            .column_as(row::Column::Position.count(), "count")
            .filter(row::Column::JobId.is_in(jobs.iter().copied()))
            .group_by(row::Column::JobId)
            .group_by(row::Column::Outcome)
            .into_tuple()
            .all(&self.db)
            .await?;
        let mut counts: HashMap<Uuid, CaptionCounts> = HashMap::new();
        for (job, outcome, count) in rows {
            let counts = counts.entry(job).or_default();
            let count = unsigned(count);
            match outcome_of(job, &outcome)? {
                CaptionOutcome::Captioned => counts.captioned = count,
                CaptionOutcome::Skipped => counts.skipped = count,
                CaptionOutcome::Failed => counts.failed = count,
            }
        }
        Ok(counts)
    }

    /// What a job has said of its images, from the position `from`; of one outcome, if it is given.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn caption_results(
        &self,
        job: Uuid,
        outcome: Option<CaptionOutcome>,
        after: Option<u64>,
        limit: u64,
    ) -> Result<Vec<CaptionResult>, StoreError> {
        let mut query = row::Entity::find()
            .filter(row::Column::JobId.eq(job))
            .order_by_asc(row::Column::Position)
            .limit(limit);
        if let Some(outcome) = outcome {
            query = query.filter(row::Column::Outcome.eq(outcome.as_str()));
        }
        if let Some(after) = after {
            query = query.filter(row::Column::Position.gt(signed(after)));
        }
        let rows = query.all(&self.db).await?;
        rows.into_iter()
            .map(|row| {
                Ok(CaptionResult {
                    position: unsigned(row.position),
                    image_id: row.image_id,
                    outcome: outcome_of(job, &row.outcome)?,
                    file_name: row.file_name,
                    message: row.message,
                    caption: row.caption,
                    tags: row.tags,
                    created_at: time_of(row.created_at_ms),
                })
            })
            .collect()
    }

    /// The captioning jobs of a dataset in the order in which they were made, after `after`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn captioning_jobs(
        &self,
        dataset: Uuid,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Run>, StoreError> {
        let mut query = find()
            .filter(run::Column::DatasetId.eq(dataset))
            .filter(run::Column::Captioner.is_not_null())
            .order_by_asc(run::Column::Id)
            .limit(limit);
        if let Some(after) = after {
            query = query.filter(run::Column::Id.gt(after));
        }
        query.all(&self.db).await?.into_iter().map(read).collect()
    }
}

/// What subscribers hear.
fn told(progress: &JobProgress) -> Value {
    json!({
        "done": progress.done,
        "total": progress.total,
        "images_per_s": progress.images_per_s,
        "eta_s": progress.eta_s,
    })
}

fn outcome_of(job: Uuid, word: &str) -> Result<CaptionOutcome, StoreError> {
    let mut known = CaptionOutcome::ALL.into_iter();
    known
        .find(|outcome| outcome.as_str() == word)
        .ok_or_else(|| StoreError::Corrupt {
            what: format!("captioning_results, {job}, outcome"),
            message: format!("found `{word}`"),
        })
}
