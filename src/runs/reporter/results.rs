//! What is told of a run's results: validations, pictures and LoRA files, which a worker before may have told.

use std::io::Cursor;
use std::path::Path;

use image::{ImageFormat, RgbImage};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Reporter, finite, unless};
use crate::lora_tools::Checked;
use crate::store::StoreError;
use crate::store::runs::{Metric, NewLora, NewSample, WorkerReport};
use crate::training::judge::Measured;

impl Reporter {
    pub(super) fn validation(
        &mut self,
        measured: &Measured,
        verdict: Option<&str>,
        early_stop: Option<&str>,
    ) {
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
        let known = self.was_told("validation", |told| told["step"] == step);
        self.write(WorkerReport {
            metrics: vec![Metric {
                step,
                epoch: self.progress.epoch,
                validation_loss: finite(loss),
                validation_error: finite(standard_error),
                ..Metric::default()
            }],
            events: unless(known.is_some(), "validation", data),
            verdict: verdict.map(|verdict| (verdict.to_owned(), early_stop.map(str::to_owned))),
            ..WorkerReport::default()
        });
    }

    pub(super) fn sample(
        &mut self,
        step: u64,
        prompt_index: usize,
        prompt: &str,
        seed: u64,
        image: &RgbImage,
    ) -> Result<(), StoreError> {
        let mut png = Cursor::new(Vec::new());
        image
            .write_to(&mut png, ImageFormat::Png)
            .map_err(|error| StoreError::Corrupt {
                what: "a preview".to_owned(),
                message: error.to_string(),
            })?;
        let blob = self.store.blobs().put(png.get_ref())?;
        let sample = NewSample {
            id: Uuid::now_v7(),
            step,
            prompt_index: u32::try_from(prompt_index).unwrap_or(u32::MAX),
            prompt: prompt.to_owned(),
            seed,
            width_px: image.width(),
            height_px: image.height(),
            sha256: blob.sha256,
            size_bytes: blob.size_bytes,
        };
        let data = json!({
            "id": sample.id, "step": sample.step, "prompt_index": sample.prompt_index,
            "prompt": sample.prompt,
        });
        let same = |told: &Value| {
            told["step"] == data["step"] && told["prompt_index"] == data["prompt_index"]
        };
        let known = self.was_told("sample", same).is_some();
        self.write(WorkerReport {
            samples: vec![sample],
            events: unless(known, "sample", data),
            ..WorkerReport::default()
        });
        Ok(())
    }

    pub(super) fn checkpoint(
        &mut self,
        step: u64,
        epoch: u64,
        last: bool,
        path: &Path,
        checked: &Checked,
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
            self_check: serde_json::to_string(checked).ok(),
        };
        let data = json!({
            "id": lora.id, "file_name": lora.file_name, "step": step, "epoch": epoch, "final": last,
            "size_bytes": lora.size_bytes, "sha256": lora.sha256,
            "validation_loss": measured.map(|measured| measured.loss),
        });
        self.write(WorkerReport {
            loras: vec![lora],
            events: unless(known, "lora", data),
            ..WorkerReport::default()
        });
        Ok(())
    }

    /// What subscribers have heard of a result that a worker before this one had.
    pub(super) fn was_told(&self, kind: &str, same: impl Fn(&Value) -> bool) -> Option<&Value> {
        let mut results = self.told.results.iter();
        let found = results.find(|(known, data)| known == kind && same(data));
        found.map(|(_, data)| data)
    }
}
