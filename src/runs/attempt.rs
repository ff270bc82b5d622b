//! The first and the last thing that a worker writes down: what it finds around it, and where its result comes from.

use tokio::runtime::Runtime;
use uuid::Uuid;

use super::origin::{Difference, Environment, Facts, Materials};
use super::provenance::{Inputs, Provenance};
use super::reproduction::{self, Mismatch};
use super::spec::{RunSpec, SnapshotImage};
use super::worker::WorkerParts;
use crate::diffusion::devices::ComputeDevice;
use crate::models::{BaseModel, Vae};
use crate::store::runs::{Run, RunFailure, RunState};
use crate::store::{Store, StoreError};

/// Why a worker cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// Rows.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The run cannot be trained as it was meant to be.
    #[error("{}", .0.message)]
    Failed(RunFailure),
}

/// What is known when a worker begins.
pub struct Begun {
    /// What it has found.
    pub facts: Facts,
    /// In what it differs from the workers before it whose work it goes on with.
    pub changes: Vec<Difference>,
}

/// Looks at program, device, base model and plugins, and writes down what is there.
///
/// # Errors
/// When the base model cannot be read; when the run repeats another and not all is as it was; when the database fails.
pub fn begin(
    runtime: &Runtime,
    parts: &WorkerParts,
    run: &Run,
    spec: &RunSpec,
    images: &[SnapshotImage],
    (base, vae): (&BaseModel, Option<&Vae>),
    device: &ComputeDevice,
) -> Result<Begun, BeginError> {
    let store = &parts.store;
    let materials = Materials::find(&parts.models, base, vae, &parts.plugins, spec)
        .map_err(|error| BeginError::Failed(RunFailure::new("model_unusable", error)))?;
    if let Some(original) = run.reproduction_of {
        let original = runtime.block_on(async {
            let original = store.run(original).await?;
            reproduction::kept_record(store, &original).await
        })?;
        let changed = mismatches(&original, &materials);
        if !changed.is_empty() {
            let message = changed.join("; ");
            return Err(BeginError::Failed(RunFailure::new(
                "inputs_changed",
                message,
            )));
        }
    }
    let inputs = Inputs::new(spec, images, Some(materials.clone()));
    // The first worker of a run that makes another longer goes on from a point that was copied.
    let goes_on = run.kept_step.is_some() || run.continued_from.is_some();
    let facts = Facts {
        environment: Environment::of(&device.info, spec.settings.precision),
        materials,
        inputs_sha256: inputs.sha256(),
        from_step: run.kept_step,
    };
    let changes = match goes_on {
        true => runtime.block_on(changes(store, run, &facts.environment))?,
        false => Vec::new(),
    };
    let text = serde_json::to_string(&facts)
        .map_err(|error| BeginError::Failed(RunFailure::new("training_failed", error)))?;
    runtime.block_on(store.note_attempt(run.id, run.attempt, text))?;
    Ok(Begun { facts, changes })
}

fn mismatches(original: &Provenance, found: &Materials) -> Vec<String> {
    let model = reproduction::check_model(original, &found.base_model.sha256);
    let vae = found.vae.as_ref();
    let vae = reproduction::check_vae(original, vae.map(|vae| vae.sha256.as_str()));
    let plugins = reproduction::check_plugins(original, &found.plugins);
    let all = model.into_iter().chain(vae).chain(plugins);
    all.map(|Mismatch { message, .. }| message).collect()
}

/// In what the environment differs from that of the worker before, of this run or of the one that it makes longer.
async fn changes(
    store: &Store,
    run: &Run,
    now: &Environment,
) -> Result<Vec<Difference>, StoreError> {
    let mut attempts = store.attempts(run.id).await?;
    if let (None, Some(parent)) = (attempts.last(), run.continued_from) {
        attempts = store.attempts(parent).await?;
    }
    let last = attempts.last();
    let facts = last.and_then(|last| serde_json::from_str::<Facts>(&last.facts).ok());
    Ok(facts.map_or_else(Vec::new, |before| {
        Environment::differences(&[&before.environment], now)
    }))
}

/// Keeps the record of a run whose result is there, and compares it when the run repeats another.
///
/// # Errors
/// When the database or the blobs fail.
pub async fn conclude(store: &Store, id: Uuid) -> Result<(), StoreError> {
    let run = store.run(id).await?;
    if run.state != RunState::Saving {
        return Ok(()); // somebody else has it, or wants its end
    }
    let record = Provenance::of(store, &run, true).await?;
    let unwritable = |error: serde_json::Error| StoreError::Corrupt {
        what: format!("the provenance of run {id}"),
        message: error.to_string(),
    };
    let bytes = serde_json::to_vec(&record).map_err(unwritable)?;
    let blobs = store.blobs().clone();
    let blob = tokio::task::spawn_blocking(move || blobs.put(&bytes)).await??;
    let reproduction = match run.reproduction_of {
        Some(original) => {
            let original = store.run(original).await?;
            let original = reproduction::kept_record(store, &original).await?;
            let found = reproduction::compare(store, &original, &record).await?;
            Some(serde_json::to_string(&found).map_err(unwritable)?)
        }
        None => None,
    };
    store.set_provenance(id, &blob.sha256, reproduction).await
}
