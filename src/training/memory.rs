//! How much memory a run takes at its peak, told before it begins, and which settings would take less.
//!
//! On the CPU, where tensors are in the process's own memory, the numbers lean to the high side; on a GPU to the low.

use std::fmt;

use crate::diffusion::{Family, Footprint, StoredTensor};
use crate::networks::{TrainParts, planned_targets, targets};
use crate::training::TrainingSet;
use crate::training::settings::{ComputePrecision, GradientCheckpointing, TrainSettings};

/// What was measured, on Stable Diffusion 1.5 stored in f16 with AdamW, as `peak_rss_bytes` of
///
/// ```text
/// lorasmith bench --device cpu --steps 1 --json --resolution R --batch-size B --rank K \
///     --gradient-checkpointing none|blocks
/// ```
///
/// in MB, the VAE's 167 MB loaded, beside what [`Workload::peak_bytes`] says of it (a run also encodes pictures, which
/// the bench does not):
///
/// | R   | B | K   | none | estimate | blocks | estimate |
/// |-----|---|-----|------|----------|--------|----------|
/// | 256 | 1 | 4   | 2662 | 2717     | 2314   | 2387     |
/// | 256 | 1 | 32  | 2881 | 2915     | 2741   | 2781     |
/// | 256 | 1 | 128 | 4365 | 4366     | 4355   | 4366     |
/// | 256 | 2 | 32  | 3318 | 3351     | 2750   | 2781     |
/// | 256 | 4 | 32  | 4184 | 4223     | 2812   | 2906     |
/// | 384 | 1 | 32  | 3353 | 3394     | 2746   | 2781     |
/// | 512 | 1 | 32  | 4024 | 4064     | 2789   | 2870     |
/// | 768 | 1 | 32  |      | 5979     | 3208   | 3460     |
struct Measured {
    /// Program, threads' buffers and the allocator's slack.
    process_bytes: f64,
    /// A trained element, without the optimizer's state.
    trained_bytes: f64,
    /// A trained element, its gradient and its new value while the optimizer changes it, without the state.
    updated_bytes: f64,
    /// The UNet's channels that this was measured with.
    unet_channels: f64,
    /// Tensors of the widest level that the VAE has at once; counted in its code.
    vae_encoder_tensors: f64,
    vae_decoder_tensors: f64,
}

const PROCESS: Measured = Measured {
    process_bytes: 120e6,
    trained_bytes: 4.0,
    updated_bytes: 12.0,
    unet_channels: 320.0,
    vae_encoder_tensors: 4.0,
    vae_decoder_tensors: 8.0,
};

/// Bytes that a generation of models keeps for the backward.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kept {
    /// Of each element of a latent plane (one channel), with `gradient_checkpointing: none`.
    graph_per_element: f64,
    /// Of a caption of 75 tokens, likewise.
    graph_per_caption: f64,
    /// The same two with `blocks`.
    inputs_per_element: f64,
    inputs_per_caption: f64,
}

impl Kept {
    const SD1: Self = Self {
        graph_per_element: 374e3,
        graph_per_caption: 53e6,
        inputs_per_element: 74e3,
        inputs_per_caption: 12e6,
    };

    /// With `blocks`, measured as above at 512², rank 16: the UNet alone 7331 MB, estimated 7765; with the text encoders
    /// 9592 MB, estimated 9630. A block with ten transformer layers that runs again is most of it. Without `blocks`
    /// reckoned from the layers, not measured.
    const SDXL: Self = Self {
        graph_per_element: 800e3,
        graph_per_caption: 600e6,
        inputs_per_element: 300e3,
        inputs_per_caption: 600e6,
    };

    fn of(family: Family) -> Self {
        match family {
            Family::Sd1 | Family::Sd2 => Self::SD1,
            Family::Sdxl => Self::SDXL,
        }
    }
}

/// Reckoned, not measured: what layers keep for the backward is the same on every device, and a GPU has the widest
/// frozen weight in f32 beside it for a moment. What its allocator holds back between tensors is left out, so that only
/// those runs are refused that do not fit in any case.
const DEVICE: Measured = Measured {
    process_bytes: 150e6,
    ..PROCESS
};

/// Where a run's tensors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the worker's own memory: the CPU.
    Process,
    /// On a GPU.
    Device,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Process => "the machine's memory",
            Self::Device => "the device's memory",
        })
    }
}

impl Place {
    fn measured(self) -> &'static Measured {
        match self {
            Self::Process => &PROCESS,
            Self::Device => &DEVICE,
        }
    }
}

