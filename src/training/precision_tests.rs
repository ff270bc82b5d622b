//! Loss sequences in lower precisions against those of f32.

use burn::tensor::{Device, Tensor};

use crate::diffusion::{LoadOptions, StableDiffusion};
use crate::networks::{LoraNetwork, NetworkSettings, TrainParts};
use crate::training::goldens::{AdamW, Constant, fixture};
use crate::training::random::{Stream, generator, normal_tensor};
use crate::training::{ComputePrecision, Conditioning, MicroBatch, TrainSettings, Trainer};

/// Losses of a few steps at one learning rate.
fn losses(precision: ComputePrecision) -> Vec<f64> {
    let device = Device::flex();
    let settings = TrainSettings {
        precision,
        network: NetworkSettings {
            rank: 4,
            alpha: 4.0,
            ..NetworkSettings::default()
        },
        unet_lr: 1e-3,
        text_encoder_lr: 5e-4,
        ..TrainSettings::default()
    };
    let options = LoadOptions {
        precision: precision.into(),
        ..LoadOptions::new(&device)
    };
    let mut model = StableDiffusion::load(&fixture("diffusers"), &options).expect("a model");
    let parts = TrainParts {
        unet: true,
        text_encoder: true,
    };
    let mut network =
        LoraNetwork::create(&mut model, &settings.network, parts, 7, &device).expect("adapters");
    let mut random = generator(7, Stream::Noise, b"precision");
    let mut normal = || -> Tensor<4> { normal_tensor(&mut random, [2, 4, 16, 24], &device) };
    let batches: Vec<MicroBatch> = (0..6_usize)
        .map(|step| MicroBatch {
            latents: normal(),
            noise: normal(),
            input_noise: None,
            mask: None,
            timesteps: vec![100 + 150 * step, 900 - 150 * step],
            conditioning: Conditioning::Tokens(vec![vec![vec![3; 77]].into(); 2]),
            time_ids: Vec::new(),
            loss_weights: vec![1.0; 2],
        })
        .collect();
    let mut optimizer = AdamW::default();
    let mut trainer = Trainer::new(
        &mut model,
        &mut network,
        &mut optimizer,
        &Constant,
        &settings,
    );
    assert_eq!(
        trainer.loss_scale().factor(),
        1.0,
        "the CPU needs no scaling"
    );
    batches
        .iter()
        .map(|batch| {
            let output = trainer.optimizer_step(std::slice::from_ref(batch));
            output.expect("a step").loss
        })
        .collect()
}

#[test]
fn lower_precisions_follow_f32() {
    let exact = losses(ComputePrecision::Fp32);
    // 16 significant bits are 1.5e-5, 8 are 4e-3; a loss averages over thousands of such roundings (found: 4e-7 and
    // 1.6e-4 on a matrix unit).
    for (precision, tolerance) in [
        (ComputePrecision::Fp16, 4e-6),
        (ComputePrecision::Bf16, 1e-3),
    ] {
        let found = losses(precision);
        let worst = exact
            .iter()
            .zip(&found)
            .map(|(exact, found)| (found / exact - 1.0).abs())
            .fold(0.0, f64::max);
        assert!(worst < tolerance, "{precision:?}: {worst:e}");
    }
}
