//! The training loop.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use time::OffsetDateTime;

use crate::allocator;
use crate::dataloader::{Batch, EpochPlan, TrainingImage};
use crate::diffusion::StableDiffusion;
use crate::networks::metadata::{TrainingRecord, base_model_record};
use crate::networks::{LoraNetwork, SavedLora};
use crate::training::data::{
    LatentEncoder, Latents, TrainingSet, encode_all, encode_held_out, stack,
};
use crate::training::progress::{Control, Phase, ProgressSink, Report, StepReport};
use crate::training::random::{Stream, generator, normal_tensor, timesteps};
use crate::training::record::{RunFacts, training_record};
use crate::training::settings::{TrainLength, TrainSettings};
use crate::training::step::{MicroBatch, Trainer};
use crate::training::text::Captions;
use crate::training::validation::{HeldOut, validation_loss};
use crate::training::{LrScheduler, Optimizer, TrainError, previews};

/// What a finished run has made.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOutcome {
    /// Optimizer steps done.
    pub steps: u64,
    /// The result.
    pub path: PathBuf,
    /// Its digest and size.
    pub saved: SavedLora,
    /// Loss on the held-out images before the first step.
    pub validation_loss_before: Option<f64>,
    /// Loss on the held-out images after the last step.
    pub validation_loss_after: Option<f64>,
}

/// Trains the adapters of `network` on `data` and writes LoRA files to `output_dir`.
///
/// A stop that the sink asks for ends in [`TrainError::Stopped`].
#[expect(
    clippy::too_many_arguments,
    reason = "the parts of a run, each with its own owner"
)]
pub fn train(
    model: &mut StableDiffusion,
    network: &mut LoraNetwork,
    data: &TrainingSet,
    settings: &TrainSettings,
    optimizer: &mut dyn Optimizer,
    scheduler: &dyn LrScheduler,
    sink: &mut dyn ProgressSink,
    output_dir: &Path,
) -> Result<TrainOutcome, TrainError> {
    if let Some(problem) = settings.problems().into_iter().next() {
        return Err(problem.into());
    }
    let mut reporter = Reporter { sink, step: 0 };
    let device = network.device();

    // What is trained on, and for how long.
    let (train_images, held_out) = data.split(&settings.validation.image_ids)?;
    if train_images.is_empty() {
        return Err(TrainError::NoImages);
    }
    let plan = EpochPlan::new(
        &train_images,
        &data.buckets,
        settings.batch_size,
        settings.seed,
    )?;
    let length = Length::new(settings, plan.batches_per_epoch())?;

    // Frozen halves of the model run once per image and caption, not once per step.
    network.detach(model);
    let mut encoder = LatentEncoder::new(model, &device, data, settings.seed);
    let latents = encode_all(&mut encoder, &train_images, &plan, |phase| {
        reporter.phase(phase)
    })?;
    let held_out = encode_held_out(&mut encoder, &held_out, &data.buckets)?;
    tracing::info!(
        cached = encoder.cached,
        encoded = encoder.encoded,
        "pictures are encoded"
    );
    if settings.samples.prompts.is_empty() {
        model.unload_vae();
    }
    let captions = data.images.iter().map(|image| image.caption.as_str());
    let cache = data.cache.as_ref();
    let captions = Captions::prepare(model, captions, settings, cache, &device, |phase| {
        reporter.phase(phase)
    })?;
    let source = BatchSource {
        settings,
        images: &train_images,
        latents: &latents,
        captions: &captions,
        schedule_steps: model.schedule.len(),
        device: &device,
    };

    let mut trainer = Trainer::new(model, network, optimizer, scheduler, settings);
    let facts = RunFacts {
        set: data,
        train: &train_images,
        plan: &plan,
        prediction: trainer.objective().prediction,
        total_steps: length.steps,
        total_epochs: length.epochs,
        base_model: base_model_record(&data.base_model).map_err(|source| {
            let path = data.base_model.display().to_string();
            TrainError::BaseModel { path, source }
        })?,
    };
    let files = Files {
        settings,
        output_dir,
        record: training_record(settings, facts),
    };

    let validation_loss_before = reporter.validate(&trainer, &held_out, &captions)?;
    if settings.samples.at_first {
        reporter.draw_samples(&trainer, settings)?;
    }
    // Pictures were encoded, and drawn, in blocks of other sizes than steps ask for.
    allocator::release();
    reporter.phase(Phase::Training)?;
    let mut average = LossAverage::default();
    let mut clock = Clock::default();
    let mut batches_done = 0;
    'epochs: for epoch in 1..=length.epochs {
        let batches = plan.batches(epoch - 1);
        let groups = batches.chunks(settings.gradient_accumulation_steps);
        for (position, group) in groups.enumerate() {
            let started = Instant::now();
            let micro: Vec<MicroBatch> = group
                .iter()
                .zip(batches_done..)
                .map(|(batch, number)| source.micro_batch(batch, number))
                .collect();
            batches_done += group.len() as u64;
            let output = trainer.optimizer_step(&micro)?;

            let step = trainer.steps_done();
            let images = group.iter().map(|batch| batch.images.len()).sum();
            clock.add(started.elapsed().as_secs_f64(), images);
            let report = StepReport {
                step,
                total_steps: length.steps,
                epoch,
                total_epochs: length.epochs,
                loss: output.loss,
                loss_average: average.add(position, output.loss),
                grad_norm: output.grad_norm,
                lr_unet: output.lr_unet,
                lr_text_encoder: output.lr_text_encoder,
                images,
                step_time_s: clock.last_s,
                images_per_s: clock.images_per_s(),
                eta_s: clock.eta_s(step, length.steps),
            };
            reporter.step = step;
            reporter.send(Report::Step(&report))?;

            if due(settings.save.every_n_steps, step) {
                let name = format!("{}-step{step:08}", settings.output_name);
                files.save(&trainer, &mut reporter, &name, epoch, false)?;
            }
            if step == length.steps {
                break 'epochs;
            }
            if due(settings.validation.every_n_steps, step) {
                reporter.validate(&trainer, &held_out, &captions)?;
            }
            if due(settings.samples.every_n_steps, step) {
                reporter.draw_samples(&trainer, settings)?;
            }
        }
        if due(settings.save.every_n_epochs, epoch) && epoch < length.epochs {
            let name = format!("{}-{epoch:06}", settings.output_name);
            files.save(&trainer, &mut reporter, &name, epoch, false)?;
        }
    }

    let name = &settings.output_name;
    let (path, saved) = files.save(&trainer, &mut reporter, name, length.epochs, true)?;
    let validation_loss_after = reporter.validate(&trainer, &held_out, &captions)?;
    reporter.draw_samples(&trainer, settings)?;
    Ok(TrainOutcome {
        steps: trainer.steps_done(),
        path,
        saved,
        validation_loss_before,
        validation_loss_after,
    })
}

