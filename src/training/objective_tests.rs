//! Runs with every setting of loss, noise and timesteps: what they change, and that they go on to the same bits.

use std::path::Path;

use burn::tensor::{Device, Tensor};

use crate::networks::LoraFile;
use crate::training::data::{LatentEncoder, Looks};
use crate::training::goldens::{AdamW, Constant, fixture, load_model};
use crate::training::loss::{HuberSchedule, LossKind, LossSettings};
use crate::training::noise::NoiseSettings;
use crate::training::random::{Stream, generator, normal_tensor};
use crate::training::timesteps::TimestepSettings;
use crate::training::train_tests::{Folders, Log, pictures, run, run_in_two, settings};
use crate::training::{
    Conditioning, MicroBatch, TrainLength, TrainOutcome, TrainSettings, Trainer,
};

fn everything() -> TrainSettings {
    let mut settings = settings();
    settings.length = TrainLength::Steps(4);
    settings.samples.prompts.clear();
    settings.augment.flip = true;
    settings.min_snr_gamma = Some(5.0);
    settings.loss = LossSettings {
        kind: LossKind::SmoothL1,
        huber_schedule: HuberSchedule::Exponential,
        huber_c: 0.2,
        masked: true,
        debiased_estimation: true,
        v_pred_like_loss: 0.1,
        ..LossSettings::default()
    };
    settings.noise = NoiseSettings {
        offset: 0.05,
        offset_random_strength: true,
        adaptive_scale: 0.01,
        multires_iterations: 6,
        input_perturbation: 0.1,
        ..NoiseSettings::default()
    };
    settings.timesteps = TimestepSettings { min: 100, max: 900 };
    settings
}

fn bytes(outcome: &TrainOutcome) -> Vec<u8> {
    std::fs::read(&outcome.path).expect("a file")
}

#[test]
fn a_run_with_everything_on_goes_on_to_the_same_bits_and_tells_what_it_did() {
    let folders = Folders::new();
    let settings = everything();
    let mut log = Log::default();
    let whole = run(&folders.get("whole"), &settings, &mut log).expect("a result");
    let first = Log {
        stop_after: Some(2),
        leave: true,
        ..Log::default()
    };
    let (.., rest) = run_in_two(&folders.get("stopped"), &settings, first);
    assert!(bytes(&whole) == bytes(&rest));

    let file = LoraFile::read(&whole.path).expect("a LoRA");
    for (key, expected) in [
        ("ss_loss_type", "smooth_l1"),
        ("ss_huber_schedule", "exponential"),
        ("ss_huber_c", "0.2"),
        ("ss_huber_scale", "1.0"),
        ("ss_debiased_estimation", "True"),
        ("ss_min_snr_gamma", "5.0"),
        ("ss_noise_offset", "0.05"),
        ("ss_noise_offset_random_strength", "True"),
        ("ss_adaptive_noise_scale", "0.01"),
        ("ss_multires_noise_iterations", "6"),
        ("ss_multires_noise_discount", "0.3"),
        ("ss_ip_noise_gamma", "0.1"),
        ("ss_ip_noise_gamma_random_strength", "False"),
        ("modelspec.timestep_range", "100,900"),
    ] {
        let found = file.metadata.get(key).map(String::as_str);
        assert_eq!(found, Some(expected), "{key}");
    }
}

/// The losses of a short run with one setting changed.
fn losses(folder: &Path, change: impl FnOnce(&mut TrainSettings)) -> (Vec<f64>, Vec<f64>) {
    let mut settings = settings();
    settings.length = TrainLength::Steps(2);
    settings.samples.prompts.clear();
    settings.validation.image_ids = vec!["image-1".to_owned()]; // half of it is transparent
    change(&mut settings);
    let mut log = Log::default();
    run(folder, &settings, &mut log).expect("a result");
    (log.losses, log.validation)
}

