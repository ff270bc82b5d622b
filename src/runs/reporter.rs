//! The training loop's ear in a worker: takes reports at once, writes them a few times per second from a thread of
//! its own, keeps the lease alive, and passes on the wish to stop.

mod course;
mod results;
mod stop;
mod writer;

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use self::writer::{Message, Writer};
use super::memory::{MemoryPlan, outgrown};
use super::origin::Difference;
use crate::diffusion::device_memory::MemoryGauge;
use crate::store::runs::{Progress, Run, RunFailure, RunState, Told, Wish, WorkerReport};
use crate::store::{Store, StoreError};
use crate::training::{Control, ProgressSink, Report, Wishes};

pub use self::stop::{LEAVE, Stop};

/// One worker's reports.
pub struct Reporter {
    sender: Option<UnboundedSender<Message>>,
    writer: Option<JoinHandle<Result<(), StoreError>>>,
    runtime: tokio::runtime::Handle,
    store: Store,
    stop: Arc<Stop>,
    progress: Progress,
    phase: String,
    failed: Option<StoreError>,
    attempt: u32,
    told: Told,
    /// Whether the file that is saved next is the last, though there are more steps.
    ends_early: bool,
    /// Wakes the writer from its rest between two writings.
    hurry: Arc<Notify>,
}

impl Reporter {
    /// Starts writing for the run that `owner` has taken. Subscribers of it have heard what is `told`.
    pub fn start(
        runtime: &Runtime,
        store: Store,
        run: &Run,
        owner: String,
        told: Told,
        stop: Arc<Stop>,
    ) -> Self {
        let (sender, receiver) = unbounded_channel();
        let hurry = Arc::new(Notify::new());
        let writer = Writer {
            store: store.clone(),
            run_id: run.id,
            owner,
            hurry: hurry.clone(),
            stop: stop.clone(),
        };
        stop::leave_when_asked(runtime, &stop);
        Self {
            sender: Some(sender),
            writer: Some(runtime.spawn(writer.run(receiver))),
            runtime: runtime.handle().clone(),
            store,
            stop,
            progress: Progress::default(),
            phase: String::new(),
            failed: None,
            attempt: run.attempt,
            told,
            ends_early: false,
            hurry,
        }
    }

    /// Tells the length of the run before its first step.
    pub fn expect_steps(&mut self, total: u64) {
        self.progress.total_steps = Some(total);
    }

    /// Tells how many pictures of a grid are drawn.
    pub fn drawn(&mut self, done: u64) -> Control {
        self.progress.step = done;
        self.write(WorkerReport {
            progress: Some(self.progress.clone()),
            ..WorkerReport::default()
        });
        self.control()
    }

    /// Tells that pictures are captioned from now on.
    pub fn captioning(&mut self) -> Control {
        self.send(Message::State(RunState::Running));
        "captioning".clone_into(&mut self.phase);
        self.write(WorkerReport {
            phase: Some(self.phase.clone()),
            events: event("phase", json!({"phase": self.phase})),
            ..WorkerReport::default()
        });
        self.control()
    }

    /// Whether the work goes on.
    pub fn go_on(&self) -> Control {
        self.control()
    }

    /// Notes how many pictures have captions, which the rows know already.
    pub fn captioned(&mut self, done: u64) -> Control {
        self.progress.step = done;
        self.control()
    }

    /// Tells what the run is expected to take.
    pub fn memory(&mut self, plan: &MemoryPlan) {
        let data = json!({
            "estimated_peak_bytes": plan.estimated_peak_bytes,
            "available_bytes": plan.available_bytes,
            "optimizer_state_bytes": plan.optimizer_state_bytes(),
            "ema_bytes": plan.ema_bytes(),
        });
        self.tell("memory", data);
    }

    /// From now on the GPU's memory is watched, too.
    pub fn watch(&self, gauge: MemoryGauge) {
        self.stop.memory.watch(gauge);
    }

    /// Tells that the run goes on where it computes other bits than where it began.
    pub fn environment_changed(&mut self, changes: &[Difference]) {
        let words: Vec<String> = changes.iter().map(ToString::to_string).collect();
        let message = format!(
            "the run goes on elsewhere than it began ({}): the result is not that of one environment to the bit",
            words.join("; ")
        );
        tracing::warn!(message, "the environment has changed");
        let data = json!({"attempt": self.attempt, "changes": changes, "message": message});
        self.tell("environment_changed", data);
    }

