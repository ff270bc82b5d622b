//! The training loop.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use time::OffsetDateTime;

use crate::allocator;
use crate::dataloader::{Batch, EpochPlan, TrainingImage};
use crate::diffusion::StableDiffusion;
use crate::networks::metadata::{
    BaseModelRecord, JudgementRecord, TrainingRecord, base_model_record,
};
use crate::networks::{LoraNetwork, SavedLora};
use crate::training::data::{
    LatentEncoder, Latents, TrainingSet, encode_all, encode_held_out, stack,
};
use crate::training::ema::Ema;
use crate::training::guard::{self, Cause, NonFinite, RolledBack};
use crate::training::judge::{EarlyStop, Judge, Measured};
use crate::training::position::{LoopState, Position};
use crate::training::progress::{Control, Phase, ProgressSink, Report, StepReport};
use crate::training::random::{Stream, generator, normal_tensor, timesteps};
use crate::training::record::{RunFacts, training_record};
use crate::training::resume::{Owner, Parts, ResumeError, ResumeFolder, ResumePoint};
use crate::training::settings::{OnNonFinite, TrainLength, TrainSettings};
use crate::training::step::{MicroBatch, StepOutput, Trainer};
use crate::training::text::Captions;
use crate::training::validation::{HeldOut, validate};
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
    /// Why it has ended before its last step, if it has.
    pub early_stop: Option<EarlyStop>,
}

/// Where a run's files go, and what they say of its origin.
#[derive(Debug, Clone)]
pub struct RunPlace {
    /// LoRA files.
    pub output_dir: PathBuf,
    /// Resume points, and what they belong to; none are kept without.
    pub resume: Option<(ResumeFolder, Owner)>,
    /// When the run was made.
    pub recorded_at: OffsetDateTime,
    /// Digest of all that decides the result; told in the files.
    pub inputs_sha256: Option<String>,
    /// A number that tells runs apart.
    pub session_id: u32,
}

/// Trains the adapters of `network` on `data` and writes LoRA files.
///
/// It goes on from the newest resume point of `place`, if there is one, and computes what it would have computed
/// without the interruption. A stop that the sink asks for ends in [`TrainError::Stopped`].
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
    place: &RunPlace,
) -> Result<TrainOutcome, TrainError> {
    if let Some(problem) = settings.problems().into_iter().next() {
        return Err(problem.into());
    }
    let mut reporter = Reporter { sink, step: 0 };
    let device = network.device();

    // What is trained on, and for how long.
    let (train_images, held_out) = data.split(settings)?;
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

    let trainer = Trainer::new(model, network, optimizer, scheduler, settings);
    let base_model = base_model_record(&data.base_model).map_err(|source| {
        let path = data.base_model.display().to_string();
        TrainError::BaseModel { path, source }
    })?;
    let resume = place.resume.clone().map(|(folder, mut owner)| {
        let BaseModelRecord { name, sha256, .. } = &base_model;
        owner.insert("the base model".to_owned(), format!("{name} {sha256}"));
        (folder, owner)
    });
    let facts = RunFacts {
        set: data,
        train: &train_images,
        held_out: held_out.len(),
        plan: &plan,
        prediction: trainer.objective().prediction,
        total_steps: length.steps,
        total_epochs: length.epochs,
        base_model,
        recorded_at: place.recorded_at,
        inputs_sha256: place.inputs_sha256.clone(),
        session_id: place.session_id,
    };
    let files = Files {
        settings,
        output_dir: &place.output_dir,
        record: training_record(settings, facts),
    };
    let state = LoopState {
        ema: (settings.ema.clone()).map(|ema| Ema::new(ema, trainer.network)),
        ..LoopState::default()
    };
    let mut run = Run {
        trainer,
        reporter,
        settings,
        files,
        held_out: &held_out,
        captions: &captions,
        length,
        resume: resume.as_ref(),
        state,
        kept_at: Instant::now(),
        measured: None,
        early_stop: None,
        start: None,
        finite_at: None,
    };
    run.take_up()?;
    let outcome = loop {
        match run.train(&plan, &source).and_then(|()| run.finish()) {
            Err(TrainError::NotFinite(found)) => {
                if let Err(error) = run.roll_back(*found) {
                    break Err(error);
                }
            }
            outcome => break outcome,
        }
    };
    if matches!(outcome, Err(TrainError::Stopped { .. })) && run.reporter.sink.wishes().leave {
        match run.keep() {
            // The next worker goes on from the point before, and finds this out itself.
            Err(TrainError::NotFinite(_)) => {}
            kept => kept?,
        }
    }
    outcome
}

