//! Tests of the whole loop on a tiny model and pictures made up here.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use image::{DynamicImage, Rgb, RgbImage};
use time::OffsetDateTime;

use crate::dataloader::{
    Augment, BucketSettings, CaptionSettings, CropMode, TensorCache, TrainingImage,
};
use crate::networks::{LoraFile, LoraNetwork, NetworkSettings, TrainParts};
use crate::training::goldens::{AdamW, Constant, fixture, load_model};
use crate::training::{
    Control, EarlyStopping, Optimizer, ProgressSink, Report, ResumeFolder, RunPlace, SamplePrompt,
    SaveSettings, TrainError, TrainLength, TrainOutcome, TrainSettings, TrainingSet, Wishes, train,
};

/// Writes down what is reported and stops after a number of steps.
#[derive(Default)]
pub(super) struct Log {
    pub(super) lines: Vec<String>,
    pub(super) losses: Vec<f64>,
    /// Learning rates of the UNet.
    pub(super) rates: Vec<f64>,
    /// Whether UNet and text encoder had gradients.
    pub(super) trained: [bool; 2],
    pub(super) averages: Vec<f64>,
    pub(super) kept: Vec<u64>,
    pub(super) validation: Vec<f64>,
    pub(super) stopped: Option<String>,
    pub(super) stop_after: Option<u64>,
    /// Asks the training to leave a resume point behind when it is stopped.
    pub(super) leave: bool,
    /// Stops at the first line that begins so.
    pub(super) stop_at: Option<&'static str>,
    /// Wants a file and pictures after this step.
    pub(super) wish_at: Option<u64>,
}

impl ProgressSink for Log {
    fn wishes(&mut self) -> Wishes {
        let wished = self
            .wish_at
            .is_some_and(|step| step == self.losses.len() as u64);
        Wishes {
            save: wished,
            sample: wished,
            leave: self.leave,
        }
    }

    fn fulfilled(&mut self, wishes: Wishes) {
        if wishes.save {
            self.wish_at = None;
            self.lines.push("fulfilled".to_owned());
        }
    }

    fn report(&mut self, report: Report<'_>) -> Control {
        let before = self.lines.len();
        let control = self.write_down(report);
        let stops = |line: &String| self.stop_at.is_some_and(|start| line.starts_with(start));
        if self.lines[before..].iter().any(stops) {
            return Control::Stop;
        }
        control
    }
}

impl Log {
    fn write_down(&mut self, report: Report<'_>) -> Control {
        match report {
            Report::Phase(_) => {}
            Report::Resumed { step, epoch, .. } => {
                self.lines.push(format!("resumed {step} epoch {epoch}"));
            }
            Report::Kept { step } => self.kept.push(step),
            Report::RolledBack { back, verdict, .. } => {
                assert!(verdict.contains("half the learning rates"), "{verdict}");
                let (from, to) = (back.at_step, back.to_step);
                self.lines.push(format!("back from {from} to {to}"));
            }
            Report::Step(step) => {
                assert!(step.loss_average.is_finite() && step.eta_s >= 0.0);
                let norms = [step.grad_norm_unet, step.grad_norm_text_encoder];
                let squares: f64 = norms.iter().flatten().map(|norm| norm * norm).sum();
                assert!((squares.sqrt() / step.grad_norm - 1.0).abs() < 1e-9);
                self.trained = norms.map(|norm| norm.is_some());
                self.rates.push(step.lr_unet);
                self.losses.push(step.loss);
                self.averages.push(step.loss_average);
                let (done, epoch) = (step.step, step.epoch);
                self.lines.push(format!("step {done} epoch {epoch}"));
                if self.stop_after == Some(done) {
                    return Control::Stop;
                }
            }
            Report::Validation {
                measured,
                early_stop,
                ..
            } => {
                self.validation.push(measured.loss);
                assert!(measured.standard_error > 0.0);
                self.stopped = early_stop.map(str::to_owned);
                self.lines.push(format!("validation {}", measured.step));
            }
            Report::Sample { step, image, .. } => {
                let (width, height) = image.dimensions();
                self.lines.push(format!("sample {step} {width}x{height}"));
            }
            Report::Checkpoint { path, last, .. } => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                self.lines.push(format!("saved {name} {last}"));
            }
        }
        Control::Continue
    }
}

