//! What a run brings forth, row by row: events, metrics, samples.

use sea_orm::sea_query::{Expr, ExprTrait as _};
use sea_orm::{
    ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _, Set,
};
use serde_json::Value;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{signed, unsigned};
use crate::store::rows::{run_event, run_metric, run_sample};
use crate::store::{Store, StoreError, now_ms, time_of};

/// Something that subscribers hear of.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its number within the run, from 1, without gaps.
    pub seq: u64,
    /// `state`, `memory`, `phase`, `resumed`, `environment_changed`, `rolled_back`, `progress`, `validation`, `sample`,
    /// `lora`.
    pub kind: String,
    /// What it says.
    pub data: Value,
    /// When it was written.
    pub created_at: OffsetDateTime,
}

/// What subscribers of a run have heard of its results.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// The step of the last `progress`, or the one to which a later `rolled_back` has led.
    pub last_step: Option<u64>,
    /// Every `validation`, `sample`, `lora` and `rolled_back`: kind and data, the newest first. What a run that has gone
    /// back does again is no longer among them.
    pub results: Vec<(String, Value)>,
}

impl Told {
    /// Forgets what came after a step: it is done, and told, again.
    pub fn go_back_to(&mut self, step: u64) {
        self.last_step = self.last_step.map(|last| Ord::min(last, step));
        self.results.retain(|(kind, data)| {
            kind == "rolled_back" || data["step"].as_u64().is_none_or(|at| at <= step)
        });
    }
}

/// One optimizer step, or the measurement before the first (step 0).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metric {
    /// Optimizer steps done.
    pub step: u64,
    /// Epoch, from 1; 0 before the first step.
    pub epoch: u64,
    /// Loss of the step.
    pub loss: Option<f64>,
    /// Mean loss of the last epoch.
    pub loss_average: Option<f64>,
    /// Loss on the held-out images.
    pub validation_loss: Option<f64>,
    /// Standard error of that loss.
    pub validation_error: Option<f64>,
    /// Learning rate of the UNet.
    pub lr_unet: Option<f64>,
    /// Learning rate of the text encoder.
    pub lr_text_encoder: Option<f64>,
    /// L2 norm of all gradients before clipping.
    pub grad_norm: Option<f64>,
    /// That of the UNet's adapters.
    pub grad_norm_unet: Option<f64>,
    /// That of the text encoder's adapters.
    pub grad_norm_text_encoder: Option<f64>,
    /// Wall-clock time of the step.
    pub step_time_s: Option<f64>,
    /// Images per second of training.
    pub images_per_s: Option<f64>,
    /// Expected time of the remaining steps.
    pub eta_s: Option<f64>,
    /// Memory of the worker's process.
    pub memory_bytes: Option<u64>,
    /// What the device has set aside for it.
    pub device_memory_bytes: Option<u64>,
}

/// A preview picture to be listed.
#[derive(Clone, Debug)]
pub struct NewSample {
    /// Its id.
    pub id: Uuid,
    /// Optimizer steps behind it.
    pub step: u64,
    /// Position in the list of prompts.
    pub prompt_index: u32,
    /// The prompt.
    pub prompt: String,
    /// Seed of its noise.
    pub seed: u64,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// Digest of the PNG.
    pub sha256: String,
    /// Size of the PNG.
    pub size_bytes: u64,
}

/// A preview picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its id.
    pub id: Uuid,
    /// Its run.
    pub run_id: Uuid,
    /// Optimizer steps behind it.
    pub step: u64,
    /// Position in the list of prompts.
    pub prompt_index: u32,
    /// The prompt.
    pub prompt: String,
    /// Seed of its noise.
    pub seed: u64,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// Digest of the PNG.
    pub sha256: String,
    /// Size of the PNG.
    pub size_bytes: u64,
    /// When it was drawn.
    pub created_at: OffsetDateTime,
}

