//! What the validations of a run say: which was the best, whether to stop early, and a verdict in words. Everything is a
//! function of the measurements, so these are all that a resume point holds of it.

use std::fmt;

use serde_json::json;

use crate::training::TrainError;
use crate::training::resume::{Part, PartTensor, Resumable, ResumeError};
use crate::training::settings::EarlyStopping;

/// The loss on the held-out images at one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Optimizer steps done.
    pub step: u64,
    /// Mean loss.
    pub loss: f64,
    /// Standard error of that mean: how far it would move with other pictures.
    pub standard_error: f64,
}

/// The measurements of a run in the order of their steps.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Judge {
    measured: Vec<Measured>,
}

/// Why a run ends before its last step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EarlyStop {
    /// The step after which it ends.
    pub step: u64,
    /// The last measurement that was an improvement.
    pub best: Measured,
    /// Measurements since then.
    pub waited: u64,
    /// What would have counted as an improvement.
    pub min_delta: f64,
}

impl fmt::Display for EarlyStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, best, .. } = self;
        let validations = match self.waited {
            1 => "1 validation".to_owned(),
            waited => format!("{waited} validations"),
        };
        let less = match self.min_delta {
            0.0 => String::new(),
            delta => format!(" by more than {delta}"),
        };
        let loss = digits(best.loss);
        write!(
            f,
            "stopped early at step {step}: {validations} since step {} have not improved on its loss of {loss}{less}",
            best.step
        )
    }
}

impl Judge {
    /// Takes a measurement; one of a step that was done before replaces the former and all after it.
    pub fn add(&mut self, new: Measured) {
        self.measured.retain(|known| known.step < new.step);
        self.measured.push(new);
    }

    /// The newest measurement.
    pub fn last(&self) -> Option<Measured> {
        self.measured.last().copied()
    }

    /// The first measurement, when it was made before the first step.
    pub fn before_training(&self) -> Option<Measured> {
        self.measured.first().copied().filter(|m| m.step == 0)
    }

    /// The lowest loss; of several the first.
    pub fn best(&self) -> Option<Measured> {
        let all = self.measured.iter().copied();
        all.min_by(|a, b| a.loss.total_cmp(&b.loss))
    }

    /// Whether the run should end after the newest measurement: `patience` of them in a row have not been lower than the
    /// best before them by more than `min_delta`.
    pub fn early_stop(&self, rule: &EarlyStopping) -> Option<EarlyStop> {
        let (first, rest) = self.measured.split_first()?;
        let (mut best, mut waited) = (*first, 0);
        for new in rest {
            if best.loss - new.loss > rule.min_delta {
                (best, waited) = (*new, 0);
            } else {
                waited += 1;
            }
        }
        let stop = EarlyStop {
            step: self.last()?.step,
            best,
            waited,
            min_delta: rule.min_delta,
        };
        (waited >= rule.patience).then_some(stop)
    }

    /// What the measurements say, in words; nothing without any.
    pub fn verdict(&self, stopped: Option<&EarlyStop>) -> Option<String> {
        let (first, last, best) = (self.measured.first()?, self.last()?, self.best()?);
        let course = if self.measured.len() == 1 {
            let Measured { step, loss, .. } = *first;
            let error = digits(first.standard_error);
            format!(
                "validation loss is {} ± {error} at step {step}",
                digits(loss)
            )
        } else {
            self.course(first, &best, &last)
        };
        Some(match stopped {
            Some(stop) => format!("{course}; {stop}"),
            None => course,
        })
    }

