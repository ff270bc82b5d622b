//! What is due after a step: files, measurements, pictures, a resume point.

use std::path::PathBuf;

use super::Run;
use super::measuring::{Occasion, with, with_result};
use super::output::CheckedFile;
use crate::networks::SavedLora;
use crate::networks::metadata::JudgementRecord;
use crate::training::TrainError;
use crate::training::judge::Measured;
use crate::training::progress::{Phase, Report};
use crate::training::step::Trainer;

impl Run<'_> {
    /// Does what is due after a step, or before the first.
    pub(super) fn chores(&mut self) -> Result<(), TrainError> {
        let step = self.trainer.steps_done();
        if step == 0 {
            return self.first_chores();
        }
        let settings = self.settings;
        let wishes = self.reporter.sink.wishes();
        let epoch = self.state.position.epoch;
        let ends_epoch = self.state.position.ends_epoch();
        let epoch_is_due = ends_epoch && due(settings.save.every_n_epochs, epoch);
        if let Some(occasion) = self.occasion(step, epoch_is_due, wishes.save) {
            self.validate(occasion)?;
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
        if self.point_is_due(step) || saved || last {
            self.keep()?;
        }
        self.reporter.sink.fulfilled(wishes);
        Ok(())
    }

    fn first_chores(&mut self) -> Result<(), TrainError> {
        self.validate(Occasion::Planned)?;
        if self.settings.samples.at_first {
            self.draw_samples()?;
        }
        self.state.position.chores_due = false;
        Ok(())
    }

    /// Why the held-out images are measured after this step, if they are.
    fn occasion(&self, step: u64, epoch_is_due: bool, wished: bool) -> Option<Occasion> {
        let settings = self.settings;
        // Whatever the run's length is: a longer one measures here, too.
        let planned = due(settings.validation.every_n_steps, step)
            || due(settings.save.every_n_steps, step)
            || epoch_is_due;
        let on_wish = if step == self.length.steps {
            Occasion::End
        } else {
            Occasion::Wished
        };
        if planned {
            Some(Occasion::Planned)
        } else {
            wished.then_some(on_wish)
        }
    }

    fn point_is_due(&self, step: u64) -> bool {
        let resume = &self.settings.resume;
        let minutes = self.kept_at.elapsed().as_secs_f64() / 60.0;
        minutes >= resume.every_minutes || due(resume.every_n_steps, step)
    }

    /// Writes a LoRA file of this moment and tells of it.
    pub(super) fn save(
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
        let save = |trainer: &mut Trainer<'_>| {
            files.save(trainer, name, epoch, judgement, rolled_back, last)
        };
        let ema = self.state.ema.as_mut();
        let CheckedFile {
            path,
            saved,
            checked,
        } = with_result(&mut self.trainer, ema, save)?;
        self.reporter.send(Report::Checkpoint {
            step,
            epoch,
            last,
            path: &path,
            saved: &saved,
            checked: &checked,
            measured,
        })?;
        Ok((path, saved))
    }

    /// Draws all prompts, if there are any.
    pub(super) fn draw_samples(&mut self) -> Result<(), TrainError> {
        let (reporter, settings) = (&mut self.reporter, self.settings);
        if settings.samples.prompts.is_empty() {
            return Ok(());
        }
        let draw = |trainer: &mut Trainer<'_>| reporter.draw_samples(trainer, settings);
        with_result(&mut self.trainer, self.state.ema.as_mut(), draw)
    }
}

/// Whether an "every n" falls on a number.
fn due(every: Option<u64>, number: u64) -> bool {
    every.is_some_and(|every| number.is_multiple_of(every))
}