/// A training in progress. Between optimizer steps its state is whole, whatever else of the step is still to do.
struct Run<'a> {
    trainer: Trainer<'a>,
    reporter: Reporter<'a>,
    settings: &'a TrainSettings,
    files: Files<'a>,
    held_out: &'a [HeldOut],
    captions: &'a Captions,
    length: Length,
    resume: Option<&'a (ResumeFolder, Owner)>,
    state: LoopState,
    /// When the last resume point was written.
    kept_at: Instant,
    /// The newest validation of this process.
    measured: Option<Measured>,
    early_stop: Option<EarlyStop>,
    /// The state before the first step, as long as there is no resume point and it may be needed.
    start: Option<ResumePoint>,
    /// The step whose adapters are known to be finite.
    finite_at: Option<u64>,
}

impl Run<'_> {
    /// The loop.
    fn train(&mut self, plan: &EpochPlan, source: &BatchSource<'_>) -> Result<(), TrainError> {
        if self.state.position.chores_due {
            self.chores()?;
        }
        self.early_stop = self.stops_early();
        // Pictures were encoded, and drawn, in blocks of other sizes than steps ask for.
        allocator::release();
        self.reporter.phase(Phase::Training)?;
        for epoch in self.state.position.epoch..=self.length.epochs {
            let batches = plan.batches(epoch - 1);
            let groups: Vec<&[Batch]> = batches
                .chunks(self.settings.gradient_accumulation_steps)
                .collect();
            for index in self.state.position.groups_done(epoch)..groups.len() {
                if self.trainer.steps_done() == self.length.steps || self.early_stop.is_some() {
                    return Ok(());
                }
                let (group, started) = (groups[index], Instant::now());
                let batches_done = self.state.position.batches_done;
                let micro: Vec<MicroBatch> = group
                    .iter()
                    .zip(batches_done..)
                    .map(|(batch, number)| source.micro_batch(batch, number))
                    .collect();
                let output = self.trainer.optimizer_step(&micro)?;
                if let (Some(ema), false) = (&mut self.state.ema, output.skipped) {
                    ema.update(self.trainer.network);
                }

                let images = group.iter().map(|batch| batch.images.len()).sum();
                let (average, clock) = (&mut self.state.average, &mut self.state.clock);
                clock.add(started.elapsed().as_secs_f64(), images);
                let loss_average = average.add(index, output.loss);
                self.state.position = Position {
                    epoch,
                    groups: index + 1,
                    groups_per_epoch: groups.len(),
                    batches_done: batches_done + group.len() as u64,
                    chores_due: true,
                };
                self.report(&output, images, loss_average)?;
                self.chores()?;
            }
        }
        Ok(())
    }

    fn report(
        &mut self,
        output: &StepOutput,
        images: usize,
        loss_average: f64,
    ) -> Result<(), TrainError> {
        let (step, clock) = (self.trainer.steps_done(), &self.state.clock);
        let report = StepReport {
            step,
            total_steps: self.length.steps,
            epoch: self.state.position.epoch,
            total_epochs: self.length.epochs,
            loss: output.loss,
            loss_average,
            grad_norm: output.grad_norm,
            grad_norm_unet: output.grad_norm_unet,
            grad_norm_text_encoder: output.grad_norm_text_encoder,
            skipped_steps: self.trainer.loss_scale().skipped(),
            lr_unet: output.lr_unet,
            lr_text_encoder: output.lr_text_encoder,
            images,
            step_time_s: clock.last_s,
            images_per_s: clock.images_per_s(),
            device_memory_bytes: self.device_memory_bytes(),
            eta_s: clock.eta_s(step, self.length.steps),
        };
        self.reporter.step = step;
        self.reporter.send(Report::Step(&report))
    }

    /// What is due after a step, or before the first: files, measurements, pictures, a resume point.
    fn chores(&mut self) -> Result<(), TrainError> {
        let step = self.trainer.steps_done();
        let settings = self.settings;
        if step == 0 {
            self.validate(Occasion::Planned)?;
            if settings.samples.at_first {
                self.draw_samples()?;
            }
            self.state.position.chores_due = false;
            return Ok(());
        }
        let wishes = self.reporter.sink.wishes();
        let Position { epoch, .. } = self.state.position;
        let ends_epoch = self.state.position.ends_epoch();
        let epoch_is_due = ends_epoch && due(settings.save.every_n_epochs, epoch);
        // Whatever the run's length is: a longer one measures here, too.
        let planned = due(settings.validation.every_n_steps, step)
            || due(settings.save.every_n_steps, step)
            || epoch_is_due;
        if planned {
            self.validate(Occasion::Planned)?;
        } else if wishes.save && step == self.length.steps {
            self.validate(Occasion::End)?;
        } else if wishes.save {
            self.validate(Occasion::Wished)?;
        }
        let last = step == self.length.steps || self.early_stop.is_some();
        let mut saved = false;
        if due(settings.save.every_n_steps, step) || wishes.save {
            let name = format!("{}-step{step:08}", settings.output_name);
            self.save(&name, epoch, false)?;
            saved = true;
        }
        // The end of the run draws anyway.
        if (due(settings.samples.every_n_steps, step) || wishes.sample) && !last {
            self.draw_samples()?;
        }
        if epoch_is_due && epoch < self.length.epochs && !last {
            let name = format!("{}-{epoch:06}", settings.output_name);
            self.save(&name, epoch, false)?;
            saved = true;
        }
        self.state.position.chores_due = false;
        let minutes = self.kept_at.elapsed().as_secs_f64() / 60.0;
        let kept =
            minutes >= settings.resume.every_minutes || due(settings.resume.every_n_steps, step);
        if kept || saved || last {
            self.keep()?;
        }
        self.reporter.sink.fulfilled(wishes);
        Ok(())
    }

    /// The result, measured and shown.
    fn finish(&mut self) -> Result<TrainOutcome, TrainError> {
        let name = &self.settings.output_name;
        if self.measured_now().is_none() {
            self.validate(Occasion::End)?;
        }
        let (path, saved) = self.save(name, self.state.position.epoch, true)?;
        self.draw_samples()?;
        let before = self.state.judge.before_training();
        Ok(TrainOutcome {
            steps: self.trainer.steps_done(),
            path,
            saved,
            validation_loss_before: before.map(|measured| measured.loss),
            validation_loss_after: self.measured_now().map(|measured| measured.loss),
            early_stop: self.early_stop,
        })
    }

    /// Goes on where the newest resume point is, if there is one.
    fn take_up(&mut self) -> Result<(), TrainError> {
        if let Some((folder, _)) = self.resume {
            folder.clear_unfinished();
        }
        let Some(point) = self.newest_point()? else {
            if self.settings.on_non_finite == OnNonFinite::HalveLr {
                self.start = Some(self.resume_point()?);
            }
            return Ok(());
        };
        let step = point.step;
        self.go_on_from(point)?;
        self.reporter.send(Report::Resumed {
            step,
            epoch: self.state.position.epoch,
            loss_average: self.state.average.mean(),
        })
    }

    /// Goes back to where the numbers were finite, once and with half the learning rates, or fails with advice.
    fn roll_back(&mut self, found: NonFinite) -> Result<(), TrainError> {
        let guard = &self.state.guard;
        let may =
            self.settings.on_non_finite == OnNonFinite::HalveLr && guard.rolled_back.is_none();
        let point = if may { self.newest_point()? } else { None };
        let Some(point) = point.or(self.start.take().filter(|_| may)) else {
            return Err(found.advised(self.settings, &self.state.guard).into());
        };
        let back = RolledBack {
            at_step: found.step,
            to_step: point.step,
            cause: found.cause.to_string(),
        };
        tracing::warn!(%back, "numbers are no longer finite");
        self.go_on_from(point)?;
        // Whatever was due after that step was done before the numbers went wrong.
        self.state.position.chores_due = false;
        self.state.guard.rolled_back = Some(back.clone());
        self.trainer.set_lr_factor(self.state.guard.lr_factor());
        (self.measured, self.early_stop, self.finite_at) = (None, None, None);
        let verdict = self.verdict(&self.state.judge).unwrap_or_default();
        let told = self.reporter.send(Report::RolledBack {
            back: &back,
            epoch: self.state.position.epoch,
            loss_average: self.state.average.mean(),
            verdict: &verdict,
        });
        // Neither a crash nor a pause makes the run forget what it has learned.
        self.keep_as(ResumeFolder::write_back)?;
        told
    }

    /// Makes everything as it was at a resume point.
    fn go_on_from(&mut self, point: ResumePoint) -> Result<(), TrainError> {
        let step = point.step;
        let owner = point.owner.clone();
        let owner = self.resume.map_or(&owner, |(_, owner)| owner);
        point.restore(owner, parts(&mut self.trainer, &mut self.state))?;
        self.trainer.resume_at(step);
        self.trainer.set_lr_factor(self.state.guard.lr_factor());
        self.reporter.step = step;
        Ok(())
    }

    fn newest_point(&self) -> Result<Option<ResumePoint>, TrainError> {
        match self.resume {
            Some((folder, _)) => Ok(folder.newest()?),
            None => Ok(None),
        }
    }

    /// The state of this moment, which has to be finite.
    fn resume_point(&mut self) -> Result<ResumePoint, TrainError> {
        let step = self.trainer.steps_done();
        let owner = self.resume.map(|(_, owner)| owner.clone());
        let parts = parts(&mut self.trainer, &mut self.state);
        let point = ResumePoint::of(step, &owner.unwrap_or_default(), parts)?;
        if !guard::is_finite(&point) {
            return Err(self.trainer.non_finite(step, Cause::Weights)?.into());
        }
        Ok(point)
    }

    /// Lets nothing be made of adapters that are not finite.
    fn expect_finite(&mut self) -> Result<(), TrainError> {
        let step = self.trainer.steps_done();
        if self.finite_at == Some(step) {
            return Ok(());
        }
        if !guard::weights_are_finite(self.trainer.network)? {
            return Err(self.trainer.non_finite(step, Cause::Weights)?.into());
        }
        self.finite_at = Some(step);
        Ok(())
    }

    /// Writes a resume point.
    fn keep(&mut self) -> Result<(), TrainError> {
        self.keep_as(ResumeFolder::write)
    }

    fn keep_as(
        &mut self,
        write: fn(&ResumeFolder, &ResumePoint) -> Result<(), ResumeError>,
    ) -> Result<(), TrainError> {
        let Some((folder, _)) = self.resume else {
            return Ok(());
        };
        let point = self.resume_point()?;
        let step = point.step;
        // Whoever goes on from here reports nothing of what came before.
        if self.reporter.sink.settle() == Control::Stop {
            return Err(TrainError::Stopped { step });
        }
        write(folder, &point)?;
        self.start = None;
        self.kept_at = Instant::now();
        self.reporter.send(Report::Kept { step })
    }

    fn save(
        &mut self,
        name: &str,
        epoch: u64,
        last: bool,
    ) -> Result<(PathBuf, SavedLora), TrainError> {
        self.expect_finite()?;
        let measured = self.measured_now();
        let step = self.trainer.steps_done();
        let judgement = measured.and_then(|measured| {
            let Measured {
                loss,
                standard_error,
                ..
            } = measured;
            Some(JudgementRecord {
                validation_loss: loss,
                standard_error,
                verdict: self.verdict(&with(&self.state.judge, measured))?,
            })
        });
        let rolled_back = self.state.guard.rolled_back.as_ref();
        let rolled_back = rolled_back.map(ToString::to_string);
        self.reporter.phase(Phase::Saving)?;
        let files = &self.files;
        let save =
            |trainer: &mut Trainer<'_>| files.save(trainer, name, epoch, judgement, rolled_back);
        let ema = self.state.ema.as_mut();
        let (path, saved) = with_result(&mut self.trainer, ema, save)?;
        self.reporter.send(Report::Checkpoint {
            step,
            epoch,
            last,
            path: &path,
            saved: &saved,
            measured,
        })?;
        Ok((path, saved))
    }

    /// Measures the held-out images, if there are any.
    fn validate(&mut self, occasion: Occasion) -> Result<(), TrainError> {
        if self.held_out.is_empty() {
            return Ok(());
        }
        self.expect_finite()?;
        self.reporter.phase(Phase::Validating)?;
        let (held_out, captions) = (self.held_out, self.captions);
        let measure = |trainer: &mut Trainer<'_>| validate(trainer, held_out, captions);
        let measured = with_result(&mut self.trainer, self.state.ema.as_mut(), measure)?;
        let judge = with(&self.state.judge, measured);
        // Later decisions depend on what every run of these settings measures, not on wishes or on where it ends.
        if occasion == Occasion::Planned {
            self.state.judge = judge.clone();
            self.early_stop = self.stops_early();
        }
        self.measured = Some(measured);
        let verdict = self.verdict(&judge);
        let early_stop = self.early_stop.map(|stop| stop.to_string());
        self.reporter.send(Report::Validation {
            measured,
            verdict: verdict.as_deref().filter(|_| occasion != Occasion::Wished),
            early_stop: early_stop.as_deref(),
        })
    }

    /// The validation of this step, if there was one.
    fn measured_now(&self) -> Option<Measured> {
        let step = self.trainer.steps_done();
        self.measured.filter(|measured| measured.step == step)
    }

    /// What validations say, and whether the run has gone back.
    fn verdict(&self, judge: &Judge) -> Option<String> {
        let judged = judge.verdict(self.early_stop.as_ref());
        let back = self.state.guard.rolled_back.as_ref();
        let said: Vec<String> = judged
            .into_iter()
            .chain(back.map(ToString::to_string))
            .collect();
        (!said.is_empty()).then(|| said.join("; "))
    }

    fn device_memory_bytes(&self) -> Option<u64> {
        let usage = self.trainer.device().memory_pool_usage()?;
        Some(usage.bytes_reserved)
    }

    /// Why the run ends here, before its last step.
    fn stops_early(&self) -> Option<EarlyStop> {
        let rule = self.settings.early_stopping.as_ref()?;
        let stop = self.state.judge.early_stop(rule)?;
        let step = self.trainer.steps_done();
        (stop.step == step && step < self.length.steps).then_some(stop)
    }

    fn draw_samples(&mut self) -> Result<(), TrainError> {
        let (reporter, settings) = (&mut self.reporter, self.settings);
        if settings.samples.prompts.is_empty() {
            return Ok(());
        }
        let draw = |trainer: &mut Trainer<'_>| reporter.draw_samples(trainer, settings);
        with_result(&mut self.trainer, self.state.ema.as_mut(), draw)
    }
}

