//! The training loop's ear in a worker: takes reports at once, writes them a few times per second from a thread of
//! its own, keeps the lease alive, and passes on the wish to stop.

use std::collections::HashMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use image::{ImageFormat, RgbImage};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::memory::{MemoryPlan, MemoryWatch, outgrown, own_bytes};
use super::origin::Difference;
use super::state;
use super::worker::LEASE;
use crate::diffusion::device_memory::MemoryGauge;
use crate::store::runs::{
    Lease, Metric, NewLora, NewSample, Progress, Run, RunFailure, RunState, Told, Wish,
    WorkerReport,
};
use crate::store::{Store, StoreError};
use crate::training::guard::RolledBack;
use crate::training::judge::Measured;
use crate::training::{Control, Phase, ProgressSink, Report, StepReport, Wishes};

/// Reports that come closer together than this are written together.
const FLUSH: Duration = Duration::from_millis(300);
/// How often a worker shows that it is alive and looks whether it should stop.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// What the supervisor writes to a worker's standard input when the service ends.
pub const LEAVE: &str = "leave\n";

/// Why a worker should stop, and what else somebody wants of it.
#[derive(Debug, Default)]
pub struct Stop {
    cancelled: AtomicBool,
    pausing: AtomicBool,
    lost: AtomicBool,
    leaving: AtomicBool,
    storage_full: AtomicBool,
    memory: MemoryWatch,
    save: AtomicBool,
    sample: AtomicBool,
}

impl Stop {
    /// Somebody wants the run to end.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Somebody wants the run to rest.
    pub fn is_pausing(&self) -> bool {
        self.pausing.load(Ordering::Relaxed)
    }

    /// The run is no longer this worker's, or cannot be written to.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// The process is asked to end.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Reports could not be written, as there is no room left.
    pub fn is_storage_full(&self) -> bool {
        self.storage_full.load(Ordering::Relaxed)
    }

    fn any(&self) -> bool {
        self.is_cancelled()
            || self.is_pausing()
            || self.is_lost()
            || self.is_leaving()
            || self.is_storage_full()
            || self.memory.outgrown().is_some()
    }

    fn flag(&self, wish: Wish) -> &AtomicBool {
        match wish {
            Wish::Cancel => &self.cancelled,
            Wish::Pause => &self.pausing,
            Wish::Save => &self.save,
            Wish::Sample => &self.sample,
            Wish::Leave => &self.leaving,
        }
    }
}

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

