//! Adapters of every kind against what LyCORIS and torch's autograd computed for tiny models
//! (`tests/fixtures/networks/make_goldens.py`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};

use crate::diffusion::conditioning::{Added, Condition};
use crate::diffusion::{Keep, LoadOptions, StableDiffusion};
use crate::networks::{LoraFile, LoraNetwork};

/// That of the UNet's own goldens. Ours are computed in f64; torch's own f32 is up to 3e-6 away from them.
const OUTPUT_TOLERANCE: f32 = 2e-5;
/// Share of a tensor's largest gradient and a hundredth of the largest of all: some gradients are 0 but for rounding (a
/// shift of channels before a norm over each). The generator prints that of torch's f32.
const GRADIENT_TOLERANCE: f32 = 5e-4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn load_model(name: &str) -> StableDiffusion {
    let path = fixtures().join(name).join("diffusers");
    let options = LoadOptions::new(&Device::flex());
    StableDiffusion::load(&path, &options).expect("the fixture loads")
}

struct Golden(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Golden {
    fn read(name: &str) -> Self {
        let path = fixtures().join(format!("networks/{name}-golden.safetensors"));
        let bytes = std::fs::read(path).expect("a golden");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let tensors = file.iter().map(|(key, view)| {
            let words = view.data().as_chunks::<4>().0.iter();
            let values = match view.dtype() {
                Dtype::F32 => words.map(|b| f32::from_le_bytes(*b)).collect(),
                Dtype::I32 => words.map(|b| i32::from_le_bytes(*b) as f32).collect(),
                other => panic!("{key}: {other:?}"),
            };
            (key.to_owned(), (view.shape().to_vec(), values))
        });
        Self(tensors.collect())
    }

    fn tensor<const D: usize>(&self, key: &str) -> Tensor<D> {
        let (shape, values) = &self.0[key];
        let data = TensorData::new(values.clone(), shape.clone());
        Tensor::from_data(data, (&Device::flex(), DType::F32))
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, value| most.max(value.abs()))
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

fn host<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

/// Output and gradients of the golden's inputs.
fn run(
    model: &mut StableDiffusion,
    network: &LoraNetwork,
    golden: &Golden,
    keep: Keep,
) -> (Tensor<4>, Vec<Option<Tensor<4>>>) {
    let timesteps = &golden.0["timesteps"].1;
    let mut leaves = network.attach(model, keep == Keep::Graphs);
    let (condition, text) = if golden.0.contains_key("ids") {
        let ids = golden.0["ids"].1.chunks(77);
        let captions: Vec<_> = ids
            .map(|row| vec![row.iter().map(|id| *id as u32).collect::<Vec<_>>()].into())
            .collect();
        let encoders = model.text().expect("encoders");
        let (states, traces) = encoders.encode_kept(&captions, 1, keep);
        (states.with_sizes(&[]), Some(traces))
    } else {
        let ids = golden.0["time_ids"].1.as_chunks::<6>().0.to_vec();
        let added = Added {
            pooled: golden.tensor("pooled"),
            time_ids: ids,
        };
        let condition = Condition {
            states: golden.tensor("context"),
            added: Some(added),
        };
        (condition, None)
    };
    let sample = golden.tensor("sample");
    let (output, trace) =
        model
            .unet
            .forward_kept(sample, timesteps, condition, text.is_some(), keep);
    if keep == Keep::Inputs {
        leaves = network.attach(model, true);
    }
    let mut found: Vec<Option<Tensor<4>>> = vec![None; leaves.0.len()];
    let mut collect = |gradients: &mut Gradients| {
        for (found, leaf) in found.iter_mut().zip(&leaves.0) {
            if let Some(gradient) = leaf.grad_remove(gradients) {
                assert!(found.is_none());
                *found = Some(gradient);
            }
        }
    };
    let gradient = golden.tensor("seed");
    let of_condition = model.unet.backward(trace, gradient, &mut collect);
    if let Some(traces) = text {
        let encoders = model.text().expect("encoders");
        encoders.backward(traces, of_condition, &mut collect);
    }
    (output, found)
}

fn check(base: &str, kind: &str) {
    let name = format!("{base}-{kind}");
    let golden = Golden::read(&name);
    let file = fixtures().join(format!("networks/{name}.safetensors"));
    let device = Device::flex();
    let mut model = load_model(base);
    let network = LoraNetwork::load(&file, &mut model, &device).expect("LyCORIS' file");
    let (output, gradients) = run(&mut model, &network, &golden, Keep::Graphs);
    let error = distance(&host(&output), &golden.0["output"].1);
    println!("{name}: the output differs by {error} at most");
    assert!(error < OUTPUT_TOLERANCE, "{name}: {error} in the output");

    let wanted = || golden.0.iter().filter(|(key, _)| key.starts_with("grad."));
    assert_eq!(wanted().count(), network.parameters().len(), "{name}");
    let most = wanted().map(|(_, (_, values))| largest(values));
    let floor = 0.01 * most.fold(0.0, f32::max);
    let mut worst = 0.0_f32;
    for (parameter, gradient) in network.parameters().iter().zip(&gradients) {
        let (shape, expected) = &golden.0[&format!("grad.{}", parameter.name)];
        let gradient = gradient
            .as_ref()
            .unwrap_or_else(|| panic!("{name}: no gradient of {}", parameter.name));
        let known: usize = shape.iter().product();
        assert_eq!(gradient.shape().num_elements(), known, "{}", parameter.name);
        let error = distance(&host(gradient), expected) / (largest(expected) + floor);
        worst = worst.max(error);
        assert!(
            error < GRADIENT_TOLERANCE,
            "{name}: {error} in the gradient of {}",
            parameter.name
        );
    }

    println!("{name}: gradients differ by {worst} at most");

    // A block that runs again computes the same, to the bit.
    let (again, recomputed) = run(&mut model, &network, &golden, Keep::Inputs);
    assert_eq!(host(&again), host(&output), "{name}");
    for (first, second) in gradients.iter().zip(&recomputed) {
        let [first, second] = [first, second].map(|g| host(g.as_ref().expect("a gradient")));
        assert_eq!(first, second, "{name}");
    }

    // What is written has the same keys, shapes and numbers as what LyCORIS wrote.
    let theirs = LoraFile::read(&file).expect("LyCORIS' file");
    let ours = network.tensors().expect("readable");
    assert!(ours.keys().eq(theirs.tensors.keys()), "{name}");
    let projections_are_linear = base == "tiny-sd2";
    for (key, theirs) in &theirs.tensors {
        if !(projections_are_linear && key.contains("_proj_")) {
            assert_eq!(ours[key].shape, theirs.shape, "{key}");
        }
        assert_eq!(ours[key].values, theirs.values, "{key}");
    }
}

#[test]
fn lora_with_trained_lengths_is_that_of_lycoris() {
    check("tiny-sd15", "lora_dora");
}

#[test]
fn locon_is_that_of_lycoris() {
    check("tiny-sd15", "locon");
    check("tiny-sd15", "locon_tucker_dora");
    check("tiny-sdxl", "locon_tucker_dora");
}

#[test]
fn loha_is_that_of_lycoris() {
    check("tiny-sd15", "loha");
    check("tiny-sd15", "loha_tucker_dora");
}

#[test]
fn lokr_is_that_of_lycoris() {
    check("tiny-sd15", "lokr");
    check("tiny-sd15", "lokr_both_tucker");
    check("tiny-sd15", "lokr_whole_dora");
    check("tiny-sd2", "lokr");
    check("tiny-sdxl", "lokr");
}

#[test]
fn ia3_is_that_of_lycoris() {
    check("tiny-sd15", "ia3");
}
