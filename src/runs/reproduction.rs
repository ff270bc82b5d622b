//! A run that repeats another: the same settings, images, model and plugins, and whether the result is the same.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::origin::{Difference, Environment, PluginRecord};
use super::provenance::{Provenance, losses_after};
use crate::store::runs::Run;
use crate::store::{Store, StoreError};

/// How a repetition went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reproduction {
    /// Whether all losses and the final file are the same to the bit, and so is every file that both have.
    pub identical: bool,
    /// The first step whose loss is another.
    pub first_differing_step: Option<u64>,
    /// What differs: files, losses, and the environment, which alone makes no difference.
    pub differences: Vec<Difference>,
    /// A sentence.
    pub message: String,
}

/// What is not as a repetition needs it: where, what was found, what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// A pointer into the record.
    pub pointer: String,
    /// What was found and what was expected.
    pub message: String,
}

/// The record of a run, as it was kept.
///
/// # Errors
/// [`StoreError::NotFound`] when there is none; [`StoreError::Corrupt`] when it cannot be read.
pub async fn kept_record(store: &Store, run: &Run) -> Result<Provenance, StoreError> {
    let sha256 = run
        .provenance_sha256
        .as_deref()
        .ok_or(StoreError::NotFound)?;
    let path = store.blobs().path(sha256);
    let bytes = tokio::fs::read(&path).await;
    let corrupt = |message: String| StoreError::Corrupt {
        what: format!("the provenance of run {}", run.id),
        message,
    };
    let bytes = bytes.map_err(|error| corrupt(error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))
}

/// Whether the base model is what it was. `found` is its digest now.
pub fn check_model(expected: &Provenance, found: &str) -> Option<Mismatch> {
    let model = expected.inputs.base_model.as_ref()?;
    let was = &model.sha256;
    (was != found).then(|| Mismatch {
        pointer: "/inputs/base_model/sha256".to_owned(),
        message: format!(
            "the base model `{}` has changed: found SHA-256 {found}, expected {was}",
            model.name
        ),
    })
}

/// Whether the VAE in place of the model's own is what it was. `found` is its digest now.
pub fn check_vae(expected: &Provenance, found: Option<&str>) -> Option<Mismatch> {
    let vae = expected.inputs.vae.as_ref()?;
    let found = found.unwrap_or("none");
    (vae.sha256 != found).then(|| Mismatch {
        pointer: "/inputs/vae/sha256".to_owned(),
        message: format!(
            "the VAE `{}` has changed: found SHA-256 {found}, expected {}",
            vae.name, vae.sha256
        ),
    })
}

/// Whether the plugins are what they were.
pub fn check_plugins(expected: &Provenance, found: &[PluginRecord]) -> Vec<Mismatch> {
    let mismatch = |(index, was): (usize, &PluginRecord)| {
        let now = found.iter().find(|now| now.role == was.role);
        let digest = now.and_then(|now| now.sha256.as_deref());
        if digest.is_some() && digest == was.sha256.as_deref() {
            return None;
        }
        let name = was.plugin_id.as_deref().unwrap_or_default();
        let version = was.version.as_deref().unwrap_or_default();
        let wanted = was.sha256.as_deref().unwrap_or("none");
        let found = match digest {
            Some(found) => {
                let version = now.and_then(|now| now.version.as_deref());
                let version = version.unwrap_or_default();
                format!("has changed: found version {version} with SHA-256 {found}")
            }
            None => "is missing: found none".to_owned(),
        };
        Some(Mismatch {
            pointer: format!("/inputs/plugins/{index}/sha256"),
            message: format!(
                "the plugin {name} of the {} `{}` {found}, expected version {version} with SHA-256 {wanted}",
                was.role, was.id
            ),
        })
    };
    let plugins = expected.inputs.plugins.iter().enumerate();
    plugins.filter_map(mismatch).collect()
}

