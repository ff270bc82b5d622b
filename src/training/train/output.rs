//! What leaves the loop: LoRA files and reports.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::Run;
use crate::lora_tools::{Checked, Layers, check_file};
use crate::networks::SavedLora;
use crate::networks::metadata::{JudgementRecord, TrainingRecord};
use crate::training::progress::{Control, Phase, ProgressSink, Report, StepReport};
use crate::training::settings::TrainSettings;
use crate::training::step::{StepOutput, Trainer};
use crate::training::{TrainError, previews};

impl Run<'_> {
    /// Tells of a step.
    pub(super) fn report(
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

    fn device_memory_bytes(&self) -> Option<u64> {
        let usage = self.trainer.device().memory_pool_usage()?;
        Some(usage.bytes_reserved)
    }
}

/// Writes LoRA files with the run's description.
pub(super) struct Files<'a> {
    pub(super) settings: &'a TrainSettings,
    pub(super) output_dir: &'a Path,
    pub(super) record: TrainingRecord,
    /// What the files are compared with once they are written.
    pub(super) layers: Layers,
}

/// A file that has passed its self-check.
pub(super) struct CheckedFile {
    pub(super) path: PathBuf,
    pub(super) saved: SavedLora,
    pub(super) checked: Checked,
}

impl Files<'_> {
    /// Writes a file and reads it again, before anybody hears of it.
    pub(super) fn save(
        &self,
        trainer: &Trainer<'_>,
        name: &str,
        epoch: u64,
        judgement: Option<JudgementRecord>,
        rolled_back: Option<String>,
        last: bool,
    ) -> Result<CheckedFile, TrainError> {
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
        let modules = trainer.network.modules().count();
        let mut entries = record.entries();
        // A file that does not pass is removed, so that one that is there has passed.
        let told = json!({"modules": modules, "names": "kohya", "passed": true});
        entries.insert("lorasmith_self_check".to_owned(), told.to_string());
        let saved = trainer.network.save(&path, precision, entries)?;
        match self.check(trainer, &path, modules, last) {
            Ok(checked) => Ok(CheckedFile {
                path,
                saved,
                checked,
            }),
            Err(error) => {
                // What is wrong is worth more than what is left behind.
                let _ = std::fs::remove_file(&path);
                Err(error)
            }
        }
    }

    fn check(
        &self,
        trainer: &Trainer<'_>,
        path: &Path,
        modules: usize,
        last: bool,
    ) -> Result<Checked, TrainError> {
        let checked = check_file(path, &self.layers);
        let checked = checked.map_err(|error| TrainError::SelfCheck(error.to_string()))?;
        if checked.modules != modules {
            let message = format!("found {} adapters, expected {modules}", checked.modules);
            return Err(TrainError::SelfCheck(message));
        }
        if checked.with_effect == 0 && last && self.has_learned(trainer) {
            let message =
                "no adapter changes the base model, expected an effect of the steps that were done";
            return Err(TrainError::SelfCheck(message.to_owned()));
        }
        Ok(checked)
    }

    /// Whether a step was done that should have changed something. The first one has a learning rate of 0 where the
    /// schedule warms up, and steps that overflow are left out.
    fn has_learned(&self, trainer: &Trainer<'_>) -> bool {
        let done = trainer.steps_done();
        let done = done.saturating_sub(trainer.loss_scale().skipped());
        let rates = [self.record.unet_lr, self.record.text_encoder_lr];
        done > 1 && rates.into_iter().flatten().any(|rate| rate > 0.0)
    }
}

/// Passes reports on and turns a wish to stop into an error.
pub(super) struct Reporter<'a> {
    pub(super) sink: &'a mut dyn ProgressSink,
    pub(super) step: u64,
}

impl Reporter<'_> {
    pub(super) fn send(&mut self, report: Report<'_>) -> Result<(), TrainError> {
        match self.sink.report(report) {
            Control::Continue => Ok(()),
            Control::Stop => Err(TrainError::Stopped { step: self.step }),
        }
    }

    pub(super) fn phase(&mut self, phase: Phase) -> Result<(), TrainError> {
        self.send(Report::Phase(phase))
    }

    pub(super) fn draw_samples(
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
