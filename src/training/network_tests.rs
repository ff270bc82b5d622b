//! Tests of training with each kind of network, of what is left out in training, and of what differs by block.

use burn::tensor::Device;

use crate::networks::settings::DropoutSettings;
use crate::networks::{LoraFile, LoraNetwork, NetworkKind, NetworkSettings, TrainParts};
use crate::training::goldens::{AdamW, Constant, fixture, golden_batches, load_model};
use crate::training::train_tests::{Folders, Log, run, run_in_two, settings};
use crate::training::{GradientCheckpointing, TrainLength, TrainSettings, Trainer};

fn kinds() -> Vec<NetworkSettings> {
    let of = |kind: NetworkKind, dora: bool| NetworkSettings {
        kind,
        rank: 2,
        alpha: 1.0,
        dora,
        ..NetworkSettings::default()
    };
    vec![
        of(NetworkKind::Lora, false),
        of(NetworkKind::Lora, true),
        of(NetworkKind::Locon, false),
        of(NetworkKind::Locon, true),
        of(NetworkKind::Loha, false),
        of(NetworkKind::Loha, true),
        of(NetworkKind::Lokr, false),
        of(NetworkKind::Lokr, true),
        of(NetworkKind::Ia3, false),
    ]
}

const BOTH: TrainParts = TrainParts {
    unet: true,
    text_encoder: true,
};

fn short(network: NetworkSettings) -> TrainSettings {
    let mut settings = TrainSettings {
        network,
        unet_lr: 1e-2,
        text_encoder_lr: 1e-2,
        length: TrainLength::Steps(4),
        ..settings()
    };
    settings.samples.prompts.clear();
    settings
}

/// Two steps of these settings on golden batches: losses, and the adapters after them.
fn steps(settings: &TrainSettings) -> (Vec<f64>, LoraNetwork) {
    let mut model = load_model(fixture("diffusers"));
    let device = Device::flex();
    let parts = TrainParts {
        unet: settings.unet_lr != 0.0,
        text_encoder: settings.text_encoder_lr != 0.0,
    };
    let mut network =
        LoraNetwork::create(&mut model, &settings.network, parts, settings.seed, &device)
            .expect("adapters");
    let mut optimizer = AdamW::default();
    let mut trainer = Trainer::new(
        &mut model,
        &mut network,
        &mut optimizer,
        &Constant,
        settings,
    );
    let losses = golden_batches(4)
        .chunks(2)
        .map(|batches| trainer.optimizer_step(batches).expect("a step").loss)
        .collect();
    (losses, network)
}

/// New adapters of every kind change nothing at first; then they learn.
#[test]
fn every_kind_begins_with_the_base_model_and_trains() {
    let base = steps(&short(NetworkSettings {
        rank: 2,
        ..NetworkSettings::default()
    }));
    for network in kinds() {
        let settings = short(network);
        let name = format!(
            "{:?}, dora {}",
            settings.network.kind, settings.network.dora
        );
        let (losses, after) = steps(&settings);
        assert!((losses[0] - base.0[0]).abs() < 1e-5, "{name}: {losses:?}");
        assert!(losses.iter().all(|loss| loss.is_finite()), "{name}");
        let mut model = load_model(fixture("diffusers"));
        let before = LoraNetwork::create(
            &mut model,
            &settings.network,
            BOTH,
            settings.seed,
            &Device::flex(),
        );
        let before = before.expect("adapters").tensors().expect("readable");
        let moved = after.tensors().expect("readable");
        let moved = moved
            .iter()
            .filter(|(key, tensor)| before[*key] != **tensor);
        // Not of the last layer's, behind clip skip, nor alphas.
        assert!(moved.count() > 30, "{name}");
    }
}