/// Five pictures of plain colours, one of them for regularization; of the second one half is transparent.
pub(super) fn pictures(folder: &Path) -> TrainingSet {
    let images = (0..5_u8).map(|index| {
        let path = folder.join(format!("{index}.png"));
        let colour = Rgb([index * 50, 255 - index * 40, 90]);
        let mut picture = DynamicImage::from(RgbImage::from_pixel(64, 64, colour));
        if index == 1 {
            let mut clear = picture.into_rgba8();
            let left = clear.enumerate_pixels_mut().filter(|(x, ..)| *x < 32);
            left.for_each(|(.., pixel)| pixel.0[3] = 0);
            picture = clear.into();
        }
        picture.save(&path).expect("a picture");
        TrainingImage {
            id: format!("image-{index}"),
            path,
            sha256: format!("{index:064}"),
            width_px: 64,
            height_px: 64,
            caption: format!("colour {index}"),
            repeats: 2,
            regularization: index == 4,
            mask: None,
            background: None,
            augment: Augment::default(),
            correction: None,
            captioning: CaptionSettings::default(),
        }
    });
    TrainingSet {
        images: images.collect(),
        subsets: HashMap::from([("image-0".to_owned(), "2_colours".to_owned())]),
        buckets: BucketSettings {
            width_px: 64,
            height_px: 64,
            enabled: false,
            min_px: 64,
            max_px: 64,
            step_px: 64,
            no_upscale: false,
            crop: CropMode::Centre,
        },
        cache: TensorCache::open(&folder.join("cache"), u64::MAX).ok(),
        base_model: fixture("tiny-sd15-ldm.safetensors"),
    }
}

pub(super) fn settings() -> TrainSettings {
    let mut settings = TrainSettings {
        output_name: "colours".to_owned(),
        network: NetworkSettings {
            rank: 2,
            alpha: 2.0,
            ..NetworkSettings::default()
        },
        unet_lr: 1e-3,
        text_encoder_lr: 5e-4,
        length: TrainLength::Steps(5),
        batch_size: 2,
        gradient_accumulation_steps: 2,
        seed: 7,
        save: SaveSettings {
            every_n_steps: Some(4),
            every_n_epochs: Some(1),
            ..SaveSettings::default()
        },
        ..TrainSettings::default()
    };
    settings.samples.prompts = vec![SamplePrompt {
        prompt: "colour 1".to_owned(),
        width_px: 64,
        height_px: 64,
        steps: 2,
        ..SamplePrompt::default()
    }];
    settings.samples.every_n_steps = Some(3);
    settings.samples.at_first = true;
    settings.validation.image_ids = vec!["image-3".to_owned()];
    settings.validation.every_n_steps = Some(2);
    settings
}

pub(super) fn run(
    folder: &Path,
    settings: &TrainSettings,
    log: &mut Log,
) -> Result<TrainOutcome, TrainError> {
    run_kept(folder, settings, log, false)
}

/// A run with resume points, if it is to have some.
pub(super) fn run_kept(
    folder: &Path,
    settings: &TrainSettings,
    log: &mut Log,
    kept: bool,
) -> Result<TrainOutcome, TrainError> {
    run_with(folder, settings, log, kept, &mut AdamW::default())
}

/// Folders of a test by name.
pub(super) struct Folders(tempfile::TempDir);

impl Folders {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    pub(super) fn get(&self, name: &str) -> PathBuf {
        let folder = self.0.path().join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        folder
    }
}

/// A run that `first` stops and another one on its folder that goes on to the end: what was logged, and the result.
pub(super) fn run_in_two(
    folder: &Path,
    settings: &TrainSettings,
    mut first: Log,
) -> (Log, Log, TrainOutcome) {
    let stopped = run_kept(folder, settings, &mut first, true);
    assert!(matches!(stopped, Err(TrainError::Stopped { .. })));
    let mut second = Log::default();
    let outcome = run_kept(folder, settings, &mut second, true).expect("a result");
    (first, second, outcome)
}

