//! What a run would do and take, told without starting it.

use std::collections::{BTreeMap, HashSet};

use super::memory::MemoryPlan;
use super::pace::{self, Pace};
use super::service::{Checked, NewRunRequest, RunError, RunProblem, RunService};
use super::worker::training_set;
use crate::dataloader::{EpochPlan, TrainingImage};
use crate::diffusion::devices::{self, DeviceInfo, DeviceSpec};
use crate::store::runs::RunFailure;
use crate::training::memory::Remedy;
use crate::training::{Length, TrainError, TrainSettings, TrainingSet};

/// What a run would do.
#[derive(Clone, Debug)]
pub struct RunPlan {
    /// The id of the device that it would run on.
    pub device: String,
    /// Pictures that it trains on.
    pub images: u64,
    /// Pictures of an epoch: repeats counted, regularization pictures balanced.
    pub images_per_epoch: u64,
    /// Batches of an epoch; each has pictures of one bucket, so that the last one of each may be smaller.
    pub batches_per_epoch: u64,
    /// Optimizer steps of an epoch.
    pub steps_per_epoch: u64,
    /// Epochs; the last one may be cut off when the length is one in steps.
    pub epochs: u64,
    /// Optimizer steps.
    pub total_steps: u64,
    /// Subsets that are trained on, by name.
    pub subsets: Vec<PlannedSubset>,
    /// Sizes of pictures, and what has them.
    pub buckets: Vec<PlannedBucket>,
    /// Memory on the CPU; of a GPU its driver does not tell.
    pub memory: Option<PlannedMemory>,
    /// Why a worker would refuse it.
    pub refusal: Option<RunFailure>,
    /// The time of a step, when an earlier run has told it.
    pub pace: Option<Pace>,
}

/// What an epoch shows of a subset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedSubset {
    /// Its name.
    pub name: String,
    /// Whether it is for regularization: then its pictures are as many as the others' together.
    pub regularization: bool,
    /// Pictures that may be trained on.
    pub images: u64,
    /// How often an epoch shows each, before regularization is balanced.
    pub repeats: u32,
    /// Pictures of an epoch: images × repeats, regularization balanced.
    pub images_per_epoch: u64,
}

/// A size of pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedBucket {
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// Pictures of this size.
    pub images: u64,
    /// The same, repeats counted.
    pub images_per_epoch: u64,
    /// Batches of an epoch.
    pub batches_per_epoch: u64,
}

/// Memory of the worker's process.
#[derive(Clone, Debug)]
pub struct PlannedMemory {
    /// The estimated peak.
    pub estimated_peak_bytes: u64,
    /// What is free now; `None` where the system does not tell.
    pub available_bytes: Option<u64>,
    /// What the optimizer keeps from step to step; part of the peak.
    pub optimizer_state_bytes: u64,
    /// What the moving average of the adapters takes; part of the peak.
    pub ema_bytes: u64,
    /// What would take less.
    pub remedies: Vec<Remedy>,
}

impl RunService {
    /// What [`RunService::create`] would start.
    ///
    /// # Errors
    /// Those of [`RunService::create`].
    pub async fn plan(&self, request: NewRunRequest) -> Result<RunPlan, RunError> {
        let Checked {
            spec, images, base, ..
        } = self.check(request).await?;
        let device = device_of(&spec.device).await?;
        let pace = pace::expected(self.store(), &spec, Some(&device.id)).await?;
        let data = training_set(self.store(), images, &spec, &base.path, None);
        let optimizer = &spec.settings.optimizer.id;
        let state_bytes = self.plugins().state_bytes_per_element(optimizer);
        // Sizes of many pictures and headers of large files.
        let planned = tokio::task::spawn_blocking(move || {
            plan(&data, &spec.settings, state_bytes, &device, pace)
        });
        planned.await?
    }
}

/// The device that a checked name means now.
async fn device_of(name: &str) -> Result<DeviceInfo, RunError> {
    let wanted = match name.parse::<DeviceSpec>() {
        Ok(spec) => spec.to_string(), // `vulkan` is `vulkan:0`
        Err(_) => name.to_owned(),
    };
    let found = tokio::task::spawn_blocking(move || {
        let mut known = devices::list();
        let index = known
            .iter()
            .position(|info| info.id == wanted || (wanted == "auto" && info.is_default));
        index.map(|index| known.swap_remove(index))
    });
    // A device can go between the check and this.
    let device = found.await?;
    device.ok_or_else(|| {
        let message = format!("found `{name}`, this machine has no such device now");
        RunError::Invalid(vec![RunProblem::new("/device", "invalid_value", message)])
    })
}