impl Store {
    /// Events after number `after`, in order.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn events(
        &self,
        run_id: Uuid,
        after: u64,
        limit: u64,
    ) -> Result<Vec<Event>, StoreError> {
        let rows = run_event::Entity::find()
            .filter(run_event::Column::RunId.eq(run_id))
            .filter(run_event::Column::Seq.gt(signed(after)))
            .order_by_asc(run_event::Column::Seq)
            .limit(limit)
            .all(&self.db)
            .await?;
        rows.into_iter().map(event).collect()
    }

    /// What subscribers have heard of the results of a run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn told(&self, run_id: Uuid) -> Result<Told, StoreError> {
        let of_kind = |kinds: &[&str]| {
            run_event::Entity::find()
                .filter(run_event::Column::RunId.eq(run_id))
                .filter(run_event::Column::Kind.is_in(kinds.iter().copied()))
                .order_by_desc(run_event::Column::Seq)
        };
        let last = of_kind(&["progress"]).one(&self.db).await?;
        let results = of_kind(&["validation", "sample", "lora", "rolled_back"]);
        let parse = |row: &run_event::Model| serde_json::from_str(&row.data).unwrap_or(Value::Null);
        let mut told = Told {
            last_step: last.as_ref().and_then(|row| parse(row)["step"].as_u64()),
            results: Vec::new(),
        };
        // Oldest first, as going back forgets what came before it.
        let rows = results.all(&self.db).await?;
        for row in rows.iter().rev() {
            let data = parse(row);
            if let ("rolled_back", Some(step)) = (row.kind.as_str(), data["to_step"].as_u64()) {
                let later = last.as_ref().is_some_and(|last| last.seq > row.seq);
                let last_step = told.last_step;
                told.go_back_to(step);
                told.last_step = if later { last_step } else { told.last_step };
            }
            told.results.insert(0, (row.kind.clone(), data));
        }
        Ok(told)
    }

    /// Metrics after step `since`, in order; with `every` only the steps that it divides, and those with a
    /// validation loss.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn metrics(
        &self,
        run_id: Uuid,
        since: Option<u64>,
        every: Option<u64>,
        limit: u64,
    ) -> Result<Vec<Metric>, StoreError> {
        let mut query = run_metric::Entity::find()
            .filter(run_metric::Column::RunId.eq(run_id))
            .order_by_asc(run_metric::Column::Step)
            .limit(limit);
        if let Some(since) = since {
            query = query.filter(run_metric::Column::Step.gt(signed(since)));
        }
        if let Some(every) = every {
            let divided = Expr::col(run_metric::Column::Step)
                .modulo(signed(every))
                .eq(0);
            query = query.filter(divided.or(run_metric::Column::ValidationLoss.is_not_null()));
        }
        Ok(query.all(&self.db).await?.into_iter().map(metric).collect())
    }

    /// Wall-clock times of the last steps of a run, in seconds.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn last_step_times(&self, run_id: Uuid, limit: u64) -> Result<Vec<f64>, StoreError> {
        let times: Vec<Option<f64>> = run_metric::Entity::find()
            .select_only()
            .column(run_metric::Column::StepTimeS)
            .filter(run_metric::Column::RunId.eq(run_id))
            .filter(run_metric::Column::StepTimeS.is_not_null())
            .order_by_desc(run_metric::Column::Step)
            .limit(limit)
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(times.into_iter().flatten().collect())
    }

    /// Samples in the order in which they were drawn, after `after`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn samples(
        &self,
        run_id: Uuid,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Sample>, StoreError> {
        let mut query = run_sample::Entity::find()
            .filter(run_sample::Column::RunId.eq(run_id))
            .order_by_asc(run_sample::Column::Id)
            .limit(limit);
        if let Some(after) = after {
            query = query.filter(run_sample::Column::Id.gt(after));
        }
        Ok(query.all(&self.db).await?.into_iter().map(sample).collect())
    }

    /// One sample of a run.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn sample(&self, run_id: Uuid, id: Uuid) -> Result<Sample, StoreError> {
        let row = run_sample::Entity::find_by_id(id)
            .filter(run_sample::Column::RunId.eq(run_id))
            .one(&self.db)
            .await?;
        row.map(sample).ok_or(StoreError::NotFound)
    }
}

