//! Resume points of the loop: kept, taken up, and gone back to when numbers are no longer finite.

use std::time::Instant;

use super::Run;
use crate::training::TrainError;
use crate::training::guard::{self, Cause, NonFinite, RolledBack};
use crate::training::position::LoopState;
use crate::training::progress::{Control, Report};
use crate::training::resume::{Parts, ResumeError, ResumeFolder, ResumePoint};
use crate::training::settings::OnNonFinite;
use crate::training::step::Trainer;

impl Run<'_> {
    /// Goes on where the newest resume point is, if there is one.
    pub(super) fn take_up(&mut self) -> Result<(), TrainError> {
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
    pub(super) fn roll_back(&mut self, found: NonFinite) -> Result<(), TrainError> {
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

    /// Writes a resume point.
    pub(super) fn keep(&mut self) -> Result<(), TrainError> {
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