/// A run with an optimizer.
pub(super) fn run_with(
    folder: &Path,
    settings: &TrainSettings,
    log: &mut Log,
    kept: bool,
    optimizer: &mut dyn Optimizer,
) -> Result<TrainOutcome, TrainError> {
    let mut model = load_model(fixture("diffusers"));
    let parts = TrainParts {
        unet: settings.unet_lr != 0.0,
        text_encoder: settings.text_encoder_lr != 0.0,
    };
    let device = Device::flex();
    let mut network =
        LoraNetwork::create(&mut model, &settings.network, parts, settings.seed, &device)?;
    let mut set = pictures(folder);
    for image in &mut set.images {
        image.augment = settings.augment;
    }
    train(
        &mut model,
        &mut network,
        &set,
        settings,
        optimizer,
        &Constant,
        log,
        &RunPlace {
            output_dir: folder.join("out"),
            resume: kept.then(|| {
                let points = ResumeFolder::open(&folder.join("resume")).expect("a folder");
                let seed = settings.seed.to_string();
                (points, [("the seed".to_owned(), seed)].into())
            }),
            recorded_at: OffsetDateTime::UNIX_EPOCH,
            inputs_sha256: None,
            session_id: 1,
        },
    )
}

#[test]
fn a_run_reports_and_saves_what_it_was_asked_to() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut log = Log::default();
    let outcome = run(folder.path(), &settings(), &mut log).expect("a result");
    // 3 pictures and 3 for regularization, twice each: 6 + 6 = 12 in batches of 2, accumulated by 2: 3 steps.
    let expected = [
        "validation 0",
        "sample 0 64x64",
        "step 1 epoch 1",
        "step 2 epoch 1",
        "validation 2",
        "step 3 epoch 1",
        "validation 3",
        "sample 3 64x64",
        "saved colours-000001.safetensors false",
        "step 4 epoch 2",
        "validation 4",
        "saved colours-step00000004.safetensors false",
        "step 5 epoch 2",
        "validation 5",
        "saved colours.safetensors true",
        "sample 5 64x64",
    ];
    assert_eq!(log.lines, expected);
    assert_eq!(outcome.steps, 5);
    assert_eq!(
        outcome.validation_loss_before,
        log.validation.first().copied()
    );
    assert_eq!(
        outcome.validation_loss_after,
        log.validation.last().copied()
    );
    let file = LoraFile::read(&outcome.path).expect("a LoRA");
    let entry = |key: &str| file.metadata.get(key).map(String::as_str);
    assert_eq!(entry("ss_steps"), Some("5"));
    assert_eq!(entry("ss_epoch"), Some("2"));
    assert_eq!(entry("ss_network_dim"), Some("2"));
    assert_eq!(entry("modelspec.title"), Some("colours"));
    assert_eq!(entry("ss_sd_model_name"), Some("tiny-sd15-ldm.safetensors"));
    let moved = file.tensors.iter().filter(|(key, tensor)| {
        key.contains("lora_up") && tensor.values.iter().any(|&value| value != 0.0)
    });
    assert!(moved.count() > 50, "the adapters were trained");
}

/// Stopped in every way and at every place, a run goes on to the same losses and, to the bit, the same file.
#[test]
fn a_run_that_was_stopped_gives_what_it_would_have_given() {
    let folders = Folders::new();
    let mut settings = settings();
    settings.length = TrainLength::Steps(8);
    let mut whole = Log::default();
    let outcome = run(&folders.get("whole"), &settings, &mut whole).expect("a result");
    let expected = std::fs::read(&outcome.path).expect("a file");

    // Asked to leave it is kept at once; killed, it goes on from the point before.
    for (case, (stop_at, leave)) in [
        ("sample 0", true),
        ("step 3", true),
        ("saved colours-step00000004", true),
        ("step 5", false),
        ("validation 8", false),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = folders.get(&case.to_string());
        settings.resume.every_n_steps = Some(2);
        let first = Log {
            stop_at: Some(stop_at),
            leave,
            ..Log::default()
        };
        let (first, second, outcome) = run_in_two(&folder, &settings, first);

        let done = 8 - second.losses.len();
        if leave {
            assert_eq!(first.losses.len(), done, "{stop_at}: no step is done twice");
            assert_eq!(
                second.lines[0],
                format!("resumed {done} epoch {}", 1 + done.saturating_sub(1) / 3)
            );
        }
        assert_eq!(second.losses, whole.losses[done..], "{stop_at}");
        assert_eq!(second.averages, whole.averages[done..], "{stop_at}");
        assert_eq!(first.losses[..], whole.losses[..first.losses.len()]);
        let found = std::fs::read(&outcome.path).expect("a file");
        assert!(
            found == expected,
            "{stop_at}, asked to leave: {leave}: another file"
        );
        // Everything was reported, by the one or the other.
        for line in &whole.lines {
            let told = first.lines.contains(line) || second.lines.contains(line);
            assert!(told, "{stop_at}, asked to leave: {leave}: {line}");
        }
    }
}

