//! What is told of a run's course: its phases, its steps, and where it goes on.

use serde_json::{Value, json};

use super::writer::Message;
use super::{Reporter, event, finite, unless};
use crate::runs::memory::own_bytes;
use crate::store::runs::{Metric, Progress, RunState, WorkerReport};
use crate::training::guard::RolledBack;
use crate::training::{Phase, StepReport};

impl Reporter {
    pub(super) fn phase(&mut self, phase: Phase) {
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
                events: event("phase", data),
                ..WorkerReport::default()
            });
        }
    }

    pub(super) fn step(&mut self, step: &StepReport) {
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
        // A worker before this one may have come further, and told it.
        let told = self.told.last_step >= Some(step.step);
        self.write(WorkerReport {
            progress: Some(self.progress.clone()),
            phase,
            metrics: vec![metric(step, memory_bytes)],
            events: unless(told, "progress", progress(step, memory_bytes)),
            ..WorkerReport::default()
        });
    }

    pub(super) fn resumed(&mut self, step: u64, epoch: u64, loss_average: f64) {
        self.progress = Progress {
            step,
            epoch,
            loss_average: (step > 0).then_some(loss_average),
            ..self.progress.clone()
        };
        let data = json!({"step": step, "epoch": epoch, "attempt": self.attempt});
        self.write(WorkerReport {
            progress: Some(self.progress.clone()),
            events: event("resumed", data),
            ..WorkerReport::default()
        });
    }

    pub(super) fn rolled_back(
        &mut self,
        back: &RolledBack,
        epoch: u64,
        loss_average: f64,
        verdict: &str,
    ) {
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
            events: unless(known.is_some(), "rolled_back", data),
            ..WorkerReport::default()
        });
    }
}

/// What is kept of a step.
fn metric(step: &StepReport, memory_bytes: Option<u64>) -> Metric {
    Metric {
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
    }
}

/// What subscribers hear of a step.
fn progress(step: &StepReport, memory_bytes: Option<u64>) -> Value {
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
    })
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