fn plan(
    data: &TrainingSet,
    settings: &TrainSettings,
    state_bytes: f64,
    device: &DeviceInfo,
    pace: Option<Pace>,
) -> Result<RunPlan, RunError> {
    let refused = |error: TrainError| {
        let problem = RunProblem::new("/dataset_id", "invalid_value", error.to_string());
        RunError::Invalid(vec![problem])
    };
    let (images, _) = data.split(settings).map_err(refused)?;
    let epoch = EpochPlan::new(&images, &data.buckets, settings.batch_size, settings.seed);
    let epoch = epoch.map_err(|error| refused(error.into()))?;
    let length = Length::new(settings, epoch.batches_per_epoch()).map_err(refused)?;
    let buckets: Vec<PlannedBucket> = buckets(&epoch, settings.batch_size);
    let (memory, refusal) = memory(data, settings, state_bytes, device);
    Ok(RunPlan {
        device: device.id.clone(),
        images: buckets.iter().map(|bucket| bucket.images).sum(),
        images_per_epoch: epoch.images_per_epoch() as u64,
        batches_per_epoch: epoch.batches_per_epoch() as u64,
        steps_per_epoch: length.steps_per_epoch,
        epochs: length.epochs,
        total_steps: length.steps,
        subsets: subsets(data, &images, &epoch),
        buckets,
        memory,
        refusal,
        pace,
    })
}

fn subsets(data: &TrainingSet, images: &[TrainingImage], epoch: &EpochPlan) -> Vec<PlannedSubset> {
    let mut shown = vec![0_u64; images.len()];
    for index in epoch.buckets().values().flatten() {
        shown[*index] += 1;
    }
    let mut subsets: BTreeMap<&str, PlannedSubset> = BTreeMap::new();
    for (image, shown) in images.iter().zip(shown) {
        let name = data.subsets.get(&image.id).map_or("", String::as_str);
        let subset = subsets.entry(name).or_insert_with(|| PlannedSubset {
            name: name.to_owned(),
            regularization: image.regularization,
            images: 0,
            repeats: image.repeats,
            images_per_epoch: 0,
        });
        subset.images += 1;
        subset.images_per_epoch += shown;
    }
    subsets.into_values().collect()
}

impl RunPlan {
    /// How the steps come about, in numbers.
    pub fn formula(&self, batch_size: u64, gradient_accumulation_steps: u64) -> String {
        let of_subset = |subset: &PlannedSubset| {
            let PlannedSubset {
                name,
                images,
                repeats,
                images_per_epoch,
                ..
            } = subset;
            match subset.regularization {
                true => format!("{name}: {images} × {repeats} balanced to {images_per_epoch}"),
                false => format!("{name}: {images} × {repeats} = {images_per_epoch}"),
            }
        };
        let subsets: Vec<String> = self.subsets.iter().map(of_subset).collect();
        let accumulated = match gradient_accumulation_steps {
            1 => String::new(),
            steps => format!(" / {steps} accumulated"),
        };
        format!(
            "{}; together {} images an epoch; / batch size {batch_size}, rounded up in each bucket, = {} \
             batches{accumulated} = {} steps an epoch; {} epochs: {} steps",
            subsets.join(", "),
            self.images_per_epoch,
            self.batches_per_epoch,
            self.steps_per_epoch,
            self.epochs,
            self.total_steps,
        )
    }
}

fn buckets(epoch: &EpochPlan, batch_size: usize) -> Vec<PlannedBucket> {
    let bucket = |((width_px, height_px), entries): (&(u32, u32), &Vec<usize>)| PlannedBucket {
        width_px: *width_px,
        height_px: *height_px,
        images: entries.iter().collect::<HashSet<_>>().len() as u64,
        images_per_epoch: entries.len() as u64,
        batches_per_epoch: entries.len().div_ceil(batch_size.max(1)) as u64,
    };
    epoch.buckets().iter().map(bucket).collect()
}

fn memory(
    data: &TrainingSet,
    settings: &TrainSettings,
    state_bytes: f64,
    device: &DeviceInfo,
) -> (Option<PlannedMemory>, Option<RunFailure>) {
    match MemoryPlan::of_another_process(data, settings, state_bytes, device) {
        Err(failure) => (None, Some(failure)),
        Ok(plan) => {
            let memory = PlannedMemory {
                estimated_peak_bytes: plan.estimated_peak_bytes,
                available_bytes: plan.available_bytes,
                optimizer_state_bytes: plan.optimizer_state_bytes(),
                ema_bytes: plan.ema_bytes(),
                remedies: plan.remedies(),
            };
            (Some(memory), plan.check().err())
        }
    }
}
