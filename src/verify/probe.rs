//! One forward pass of the UNet with a LoRA, kept with its inputs, so that another program can do the same.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::VerifyError;
use crate::diffusion::conditioning::SIZES;
use crate::diffusion::{LoadOptions, StableDiffusion, TextStates, TimeIds};
use crate::networks::LoraNetwork;
use crate::training::random::{Stream, generator, normal_tensor};

/// Side of the latent, in its own elements.
const SIDE: usize = 16;

/// Sizes that SDXL is told.
const TIME_IDS: TimeIds = [128.0, 128.0, 0.0, 0.0, 128.0, 128.0];

/// Writes `sample`, `timesteps`, `context` (a made-up prompt's states) and `output` as f32; for SDXL also `pooled` and
/// `time_ids`.
///
/// # Errors
/// When the model or the LoRA cannot be loaded, or the file cannot be written.
pub fn lora_output(base: &Path, lora: &Path, output: &Path) -> Result<(), VerifyError> {
    let device = Device::flex();
    let mut model = StableDiffusion::load(base, &LoadOptions::new(&device))?;
    let network = LoraNetwork::load(lora, &mut model, &device)?;
    network.attach(&mut model, false);
    let mut random = generator(0, Stream::Preview, b"probe");
    let shape = [2, model.unet.latent_channels(), SIDE, SIDE];
    let sample = normal_tensor::<4>(&mut random, shape, &device);
    let (width, pooled_width) = model.text_widths();
    let context = normal_tensor::<3>(&mut random, [2, 77, width], &device);
    let pooled = pooled_width.map(|width| normal_tensor::<2>(&mut random, [2, width], &device));
    let times = [500.0_f32, 20.0];
    let states = TextStates {
        states: context.clone(),
        pooled: pooled.clone(),
    };
    let condition = states.with_sizes(&[TIME_IDS; 2]);
    let predicted = model.unet.forward(sample.clone(), &times, condition);
    let timesteps =
        Tensor::<1>::from_data(TensorData::new(times.to_vec(), [2]), (&device, DType::F32));
    let mut parts = vec![
        ("sample", shape.to_vec(), sample.into_data()),
        ("context", context.dims().to_vec(), context.into_data()),
        ("timesteps", vec![2], timesteps.into_data()),
        ("output", shape.to_vec(), predicted.into_data()),
    ];
    if let Some(pooled) = pooled {
        let ids = TensorData::new([TIME_IDS; 2].concat(), [2, SIZES]);
        parts.push(("pooled", pooled.dims().to_vec(), pooled.into_data()));
        parts.push(("time_ids", vec![2, SIZES], ids));
    }
    let bytes: Vec<(&str, Vec<usize>, Vec<u8>)> = parts
        .into_iter()
        .map(|(name, shape, data)| {
            (
                name,
                shape,
                data.iter::<f32>().flat_map(f32::to_le_bytes).collect(),
            )
        })
        .collect();
    let broken = |message: String| VerifyError::Layout {
        path: output.to_owned(),
        message,
    };
    let mut views = HashMap::new();
    for (name, shape, bytes) in &bytes {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        views.insert(*name, view.map_err(|error| broken(error.to_string()))?);
    }
    safetensors::serialize_to_file(views, None, output).map_err(|error| broken(error.to_string()))
}