/// Does something with the adapters that are measured, drawn with and saved: their average where there is one, else what
/// the optimizer gives out for that.
fn with_result<'a, T>(
    trainer: &mut Trainer<'a>,
    ema: Option<&mut Ema>,
    work: impl FnOnce(&mut Trainer<'a>) -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    let Some(ema) = ema else {
        return trainer.with_eval_values(work);
    };
    ema.exchange(trainer.network);
    trainer.attach();
    let outcome = work(trainer);
    ema.exchange(trainer.network);
    trainer.attach();
    outcome
}

/// Why the held-out images are measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// The settings want it at this step, however long the run is.
    Planned,
    /// Somebody has wished for a file.
    Wished,
    /// The run ends.
    End,
}

/// The measurements with one more.
fn with(judge: &Judge, measured: Measured) -> Judge {
    let mut judge = judge.clone();
    judge.add(measured);
    judge
}

/// Everything that a resume point holds. A new part is one line, here or in [`Trainer::resumable`].
fn parts<'a>(trainer: &'a mut Trainer<'_>, state: &'a mut LoopState) -> Parts<'a> {
    let mut parts = trainer.resumable();
    parts.push(("position", &mut state.position));
    parts.push(("loss_average", &mut state.average));
    parts.push(("clock", &mut state.clock));
    parts.push(("validations", &mut state.judge));
    parts.push(("guard", &mut state.guard));
    if let Some(ema) = &mut state.ema {
        parts.push(("ema", ema));
    }
    parts
}

