//! Time and memory of training steps of a full-size model, without a dataset.
//!
//! The model is loaded from a file as for a run, the steps are the trainer's own; only the latents and the caption
//! are random.

mod layout;
mod report;
mod usage;
mod weights;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use rand::RngExt as _;
use serde_json::json;

use crate::allocator;
use crate::diffusion::devices::{self, DeviceSpec};
use crate::diffusion::{CaptionTokens, Family, LoadError, LoadOptions, StableDiffusion, TimeIds};
use crate::networks::{LoraNetwork, NetworkKind, NetworkSettings, TrainParts};
use crate::plugin_host::PluginHost;
use crate::training::random::{Stream, generator, normal_tensor, timesteps};
use crate::training::{
    ComputePrecision, Conditioning, GradientCheckpointing, MicroBatch, PluginChoice, TrainLength,
    TrainSettings, Trainer,
};

pub use report::{BenchReport, DeviceMemory, PhaseTimes, Summary};
pub use usage::{Moment, Spent};

use layout::Sizes;
use report::{Measured, StepMeasure};

/// Pixels of a latent's element, along each side.
const VAE_FACTOR: usize = 8;
/// Channels of a latent.
const LATENT_CHANNELS: usize = 4;
/// Tokens between begin and end of a caption.
const CAPTION_TOKENS: usize = 75;