    /// The verdict on several measurements. A change that is smaller than the standard error is none.
    fn course(&self, first: &Measured, best: &Measured, last: &Measured) -> String {
        let fell = first.loss - best.loss > noise(first, best);
        let rose = last.loss - best.loss > noise(best, last);
        let [from, lowest, now] = [first, best, last].map(|measured| digits(measured.loss));
        let error = digits(best.standard_error);
        if !fell && !rose {
            return format!(
                "validation loss has not changed by more than its standard error: {from} at step {}, {now} ± {error} at \
                 step {}; the lowest is {lowest} at step {}",
                first.step, last.step, best.step
            );
        }
        let since = match self.rising_since() {
            Some(step) if rose => Some(format!("and has been rising since step {step}")),
            _ => None,
        };
        if !fell {
            let since = since.map(|since| format!(" {since}")).unwrap_or_default();
            return format!(
                "validation loss has not fallen below the {from} of step {} by more than its standard error{since}; it \
                 is {now} at step {}",
                first.step, last.step
            );
        }
        let fall = format!("validation loss fell from {from} to {lowest} ± {error}");
        if best.step == last.step {
            return format!(
                "{fall} and was still falling at step {}, which is the best",
                last.step
            );
        }
        let since = match since {
            Some(since) => format!("{since}, to {now}"),
            None if rose => format!("and has not fallen below that since, to {now}"),
            None => format!("and has stayed within its standard error since, {now}"),
        };
        format!(
            "{fall} {since} at step {}; best is step {}",
            last.step, best.step
        )
    }

    /// Where the rise began that the newest measurement is part of.
    fn rising_since(&self) -> Option<u64> {
        let mut pairs = self.measured.windows(2).rev();
        let falls = pairs.position(|pair| pair[1].loss <= pair[0].loss);
        let rises = falls.unwrap_or(self.measured.len() - 1);
        let start = self.measured.len().checked_sub(1 + rises)?;
        (rises > 0).then(|| self.measured[start].step)
    }
}

/// What a difference of two measurements has to exceed to mean something.
fn noise(a: &Measured, b: &Measured) -> f64 {
    a.standard_error.max(b.standard_error)
}

/// Three digits that mean something: `0.0983`.
fn digits(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let before_the_point = value.abs().log10().floor() as i32 + 1;
    let decimals = usize::try_from(3 - before_the_point).unwrap_or(0);
    format!("{value:.decimals$}")
}

impl Resumable for Judge {
    fn keep(&mut self) -> Result<Part, TrainError> {
        let steps: Vec<u64> = self.measured.iter().map(|m| m.step).collect();
        let column =
            |value: fn(&Measured) -> f64| -> Vec<f64> { self.measured.iter().map(value).collect() };
        Ok(Part {
            values: json!({ "steps": steps }),
            tensors: vec![
                PartTensor::of_doubles("losses", &column(|m| m.loss)),
                PartTensor::of_doubles("standard_errors", &column(|m| m.standard_error)),
            ],
        })
    }