enum Message {
    /// Something to write.
    Report(Box<WorkerReport>),
    /// A state to go to.
    State(RunState),
    /// Somebody waits until everything before is written.
    Settle(std::sync::mpsc::Sender<()>),
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
        leave_when_asked(runtime, &stop);
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
        if self.stop.any() {
            Control::Stop
        } else {
            Control::Continue
        }
    }

    /// Tells what the run is expected to take.
    pub fn memory(&mut self, plan: &MemoryPlan) {
        let data = json!({
            "estimated_peak_bytes": plan.estimated_peak_bytes,
            "available_bytes": plan.available_bytes,
        });
        self.write(WorkerReport {
            events: vec![("memory".to_owned(), data)],
            ..WorkerReport::default()
        });
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
        self.write(WorkerReport {
            events: vec![("environment_changed".to_owned(), data)],
            ..WorkerReport::default()
        });
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

    fn send(&mut self, message: Message) {
        if let Some(sender) = &self.sender
            && sender.send(message).is_err()
            && !self.stop.is_storage_full()
        {
            self.stop.lost.store(true, Ordering::Relaxed);
        }
    }

    fn write(&mut self, report: WorkerReport) {
        self.send(Message::Report(Box::new(report)));
    }

    fn phase(&mut self, phase: Phase) {
        if matches!(phase, Phase::Training) {
            self.send(Message::State(RunState::Running));
        }
        let saves_last = self.ends_early || Some(self.progress.step) == self.progress.total_steps;
        if matches!(phase, Phase::Saving) && saves_last {
            self.send(Message::State(RunState::Saving));
        }
        let (name, data) = describe(phase);
        let counts = matches!(
            phase,
            Phase::CheckingDevice { .. } | Phase::CachingLatents { .. } | Phase::CachingText { .. }
        );
        if counts || self.phase != name {
            self.phase = name.to_owned();
            self.write(WorkerReport {
                phase: Some(name.to_owned()),
                events: vec![("phase".to_owned(), data)],
                ..WorkerReport::default()
            });
        }
    }

    fn step(&mut self, step: &StepReport) {
        let memory_bytes = own_bytes();
        self.progress = Progress {
            step: step.step,
            total_steps: Some(step.total_steps),
            epoch: step.epoch,
            total_epochs: Some(step.total_epochs),
            loss_average: Some(step.loss_average),
            steps_per_s: Some(1.0 / step.step_time_s.max(f64::MIN_POSITIVE)),
            eta_s: Some(step.eta_s),
            memory_bytes,
        };
        // After a validation or a picture the loop is back at its steps.
        let training = "training";
        let phase = (self.phase != training).then(|| training.to_owned());
        self.phase = training.to_owned();
        self.write(WorkerReport {
            progress: Some(self.progress.clone()),
            phase,
            metrics: vec![Metric {
                step: step.step,
                epoch: step.epoch,
                loss: finite(step.loss),
                loss_average: Some(step.loss_average),
                lr_unet: Some(step.lr_unet),
                lr_text_encoder: Some(step.lr_text_encoder),
                grad_norm: finite(step.grad_norm),
                grad_norm_unet: step.grad_norm_unet.and_then(finite),
                grad_norm_text_encoder: step.grad_norm_text_encoder.and_then(finite),
                step_time_s: Some(step.step_time_s),
                images_per_s: Some(step.images_per_s),
                eta_s: Some(step.eta_s),
                memory_bytes,
                device_memory_bytes: step.device_memory_bytes,
                ..Metric::default()
            }],
            // A worker before this one may have come further, and told it.
            events: if self.told.last_step >= Some(step.step) {
                Vec::new()
            } else {
                vec![(
                    "progress".to_owned(),
                    json!({
                        "step": step.step,
                        "total_steps": step.total_steps,
                        "epoch": step.epoch,
                        "total_epochs": step.total_epochs,
                        "loss": finite(step.loss),
                        "loss_average": step.loss_average,
                        "lr_unet": step.lr_unet,
                        "lr_text_encoder": step.lr_text_encoder,
                        "images_per_s": step.images_per_s,
                        "step_time_s": step.step_time_s,
                        "eta_s": step.eta_s,
                        "memory_bytes": memory_bytes,
                        "device_memory_bytes": step.device_memory_bytes,
                        "grad_norm": finite(step.grad_norm),
                        "grad_norm_unet": step.grad_norm_unet.and_then(finite),
                        "grad_norm_text_encoder": step.grad_norm_text_encoder.and_then(finite),
                        "skipped_steps": step.skipped_steps,
                    }),
                )]
            },
            ..WorkerReport::default()
        });
    }

    fn validation(&mut self, measured: &Measured, verdict: Option<&str>, early_stop: Option<&str>) {
        let Measured {
            step,
            loss,
            standard_error,
        } = *measured;
        self.ends_early = early_stop.is_some();
        let data = json!({
            "step": step, "loss": finite(loss), "standard_error": finite(standard_error), "verdict": verdict,
            "early_stop": early_stop,
        });
        self.write(WorkerReport {
            metrics: vec![Metric {
                step,
                epoch: self.progress.epoch,
                validation_loss: finite(loss),
                validation_error: finite(standard_error),
                ..Metric::default()
            }],
            events: if self
                .was_told("validation", |told| told["step"] == step)
                .is_some()
            {
                Vec::new()
            } else {
                vec![("validation".to_owned(), data)]
            },
            verdict: verdict.map(|verdict| (verdict.to_owned(), early_stop.map(str::to_owned))),
            ..WorkerReport::default()
        });
    }

    /// What subscribers have heard of a result that a worker before this one had.
    fn was_told(&self, kind: &str, same: impl Fn(&Value) -> bool) -> Option<&Value> {
        let mut results = self.told.results.iter();
        let found = results.find(|(known, data)| known == kind && same(data));
        found.map(|(_, data)| data)
    }

    fn resumed(&mut self, step: u64, epoch: u64, loss_average: f64) {
        self.progress = Progress {
            step,
            epoch,
            loss_average: (step > 0).then_some(loss_average),
            ..self.progress.clone()
        };
        let data = json!({"step": step, "epoch": epoch, "attempt": self.attempt});
        self.write(WorkerReport {
            progress: Some(self.progress.clone()),
            events: vec![("resumed".to_owned(), data)],
            ..WorkerReport::default()
        });
    }

    fn rolled_back(&mut self, back: &RolledBack, epoch: u64, loss_average: f64, verdict: &str) {
        self.told.go_back_to(back.to_step);
        self.ends_early = false;
        self.progress = Progress {
            step: back.to_step,
            epoch,
            loss_average: (back.to_step > 0).then_some(loss_average),
            ..self.progress.clone()
        };
        let data = json!({
            "at_step": back.at_step, "to_step": back.to_step, "lr_factor": back.lr_factor(), "cause": back.cause,
            "message": back.to_string(),
        });
        let known = self.was_told("rolled_back", |told| told["at_step"] == back.at_step);
        self.write(WorkerReport {
            progress: Some(self.progress.clone()),
            verdict: Some((verdict.to_owned(), None)),
            rolled_back: serde_json::to_string(back).ok(),
            events: if known.is_some() {
                Vec::new()
            } else {
                vec![("rolled_back".to_owned(), data)]
            },
            ..WorkerReport::default()
        });
    }

    fn sample(&mut self, new: NewSample, image: &RgbImage) -> Result<(), StoreError> {
        let mut png = Cursor::new(Vec::new());
        image
            .write_to(&mut png, ImageFormat::Png)
            .map_err(|error| StoreError::Corrupt {
                what: "a preview".to_owned(),
                message: error.to_string(),
            })?;
        let blob = self.store.blobs().put(png.get_ref())?;
        let sample = NewSample {
            sha256: blob.sha256,
            size_bytes: blob.size_bytes,
            ..new
        };
        let data = json!({
            "id": sample.id, "step": sample.step, "prompt_index": sample.prompt_index,
            "prompt": sample.prompt,
        });
        let same = |told: &Value| {
            told["step"] == data["step"] && told["prompt_index"] == data["prompt_index"]
        };
        let events = match self.was_told("sample", same) {
            Some(_) => Vec::new(),
            None => vec![("sample".to_owned(), data)],
        };
        self.write(WorkerReport {
            samples: vec![sample],
            events,
            ..WorkerReport::default()
        });
        Ok(())
    }

    fn checkpoint(
        &mut self,
        step: u64,
        epoch: u64,
        last: bool,
        path: &Path,
        measured: Option<Measured>,
    ) -> Result<(), StoreError> {
        let file_name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let blob = self.store.blobs().adopt(path)?;
        let same = |told: &Value| told["file_name"] == file_name.as_str();
        let told = self.was_told("lora", same);
        let known = told.is_some_and(|told| told["sha256"] == blob.sha256.as_str());
        let id = told.and_then(|told| told["id"].as_str()?.parse().ok());
        let lora = NewLora {
            id: id.unwrap_or_else(Uuid::now_v7),
            file_name,
            step,
            epoch,
            is_final: last,
            sha256: blob.sha256,
            size_bytes: blob.size_bytes,
            validation: measured.map(|measured| (measured.loss, measured.standard_error)),
        };
        let data = json!({
            "id": lora.id, "file_name": lora.file_name, "step": step, "epoch": epoch, "final": last,
            "size_bytes": lora.size_bytes, "sha256": lora.sha256,
            "validation_loss": measured.map(|measured| measured.loss),
        });
        self.write(WorkerReport {
            loras: vec![lora],
            events: if known {
                Vec::new()
            } else {
                vec![("lora".to_owned(), data)]
            },
            ..WorkerReport::default()
        });
        Ok(())
    }
}