#[test]
fn halves_that_are_not_trained_have_no_adapters_of_any_kind() {
    for network in kinds() {
        for text in [true, false] {
            let settings = TrainSettings {
                unet_lr: if text { 0.0 } else { 1e-3 },
                text_encoder_lr: if text { 1e-3 } else { 0.0 },
                ..short(network.clone())
            };
            let (_, network) = steps(&settings);
            let keys = network.tensors().expect("readable");
            let prefix = if text { "lora_te_" } else { "lora_unet_" };
            assert!(keys.keys().all(|key| key.starts_with(prefix)));
        }
    }
}

/// What is left out is a function of seed and place: the same with blocks that run again, and after a resume.
#[test]
fn dropout_is_the_same_when_blocks_run_again_and_a_run_goes_on() {
    for (kind, neuron) in [
        (NetworkKind::Locon, 0.3),
        (NetworkKind::Loha, 0.0),
        (NetworkKind::Lokr, 0.0),
    ] {
        let network = NetworkSettings {
            kind,
            rank: 4,
            dropout: DropoutSettings {
                neuron,
                rank: 0.3,
                module: 0.2,
            },
            ..NetworkSettings::default()
        };
        let plain = short(network);
        let blocks = TrainSettings {
            gradient_checkpointing: GradientCheckpointing::Blocks,
            ..plain.clone()
        };
        let without = TrainSettings {
            network: NetworkSettings {
                dropout: DropoutSettings::default(),
                ..plain.network.clone()
            },
            ..plain.clone()
        };
        let tensors = |settings: &TrainSettings| {
            let (losses, network) = steps(settings);
            (losses, network.tensors().expect("readable"))
        };
        let expected = tensors(&plain);
        assert_eq!(tensors(&blocks), expected, "{kind:?}");
        assert_ne!(tensors(&without).0, expected.0, "{kind:?}");

        let folders = Folders::new();
        let whole = run(&folders.get("whole"), &plain, &mut Log::default()).expect("a result");
        let first = Log {
            stop_at: Some("step 3"),
            leave: true,
            ..Log::default()
        };
        let (.., resumed) = run_in_two(&folders.get("parts"), &plain, first);
        assert_eq!(resumed.saved, whole.saved, "{kind:?}");
    }
}

/// Off where nothing is trained: the loss of new adapters is that of the base model.
#[test]
fn nothing_is_left_out_of_measurements() {
    let dropout = DropoutSettings {
        neuron: 0.5,
        rank: 0.5,
        module: 0.5,
    };
    let settings = short(NetworkSettings {
        rank: 2,
        dropout,
        ..NetworkSettings::default()
    });
    let (_, network) = steps(&settings);
    let mut model = load_model(fixture("diffusers"));
    let mut network = network;
    let mut optimizer = AdamW::default();
    let trainer = Trainer::new(
        &mut model,
        &mut network,
        &mut optimizer,
        &Constant,
        &settings,
    );
    let batch = &golden_batches(1)[0];
    let loss = || trainer.loss(batch).expect("a loss").into_scalar::<f32>();
    assert_eq!(loss(), loss());
    let mut model = load_model(fixture("diffusers"));
    let mut plain = settings.clone();
    plain.network.dropout = DropoutSettings::default();
    let mut optimizer = AdamW::default();
    let expected = loss();
    let trainer = Trainer::new(&mut model, &mut network, &mut optimizer, &Constant, &plain);
    let found = trainer.loss(batch).expect("a loss").into_scalar::<f32>();
    assert_eq!(found, expected);
}