pub(super) fn event(row: run_event::Model) -> Result<Event, StoreError> {
    let data = serde_json::from_str(&row.data).map_err(|error| StoreError::Corrupt {
        what: format!("run_events, {}/{}, data", row.run_id, row.seq),
        message: error.to_string(),
    })?;
    Ok(Event {
        seq: unsigned(row.seq),
        kind: row.kind,
        data,
        created_at: time_of(row.created_at_ms),
    })
}

pub(super) fn metric_row(run_id: Uuid, metric: Metric) -> run_metric::ActiveModel {
    run_metric::ActiveModel {
        run_id: Set(run_id),
        step: Set(signed(metric.step)),
        epoch: Set(signed(metric.epoch)),
        loss: Set(metric.loss),
        loss_average: Set(metric.loss_average),
        validation_loss: Set(metric.validation_loss),
        validation_error: Set(metric.validation_error),
        lr_unet: Set(metric.lr_unet),
        lr_text_encoder: Set(metric.lr_text_encoder),
        grad_norm: Set(metric.grad_norm),
        grad_norm_unet: Set(metric.grad_norm_unet),
        grad_norm_text_encoder: Set(metric.grad_norm_text_encoder),
        step_time_s: Set(metric.step_time_s),
        images_per_s: Set(metric.images_per_s),
        eta_s: Set(metric.eta_s),
        device_memory_bytes: Set(metric.device_memory_bytes.map(signed)),
        memory_bytes: Set(metric.memory_bytes.map(signed)),
    }
}

pub(super) fn sample_row(run_id: Uuid, new: NewSample) -> run_sample::ActiveModel {
    run_sample::ActiveModel {
        id: Set(new.id),
        run_id: Set(run_id),
        step: Set(signed(new.step)),
        prompt_index: Set(small(new.prompt_index)),
        prompt: Set(new.prompt),
        seed: Set(new.seed.to_string()),
        width_px: Set(small(new.width_px)),
        height_px: Set(small(new.height_px)),
        sha256: Set(new.sha256),
        size_bytes: Set(signed(new.size_bytes)),
        created_at_ms: Set(now_ms()),
    }
}

fn metric(row: run_metric::Model) -> Metric {
    Metric {
        step: unsigned(row.step),
        epoch: unsigned(row.epoch),
        loss: row.loss,
        loss_average: row.loss_average,
        validation_loss: row.validation_loss,
        validation_error: row.validation_error,
        lr_unet: row.lr_unet,
        lr_text_encoder: row.lr_text_encoder,
        grad_norm: row.grad_norm,
        grad_norm_unet: row.grad_norm_unet,
        grad_norm_text_encoder: row.grad_norm_text_encoder,
        step_time_s: row.step_time_s,
        images_per_s: row.images_per_s,
        eta_s: row.eta_s,
        device_memory_bytes: row.device_memory_bytes.map(unsigned),
        memory_bytes: row.memory_bytes.map(unsigned),
    }
}

fn sample(row: run_sample::Model) -> Sample {
    Sample {
        id: row.id,
        run_id: row.run_id,
        step: unsigned(row.step),
        prompt_index: natural(row.prompt_index),
        prompt: row.prompt,
        seed: row.seed.parse().unwrap_or(0),
        width_px: natural(row.width_px),
        height_px: natural(row.height_px),
        sha256: row.sha256,
        size_bytes: unsigned(row.size_bytes),
        created_at: time_of(row.created_at_ms),
    }
}

fn small(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

fn natural(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}
