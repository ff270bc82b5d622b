//! Losses of every kind and weight, with their gradients, and the thresholds and noise that they are made with.

use burn::tensor::Tensor;
use serde::Deserialize;

use super::VerifyError;
use super::goldens::{GoldenFile, Goldens};
use super::report::Checker;
use crate::diffusion::PredictionType;
use crate::diffusion::schedule::NoiseSchedule;
use crate::training::loss::{HuberSchedule, LossSettings};
use crate::training::objective::Objective;

/// Relative, of a loss, and of a sample's gradient beside its largest element: ten times what the reference in f32 is
/// off from itself in f64.
const TOLERANCE: f64 = 2.5e-6;

/// What one golden was made with.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    loss: LossSettings,
    prediction: PredictionType,
    #[serde(default)]
    min_snr_gamma: Option<f64>,
    #[serde(default)]
    zero_terminal_snr: bool,
    /// Whether the samples have weights of their own.
    #[serde(default)]
    prior: bool,
}

/// Computes each recorded loss again.
pub fn check(
    check: &mut Checker<'_>,
    goldens: &Goldens,
    schedule: &NoiseSchedule,
) -> Result<(), VerifyError> {
    let Some(file) = goldens.file("objectives")? else {
        return Ok(());
    };
    let path = goldens.path("objectives.json");
    let broken = |message: String| VerifyError::Layout {
        path: path.clone(),
        message,
    };
    let text = std::fs::read(&path).map_err(|error| broken(error.to_string()))?;
    let cases: Vec<Case> =
        serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
    for case in &cases {
        loss(check, &file, schedule, case)?;
    }
    Ok(())
}

fn loss(
    check: &mut Checker<'_>,
    file: &GoldenFile,
    schedule: &NoiseSchedule,
    case: &Case,
) -> Result<(), VerifyError> {
    let objective = Objective {
        prediction: case.prediction,
        min_snr_gamma: case.min_snr_gamma,
        loss: case.loss,
    };
    let schedule = match case.zero_terminal_snr {
        true => &schedule.zero_terminal(),
        false => schedule,
    };
    let timesteps = file.timesteps("timesteps")?;
    let weights = match case.prior {
        true => file.values("prior")?.to_vec(),
        false => vec![1.0; timesteps.len()],
    };
    let mask = case.loss.masked.then(|| file.tensor("mask")).transpose()?;
    let prediction = file.tensor::<4>("prediction")?.autodiff().require_grad();
    let target = file.tensor("target")?;
    let loss = objective.loss(
        prediction.clone(),
        target,
        mask,
        schedule,
        &timesteps,
        &weights,
    );
    let gradient = prediction.grad(&loss.backward());
    let label = |what: &str| format!("objective {}, {what}", case.name);
    let found = numbers(loss.without_autodiff());
    let expected = file.values(&format!("{}.loss", case.name))?;
    check.relative(&label("loss"), &found, expected, TOLERANCE);
    let expected = file.values(&format!("{}.grad", case.name))?;
    let found = gradient.map(numbers).unwrap_or_default();
    let error = worst_of_samples(&found, expected, timesteps.len());
    check.add(label("gradient"), error, TOLERANCE, String::new());
    Ok(())
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

/// The largest difference beside the largest element of its own sample; where that is 0, the difference itself.
fn worst_of_samples(found: &[f64], expected: &[f64], samples: usize) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let length = (expected.len() / samples.max(1)).max(1);
    let of_sample = |(found, expected): (&[f64], &[f64])| {
        let largest = expected.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
        let scale = if largest == 0.0 { 1.0 } else { largest };
        let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
        // What is not a number is the worst.
        let worst = differences.fold(0.0, |worst, d| if d <= worst { worst } else { d });
        worst / scale
    };
    let samples = found.chunks(length).zip(expected.chunks(length));
    samples
        .map(of_sample)
        .fold(0.0, |worst, d| if d <= worst { worst } else { d })
}

/// The thresholds of Huber's loss that the schedule's goldens have.
pub fn thresholds(
    check: &mut Checker<'_>,
    file: &GoldenFile,
    schedule: &NoiseSchedule,
    tolerance: f64,
) -> Result<(), VerifyError> {
    for (key, huber_schedule) in [
        ("huber_exp_c0p1", HuberSchedule::Exponential),
        ("huber_snr_c0p1", HuberSchedule::Snr),
    ] {
        if file.has(key) {
            let loss = LossSettings {
                huber_schedule,
                ..LossSettings::default()
            };
            let timesteps = file.timesteps("timesteps")?;
            let ours: Vec<f64> = timesteps
                .iter()
                .map(|&t| loss.threshold(schedule, t))
                .collect();
            let label = format!("schedule, {key}");
            check.relative(&label, &ours, file.values(key)?, tolerance);
        }
    }
    Ok(())
}