/// Optimizer steps that [`train`] will do.
///
/// # Errors
/// When the settings or the bucket sizes make no sense, or nothing is left to train on.
pub fn planned_steps(data: &TrainingSet, settings: &TrainSettings) -> Result<u64, TrainError> {
    let (images, _) = data.split(&settings.validation.image_ids)?;
    let plan = EpochPlan::new(&images, &data.buckets, settings.batch_size, settings.seed)?;
    Ok(Length::new(settings, plan.batches_per_epoch())?.steps)
}

/// Optimizer steps and epochs of a run.
struct Length {
    steps: u64,
    epochs: u64,
}

impl Length {
    /// `epochs · ⌈batches / accumulation⌉` steps, or the epochs that the steps need.
    fn new(settings: &TrainSettings, batches_per_epoch: usize) -> Result<Self, TrainError> {
        let accumulation = settings.gradient_accumulation_steps;
        let per_epoch = batches_per_epoch.div_ceil(accumulation) as u64;
        if per_epoch == 0 {
            return Err(TrainError::NoImages);
        }
        Ok(match settings.length {
            TrainLength::Steps(steps) => Self {
                steps,
                epochs: steps.div_ceil(per_epoch),
            },
            TrainLength::Epochs(epochs) => Self {
                steps: epochs.saturating_mul(per_epoch),
                epochs,
            },
        })
    }
}

/// Makes batches: latents and captions of the images, noise and timesteps of the batch's number.
struct BatchSource<'a> {
    settings: &'a TrainSettings,
    images: &'a [TrainingImage],
    latents: &'a [Latents],
    captions: &'a Captions,
    schedule_steps: usize,
    device: &'a Device,
}

