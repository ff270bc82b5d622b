//! Measuring the held-out images and what follows from it, with the adapters that are worth measuring.

use super::Run;
use crate::training::TrainError;
use crate::training::ema::Ema;
use crate::training::guard::{self, Cause};
use crate::training::judge::{EarlyStop, Judge, Measured};
use crate::training::progress::{Phase, Report};
use crate::training::step::Trainer;
use crate::training::validation::validate;

/// Why the held-out images are measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    /// The settings want it at this step, however long the run is.
    Planned,
    /// Somebody has wished for a file.
    Wished,
    /// The run ends.
    End,
}

impl Run<'_> {
    /// Lets nothing be made of adapters that are not finite.
    pub(super) fn expect_finite(&mut self) -> Result<(), TrainError> {
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

    /// Measures the held-out images, if there are any.
    pub(super) fn validate(&mut self, occasion: Occasion) -> Result<(), TrainError> {
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
    pub(super) fn measured_now(&self) -> Option<Measured> {
        let step = self.trainer.steps_done();
        self.measured.filter(|measured| measured.step == step)
    }

    /// What validations say, and whether the run has gone back.
    pub(super) fn verdict(&self, judge: &Judge) -> Option<String> {
        let judged = judge.verdict(self.early_stop.as_ref());
        let back = self.state.guard.rolled_back.as_ref();
        let said: Vec<String> = judged
            .into_iter()
            .chain(back.map(ToString::to_string))
            .collect();
        (!said.is_empty()).then(|| said.join("; "))
    }

    /// Why the run ends here, before its last step.
    pub(super) fn stops_early(&self) -> Option<EarlyStop> {
        let rule = self.settings.early_stopping.as_ref()?;
        let stop = self.state.judge.early_stop(rule)?;
        let step = self.trainer.steps_done();
        (stop.step == step && step < self.length.steps).then_some(stop)
    }
}

/// The measurements with one more.
pub(super) fn with(judge: &Judge, measured: Measured) -> Judge {
    let mut judge = judge.clone();
    judge.add(measured);
    judge
}

/// Does something with the adapters that are measured, drawn with and saved: their average where there is one, else what
/// the optimizer gives out for that.
pub(super) fn with_result<'a, T>(
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