const GIB: f64 = (1_u64 << 30) as f64;

/// What a run will hold in memory.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Weights that stay for the whole run, as stored: the UNet, and text encoders that are trained or drawn with.
    weights_bytes: f64,
    /// The same weights, those of 32 and 64 bits halved to 16.
    weights_f16_bytes: f64,
    /// Weights of text encoders that are given back when the captions are encoded.
    passing_bytes: f64,
    vae_bytes: f64,
    /// Trained elements.
    parameters: f64,
    /// Elements of changed weights that are made as a whole: those that the graph keeps, and the largest.
    rebuilt: Rebuilt,
    /// Bytes of the optimizer's state for each of them.
    state_bytes: f64,
    /// Bytes of their moving average for each of them.
    ema_bytes: f64,
    /// The UNet's width, in units of that which was measured.
    width: f64,
    kept: Kept,
    vae_channels: f64,
    vae_factor: f64,
    batch_size: f64,
    gradient_checkpointing: GradientCheckpointing,
    /// Area of the largest picture, in pixels.
    picture_px: f64,
    /// Area of the largest preview, in pixels; 0 without previews.
    preview_px: f64,
    /// Whether pictures are encoded between the steps.
    encodes: bool,
    /// Chunks of 75 tokens of each caption.
    chunks: f64,
    place: Place,
    /// Share of f32 that values between layers take.
    width_of_values: f64,
}

/// What adapters that are more than narrow matrices make of their weights, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rebuilt {
    kept: f64,
    largest: f64,
}

/// A change of the settings, and what the run would take with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// What to change.
    pub change: String,
    /// The estimate after it.
    pub peak_bytes: u64,
}

impl Workload {
    /// What training `data` with these settings means for a model of this size. `state_bytes` is what the optimizer keeps
    /// for each trained element.
    pub fn new(
        model: &Footprint,
        data: &TrainingSet,
        settings: &TrainSettings,
        state_bytes: f64,
        place: Place,
    ) -> Self {
        let parts = TrainParts {
            unet: settings.unet_lr != 0.0,
            text_encoder: settings.text_encoder_lr != 0.0,
        };
        let adapters = planned_targets(model, &settings.network, parts);
        let parameters: usize = adapters.iter().map(targets::Target::parameter_count).sum();
        let text_stays = settings.text_encoder_lr != 0.0 || !settings.samples.prompts.is_empty();
        let (text, passing) = if text_stays {
            (&model.text_encoders[..], &[][..])
        } else {
            (&[][..], &model.text_encoders[..])
        };
        let stored = |tensors: &[StoredTensor]| -> f64 {
            tensors.iter().map(|tensor| tensor.size_bytes as f64).sum()
        };
        let pictures = data.images.iter().map(|image| {
            let (width, height) = (image.width_px.max(1), image.height_px.max(1));
            data.buckets.place(width, height).bucket
        });
        let previews = settings.samples.prompts.iter();
        let previews = previews.map(|prompt| (prompt.width_px, prompt.height_px));
        Self {
            weights_bytes: stored(&model.unet) + stored(text),
            weights_f16_bytes: model.unet.iter().chain(text).map(f16_bytes).sum(),
            passing_bytes: stored(passing),
            vae_bytes: stored(&model.vae),
            kept: Kept::of(model.family),
            parameters: parameters as f64,
            rebuilt: Rebuilt {
                kept: adapters
                    .iter()
                    .map(targets::Target::kept_elements)
                    .sum::<usize>() as f64,
                largest: adapters
                    .iter()
                    .map(targets::Target::rebuilt_elements)
                    .max()
                    .unwrap_or(0) as f64,
            },
            state_bytes,
            ema_bytes: if settings.ema.is_some() { 4.0 } else { 0.0 },
            width: model.unet_channels as f64 / PROCESS.unet_channels,
            vae_channels: model.vae_channels as f64,
            vae_factor: model.vae_factor as f64,
            batch_size: settings.batch_size as f64,
            gradient_checkpointing: settings.gradient_checkpointing,
            picture_px: largest(pictures),
            preview_px: largest(previews),
            encodes: data.images.iter().any(|image| image.augment.is_fresh()),
            chunks: settings.max_token_length.div_ceil(75).max(1) as f64,
            place,
            // On the CPU values stay f32 in memory, whatever is computed in.
            width_of_values: match (place, settings.precision) {
                (Place::Process, _) | (_, ComputePrecision::Fp32) => 1.0,
                (Place::Device, ComputePrecision::Fp16 | ComputePrecision::Bf16) => 0.5,
            },
        }
    }