/// Optimizer steps that [`train`] will do.
///
/// # Errors
/// When the settings or the bucket sizes make no sense, or nothing is left to train on.
pub fn planned_steps(data: &TrainingSet, settings: &TrainSettings) -> Result<u64, TrainError> {
    let (images, _) = data.split(settings)?;
    let plan = EpochPlan::new(&images, &data.buckets, settings.batch_size, settings.seed)?;
    Ok(Length::new(settings, plan.batches_per_epoch())?.steps)
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Epochs, the last of which may be cut short.
    pub epochs: u64,
    /// Optimizer steps of a whole epoch.
    pub steps_per_epoch: u64,
}

impl Length {
    /// `epochs · ⌈batches / accumulation⌉` steps, or the epochs that the steps need.
    ///
    /// # Errors
    /// When there are no batches.
    pub fn new(settings: &TrainSettings, batches_per_epoch: usize) -> Result<Self, TrainError> {
        let accumulation = settings.gradient_accumulation_steps;
        let steps_per_epoch = batches_per_epoch.div_ceil(accumulation) as u64;
        if steps_per_epoch == 0 {
            return Err(TrainError::NoImages);
        }
        let (steps, epochs) = match settings.length {
            TrainLength::Steps(steps) => (steps, steps.div_ceil(steps_per_epoch)),
            TrainLength::Epochs(epochs) => (epochs.saturating_mul(steps_per_epoch), epochs),
        };
        Ok(Self {
            steps,
            epochs,
            steps_per_epoch,
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
        name: &str,
        epoch: u64,
        judgement: Option<JudgementRecord>,
        rolled_back: Option<String>,
    ) -> Result<(PathBuf, SavedLora), TrainError> {
        let record = TrainingRecord {
            output_name: name.to_owned(),
            steps: trainer.steps_done(),
            epoch,
            judgement,
            rolled_back,
            ..self.record.clone()
        };
        let path = self.output_dir.join(format!("{name}.safetensors"));
        let precision = self.settings.save.precision;
        let saved = trainer.network.save(&path, precision, record.entries())?;
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

    fn draw_samples(
        &mut self,
        trainer: &Trainer<'_>,
        settings: &TrainSettings,
    ) -> Result<(), TrainError> {
        for (prompt_index, prompt) in settings.samples.prompts.iter().enumerate() {
            self.phase(Phase::Sampling)?;
            let image = previews::draw(trainer, prompt, settings)?;
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