/// What is trained on.
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// This file or diffusers folder.
    Own(PathBuf),
    /// A full-size model with random weights, in this file or one in the system's folder for temporary files. It is
    /// written when it is not there.
    Random(Option<PathBuf>),
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Generation of the model.
    pub family: Family,
    /// What is trained on.
    pub model: ModelSource,
    /// Side of the pictures, a multiple of 64.
    pub resolution_px: u32,
    /// Pictures per step.
    pub batch_size: usize,
    /// Steps that are timed, after a first one.
    pub steps: usize,
    /// Kind of the adapters.
    pub network_kind: NetworkKind,
    /// Rank of the adapters.
    pub rank: usize,
    /// Whether the text encoders stay as they are: the caption is encoded once, and their memory given back.
    pub unet_only: bool,
    /// Whether activations are computed again.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Number format of the computation.
    pub precision: ComputePrecision,
    /// Id of the optimizer.
    pub optimizer: String,
    /// Where to compute.
    pub device: DeviceSpec,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A file of the name for random weights is something else.
    #[error(
        "{}: found another file than this version's random weights; remove it, or name another place with \
         --model-file (a model of your own is named with --model)",
        path.display()
    )]
    OtherFile {
        /// The file.
        path: PathBuf,
    },
    /// The random weights cannot be written.
    #[error("{}: {source}; --model-file names another place for the random weights", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The device cannot be opened.
    #[error(transparent)]
    Device(#[from] devices::DeviceError),
    /// The device has failed in a step.
    #[error("the device did not finish step {step}: {reason}")]
    Step {
        /// The step, from 0.
        step: usize,
        /// What it said.
        reason: String,
    },
    /// A step has failed.
    #[error(transparent)]
    Train(#[from] crate::training::TrainError),
    /// The adapters cannot be made.
    #[error(transparent)]
    Network(#[from] crate::networks::NetworkError),
    /// The optimizer's plugin cannot be used.
    #[error(transparent)]
    Optimizer(#[from] crate::training::OptimizerError),
}

/// Trains `steps` steps and one more before them, and tells what they took.
///
/// `process_start` is the [`Moment::process_start`] of `main`.
///
/// # Errors
/// When the model, the device or a plugin cannot be used, or a step fails.
pub fn run(
    options: &BenchOptions,
    plugins: &PluginHost,
    process_start: Moment,
) -> Result<BenchReport, BenchError> {
    let writing = Moment::now();
    let path = model_file(options)?;
    let writing = writing.elapsed();

    let device = devices::open(options.device)?;
    let settings = settings(options);
    let load = LoadOptions {
        precision: settings.precision.into(),
        ..LoadOptions::new(&device.device)
    };
    device.check(load.precision)?;
    let mut model = StableDiffusion::load(&path, &load)?;
    let parts = TrainParts {
        unet: true,
        text_encoder: !options.unet_only,
    };
    let source = BatchSource::new(options, &settings, &mut model, &device.device)?;
    let mut network = LoraNetwork::create(
        &mut model,
        &settings.network,
        parts,
        settings.seed,
        &device.device,
    )?;
    let choice = &settings.optimizer;
    let mut optimizer = plugins.create_optimizer(&choice.id, &choice.settings)?;
    let total_steps = 1 + options.steps as u64;
    let scheduler = plugins.create_scheduler(
        &settings.scheduler.id,
        &settings.scheduler.settings,
        settings.unet_lr,
        settings.lr_warmup_steps,
        total_steps,
    )?;
    let mut trainer = Trainer::new(
        &mut model,
        &mut network,
        optimizer.as_mut(),
        scheduler.as_ref(),
        &settings,
    );
    trainer.wait_after_phases();
    let start = process_start.elapsed().without(writing);
    let mut measured = Measured::new(start, trainer.network.parameter_count());
    for step in 0..=options.steps {
        let output = timed_step(&mut trainer, &source, step)?;
        measured.add(output, device_memory(&device.device));
    }
    Ok(BenchReport::new(options, &path, &device.info, &measured))
}

fn timed_step(
    trainer: &mut Trainer<'_>,
    source: &BatchSource<'_>,
    step: usize,
) -> Result<StepMeasure, BenchError> {
    let start = Moment::now();
    let batch = source.batch(step);
    let data_s = start.elapsed().wall_s;
    let output = trainer.optimizer_step(&[batch])?;
    // The loss has been read, but the update may still be under way.
    trainer.device().sync().map_err(|error| BenchError::Step {
        step,
        reason: error.to_string(),
    })?;
    Ok(StepMeasure {
        spent: start.elapsed(),
        phases: PhaseTimes {
            data_s,
            text_encoder_s: output.times.text_encoder_s,
            forward_s: output.times.forward_s,
            backward_s: output.times.backward_s,
            optimizer_s: output.times.optimizer_s,
        },
        loss: output.loss,
    })
}

fn device_memory(device: &Device) -> Option<DeviceMemory> {
    device.memory_pool_usage().map(|usage| DeviceMemory {
        in_use_bytes: usage.bytes_in_use,
        reserved_bytes: usage.bytes_reserved,
    })
}

/// The model's place, after the random weights are there.
fn model_file(options: &BenchOptions) -> Result<PathBuf, BenchError> {
    let named = match &options.model {
        ModelSource::Own(path) => return Ok(path.clone()),
        ModelSource::Random(named) => named.as_deref(),
    };
    let name = match options.family {
        Family::Sd1 => "lorasmith-bench-sd1.safetensors",
        Family::Sd2 => "lorasmith-bench-sd2.safetensors",
        Family::Sdxl => "lorasmith-bench-sdxl.safetensors",
    };
    let path = named.map_or_else(|| std::env::temp_dir().join(name), Path::to_owned);
    weights::ensure(&path, &Sizes::of(options.family).tensors())?;
    Ok(path)
}

fn settings(options: &BenchOptions) -> TrainSettings {
    TrainSettings {
        network: NetworkSettings {
            kind: options.network_kind,
            rank: options.rank,
            alpha: options.rank as f64,
            ..NetworkSettings::default()
        },
        length: TrainLength::Steps(1 + options.steps as u64),
        batch_size: options.batch_size,
        gradient_checkpointing: options.gradient_checkpointing,
        precision: options.precision,
        optimizer: PluginChoice {
            id: options.optimizer.clone(),
            settings: json!({}),
        },
        text_encoder_lr: if options.unet_only {
            0.0
        } else {
            TrainSettings::default().text_encoder_lr
        },
        ..TrainSettings::default()
    }
}

/// Makes batches as a run does, of pictures that never were.
struct BatchSource<'a> {
    latents: Tensor<4>,
    conditioning: Conditioning,
    time_ids: TimeIds,
    schedule_steps: usize,
    seed: u64,
    device: &'a Device,
}

impl<'a> BatchSource<'a> {
    fn new(
        options: &BenchOptions,
        settings: &TrainSettings,
        model: &mut StableDiffusion,
        device: &'a Device,
    ) -> Result<Self, LoadError> {
        let side = options.resolution_px as usize / VAE_FACTOR;
        let shape = [options.batch_size, LATENT_CHANNELS, side, side];
        let mut rng = generator(settings.seed, Stream::Latents, b"bench");
        let row = caption(model.vocabulary(), settings.seed);
        let caption = CaptionTokens {
            first: vec![row.clone()],
            second: model.tokenizer_2.iter().map(|_| row.clone()).collect(),
        };
        let captions = vec![caption; options.batch_size];
        let conditioning = if options.unet_only {
            let states = model.text()?.encode(&captions, settings.clip_skip);
            model.unload_text();
            allocator::release();
            Conditioning::States(states)
        } else {
            Conditioning::Tokens(captions)
        };
        let side_px = options.resolution_px as f32;
        Ok(Self {
            latents: normal_tensor(&mut rng, shape, device),
            conditioning,
            time_ids: [side_px, side_px, 0.0, 0.0, side_px, side_px],
            schedule_steps: model.schedule.len(),
            seed: settings.seed,
            device,
        })
    }

    fn batch(&self, step: usize) -> MicroBatch {
        let place = (step as u64).to_le_bytes();
        let shape = self.latents.dims();
        let size = shape[0];
        let mut noise_rng = generator(self.seed, Stream::Noise, &place);
        let mut timestep_rng = generator(self.seed, Stream::Timesteps, &place);
        MicroBatch {
            latents: self.latents.clone(),
            noise: normal_tensor(&mut noise_rng, shape, self.device),
            input_noise: None,
            mask: None,
            timesteps: timesteps(&mut timestep_rng, size, 0..self.schedule_steps),
            conditioning: self.conditioning.clone(),
            time_ids: vec![self.time_ids; size],
            loss_weights: vec![1.0; size],
        }
    }
}

/// A row of random ids between begin and end, which are the vocabulary's last two.
fn caption(vocabulary: usize, seed: u64) -> Vec<u32> {
    let end = vocabulary as u32 - 1;
    let begin = end - 1;
    let mut rng = generator(seed, Stream::Preview, b"bench caption");
    let words = (0..CAPTION_TOKENS).map(|_| rng.random_range(0..begin));
    std::iter::once(begin).chain(words).chain([end]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caption_is_a_full_row() {
        let caption = caption(49_408, 0);
        assert_eq!(caption.len(), 77);
        assert_eq!((caption[0], caption[76]), (49_406, 49_407));
        assert!(caption[1..76].iter().all(|id| *id < 49_406));
    }
}