#[test]
fn a_longer_run_goes_on_where_a_shorter_one_has_ended() {
    let temporary = tempfile::tempdir().expect("a folder");
    let folder = |name: &str| {
        let folder = temporary.path().join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        folder
    };
    let of_length = |steps| TrainSettings {
        length: TrainLength::Steps(steps),
        ..settings()
    };
    let mut log = Log::default();
    run_kept(&folder("a"), &of_length(4), &mut log, true).expect("a result");
    let mut more = Log::default();
    let extended = run_kept(&folder("a"), &of_length(7), &mut more, true).expect("a result");
    let mut whole = Log::default();
    let expected = run(&folder("b"), &of_length(7), &mut whole).expect("a result");
    assert_eq!([log.losses, more.losses].concat(), whole.losses);
    assert_eq!(extended.saved, expected.saved);
    let other = TrainSettings {
        seed: 8,
        ..of_length(9)
    };
    let refused = run_kept(&folder("a"), &other, &mut Log::default(), true);
    let message = refused.expect_err("another seed").to_string();
    assert!(message.contains("the seed was `7`"), "{message}");
}

/// The files tell what validation says, and only what validation says stops a run early, resumed or not.
#[test]
fn a_run_whose_validation_no_longer_improves_ends_early_at_the_same_step() {
    let folders = Folders::new();
    let mut settings = settings();
    settings.length = TrainLength::Steps(20);
    settings.validation.image_ids.clear();
    settings.validation.fraction = Some(0.5);
    // No loss falls by 1000: the validations of steps 2 and 4, each the end of an epoch, are enough.
    settings.early_stopping = Some(EarlyStopping {
        patience: 2,
        min_delta: 1e3,
    });
    let mut whole = Log::default();
    let outcome = run(&folders.get("whole"), &settings, &mut whole).expect("a result");
    assert_eq!((outcome.steps, whole.losses.len()), (4, 4));
    let why = whole.stopped.expect("a reason");
    assert!(
        why.starts_with("stopped early at step 4: 2 validations since step 0"),
        "{why}"
    );
    let file = LoraFile::read(&outcome.path).expect("a LoRA");
    assert!(file.metadata["lorasmith_verdict"].ends_with(&why));
    assert_eq!(file.metadata["ss_num_validation_images"], "2");
    assert_eq!(file.metadata["ss_validation_split"], "0.5");
    let loss: f64 = file.metadata["lorasmith_validation_loss"]
        .parse()
        .expect("a number");
    assert_eq!(Some(loss), outcome.validation_loss_after);

    settings.resume.every_n_steps = Some(1);
    for (stop_at, leave) in [
        ("step 3", false),
        ("validation 4", true),
        ("saved colours.", false),
    ] {
        let folder = folders.get(stop_at);
        let first = Log {
            stop_at: Some(stop_at),
            leave,
            ..Log::default()
        };
        let (_, second, resumed) = run_in_two(&folder, &settings, first);
        assert_eq!(
            (resumed.steps, &resumed.saved),
            (4, &outcome.saved),
            "{stop_at}"
        );
        assert_eq!(second.stopped.as_deref(), Some(why.as_str()), "{stop_at}");
    }
}