/// No change of a weight is longer than the limit; those that are shorter stay.
#[test]
fn norms_are_limited_after_each_step() {
    for network in kinds() {
        if network.kind == NetworkKind::Ia3 {
            continue;
        }
        let (_, free) = steps(&short(network.clone()));
        let norms = |network: &LoraNetwork| -> Vec<f64> {
            let names = network.modules().map(|module| &module.name);
            let norm = |name: &String| {
                let delta = network.weight_delta(name).expect("an adapter");
                let squares = delta.values.iter().map(|v| f64::from(*v).powi(2));
                squares.sum::<f64>().sqrt()
            };
            names.map(norm).collect()
        };
        let before = norms(&free);
        let mut sorted = before.clone();
        sorted.sort_by(f64::total_cmp);
        let limit = sorted[sorted.len() / 2];
        let mut limited = free;
        let scaled = limited.scale_norms(limit).expect("norms");
        let above = before.iter().filter(|norm| **norm > limit * 1.0001);
        assert!(scaled.abs_diff(above.count()) <= 1, "{network:?}");
        for (before, after) in before.iter().zip(norms(&limited)) {
            let expected = before.min(limit);
            assert!(
                (after - expected).abs() < 1e-4 * limit,
                "{:?}: {after} for {before}, limit {limit}",
                network.kind
            );
        }
        let by_itself = short(NetworkSettings {
            scale_weight_norms: Some(limit),
            ..network
        });
        let (_, trained) = steps(&by_itself);
        assert!(norms(&trained).iter().all(|norm| *norm < limit * 1.0001));
    }
}

/// A block of weight 0 has no adapters; others move by their weight, `lora_up` by LoRA+.
#[test]
fn blocks_have_their_own_ranks_and_rates() {
    let mut network = NetworkSettings {
        rank: 2,
        ..NetworkSettings::default()
    };
    let mut dims = vec![2; 25];
    dims[12] = 3;
    network.blocks.dims = Some(dims);
    network.blocks.down_lr_weight = Some("zeros".to_owned());
    network.blocks.up_lr_weight = Some("zeros+0.5".to_owned());
    network.lora_plus.ratio = Some(4.0);
    let (_, network) = steps(&short(network));
    assert!(network.modules().all(|m| !m.name.contains("down_blocks")));
    for module in network.modules() {
        let rank = if module.name.contains("mid_block") {
            3
        } else {
            2
        };
        assert_eq!(module.rank, rank, "{}", module.name);
    }
    for parameter in network.parameters() {
        let block = if parameter.name.contains("_up_blocks_") {
            0.5
        } else {
            1.0
        };
        let up = if parameter.name.ends_with("lora_up.weight") {
            4.0
        } else {
            1.0
        };
        assert_eq!(parameter.lr_factor, block * up, "{}", parameter.name);
    }
}

/// A LoRA of every kind goes on from its file: by its own sizes, or by the settings where they are the same.
#[test]
fn a_file_is_the_beginning_of_a_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let device = Device::flex();
    for mut settings in kinds() {
        let (_, trained) = steps(&short(settings.clone()));
        let path = folder.path().join("x.safetensors");
        trained
            .save(&path, Default::default(), Default::default())
            .expect("a file");
        let expected = LoraFile::read(&path).expect("a file").tensors;
        let begin = |settings: &NetworkSettings, parts: TrainParts| {
            let mut model = load_model(fixture("diffusers"));
            LoraNetwork::continue_from(&path, &mut model, settings, parts, &device)
        };
        let same = begin(&settings, BOTH).expect("the same sizes");
        assert!(
            same.tensors().expect("readable") == expected,
            "{settings:?}"
        );
        let unet = TrainParts {
            text_encoder: false,
            ..BOTH
        };
        let half = begin(&settings, unet).expect("a half");
        let half = half.tensors().expect("readable");
        assert!(half.keys().all(|key| key.starts_with("lora_unet_")));
        assert!(half.len() < expected.len());
        if settings.kind == NetworkKind::Ia3 {
            continue;
        }
        settings.rank = 3;
        let message = begin(&settings, BOTH)
            .expect_err("another rank")
            .to_string();
        assert!(message.contains("of rank 2"), "{message}");
        settings.init_from = Some(crate::networks::InitFrom {
            dim_from_weights: true,
            file: Some("x.safetensors".to_owned()),
            ..Default::default()
        });
        let taken = begin(&settings, BOTH).expect("its own sizes");
        assert!(
            taken.tensors().expect("readable") == expected,
            "{settings:?}"
        );
    }
}