impl BatchSource<'_> {
    fn micro_batch(&self, batch: &Batch, number: u64) -> MicroBatch {
        let place = number.to_le_bytes();
        let seed = self.settings.seed;
        let images = || batch.images.iter().map(|&index| &self.images[index]);
        let latents: Vec<_> = batch.images.iter().map(|&i| &self.latents[i]).collect();
        let latents = stack(&latents, self.device); // [batch, channels, height, width]
        let mut noise_rng = generator(seed, Stream::Noise, &place);
        let mut timestep_rng = generator(seed, Stream::Timesteps, &place);
        let captions: Vec<&str> = images().map(|image| image.caption.as_str()).collect();
        let prior = self.settings.prior_loss_weight;
        MicroBatch {
            noise: normal_tensor(&mut noise_rng, latents.dims(), self.device),
            latents,
            timesteps: timesteps(&mut timestep_rng, captions.len(), self.schedule_steps),
            conditioning: self.captions.batch(&captions),
            loss_weights: images()
                .map(|image| if image.regularization { prior } else { 1.0 })
                .collect(),
        }
    }
}

/// Writes LoRA files with the run's description.
struct Files<'a> {
    settings: &'a TrainSettings,
    output_dir: &'a Path,
    record: TrainingRecord,
}

impl Files<'_> {
    fn save(
        &self,
        trainer: &Trainer<'_>,
        reporter: &mut Reporter<'_>,
        name: &str,
        epoch: u64,
        last: bool,
    ) -> Result<(PathBuf, SavedLora), TrainError> {
        reporter.phase(Phase::Saving)?;
        let step = trainer.steps_done();
        let record = TrainingRecord {
            output_name: name.to_owned(),
            steps: step,
            epoch,
            finished_at: OffsetDateTime::now_utc(),
            ..self.record.clone()
        };
        let path = self.output_dir.join(format!("{name}.safetensors"));
        let precision = self.settings.save.precision;
        let saved = trainer.network.save(&path, precision, record.entries())?;
        reporter.send(Report::Checkpoint {
            step,
            epoch,
            last,
            path: &path,
            saved: &saved,
        })?;
        Ok((path, saved))
    }
}

/// Passes reports on and turns a wish to stop into an error.
struct Reporter<'a> {
    sink: &'a mut dyn ProgressSink,
    step: u64,
}

impl Reporter<'_> {
    fn send(&mut self, report: Report<'_>) -> Result<(), TrainError> {
        match self.sink.report(report) {
            Control::Continue => Ok(()),
            Control::Stop => Err(TrainError::Stopped { step: self.step }),
        }
    }

    fn phase(&mut self, phase: Phase) -> Result<(), TrainError> {
        self.send(Report::Phase(phase))
    }

    fn validate(
        &mut self,
        trainer: &Trainer<'_>,
        held_out: &[HeldOut],
        captions: &Captions,
    ) -> Result<Option<f64>, TrainError> {
        if held_out.is_empty() {
            return Ok(None);
        }
        self.phase(Phase::Validating)?;
        let loss = validation_loss(trainer, held_out, captions)?;
        let step = trainer.steps_done();
        self.send(Report::Validation { step, loss })?;
        Ok(Some(loss))
    }

    fn draw_samples(
        &mut self,
        trainer: &Trainer<'_>,
        settings: &TrainSettings,
    ) -> Result<(), TrainError> {
        for (prompt_index, prompt) in settings.samples.prompts.iter().enumerate() {
            self.phase(Phase::Sampling)?;
            let image = previews::draw(trainer, prompt, settings.max_token_length)?;
            self.send(Report::Sample {
                step: trainer.steps_done(),
                prompt_index,
                prompt: &prompt.prompt,
                seed: prompt.seed,
                image: &image,
            })?;
        }
        Ok(())
    }
}

/// Whether an "every n" falls on a number.
fn due(every: Option<u64>, number: u64) -> bool {
    every.is_some_and(|every| number.is_multiple_of(every))
}

/// The mean over the latest loss at each position of the epoch: smooth, and never more than one epoch old.
#[derive(Debug, Default)]
struct LossAverage {
    losses: Vec<f64>,
}

impl LossAverage {
    fn add(&mut self, position: usize, loss: f64) -> f64 {
        match self.losses.get_mut(position) {
            Some(slot) => *slot = loss,
            None => self.losses.push(loss),
        }
        self.losses.iter().sum::<f64>() / self.losses.len() as f64
    }
}

/// Time spent in optimizer steps.
#[derive(Debug, Default)]
struct Clock {
    steps: u64,
    images: usize,
    seconds: f64,
    last_s: f64,
}

impl Clock {
    fn add(&mut self, seconds: f64, images: usize) {
        self.steps += 1;
        self.images += images;
        self.seconds += seconds;
        self.last_s = seconds;
    }

    fn images_per_s(&self) -> f64 {
        self.images as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }

    fn eta_s(&self, step: u64, total: u64) -> f64 {
        self.seconds / self.steps as f64 * total.saturating_sub(step) as f64
    }
}
