//! Where the loop is, and what it remembers besides adapters and optimizer.

use serde_json::json;

use crate::training::TrainError;
use crate::training::ema::Ema;
use crate::training::guard::Guard;
use crate::training::judge::Judge;
use crate::training::resume::{Part, PartTensor, Resumable};

/// What the loop changes from step to step.
#[derive(Debug, Default)]
pub struct LoopState {
    /// In the data.
    pub position: Position,
    /// Of the loss.
    pub average: LossAverage,
    /// Of the steps.
    pub clock: Clock,
    /// Of the validations.
    pub judge: Judge,
    /// Of numbers that were not finite.
    pub guard: Guard,
    /// Of the adapters, where one is wanted.
    pub ema: Option<Ema>,
}

/// How far the data has been gone through. Its order is a function of the seed and the epoch, noise and timesteps of
/// the seed and the batch's number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Epoch of the last step, from 1.
    pub epoch: u64,
    /// Steps done in that epoch.
    pub groups: usize,
    /// Steps of an epoch; 0 before the first.
    pub groups_per_epoch: usize,
    /// Batches done in the whole run.
    pub batches_done: u64,
    /// Whether files, measurements and pictures of this step are still to be made; some of them may be there.
    pub chores_due: bool,
}

impl Default for Position {
    fn default() -> Self {
        Self {
            epoch: 1,
            groups: 0,
            groups_per_epoch: 0,
            batches_done: 0,
            chores_due: true,
        }
    }
}

impl Position {
    /// Steps done in an epoch that has been begun, or is the next one.
    pub fn groups_done(&self, epoch: u64) -> usize {
        if epoch == self.epoch { self.groups } else { 0 }
    }

    /// Whether the last step was the last of its epoch.
    pub fn ends_epoch(&self) -> bool {
        self.groups == self.groups_per_epoch
    }
}

impl Resumable for Position {
    fn keep(&mut self) -> Result<Part, TrainError> {
        Ok(Part {
            values: json!({
                "epoch": self.epoch,
                "groups": self.groups,
                "groups_per_epoch": self.groups_per_epoch,
                "batches_done": self.batches_done,
                "chores_due": self.chores_due,
            }),
            tensors: Vec::new(),
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        *self = Self {
            epoch: part.count("epoch")?,
            groups: part.count("groups")? as usize,
            groups_per_epoch: part.count("groups_per_epoch")? as usize,
            batches_done: part.count("batches_done")?,
            chores_due: part.values["chores_due"] == true,
        };
        Ok(())
    }
}

/// The mean over the latest loss at each position of the epoch: smooth, and never more than one epoch old.
#[derive(Debug, Default)]
pub struct LossAverage {
    losses: Vec<f64>,
}

impl LossAverage {
    /// Takes the loss of a position, and tells the new mean.
    pub fn add(&mut self, position: usize, loss: f64) -> f64 {
        // A step that was left out has no loss to speak of.
        let loss = if loss.is_finite() { loss } else { self.mean() };
        match self.losses.get_mut(position) {
            Some(slot) => *slot = loss,
            None => self.losses.push(loss),
        }
        self.mean()
    }

    /// The mean; 0 before the first loss.
    pub fn mean(&self) -> f64 {
        self.losses.iter().sum::<f64>() / self.losses.len().max(1) as f64
    }
}

impl Resumable for LossAverage {
    fn keep(&mut self) -> Result<Part, TrainError> {
        Ok(Part {
            values: json!({}),
            tensors: vec![PartTensor::of_doubles("losses", &self.losses)],
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        self.losses = part.tensor("losses")?.doubles();
        Ok(())
    }
}

/// Time spent in optimizer steps.
#[derive(Debug, Default)]
pub struct Clock {
    steps: u64,
    images: usize,
    seconds: f64,
    /// Of the last step.
    pub last_s: f64,
}

impl Clock {
    /// Takes the time of a step.
    pub fn add(&mut self, seconds: f64, images: usize) {
        self.steps += 1;
        self.images += images;
        self.seconds += seconds;
        self.last_s = seconds;
    }

    /// Over all steps so far.
    pub fn images_per_s(&self) -> f64 {
        self.images as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }

    /// Time that the rest takes at the speed so far.
    pub fn eta_s(&self, step: u64, total: u64) -> f64 {
        self.seconds / self.steps as f64 * total.saturating_sub(step) as f64
    }
}

impl Resumable for Clock {
    fn keep(&mut self) -> Result<Part, TrainError> {
        Ok(Part {
            values: json!({"steps": self.steps, "images": self.images}),
            tensors: vec![PartTensor::of_doubles(
                "seconds",
                &[self.seconds, self.last_s],
            )],
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        let seconds = part.tensor("seconds")?.doubles();
        *self = Self {
            steps: part.count("steps")?,
            images: part.count("images")? as usize,
            seconds: seconds.first().copied().unwrap_or_default(),
            last_s: seconds.last().copied().unwrap_or_default(),
        };
        Ok(())
    }
}
