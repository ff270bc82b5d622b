//! Tests of runs whose numbers are no longer finite.

use std::path::{Path, PathBuf};

use crate::networks::LoraFile;
use crate::training::goldens::AdamW;
use crate::training::train_tests::{Log, run_with, settings};
use crate::training::{
    OnNonFinite, Optimizer, OptimizerError, ParamUpdate, StateTensor, TrainError, TrainLength,
    TrainOutcome, TrainSettings,
};

/// AdamW whose update of one step explodes when the learning rate is above a limit.
struct Explosive {
    inner: AdamW,
    /// Updates done before the one that explodes.
    after: u64,
    limit: f64,
}

impl Optimizer for Explosive {
    fn step(&mut self, step: u64, params: &mut [ParamUpdate<'_>]) -> Result<(), OptimizerError> {
        self.inner.step(step, params)?;
        for param in params {
            if step == self.after && param.lr > self.limit {
                *param.value = param.value.clone().add_scalar(f32::INFINITY);
            }
        }
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<StateTensor>, OptimizerError> {
        self.inner.state()
    }

    fn restore(&mut self, state: Vec<StateTensor>) -> Result<(), OptimizerError> {
        self.inner.restore(state)
    }
}

/// The UNet's learning rate is 1e-3.
fn train(
    folder: &Path,
    settings: &TrainSettings,
    log: &mut Log,
    kept: bool,
    (after, limit): (u64, f64),
) -> Result<TrainOutcome, TrainError> {
    let mut optimizer = Explosive {
        inner: AdamW::default(),
        after,
        limit,
    };
    run_with(folder, settings, log, kept, &mut optimizer)
}

fn eight_steps() -> TrainSettings {
    let mut settings = settings();
    settings.length = TrainLength::Steps(8);
    settings.resume.every_n_steps = Some(2);
    settings.save.every_n_steps = None;
    settings.save.every_n_epochs = None;
    settings
}

fn place(root: &Path, name: &str) -> PathBuf {
    let folder = root.join(name);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

#[test]
fn a_run_goes_back_once_and_on_with_half_the_learning_rates() {
    let temporary = tempfile::tempdir().expect("a folder");
    let settings = eight_steps();
    let mut log = Log::default();
    let folder = place(temporary.path(), "whole");
    let whole = train(&folder, &settings, &mut log, true, (4, 7e-4)).expect("a result");
    // Step 5 writes infinities, which step 6 notices; step 4 was kept.
    let steps: Vec<&String> = log
        .lines
        .iter()
        .filter(|line| line.starts_with("step ") || line.starts_with("back "))
        .collect();
    let expected = [
        "step 1 epoch 1",
        "step 2 epoch 1",
        "step 3 epoch 1",
        "step 4 epoch 2",
        "step 5 epoch 2",
        "back from 6 to 4",
        "step 5 epoch 2",
        "step 6 epoch 2",
        "step 7 epoch 3",
        "step 8 epoch 3",
    ];
    assert_eq!(steps, expected);
    assert_eq!(log.rates, [[1e-3; 5].as_slice(), &[5e-4; 4]].concat());
    assert_eq!(log.kept, [2, 4, 4, 6, 8]);
    let file = LoraFile::read(&whole.path).expect("a LoRA");
    let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    assert!(file.tensors.values().all(|tensor| finite(&tensor.values)));
    let told = &file.metadata["lorasmith_rolled_back"];
    assert!(
        told.starts_with("at step 6 the loss was NaN") && told.contains("back to step 4"),
        "{told}"
    );
    assert!(file.metadata["lorasmith_verdict"].ends_with(told.as_str()));

    // Killed or paused after that, it does not forget the halving.
    for (stop_at, leave) in [
        ("back from", false),
        ("back from", true),
        ("step 7", false),
        ("step 7", true),
    ] {
        let folder = place(temporary.path(), &format!("{stop_at}{leave}"));
        let mut first = Log {
            stop_at: Some(stop_at),
            leave,
            ..Log::default()
        };
        train(&folder, &settings, &mut first, true, (4, 7e-4)).expect_err("stopped");
        let mut second = Log::default();
        let resumed = train(&folder, &settings, &mut second, true, (4, 7e-4)).expect("a result");
        assert!(second.rates.iter().all(|&rate| rate == 5e-4), "{stop_at}");
        assert_eq!(resumed.saved, whole.saved, "{stop_at}, {leave}");
    }
}

#[test]
fn without_a_resume_point_it_goes_back_to_its_start() {
    let temporary = tempfile::tempdir().expect("a folder");
    for kept in [false, true] {
        let mut settings = eight_steps();
        settings.resume.every_n_steps = None;
        settings.length = TrainLength::Steps(4);
        let mut log = Log::default();
        let folder = place(temporary.path(), &kept.to_string());
        train(&folder, &settings, &mut log, kept, (1, 7e-4)).expect("a result");
        // The adapters are looked at before they are measured, or anything is made of them.
        let back = log
            .lines
            .iter()
            .position(|line| line == "back from 2 to 0")
            .expect("told");
        assert_eq!(log.lines[back + 1], "step 1 epoch 1");
        assert!(!log.lines[..back].iter().any(|line| line == "validation 2"));
        assert_eq!(log.rates[2..], [5e-4; 4]);
    }
}

#[test]
fn what_is_kept_is_finite() {
    let temporary = tempfile::tempdir().expect("a folder");
    let mut settings = eight_steps();
    settings.validation.every_n_steps = None;
    settings.samples.every_n_steps = None;
    let mut log = Log::default();
    // The update of step 4 explodes, after which the run is to be kept.
    train(temporary.path(), &settings, &mut log, true, (3, 7e-4)).expect("a result");
    assert!(log.lines.contains(&"back from 4 to 2".to_owned()));
    assert_eq!(log.kept, [2, 2, 4, 6, 8]);
}

#[test]
fn a_run_that_may_not_go_back_or_has_done_so_fails_with_advice() {
    let temporary = tempfile::tempdir().expect("a folder");
    let mut settings = eight_steps();
    settings.on_non_finite = OnNonFinite::Fail;
    let failed = |settings: &TrainSettings, name: &str, limit| {
        let folder = place(temporary.path(), name);
        let mut log = Log::default();
        let error = train(&folder, settings, &mut log, true, (4, limit)).expect_err("failed");
        assert!(matches!(error, TrainError::NotFinite(_)), "{error}");
        (error.to_string(), log)
    };
    let (message, log) = failed(&settings, "never", 7e-4);
    for part in [
        "step 6",
        "the last finite step was 5",
        "1e-3 (UNet) and 5e-4 (text encoder)",
        "lr_warmup_steps",
        "on_non_finite: halve_lr",
    ] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(log.kept, [2, 4]);
    settings.on_non_finite = OnNonFinite::HalveLr;
    let (message, log) = failed(&settings, "twice", 0.0);
    assert!(
        message.contains("had gone back from step 6 to step 4"),
        "{message}"
    );
    assert!(message.contains("5e-4 (UNet)"), "{message}");
    assert_eq!(log.kept, [2, 4, 4]);
}
