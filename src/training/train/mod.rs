//! The training loop: its steps in order, what is due between them, and how it goes on after an interruption.

mod chores;
mod inputs;
mod measuring;
mod output;
mod resuming;

use std::path::{Path, PathBuf};
use std::time::Instant;

use time::OffsetDateTime;

pub use self::inputs::{Length, planned_steps};

use self::inputs::{BatchSource, Inputs, Selection};
use self::measuring::Occasion;
use self::output::{Files, Reporter};
use crate::allocator;
use crate::dataloader::{Batch, EpochPlan};
use crate::diffusion::StableDiffusion;
use crate::lora_tools::Layers;
use crate::networks::metadata::{BaseModelRecord, base_model_record};
use crate::networks::{LoraNetwork, SavedLora};
use crate::training::data::TrainingSet;
use crate::training::ema::Ema;
use crate::training::judge::{EarlyStop, Measured};
use crate::training::position::{LoopState, Position};
use crate::training::progress::{Phase, ProgressSink};
use crate::training::record::training_record;
use crate::training::resume::{Owner, ResumeFolder, ResumePoint};
use crate::training::settings::{SettingProblem, TrainSettings};
use crate::training::step::{MicroBatch, Trainer};
use crate::training::text::Captions;
use crate::training::validation::HeldOut;
use crate::training::{LrScheduler, Optimizer, TrainError};

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

    let selection = Selection::new(data, settings)?;
    network.detach(model);
    let inputs = Inputs::prepare(model, data, settings, &selection, &device, &mut reporter)?;
    let schedule_steps = model.schedule.len();
    let source = BatchSource::new(settings, &selection, &inputs, schedule_steps, &device);

    let separate_vae = model.separate_vae().map(Path::to_owned);
    let layers = Layers::of(model);
    let trainer = Trainer::new(model, network, optimizer, scheduler, settings);
    if let Some((field, message)) = settings.loss.problem_with(trainer.objective().prediction) {
        let pointer = format!("/loss/{field}");
        return Err(SettingProblem { pointer, message }.into());
    }
    let recorded = |path: &Path| {
        base_model_record(path).map_err(|source| {
            let path = path.display().to_string();
            TrainError::BaseModel { path, source }
        })
    };
    let mut base_model = recorded(&data.base_model)?;
    if let Some(path) = &separate_vae {
        base_model.vae = Some(Box::new(recorded(path)?));
    }
    let resume = place.resume.clone().map(|(folder, mut owner)| {
        let BaseModelRecord {
            name, sha256, vae, ..
        } = &base_model;
        owner.insert("the base model".to_owned(), format!("{name} {sha256}"));
        if let Some(vae) = vae {
            owner.insert("the VAE".to_owned(), format!("{} {}", vae.name, vae.sha256));
        }
        (folder, owner)
    });
    let facts = selection.facts(data, place, &trainer, base_model);
    let files = Files {
        settings,
        output_dir: &place.output_dir,
        record: training_record(settings, facts),
        layers,
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
        held_out: &inputs.held_out,
        captions: &inputs.captions,
        length: selection.length,
        resume: resume.as_ref(),
        state,
        kept_at: Instant::now(),
        measured: None,
        early_stop: None,
        start: None,
        finite_at: None,
    };
    run.complete(&selection.plan, &source)
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
    /// Everything from the newest resume point to the result. Numbers that are not finite send the loop back, and who is
    /// to leave early may have to leave a resume point behind.
    fn complete(
        &mut self,
        plan: &EpochPlan,
        source: &BatchSource<'_>,
    ) -> Result<TrainOutcome, TrainError> {
        self.take_up()?;
        let outcome = loop {
            match self.train(plan, source).and_then(|()| self.finish()) {
                Err(TrainError::NotFinite(found)) => {
                    if let Err(error) = self.roll_back(*found) {
                        break Err(error);
                    }
                }
                outcome => break outcome,
            }
        };
        if matches!(outcome, Err(TrainError::Stopped { .. })) && self.reporter.sink.wishes().leave {
            match self.keep() {
                // The next worker goes on from the point before, and finds this out itself.
                Err(TrainError::NotFinite(_)) => {}
                kept => kept?,
            }
        }
        outcome
    }

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
                let step = self.trainer.steps_done();
                let micro: Vec<MicroBatch> = group
                    .iter()
                    .zip(batches_done..)
                    .map(|(batch, number)| {
                        source.micro_batch(batch, number, epoch, step, self.trainer.model)
                    })
                    .collect::<Result<_, _>>()?;
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
}
