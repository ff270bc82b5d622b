//! How long a step takes, as earlier runs have told.

use uuid::Uuid;

use super::spec::RunSpec;
use crate::store::runs::{Run, RunFilter};
use crate::store::{Store, StoreError};

/// How many of the newest runs on a base model are looked at.
const RUNS: u64 = 50;
/// How many of the last steps of a run are looked at; the first ones are slower.
const STEPS: u64 = 51;

/// The time of a step, and who has told it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Wall-clock time of an optimizer step, in seconds.
    pub step_time_s: f64,
    /// The run in which it was measured.
    pub run_id: Uuid,
}

/// The pace that a run with `spec` may have: that of the newest run of the same base model, device and resolution.
/// A run of the same batches is preferred; with others the time is taken to grow with the pictures of a step.
///
/// `device` is the id of the device that `spec` means, where that is known.
///
/// # Errors
/// When the database fails.
pub async fn expected(
    store: &Store,
    spec: &RunSpec,
    device: Option<&str>,
) -> Result<Option<Pace>, StoreError> {
    let filter = RunFilter {
        base_model_id: Some(spec.base_model_id.clone()),
        ..RunFilter::default()
    };
    let mut candidates: Vec<(bool, f64, Uuid)> = Vec::new();
    for run in store.newest_runs(filter, RUNS).await? {
        let Ok(earlier) = serde_json::from_str::<RunSpec>(&run.spec) else {
            continue; // of a version that is gone
        };
        if is_like(spec, device, &run, &earlier) {
            let scale = pictures(spec) / pictures(&earlier);
            candidates.push((!is_same_work(spec, &earlier), scale, run.id));
        }
    }
    candidates.sort_by_key(|(other, ..)| *other); // stable: the newest first
    for (_, scale, run_id) in candidates {
        let mut times = store.last_step_times(run_id, STEPS).await?;
        times.sort_by(f64::total_cmp);
        if let Some(median) = times.get(times.len() / 2) {
            return Ok(Some(Pace {
                step_time_s: median * scale,
                run_id,
            }));
        }
    }
    Ok(None)
}

fn is_like(spec: &RunSpec, device: Option<&str>, run: &Run, earlier: &RunSpec) -> bool {
    let Some(used) = &run.device else {
        return false;
    };
    let used = used.split(' ').next(); // `cpu (name)`
    let same_device = earlier.device == spec.device || used == Some(&spec.device) || used == device;
    let size = |spec: &RunSpec| (spec.buckets.width_px, spec.buckets.height_px);
    same_device && size(earlier) == size(spec)
}

/// Whether a step of the two does the same.
fn is_same_work(a: &RunSpec, b: &RunSpec) -> bool {
    let work = |spec: &RunSpec| {
        let settings = &spec.settings;
        (
            settings.batch_size,
            settings.gradient_accumulation_steps,
            settings.gradient_checkpointing,
            settings.precision,
            settings.text_encoder_lr == 0.0,
        )
    };
    work(a) == work(b)
}

fn pictures(spec: &RunSpec) -> f64 {
    let settings = &spec.settings;
    (settings.batch_size * settings.gradient_accumulation_steps).max(1) as f64
}
