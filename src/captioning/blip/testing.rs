//! The tiny model, and what transformers computed with it (`tests/fixtures/tiny-blip/make.py`).

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Tensor};
use image::RgbImage;
use serde_json::Value;

use super::{BlipSettings, Decoding, EarlyStopping};
use crate::diffusion::Weights;
use crate::diffusion::devices::{self, ComputeDevice};

pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-blip")
}

/// The device, if this machine has it.
pub fn device(name: &str) -> Option<ComputeDevice> {
    devices::open(name.parse().expect("a device's name")).ok()
}

pub fn tensors(folder: &Path) -> Weights {
    Weights::open(&[folder.join("goldens.safetensors")]).unwrap()
}

pub fn json() -> Value {
    json_in(&folder())
}

pub fn json_in(folder: &Path) -> Value {
    let text = std::fs::read(folder.join("goldens.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

pub fn pictures(folder: &Path) -> Vec<RgbImage> {
    (0..4)
        .map(|index| {
            image::open(folder.join(format!("{index}.png")))
                .unwrap()
                .into_rgb8()
        })
        .collect()
}

pub fn ids(goldens: &Weights, key: &str) -> Vec<Vec<u32>> {
    let (bytes, _, shape) = goldens.read_bytes(key).unwrap();
    let ids: Vec<u32> = bytemuck::pod_collect_to_vec(bytes);
    ids.chunks(shape[1]).map(<[u32]>::to_vec).collect()
}

pub fn check(goldens: &Weights, key: &str, actual: Tensor<3>, tolerance: f32) {
    let (expected, shape) = goldens.read_f32(key).unwrap();
    assert_eq!(actual.dims().as_slice(), shape, "{key}");
    let actual = actual.into_data().convert_dtype(DType::F32);
    let actual: Vec<f32> = actual.try_into_vec().unwrap();
    let errors = actual.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let worst = errors.fold(0.0, f32::max);
    println!("{key}: {worst:.2e}");
    assert!(
        worst <= tolerance,
        "{key}: off by {worst:e}, allowed {tolerance:e}"
    );
}

/// The arguments of `generate` as settings.
pub fn settings(case: &Value) -> BlipSettings {
    let number = |key: &str, absent: f64| case[key].as_f64().unwrap_or(absent);
    BlipSettings {
        decoding: Decoding::Beam {
            beams: number("num_beams", 1.0) as usize,
            length_penalty: number("length_penalty", 1.0) as f32,
            early_stopping: match &case["early_stopping"] {
                Value::Bool(true) => EarlyStopping::WhenFull,
                Value::String(never) if never == "never" => EarlyStopping::Never,
                _ => EarlyStopping::Heuristic,
            },
        },
        min_length: number("min_length", 0.0) as usize,
        max_length: number("max_length", 20.0) as usize,
        repetition_penalty: number("repetition_penalty", 1.0) as f32,
        prefix: case["prefix"].as_str().unwrap_or_default().to_owned(),
        keep_prefix: true,
    }
}