    /// Why the training was stopped, when it was for its memory.
    pub fn outgrown(&self, plan: &MemoryPlan) -> Option<RunFailure> {
        let grown = self.stop.memory.outgrown()?;
        Some(outgrown(grown, plan))
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    /// When something could not be written.
    pub fn finish(&mut self) -> Result<(), StoreError> {
        self.sender = None; // ends the writer once it has read everything
        match self.writer.take() {
            Some(writer) => self.runtime.block_on(writer).unwrap_or_else(|error| {
                tracing::error!(%error, "the writer of reports has failed");
                Ok(())
            }),
            None => Ok(()),
        }
    }

    /// What could not be kept, when that is why the training was stopped.
    pub fn take_failure(&mut self) -> Option<StoreError> {
        self.failed.take()
    }

    /// Whether the work goes on.
    fn control(&self) -> Control {
        if self.stop.any() {
            Control::Stop
        } else {
            Control::Continue
        }
    }

    fn send(&mut self, message: Message) {
        if let Some(sender) = &self.sender
            && sender.send(message).is_err()
            && !self.stop.is_storage_full()
        {
            self.stop.lose();
        }
    }

    fn tell(&mut self, kind: &str, data: Value) {
        self.write(WorkerReport {
            events: event(kind, data),
            ..WorkerReport::default()
        });
    }

    fn write(&mut self, report: WorkerReport) {
        self.send(Message::Report(Box::new(report)));
    }
}

impl ProgressSink for Reporter {
    fn report(&mut self, report: Report<'_>) -> Control {
        let mut outcome = Ok(());
        match report {
            Report::Phase(phase) => self.phase(phase),
            Report::Step(step) => self.step(step),
            Report::Resumed {
                step,
                epoch,
                loss_average,
            } => self.resumed(step, epoch, loss_average),
            Report::RolledBack {
                back,
                epoch,
                loss_average,
                verdict,
            } => self.rolled_back(back, epoch, loss_average, verdict),
            Report::Kept { step } => self.write(WorkerReport {
                kept_step: Some(step),
                ..WorkerReport::default()
            }),
            Report::Validation {
                measured,
                verdict,
                early_stop,
            } => self.validation(&measured, verdict, early_stop),
            Report::Sample {
                step,
                prompt_index,
                prompt,
                seed,
                image,
            } => outcome = self.sample(step, prompt_index, prompt, seed, image),
            Report::Checkpoint {
                step,
                epoch,
                last,
                path,
                saved: _,
                checked,
                measured,
            } => outcome = self.checkpoint(step, epoch, last, path, checked, measured),
        }
        if let Err(error) = outcome {
            tracing::error!(%error, "a result could not be kept");
            self.failed.get_or_insert(error);
            return Control::Stop;
        }
        self.control()
    }

    fn wishes(&mut self) -> Wishes {
        let stop = &self.stop;
        // A result that could not be kept must be made again.
        let may_stay = !stop.is_cancelled() && !stop.is_lost() && self.failed.is_none();
        Wishes {
            save: stop.wants(Wish::Save),
            sample: stop.wants(Wish::Sample),
            leave: may_stay && (stop.is_pausing() || stop.is_leaving()),
        }
    }

    fn fulfilled(&mut self, wishes: Wishes) {
        let wished = [(wishes.save, Wish::Save), (wishes.sample, Wish::Sample)];
        let fulfilled: Vec<Wish> = wished
            .into_iter()
            .filter_map(|(wished, wish)| wished.then_some(wish))
            .collect();
        if !fulfilled.is_empty() {
            self.write(WorkerReport {
                fulfilled,
                ..WorkerReport::default()
            });
            let _ = self.settle(); // the next step would do it again
        }
    }

    fn settle(&mut self) -> Control {
        let (sender, settled) = std::sync::mpsc::channel();
        self.send(Message::Settle(sender));
        self.hurry.notify_one();
        // The writer drops the sender when it ends.
        if settled.recv().is_ok() && !self.stop.is_lost() && !self.stop.is_storage_full() {
            Control::Continue
        } else {
            Control::Stop
        }
    }
}

/// One thing that subscribers hear.
fn event(kind: &str, data: Value) -> Vec<(String, Value)> {
    vec![(kind.to_owned(), data)]
}

/// The same, unless a worker before this one has told it.
fn unless(told: bool, kind: &str, data: Value) -> Vec<(String, Value)> {
    if told { Vec::new() } else { event(kind, data) }
}

/// JSON has no infinity.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}
