//! Tests of runs that average their adapters.

use std::collections::BTreeMap;

use crate::networks::LoraFile;
use crate::training::goldens::AdamW;
use crate::training::settings::EmaSettings;
use crate::training::train_tests::{Folders, Log, run_in_two, run_with, settings};
use crate::training::{
    Optimizer, OptimizerError, ParamUpdate, StateTensor, TrainLength, TrainSettings,
};

/// AdamW that writes down every value that an adapter has.
#[derive(Default)]
struct Recorder {
    inner: AdamW,
    values: BTreeMap<String, Vec<Vec<f64>>>,
}

impl Recorder {
    fn write_down(&mut self, params: &[ParamUpdate<'_>]) {
        for param in params {
            let values = param.value.to_data();
            let seen = self.values.entry(param.name.to_owned()).or_default();
            seen.push(values.iter::<f32>().map(f64::from).collect());
        }
    }
}

impl Optimizer for Recorder {
    fn step(&mut self, step: u64, params: &mut [ParamUpdate<'_>]) -> Result<(), OptimizerError> {
        if step == 0 {
            self.write_down(params);
        }
        self.inner.step(step, params)?;
        self.write_down(params);
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<StateTensor>, OptimizerError> {
        self.inner.state()
    }

    fn restore(&mut self, state: Vec<StateTensor>) -> Result<(), OptimizerError> {
        self.inner.restore(state)
    }
}

fn averaged(decay: f64, warm_up: bool) -> TrainSettings {
    let mut settings = settings();
    settings.ema = Some(EmaSettings { decay, warm_up });
    settings.length = TrainLength::Steps(4);
    settings.save.every_n_steps = None;
    settings.save.every_n_epochs = None;
    settings.samples.prompts.clear();
    settings.samples.every_n_steps = None;
    settings.validation.every_n_steps = None;
    settings
}

/// The file has the average that a hand would compute, and a run that was killed the same one to the bit.
#[test]
fn the_file_has_the_average_resumed_or_not() {
    let folders = Folders::new();
    let mut settings = averaged(0.2, true);
    let mut recorder = Recorder::default();
    let folder = folders.get("whole");
    let mut log = Log::default();
    let whole = run_with(&folder, &settings, &mut log, true, &mut recorder).expect("a result");
    let file = LoraFile::read(&whole.path).expect("a LoRA");
    assert_eq!(file.metadata["lorasmith_weights"], "ema");
    assert_eq!(file.metadata["lorasmith_ema_decay"], "0.2");
    // 2/11 is below 0.2, 3/12 above.
    let decays = [0.0, 2.0 / 11.0, 0.2, 0.2];
    let mut differs = false;
    for (name, values) in &recorder.values {
        let found = &file.tensors[name].values;
        for (index, &found) in found.iter().enumerate() {
            let mut average = values[0][index];
            for (decay, value) in decays.iter().zip(&values[1..]) {
                average = decay * average + (1.0 - decay) * value[index];
            }
            assert!((f64::from(found) - average).abs() < 1e-6, "{name}");
            differs |= (f64::from(found) - values[4][index]).abs() > 1e-6;
        }
    }
    assert!(differs, "the average is not the last value");

    settings.resume.every_n_steps = Some(1);
    for (stop_at, leave) in [("step 2", true), ("step 4", false)] {
        let first = Log {
            stop_at: Some(stop_at),
            leave,
            ..Log::default()
        };
        let (.., resumed) = run_in_two(&folders.get(stop_at), &settings, first);
        assert_eq!(resumed.saved, whole.saved, "{stop_at}");
        assert_eq!(
            resumed.validation_loss_after, whole.validation_loss_after,
            "{stop_at}"
        );
    }
}

/// What is trained does not depend on whether it is averaged; what is measured and saved does.
#[test]
fn the_average_changes_nothing_of_the_training() {
    let temporary = tempfile::tempdir().expect("a folder");
    let run = |ema: bool| {
        let mut settings = averaged(0.9, false);
        settings.length = TrainLength::Steps(3);
        if !ema {
            settings.ema = None;
        }
        let mut log = Log::default();
        let outcome = run_with(
            temporary.path(),
            &settings,
            &mut log,
            false,
            &mut AdamW::default(),
        );
        (outcome.expect("a result"), log.losses)
    };
    let ((with, losses), (without, same)) = (run(true), run(false));
    assert_eq!(losses, same);
    assert_ne!(with.saved.sha256, without.saved.sha256);
    assert_ne!(with.validation_loss_after, without.validation_loss_after);
    assert_eq!(with.validation_loss_before, without.validation_loss_before);
}