impl ProgressSink for Reporter {
    fn report(&mut self, report: Report<'_>) -> Control {
        let outcome = match report {
            Report::Phase(phase) => {
                self.phase(phase);
                Ok(())
            }
            Report::Step(step) => {
                self.step(step);
                Ok(())
            }
            Report::Resumed {
                step,
                epoch,
                loss_average,
            } => {
                self.resumed(step, epoch, loss_average);
                Ok(())
            }
            Report::RolledBack {
                back,
                epoch,
                loss_average,
                verdict,
            } => {
                self.rolled_back(back, epoch, loss_average, verdict);
                Ok(())
            }
            Report::Kept { step } => {
                self.write(WorkerReport {
                    kept_step: Some(step),
                    ..WorkerReport::default()
                });
                Ok(())
            }
            Report::Validation {
                measured,
                verdict,
                early_stop,
            } => {
                self.validation(&measured, verdict, early_stop);
                Ok(())
            }
            Report::Sample {
                step,
                prompt_index,
                prompt,
                seed,
                image,
            } => {
                let new = NewSample {
                    id: Uuid::now_v7(),
                    step,
                    prompt_index: u32::try_from(prompt_index).unwrap_or(u32::MAX),
                    prompt: prompt.to_owned(),
                    seed,
                    width_px: image.width(),
                    height_px: image.height(),
                    sha256: String::new(),
                    size_bytes: 0,
                };
                self.sample(new, image)
            }
            Report::Checkpoint {
                step,
                epoch,
                last,
                path,
                saved: _,
                measured,
            } => self.checkpoint(step, epoch, last, path, measured),
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "a result could not be kept");
            self.failed.get_or_insert(error);
            return Control::Stop;
        }
        if self.stop.any() {
            Control::Stop
        } else {
            Control::Continue
        }
    }

    fn wishes(&mut self) -> Wishes {
        let stop = &self.stop;
        // A result that could not be kept must be made again.
        let may_stay = !stop.is_cancelled() && !stop.is_lost() && self.failed.is_none();
        Wishes {
            save: stop.save.load(Ordering::Relaxed),
            sample: stop.sample.load(Ordering::Relaxed),
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

impl Reporter {
    /// What could not be kept, when that is why the training was stopped.
    pub fn take_failure(&mut self) -> Option<StoreError> {
        self.failed.take()
    }
}

/// The writing half.
struct Writer {
    store: Store,
    run_id: Uuid,
    owner: String,
    stop: Arc<Stop>,
    hurry: Arc<Notify>,
}

impl Writer {
    async fn run(self, mut receiver: UnboundedReceiver<Message>) -> Result<(), StoreError> {
        let mut beat = tokio::time::interval(HEARTBEAT);
        loop {
            tokio::select! {
                message = receiver.recv() => {
                    let Some(first) = message else { return Ok(()) };
                    let began = Instant::now();
                    let ended = self.write_together(first, &mut receiver).await;
                    if let Err(error) = ended {
                        let flag = if error.is_storage_full() {
                            &self.stop.storage_full
                        } else {
                            &self.stop.lost
                        };
                        flag.store(true, Ordering::Relaxed);
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
            self.stop.lost.store(true, Ordering::Relaxed);
        }
        for wish in fulfilled {
            self.stop.flag(wish).store(false, Ordering::Relaxed);
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
                    self.stop.flag(wish).store(true, Ordering::Relaxed);
                }
            }
            Ok(Lease::Lost) => self.stop.lost.store(true, Ordering::Relaxed),
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

fn describe(phase: Phase) -> (&'static str, Value) {
    let counted = |name, done, total, cached: Option<usize>| {
        let mut data = json!({"phase": name, "done": done, "total": total});
        if let Some(cached) = cached {
            data["cached"] = cached.into();
        }
        (name, data)
    };
    let name = match phase {
        Phase::CheckingDevice { done, total } => {
            return counted("checking_device", done, total, None);
        }
        Phase::Loading => "loading",
        Phase::CachingLatents {
            done,
            total,
            cached,
        } => return counted("caching_latents", done, total, Some(cached)),
        Phase::CachingText {
            done,
            total,
            cached,
        } => return counted("caching_text", done, total, Some(cached)),
        Phase::Training => "training",
        Phase::Validating => "validating",
        Phase::Sampling => "sampling",
        Phase::Saving => "saving",
    };
    (name, json!({"phase": name}))
}

/// Sets the flag when the process is asked to end, by a signal or by its supervisor.
fn leave_when_asked(runtime: &Runtime, stop: &Arc<Stop>) {
    let flag = stop.clone();
    runtime.spawn(async move {
        if wait_for_end_of_process().await.is_ok() {
            flag.leaving.store(true, Ordering::Relaxed);
        }
    });
    let flag = stop.clone();
    // A thread of its own, as reading blocks; it ends with the process.
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            match line {
                Ok(line) if line.trim() == LEAVE.trim() => {
                    flag.leaving.store(true, Ordering::Relaxed);
                    return;
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    });
}

/// Returns when a signal asks the process to end.
async fn wait_for_end_of_process() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
/// JSON has no infinity.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}