/// Compares the record of a repetition with that of its original.
///
/// # Errors
/// When the database fails.
pub async fn compare(
    store: &Store,
    original: &Provenance,
    repeated: &Provenance,
) -> Result<Reproduction, StoreError> {
    let mut differences = Vec::new();
    let losses = first_difference(store, original.run_id, repeated.run_id).await?;
    if let Some((step, was, is)) = losses {
        differences.push(Difference {
            what: format!("loss of step {step}"),
            before: was.map(|loss| loss.to_string()),
            now: is.map(|loss| loss.to_string()),
        });
    }
    let files = differing_files(original, repeated);
    let same_files = files.iter().all(|file| file.is_harmless);
    differences.extend(files.into_iter().map(|file| file.difference));
    let identical = losses.is_none() && same_files;
    let environments = |of: &Provenance| -> Vec<Environment> {
        let attempts = of.attempts.iter();
        attempts
            .map(|attempt| attempt.environment.clone())
            .collect()
    };
    let (before, now) = (environments(original), environments(repeated));
    let before: Vec<&Environment> = before.iter().collect();
    let changed = match now.last() {
        Some(now) => Environment::differences(&before, now),
        None => Vec::new(),
    };
    let first_differing_step = losses.map(|(step, _, _)| step);
    let message = message(identical, first_differing_step, &changed);
    differences.extend(changed);
    Ok(Reproduction {
        identical,
        first_differing_step,
        differences,
        message,
    })
}

fn message(identical: bool, step: Option<u64>, changed: &[Difference]) -> String {
    let result = match (identical, step) {
        (true, _) => "every loss and the final file are the same to the bit".to_owned(),
        (false, Some(step)) => format!("the losses differ from step {step} on"),
        (false, None) => "the losses are the same, but files differ".to_owned(),
    };
    if changed.is_empty() {
        return result;
    }
    let changed: Vec<String> = changed.iter().map(ToString::to_string).collect();
    let link = if identical { "though" } else { "and" };
    format!(
        "{result}, {link} the environment differs: {}",
        changed.join("; ")
    )
}

struct DifferingFile {
    difference: Difference,
    /// A file that somebody has asked for on the way is not made again.
    is_harmless: bool,
}

fn differing_files(original: &Provenance, repeated: &Provenance) -> Vec<DifferingFile> {
    let find = |of: &Provenance, name: &str| {
        let found = of.result.files.iter().find(|file| file.file_name == name);
        found.map(|file| file.sha256.clone())
    };
    let all = original.result.files.iter().chain(&repeated.result.files);
    let mut names: Vec<(&str, bool)> = all
        .map(|file| (file.file_name.as_str(), file.is_final))
        .collect();
    names.sort_unstable();
    names.dedup();
    let differing = names.into_iter().filter_map(|(name, is_final)| {
        let (before, now) = (find(original, name), find(repeated, name));
        (before != now).then(|| DifferingFile {
            is_harmless: now.is_none() && !is_final,
            difference: Difference {
                what: format!("file {name}"),
                before,
                now,
            },
        })
    });
    differing.collect()
}

/// The first step whose losses differ, and both; a step that one of them has not is a difference, too.
async fn first_difference(
    store: &Store,
    original: Uuid,
    repeated: Uuid,
) -> Result<Option<(u64, Option<f64>, Option<f64>)>, StoreError> {
    let mut since = 0;
    loop {
        let was = losses_after(store, original, since).await?;
        let is = losses_after(store, repeated, since).await?;
        for (was, is) in was.iter().zip(&is) {
            if was.0 != is.0 {
                let step = was.0.min(is.0);
                let at = |pair: &(u64, f64)| (pair.0 == step).then_some(pair.1);
                return Ok(Some((step, at(was), at(is))));
            }
            if was.1.to_bits() != is.1.to_bits() {
                return Ok(Some((was.0, Some(was.1), Some(is.1))));
            }
        }
        let common = was.len().min(is.len());
        if let Some((step, loss)) = was.get(common) {
            return Ok(Some((*step, Some(*loss), None)));
        }
        if let Some((step, loss)) = is.get(common) {
            return Ok(Some((*step, None, Some(*loss))));
        }
        match was.last() {
            Some((last, _)) => since = *last,
            None => return Ok(None),
        }
    }
}