    /// Where all this is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// What the optimizer keeps from step to step.
    pub fn optimizer_state_bytes(&self) -> u64 {
        (self.parameters * self.state_bytes) as u64
    }

    /// What the moving average of the adapters takes; 0 without one.
    pub fn ema_bytes(&self) -> u64 {
        (self.parameters * self.ema_bytes) as u64
    }

    /// The most memory that the run takes at once.
    pub fn peak_bytes(&self) -> u64 {
        let m = self.place.measured();
        let kept = self.kept;
        let (per_element, per_caption) = match self.gradient_checkpointing {
            GradientCheckpointing::None => (kept.graph_per_element, kept.graph_per_caption),
            GradientCheckpointing::Blocks => (kept.inputs_per_element, kept.inputs_per_caption),
        };
        let elements = self.picture_px / self.vae_factor.powi(2);
        let sample = elements * per_element + self.chunks * per_caption;
        let sample = sample * self.width * self.width_of_values;
        // A block that runs again makes its own alone: a part of all, reckoned as a tenth.
        let rebuilt = match self.gradient_checkpointing {
            GradientCheckpointing::None => self.rebuilt.kept,
            GradientCheckpointing::Blocks => self.rebuilt.kept / 10.0,
        };
        let rebuilt = 4.0 * (rebuilt + 4.0 * self.rebuilt.largest);
        let between_steps = self.parameters * (m.trained_bytes + self.state_bytes + self.ema_bytes);
        // One f32 tensor at the pictures' own size, per pixel.
        let vae_tensor = 4.0 * self.vae_channels;

        let encoding = self.vae_bytes + self.picture_px * vae_tensor * m.vae_encoder_tensors;
        // With `blocks` all gradients are there before the last block runs again.
        let gradients = match self.gradient_checkpointing {
            GradientCheckpointing::None => 0.0,
            GradientCheckpointing::Blocks => self.parameters * 4.0,
        };
        let training = between_steps + gradients + rebuilt + self.batch_size * sample;
        // The old state stays until the new one is there.
        let updated_bytes = m.updated_bytes + 2.0 * self.state_bytes + self.ema_bytes;
        let updating = self.parameters * updated_bytes;
        let drawing = self.preview_px * vae_tensor * m.vae_decoder_tensors;
        let encoding_anew = match self.encodes {
            true => self.picture_px * vae_tensor * m.vae_encoder_tensors,
            false => 0.0,
        };
        let vae = match self.preview_px > 0.0 || self.encodes {
            true => self.vae_bytes,
            false => 0.0,
        };
        let peak = encoding
            .max(vae + self.passing_bytes)
            .max(vae + training)
            .max(vae + updating)
            .max(vae + between_steps + drawing.max(encoding_anew));
        (m.process_bytes + self.weights_bytes + peak) as u64
    }

    /// What would take less, and how much it would take.
    pub fn remedies(&self) -> Vec<Remedy> {
        let mut remedies = Vec::new();
        let mut all = self.clone();
        let mut offer = |change: String, apply: &dyn Fn(&mut Self)| {
            let mut changed = self.clone();
            apply(&mut changed);
            if changed.peak_bytes() < self.peak_bytes() {
                apply(&mut all);
                remedies.push(Remedy {
                    change,
                    peak_bytes: changed.peak_bytes(),
                });
            }
        };
        offer("`gradient_checkpointing: blocks`".to_owned(), &|workload| {
            workload.gradient_checkpointing = GradientCheckpointing::Blocks;
        });
        if self.batch_size > 1.0 {
            let smaller = (self.batch_size / 2.0).floor();
            offer(format!("`batch_size: {smaller}`"), &|workload| {
                workload.batch_size = smaller;
            });
        }
        offer("a base model stored in f16".to_owned(), &|workload| {
            workload.weights_bytes = workload.weights_f16_bytes;
        });
        offer("a `resolution` of half the sides".to_owned(), &|workload| {
            workload.picture_px /= 4.0;
        });
        offer("previews of half the sides".to_owned(), &|workload| {
            workload.preview_px /= 4.0;
        });
        offer("half the `rank`".to_owned(), &|workload| {
            workload.parameters /= 2.0;
        });
        if remedies.len() > 1 {
            remedies.push(Remedy {
                change: "all of these".to_owned(),
                peak_bytes: all.peak_bytes(),
            });
        }
        remedies
    }