#[test]
fn resume_points_and_wishes_come_when_they_are_due() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut settings = settings();
    settings.save.every_n_steps = None;
    settings.save.every_n_epochs = None;
    settings.length = TrainLength::Steps(6);
    settings.resume.every_n_steps = Some(4);
    let mut log = Log {
        wish_at: Some(2),
        ..Log::default()
    };
    run_kept(folder.path(), &settings, &mut log, true).expect("a result");
    // The file that was wished for, every fourth step, the end.
    assert_eq!(log.kept, [2, 4, 6]);
    let at = |line: &str| {
        log.lines
            .iter()
            .position(|known| known == line)
            .expect("told")
    };
    let [saved, drawn] = [
        "saved colours-step00000002.safetensors false",
        "sample 2 64x64",
    ]
    .map(at);
    assert!(at("step 2 epoch 1") < saved && saved < drawn && drawn < at("fulfilled"));
    assert!(at("fulfilled") < at("step 3 epoch 1"));

    let folder = tempfile::tempdir().expect("a folder");
    settings.resume.every_n_steps = None;
    settings.resume.every_minutes = 1e-9;
    let mut log = Log::default();
    run_kept(folder.path(), &settings, &mut log, true).expect("a result");
    assert_eq!(log.kept, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_run_is_a_function_of_its_seed() {
    let folder = tempfile::tempdir().expect("a folder");
    let hash = |seed| {
        let settings = TrainSettings { seed, ..settings() };
        let outcome = run(folder.path(), &settings, &mut Log::default()).expect("a result");
        let file = LoraFile::read(&outcome.path).expect("a LoRA");
        file.metadata["sshs_model_hash"].clone()
    };
    let first = hash(7);
    assert_eq!(
        first,
        hash(7),
        "the second run reads its latents from the cache"
    );
    assert_ne!(first, hash(8));
}

#[test]
fn an_untrained_text_encoder_has_no_adapters_in_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let settings = TrainSettings {
        text_encoder_lr: 0.0,
        length: TrainLength::Epochs(1),
        ..settings()
    };
    let mut log = Log::default();
    let outcome = run(folder.path(), &settings, &mut log).expect("a result");
    assert_eq!(outcome.steps, 3);
    assert_eq!(log.trained, [true, false]);
    let file = LoraFile::read(&outcome.path).expect("a LoRA");
    assert!(file.tensors.keys().all(|key| key.starts_with("lora_unet_")));
    assert_eq!(file.metadata["ss_text_encoder_lr"], "None");
}

#[test]
fn a_run_stops_when_it_is_asked_to() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut log = Log {
        stop_after: Some(2),
        ..Log::default()
    };
    let error = run(folder.path(), &settings(), &mut log).expect_err("stopped");
    assert!(matches!(error, TrainError::Stopped { step: 2 }), "{error}");
    assert_eq!(log.losses.len(), 2);
    assert!(!folder.path().join("out").exists(), "nothing was written");
}

#[test]
fn unusable_settings_are_refused_before_any_work() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut log = Log::default();
    let mut settings = settings();
    settings.batch_size = 0;
    let error = run(folder.path(), &settings, &mut log).expect_err("no batch");
    assert!(error.to_string().starts_with("/batch_size"), "{error}");
    settings.batch_size = 1;
    settings.validation.image_ids = vec!["none".to_owned()];
    let error = run(folder.path(), &settings, &mut log).expect_err("no such image");
    assert!(matches!(error, TrainError::UnknownImage { .. }), "{error}");
    assert!(log.lines.is_empty());
}

/// What is drawn for a picture depends on its place in the run alone: a run that was stopped sees what it would have
/// seen, with latents that are kept (flips) and with those that are made each time.
#[test]
fn pictures_change_alike_after_a_stop() {
    let folders = Folders::new();
    let mut settings = settings();
    settings.length = TrainLength::Steps(4);
    settings.samples.prompts.clear(); // the VAE is kept nevertheless
    let bytes = |outcome: &TrainOutcome| std::fs::read(&outcome.path).expect("a file");
    let mut results = Vec::new();
    for (name, color) in [("flips", false), ("colours", true)] {
        settings.augment = Augment {
            flip: true,
            color,
            random_crop: color,
        };
        let whole = run(&folders.get(name), &settings, &mut Log::default()).expect("a result");
        let folder = folders.get(&format!("{name} stopped"));
        let first = Log {
            stop_after: Some(2),
            leave: true,
            ..Log::default()
        };
        let (.., rest) = run_in_two(&folder, &settings, first);
        assert!(bytes(&whole) == bytes(&rest), "{name}");
        let file = LoraFile::read(&whole.path).expect("a LoRA");
        let entry = |key: &str| file.metadata.get(key).map(String::as_str);
        let told = if color { "True" } else { "False" };
        assert_eq!(entry("ss_flip_aug"), Some("True"));
        assert_eq!(
            (entry("ss_color_aug"), entry("ss_random_crop")),
            (Some(told), Some(told))
        );
        assert_ne!(entry("ss_cache_latents"), Some(told));
        results.push(bytes(&whole));
    }
    assert!(results[0] != results[1]);
}