#[test]
fn validation_measures_by_type_and_mask_and_nothing_else() {
    let temporary = tempfile::tempdir().expect("a folder");
    let folder = temporary.path();
    let (usual, measured) = losses(folder, |_| {});
    let first = measured[0];
    let (noisy, measured) = losses(folder, |settings| {
        settings.noise = everything().noise;
        settings.loss.debiased_estimation = true;
    });
    assert_ne!(noisy[0], usual[0]);
    assert_eq!(measured[0], first);
    let (_, measured) = losses(folder, |settings| settings.loss.kind = LossKind::L1);
    assert_ne!(measured[0], first);
    let (_, measured) = losses(folder, |settings| settings.loss.masked = true);
    // Half of the picture counts, of about equal losses.
    assert!((0.3..0.7).contains(&(measured[0] / first)), "{measured:?}");
    let (_, measured) = losses(folder, |settings| settings.timesteps.max = 100);
    assert_ne!(measured[0], first);
}

#[test]
fn masks_follow_flips_and_opaque_pictures_have_none() {
    let temporary = tempfile::tempdir().expect("a folder");
    let set = pictures(temporary.path());
    let model = load_model(fixture("diffusers"));
    let looks = Looks::new(&set, true).expect("pictures");
    let mut encoder = LatentEncoder::new(&model, &Device::flex(), &set, looks, 1);
    let mut mask = |image: usize, flipped| {
        let latents = encoder.encode(&set.images[image], (64, 64), flipped);
        let latents = latents.expect("latents");
        (latents.shape[2], latents.mask)
    };
    assert_eq!(mask(0, false).1, None);
    for flipped in [false, true] {
        let (width, mask) = mask(1, flipped);
        let mask = mask.expect("half of it is transparent");
        for (index, value) in mask.iter().enumerate() {
            let left = index % width < width / 2;
            assert_eq!(*value, if left == flipped { 1.0 } else { 0.0 });
        }
    }
}

#[test]
fn a_loss_is_the_weighted_mean_of_its_samples_and_sees_its_mask() {
    let mut model = load_model(fixture("diffusers"));
    let settings = TrainSettings::default();
    let parts = crate::networks::TrainParts {
        unet: true,
        text_encoder: false,
    };
    let device = Device::flex();
    let mut network =
        crate::networks::LoraNetwork::create(&mut model, &settings.network, parts, 1, &device)
            .expect("adapters");
    let mut optimizer = AdamW::default();
    let trainer = Trainer::new(
        &mut model,
        &mut network,
        &mut optimizer,
        &Constant,
        &settings,
    );
    let mut random = generator(1, Stream::Noise, b"objective");
    let mut normal = || -> Tensor<4> { normal_tensor(&mut random, [2, 4, 8, 8], &device) };
    let whole = MicroBatch {
        latents: normal(),
        noise: normal(),
        input_noise: None,
        mask: None,
        timesteps: vec![100, 700],
        conditioning: Conditioning::Tokens(vec![vec![vec![3; 77]].into(); 2]),
        time_ids: Vec::new(),
        loss_weights: vec![1.0, 0.4],
    };
    let loss = |batch: &MicroBatch| -> f64 {
        let loss = trainer.loss(batch).expect("a loss");
        loss.to_data().iter::<f64>().next().expect("a number")
    };
    let of_sample = |index: usize| {
        loss(&MicroBatch {
            latents: whole.latents.clone().narrow(0, index, 1),
            noise: whole.noise.clone().narrow(0, index, 1),
            timesteps: vec![whole.timesteps[index]],
            conditioning: Conditioning::Tokens(vec![vec![vec![3; 77]].into()]),
            loss_weights: vec![1.0],
            ..whole.clone()
        })
    };
    let expected = f64::midpoint(of_sample(0), 0.4 * of_sample(1));
    assert!((loss(&whole) / expected - 1.0).abs() < 1e-5);
    let mask = Tensor::<4>::ones([2, 1, 8, 8], &device);
    let masked = |mask: Tensor<4>| MicroBatch {
        mask: Some(mask),
        ..whole.clone()
    };
    assert!((loss(&masked(mask.clone())) / expected - 1.0).abs() < 1e-5);
    assert!((loss(&masked(mask.mul_scalar(0.25))) / (0.25 * expected) - 1.0).abs() < 1e-5);
    // The input is another one, the target the same.
    let perturbed = MicroBatch {
        input_noise: Some(whole.noise.clone()),
        ..whole.clone()
    };
    assert_eq!(loss(&perturbed), loss(&whole));
    let perturbed = MicroBatch {
        input_noise: Some(whole.noise.clone().mul_scalar(1.5)),
        ..whole.clone()
    };
    assert_ne!(loss(&perturbed), loss(&whole));
}