    fn take_up(&mut self, part: Part) -> Result<(), TrainError> {
        let steps: Vec<u64> = serde_json::from_value(part.values["steps"].clone())
            .map_err(|error| ResumeError::Parts(format!("validations: {error}")))?;
        let losses = part.tensor("losses")?.doubles();
        let errors = part.tensor("standard_errors")?.doubles();
        if losses.len() != steps.len() || errors.len() != steps.len() {
            let message = format!("{} validations, {} losses", steps.len(), losses.len());
            return Err(ResumeError::Parts(message).into());
        }
        let rows = steps.into_iter().zip(losses.into_iter().zip(errors));
        self.measured = rows
            .map(|(step, (loss, standard_error))| Measured {
                step,
                loss,
                standard_error,
            })
            .collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A measurement every 100 steps.
    fn judge(losses: &[f64]) -> Judge {
        let mut judge = Judge::default();
        for (index, &loss) in losses.iter().enumerate() {
            judge.add(Measured {
                step: 100 * index as u64,
                loss,
                standard_error: 0.002,
            });
        }
        judge
    }

    fn stop(losses: &[f64], patience: u64, min_delta: f64) -> Option<EarlyStop> {
        judge(losses).early_stop(&EarlyStopping {
            patience,
            min_delta,
        })
    }

    #[test]
    fn verdicts_say_what_the_losses_do() {
        let cases: [(&[f64], Option<&str>); 10] = [
            (&[], None),
            (
                &[0.124],
                Some("validation loss is 0.124 ± 0.00200 at step 0"),
            ),
            (
                &[0.124, 0.11, 0.098],
                Some(
                    "validation loss fell from 0.124 to 0.0980 ± 0.00200 and was still falling at step 200, which is \
                     the best",
                ),
            ),
            (
                &[0.124, 0.098, 0.1, 0.1049, 0.11],
                Some(
                    "validation loss fell from 0.124 to 0.0980 ± 0.00200 and has been rising since step 100, to 0.110 \
                     at step 400; best is step 100",
                ),
            ),
            (
                &[0.124, 0.098, 0.11, 0.1, 0.105],
                Some(
                    "validation loss fell from 0.124 to 0.0980 ± 0.00200 and has been rising since step 300, to 0.105 \
                     at step 400; best is step 100",
                ),
            ),
            (
                &[0.124, 0.098, 0.11, 0.105],
                Some(
                    "validation loss fell from 0.124 to 0.0980 ± 0.00200 and has not fallen below that since, to \
                     0.105 at step 300; best is step 100",
                ),
            ),
            // 0.001 is less than the standard error.
            (
                &[0.124, 0.098, 0.11, 0.099],
                Some(
                    "validation loss fell from 0.124 to 0.0980 ± 0.00200 and has stayed within its standard error \
                     since, 0.0990 at step 300; best is step 100",
                ),
            ),
            (
                &[0.124, 0.1235, 0.123, 0.1232],
                Some(
                    "validation loss has not changed by more than its standard error: 0.124 at step 0, 0.123 ± \
                     0.00200 at step 300; the lowest is 0.123 at step 200",
                ),
            ),
            (
                &[0.1, 0.2, 0.3],
                Some(
                    "validation loss has not fallen below the 0.100 of step 0 by more than its standard error and has \
                     been rising since step 0; it is 0.300 at step 200",
                ),
            ),
            (
                &[0.1, 12.5, 1234.5],
                Some(
                    "validation loss has not fallen below the 0.100 of step 0 by more than its standard error and has \
                     been rising since step 0; it is 1234 at step 200",
                ),
            ),
        ];
        for (losses, expected) in cases {
            assert_eq!(
                judge(losses).verdict(None).as_deref(),
                expected,
                "{losses:?}"
            );
        }
        let losses = [0.124, 0.098, 0.1, 0.11];
        let stop = stop(&losses, 2, 0.001).expect("stopped");
        let verdict = judge(&losses).verdict(Some(&stop)).expect("words");
        assert!(
            verdict.ends_with(
                "best is step 100; stopped early at step 300: 2 validations since step 100 have not improved on its \
                 loss of 0.0980 by more than 0.001"
            ),
            "{verdict}"
        );
    }

    #[test]
    fn patience_counts_validations_without_enough_of_an_improvement() {
        assert_eq!(stop(&[], 1, 0.0), None);
        assert_eq!(stop(&[1.0], 1, 0.0), None);
        assert_eq!(stop(&[1.0, 0.9, 0.8], 1, 0.0), None);
        assert_eq!(stop(&[1.0, 1.0], 1, 0.0).map(|s| s.step), Some(100));
        assert_eq!(stop(&[1.0, 1.1, 0.9, 1.0], 2, 0.0), None);
        // Each is lower, but none by enough; together they are.
        assert_eq!(stop(&[1.0, 0.96, 0.92], 2, 0.1).map(|s| s.waited), Some(2));
        assert_eq!(stop(&[1.0, 0.96, 0.92, 0.88], 3, 0.1), None);
    }

    #[test]
    fn a_step_that_is_done_again_is_measured_once() {
        let mut judge = judge(&[1.0, 0.9, 0.8]);
        let again = Measured {
            step: 100,
            loss: 0.95,
            standard_error: 0.0,
        };
        judge.add(again);
        assert_eq!(judge.last(), Some(again));
        assert_eq!(judge.before_training().map(|m| m.loss), Some(1.0));
        assert_eq!(judge.best(), Some(again));
    }

    #[test]
    fn it_goes_on_where_it_was_to_the_bit() {
        let mut judge = judge(&[0.1 + 0.2, 1.0 / 3.0]);
        let mut resumed = Judge::default();
        resumed
            .take_up(judge.keep().expect("a part"))
            .expect("the same");
        assert_eq!(resumed, judge);
    }
}