    /// The remedies as a sentence; empty when nothing helps.
    pub fn advice(&self) -> String {
        let remedies: Vec<String> = self
            .remedies()
            .iter()
            .map(|remedy| format!("{}: {}", remedy.change, in_gib(remedy.peak_bytes)))
            .collect();
        if remedies.is_empty() {
            return String::new();
        }
        format!("; estimated with {}", remedies.join(", with "))
    }
}

/// A size for people.
pub fn in_gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB)
}

fn f16_bytes(tensor: &StoredTensor) -> f64 {
    let elements: usize = tensor.shape.iter().product();
    (tensor.size_bytes as f64).min(2.0 * elements as f64)
}

fn largest(sizes: impl Iterator<Item = (u32, u32)>) -> f64 {
    let areas = sizes.map(|(width, height)| f64::from(width) * f64::from(height));
    areas.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataloader::BucketSettings;
    use crate::diffusion::StableDiffusion;
    use crate::networks::{LoraNetwork, NetworkSettings, TrainParts};
    use crate::training::SamplePrompt;
    use crate::training::goldens::{fixture, load_model};

    /// Stable Diffusion 1.5 in f16 as the bench trains it, its VAE loaded.
    fn bench(side_px: u32, batch_size: usize, checkpointing: GradientCheckpointing) -> Workload {
        Workload {
            weights_bytes: 1_965_162_888.0 + 167_307_726.0,
            weights_f16_bytes: 1_965_162_888.0 + 167_307_726.0,
            passing_bytes: 0.0,
            kept: Kept::SD1,
            vae_bytes: 0.0,
            parameters: 18_874_368.0,
            rebuilt: Rebuilt::default(),
            state_bytes: 8.0,
            ema_bytes: 0.0,
            width: 1.0,
            vae_channels: 128.0,
            vae_factor: 8.0,
            batch_size: batch_size as f64,
            gradient_checkpointing: checkpointing,
            picture_px: f64::from(side_px).powi(2),
            preview_px: 0.0,
            encodes: false,
            chunks: 1.0,
            place: Place::Process,
            width_of_values: 1.0,
        }
    }

    #[test]
    fn estimates_lie_a_little_above_what_was_measured() {
        use GradientCheckpointing::{Blocks, None};
        for (side_px, batch, rank, checkpointing, measured_mb) in [
            (256, 1, 4, None, 2662.0),
            (256, 1, 32, None, 2881.0),
            (256, 1, 128, None, 4365.0),
            (256, 2, 32, None, 3318.0),
            (256, 4, 32, None, 4184.0),
            (384, 1, 32, None, 3353.0),
            (512, 1, 32, None, 4024.0),
            (256, 1, 4, Blocks, 2314.0),
            (256, 1, 32, Blocks, 2741.0),
            (256, 1, 128, Blocks, 4355.0),
            (256, 2, 32, Blocks, 2750.0),
            (256, 4, 32, Blocks, 2812.0),
            (384, 1, 32, Blocks, 2746.0),
            (512, 1, 32, Blocks, 2789.0),
            (768, 1, 32, Blocks, 3208.0),
        ] {
            let mut workload = bench(side_px, batch, checkpointing);
            workload.parameters *= f64::from(rank) / 32.0;
            let ratio = workload.peak_bytes() as f64 / (measured_mb * 1e6);
            assert!((1.0..1.2).contains(&ratio), "{workload:?}: {ratio}");
        }
    }

    #[test]
    fn more_work_takes_more_memory() {
        let base = bench(512, 1, GradientCheckpointing::None);
        let with = |change: &dyn Fn(&mut Workload)| {
            let mut workload = base.clone();
            change(&mut workload);
            workload.peak_bytes()
        };
        let peak = base.peak_bytes();
        assert!(with(&|w| w.batch_size = 2.0) > peak);
        assert!(with(&|w| w.picture_px *= 2.0) > peak);
        assert!(with(&|w| w.parameters *= 2.0) > peak);
        assert!(with(&|w| w.weights_bytes *= 2.0) > peak);
        assert!(with(&|w| w.chunks = 3.0) > peak);
        let gained = |change: &dyn Fn(&mut Workload)| (with(change) as f64 - peak as f64).round();
        let parameters = base.parameters;
        assert_eq!(gained(&|w| w.ema_bytes = 4.0), 4.0 * parameters);
        assert_eq!(gained(&|w| w.state_bytes = 2.0), -6.0 * parameters);
        let eight_bits = Workload {
            state_bytes: 2.0 * (1.0 + 4.0 / 256.0),
            ..base.clone()
        };
        let ratio = eight_bits.optimizer_state_bytes() as f64 / base.optimizer_state_bytes() as f64;
        assert!((0.25..0.26).contains(&ratio), "{ratio}");
        assert!(with(&|w| w.preview_px = 2048.0 * 2048.0) > peak);
        assert!(with(&|w| w.gradient_checkpointing = GradientCheckpointing::Blocks) < peak);
    }

    #[test]
    fn values_in_half_precision_take_half_the_memory_of_a_gpu() {
        let wide = Workload {
            place: Place::Device,
            ..bench(512, 4, GradientCheckpointing::None)
        };
        let half = Workload {
            width_of_values: 0.5,
            ..wide.clone()
        };
        let values = 4.0 * (4096.0 * 374e3 + 53e6);
        let saved = (wide.peak_bytes() - half.peak_bytes()) as f64;
        assert!((saved / (values / 2.0) - 1.0).abs() < 1e-6, "{saved}");
    }

    #[test]
    fn remedies_are_those_that_help() {
        let mut workload = bench(512, 4, GradientCheckpointing::None);
        workload.weights_bytes *= 2.0;
        let remedies = workload.remedies();
        let changes: Vec<&str> = remedies.iter().map(|r| r.change.as_str()).collect();
        assert_eq!(
            changes,
            [
                "`gradient_checkpointing: blocks`",
                "`batch_size: 2`",
                "a base model stored in f16",
                "a `resolution` of half the sides",
                "half the `rank`",
                "all of these",
            ]
        );
        let (all, single) = remedies.split_last().expect("remedies");
        for remedy in single {
            assert!(remedy.peak_bytes < workload.peak_bytes());
            assert!(all.peak_bytes < remedy.peak_bytes);
        }
        let advice = workload.advice();
        assert!(advice.contains("with `batch_size: 2`: "), "{advice}");

        let small = bench(64, 1, GradientCheckpointing::Blocks);
        let remedies = small.remedies();
        let changes: Vec<&str> = remedies.iter().map(|r| r.change.as_str()).collect();
        assert_eq!(changes, ["half the `rank`"]);
    }

    #[test]
    fn a_model_is_measured_without_loading_it() {
        let settings = TrainSettings {
            network: NetworkSettings {
                rank: 3,
                conv_rank: Some(2),
                ..NetworkSettings::default()
            },
            ..TrainSettings::default()
        };
        let data = TrainingSet {
            images: Vec::new(),
            subsets: std::collections::HashMap::new(),
            buckets: BucketSettings::default(),
            cache: None,
            base_model: fixture("diffusers"),
        };
        let parts = TrainParts {
            unet: true,
            text_encoder: true,
        };
        let device = burn::tensor::Device::flex();
        for path in ["diffusers", "tiny-sd15-ldm.safetensors"] {
            let footprint = StableDiffusion::measure(&fixture(path)).expect("a model");
            let workload = Workload::new(&footprint, &data, &settings, 8.0, Place::Process);
            let mut model = load_model(fixture(path));
            let network = LoraNetwork::create(&mut model, &settings.network, parts, 0, &device);
            let expected = network.expect("adapters").parameter_count();
            assert_eq!(workload.parameters, expected as f64, "{path}");
            assert_eq!(workload.width, 0.1);
            assert_eq!(workload.weights_bytes, workload.weights_f16_bytes);
            assert!(workload.weights_bytes > 2.0 * 49_408.0 * 8.0);
        }
    }

    #[test]
    fn the_largest_picture_and_preview_count() {
        let footprint = StableDiffusion::measure(&fixture("diffusers")).expect("a model");
        let data = TrainingSet {
            images: Vec::new(),
            subsets: std::collections::HashMap::new(),
            buckets: BucketSettings::default(),
            cache: None,
            base_model: fixture("diffusers"),
        };
        let mut settings = TrainSettings::default();
        let prompt = |width_px, height_px| SamplePrompt {
            width_px,
            height_px,
            ..SamplePrompt::default()
        };
        settings.samples.prompts = vec![prompt(64, 64), prompt(64, 128)];
        let workload = Workload::new(&footprint, &data, &settings, 8.0, Place::Process);
        assert_eq!((workload.picture_px, workload.preview_px), (0.0, 8192.0));
        settings.samples.prompts.clear();
        let workload = Workload::new(&footprint, &data, &settings, 8.0, Place::Process);
        assert_eq!(workload.preview_px, 0.0);
    }
}
