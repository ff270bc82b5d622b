//! The writing half: gathers what comes closely together, writes it in one go, and keeps the lease alive.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;
use uuid::Uuid;

use super::Stop;
use crate::runs::state;
use crate::runs::worker::LEASE;
use crate::store::runs::{Lease, RunState, WorkerReport};
use crate::store::{Store, StoreError};

/// Reports that come closer together than this are written together.
const FLUSH: Duration = Duration::from_millis(300);
/// How often a worker shows that it is alive and looks whether it should stop.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// What the writing half takes, in order.
pub(super) enum Message {
    /// Something to write.
    Report(Box<WorkerReport>),
    /// A state to go to.
    State(RunState),
    /// Somebody waits until everything before is written.
    Settle(std::sync::mpsc::Sender<()>),
}

/// The writing half.
pub(super) struct Writer {
    pub(super) store: Store,
    pub(super) run_id: Uuid,
    pub(super) owner: String,
    pub(super) stop: Arc<Stop>,
    pub(super) hurry: Arc<Notify>,
}

impl Writer {
    /// Writes until nobody sends any more.
    ///
    /// # Errors
    /// When something could not be written.
    pub(super) async fn run(
        self,
        mut receiver: UnboundedReceiver<Message>,
    ) -> Result<(), StoreError> {
        let mut beat = tokio::time::interval(HEARTBEAT);
        loop {
            tokio::select! {
                message = receiver.recv() => {
                    let Some(first) = message else { return Ok(()) };
                    let began = Instant::now();
                    let ended = self.write_together(first, &mut receiver).await;
                    if let Err(error) = ended {
                        self.stop.cannot_write(&error);
                        return Err(error);
                    }
                    // Steps of a fast device are gathered meanwhile.
                    let rest = FLUSH.saturating_sub(began.elapsed());
                    tokio::select! {
                        () = tokio::time::sleep(rest) => {}
                        () = self.hurry.notified() => {}
                    }
                }
                _ = beat.tick() => self.beat().await,
            }
        }
    }

    /// Writes `first` and everything else that is waiting, in order.
    async fn write_together(
        &self,
        first: Message,
        receiver: &mut UnboundedReceiver<Message>,
    ) -> Result<(), StoreError> {
        let mut gathered = WorkerReport::default();
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Report(report) => merge(&mut gathered, *report),
                Message::State(to) => {
                    self.flush(std::mem::take(&mut gathered)).await?;
                    let (store, from) = (&self.store, state::before(to));
                    store
                        .move_own_run(self.run_id, &self.owner, from, to, None)
                        .await?;
                }
                Message::Settle(waiting) => {
                    self.flush(std::mem::take(&mut gathered)).await?;
                    let _ = waiting.send(()); // nobody waits any more: no matter
                }
            }
            next = receiver.try_recv().ok();
        }
        self.flush(gathered).await
    }

    async fn flush(&self, mut report: WorkerReport) -> Result<(), StoreError> {
        thin(&mut report.events);
        let fulfilled = report.fulfilled.clone();
        if !self.store.record(self.run_id, &self.owner, report).await? {
            self.stop.lose();
        }
        for wish in fulfilled {
            self.stop.set(wish, false);
        }
        Ok(())
    }

    async fn beat(&self) {
        self.stop.memory.look();
        match self
            .store
            .renew_lease(self.run_id, &self.owner, LEASE)
            .await
        {
            Ok(Lease::Held { wishes }) => {
                for wish in wishes {
                    self.stop.set(wish, true);
                }
            }
            Ok(Lease::Lost) => self.stop.lose(),
            // A missed beat is no harm as long as the lease lasts.
            Err(error) => tracing::warn!(%error, "the lease was not renewed"),
        }
    }
}

fn merge(into: &mut WorkerReport, report: WorkerReport) {
    into.progress = report.progress.or(into.progress.take());
    into.phase = report.phase.or(into.phase.take());
    for metric in report.metrics {
        let same = into
            .metrics
            .iter_mut()
            .find(|known| known.step == metric.step);
        match same {
            // A run that has gone back does steps again.
            Some(known) if metric.loss_average.is_some() => *known = metric,
            Some(known) => {
                known.validation_loss = metric.validation_loss.or(known.validation_loss);
                known.validation_error = metric.validation_error.or(known.validation_error);
            }
            None => into.metrics.push(metric),
        }
    }
    into.samples.extend(report.samples);
    into.loras.extend(report.loras);
    into.events.extend(report.events);
    into.verdict = report.verdict.or(into.verdict.take());
    into.rolled_back = report.rolled_back.or(into.rolled_back.take());
    into.kept_step = report.kept_step.or(into.kept_step);
    into.fulfilled.extend(report.fulfilled);
}

/// Of several progress events at once only the last says something, and of several of one phase.
fn thin(events: &mut Vec<(String, Value)>) {
    let subject = |kind: &str, data: &Value| {
        let phase = data["phase"].as_str().unwrap_or_default();
        (kind.to_owned(), phase.to_owned())
    };
    let mut last = HashMap::new();
    for (index, (kind, data)) in events.iter().enumerate() {
        last.insert(subject(kind, data), index);
    }
    let mut index = 0;
    events.retain(|(kind, data)| {
        let thinned = matches!(kind.as_str(), "progress" | "phase");
        let keep = !thinned || last[&subject(kind, data)] == index;
        index += 1;
        keep
    });
}
