//! A whole Stable Diffusion model: found in a diffusers folder or a single file, and loaded.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::PredictionType;
use super::conditioning::{CaptionTokens, TextEncoders, WeightedTokens};
use super::config::{Hints, TextEncoderConfig, UNetConfig, VaeConfig};
use super::error::LoadError;
use super::layers::{LayerMut, Layers};
use super::ldm::UNetLayout;
use super::schedule::NoiseSchedule;
use super::source::{Source, main_dtype, other_channels};
use super::text_encoder::TextEncoder;
use super::tokenizer::Tokenizer;
use super::unet::UNet;
use super::vae::Vae;
use super::vae_source::{VaeInfo, VaeSource};
use super::weights::{LoadOptions, Weights};
use crate::kernels::Precision;

/// Which part of a model a layer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The UNet.
    UNet,
    /// The text encoder, or the first of two.
    TextEncoder,
    /// The second text encoder.
    TextEncoder2,
}

impl Part {
    /// Whether it is a text encoder.
    pub fn is_text(self) -> bool {
        matches!(self, Self::TextEncoder | Self::TextEncoder2)
    }
}

/// The generation of a model, told by its tensors or its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Stable Diffusion 1.x: one CLIP text encoder.
    Sd1,
    /// Stable Diffusion 2.x: one OpenCLIP text encoder.
    Sd2,
    /// Stable Diffusion XL: two text encoders.
    Sdxl,
}

/// How a model is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// A folder with one folder per component.
    Diffusers,
    /// One file in the original code's (LDM) names.
    SingleFile,
}

/// What can be told of a model without loading it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// How it is stored.
    pub layout: Layout,
    /// Its generation.
    pub family: Family,
    /// What its UNet predicts.
    pub prediction: PredictionType,
    /// Whether nothing of the picture is left at the last timestep.
    pub zero_terminal_snr: bool,
    /// Size of its weight files.
    pub size_bytes: u64,
    /// Number format of most of the UNet: `F16`, `BF16`, `F32`.
    pub dtype: String,
    /// Why it cannot be trained here; `None` when it can.
    pub unsupported: Option<String>,
}

/// One tensor of a model's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name in diffusers.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it takes as it is stored.
    pub size_bytes: u64,
}

/// What a model consists of, known without loading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Tensors of the UNet.
    pub unet: Vec<StoredTensor>,
    /// Its generation.
    pub family: Family,
    /// Tensors of the text encoder, or of both.
    pub text_encoders: Vec<StoredTensor>,
    /// Where the second text encoder's begin among them.
    pub second_text_encoder_at: usize,
    /// How the blocks of the UNet follow each other.
    pub unet_layout: UNetLayout,
    /// Tensors of the VAE.
    pub vae: Vec<StoredTensor>,
    /// Channels of the UNet at the latents' own size.
    pub unet_channels: usize,
    /// Channels of the VAE at the pictures' own size.
    pub vae_channels: usize,
    /// Pixels of a picture's side for each element of its latents'.
    pub vae_factor: usize,
}

/// The parts of a Stable Diffusion model.
#[derive(Debug)]
pub struct StableDiffusion {
    /// Its generation.
    pub family: Family,
    /// Text to token ids, for the text encoder or the first of two.
    pub tokenizer: Tokenizer,
    /// The same for the second.
    pub tokenizer_2: Option<Tokenizer>,
    /// Noisy latents and states to noise.
    pub unet: UNet,
    /// Noise levels of the timesteps.
    pub schedule: NoiseSchedule,
    /// What the UNet predicts.
    pub prediction: PredictionType,
    /// How the blocks of the UNet follow each other.
    pub unet_layout: UNetLayout,
    /// Token ids to states; loaded with the model, and again when it was given back and is asked for.
    text: OnceLock<TextEncoders>,
    stored_text: StoredText,
    /// Pictures to latents and back; loaded when it is first asked for.
    vae: OnceLock<Vae>,
    stored_vae: Stored<VaeConfig>,
    /// The file or folder of the VAE, where it is not the model's own.
    separate_vae: Option<PathBuf>,
}

/// A component as its files have it. They stay open: what is read later is what was there when the model was loaded,
/// even if the file has been replaced by another.
#[derive(Debug)]
struct Stored<C> {
    weights: Weights,
    config: C,
}

impl<C: fmt::Debug> Stored<C> {
    /// Tells the component apart from all that compute something else.
    fn digest(&self) -> String {
        let mut digest = Sha256::new();
        let (dtype, precision) = (self.weights.dtype(), self.weights.precision());
        digest.update(format!("{:?} {dtype:?} {precision:?}\n", self.config));
        digest.update(self.weights.digest());
        hex::encode(digest.finalize())
    }
}

/// The text encoder, or both, as the files have them.
#[derive(Debug)]
struct StoredText {
    first: Stored<TextEncoderConfig>,
    second: Option<Stored<TextEncoderConfig>>,
}

impl StoredText {
    fn find(source: &Source, options: &LoadOptions) -> Result<Self, LoadError> {
        let (hints, second_hints) = source.hints();
        let weights = source.text_encoder()?.with_options(options);
        let config = source.text_config("text_encoder", &weights, &hints)?;
        let first = Stored { weights, config };
        let second = match source.text_encoder_2()? {
            None => None,
            Some(weights) => {
                let weights = weights.with_options(options);
                let config = source.text_config("text_encoder_2", &weights, &second_hints)?;
                Some(Stored { weights, config })
            }
        };
        Ok(Self { first, second })
    }

    /// Length of a state, of both encoders together.
    fn width(&self) -> usize {
        let second = self.second.as_ref();
        self.first.config.hidden_size + second.map_or(0, |stored| stored.config.hidden_size)
    }

    fn load(&self) -> Result<TextEncoders, LoadError> {
        let Stored { weights, config } = &self.first;
        let first = TextEncoder::load(&weights.at(""), config)?;
        let second = self
            .second
            .as_ref()
            .map(|Stored { weights, config }| TextEncoder::load_pooled(&weights.at(""), config));
        Ok(TextEncoders {
            first,
            second: second.transpose()?,
        })
    }
}

impl StableDiffusion {
    /// Loads a diffusers folder, or a single file in LDM names.
    ///
    /// # Errors
    /// When the path is no model, a file is broken, a tensor is missing or has another shape than it must have, or
    /// the model is of a kind that is not handled.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        let source = Source::find(path, options.config_dir.as_deref())?;
        let (hints, _) = source.hints();
        let unet_weights = source.unet()?.with_options(options);
        source.check_kind(&unet_weights)?;
        let stored_vae = stored_vae(&source, options)?;
        let unet_config = source.unet_config(&unet_weights, &hints)?;
        let stored_text = StoredText::find(&source, options)?;
        check_fit(path, &unet_config, &stored_vae.config, stored_text.width())?;

        let (tokenizer, tokenizer_2) = source.tokenizers()?;
        let first = (Some(&tokenizer), Some(&stored_text.first));
        for (tokenizer, stored) in [first, (tokenizer_2.as_ref(), stored_text.second.as_ref())] {
            if let (Some(tokenizer), Some(stored)) = (tokenizer, stored) {
                check_vocabulary(path, tokenizer, &stored.config)?;
            }
        }
        let (schedule, prediction) = source.schedule()?;
        let text = stored_text.load()?;
        let unet = UNet::load(&unet_weights.at(""), &unet_config)?;
        if unet.pooled_width() != text.pooled_width() {
            let reason = format!(
                "the UNet is told pooled text of width {:?}, the text encoder's has {:?}",
                unet.pooled_width(),
                text.pooled_width()
            );
            return Err(LoadError::config(path, reason));
        }
        Ok(Self {
            family: source.family,
            tokenizer,
            tokenizer_2,
            unet,
            schedule,
            prediction,
            unet_layout: unet_config.layout(),
            text: OnceLock::from(text),
            stored_text,
            vae: OnceLock::new(),
            stored_vae,
            separate_vae: options.vae.clone(),
        })
    }

    /// Token ids to states.
    ///
    /// # Errors
    /// When they were given back, and reading them again fails.
    pub fn text(&self) -> Result<&TextEncoders, LoadError> {
        if let Some(text) = self.text.get() {
            return Ok(text);
        }
        let text = self.stored_text.load()?;
        Ok(self.text.get_or_init(|| text))
    }

    /// Gives the memory of the text encoders back until they are asked for again; without the adapters on them.
    pub fn unload_text(&mut self) {
        self.text.take();
    }

    /// Length of a text state, of both encoders together, and that of the pooled text.
    pub fn text_widths(&self) -> (usize, Option<usize>) {
        (self.stored_text.width(), self.unet.pooled_width())
    }

    /// Ids that the text encoder embeds.
    pub fn vocabulary(&self) -> usize {
        self.stored_text.first.config.vocab_size
    }

    /// A caption's rows of 77 ids for each text encoder; `max_length` counts begin and end.
    pub fn tokens(&self, caption: &str, max_length: usize) -> CaptionTokens {
        let second = self.tokenizer_2.as_ref();
        CaptionTokens {
            first: self.tokenizer.chunks(caption, max_length),
            second: second.map_or_else(Vec::new, |second| second.chunks(caption, max_length)),
        }
    }

    /// The token ids of a prompt for each text encoder, and their weights.
    pub fn weighted_tokens(&self, prompt: &str, max_length: usize) -> WeightedTokens {
        let (first, first_weights) = self.tokenizer.weighted_chunks(prompt, max_length);
        let second = self.tokenizer_2.as_ref();
        let second = second.map(|second| second.weighted_chunks(prompt, max_length));
        let (second, second_weights) = second.unwrap_or_default();
        WeightedTokens {
            tokens: CaptionTokens { first, second },
            first_weights,
            second_weights,
        }
    }

    /// Pictures to latents and back.
    ///
    /// # Errors
    /// At the first call, when a tensor is missing or has another shape than it must have.
    pub fn vae(&self) -> Result<&Vae, LoadError> {
        if let Some(vae) = self.vae.get() {
            return Ok(vae);
        }
        let Stored { weights, config } = &self.stored_vae;
        let vae = Vae::load(&weights.at(""), config)?;
        Ok(self.vae.get_or_init(|| vae))
    }

    /// Shifts the noise schedule so that nothing of the picture is left at its last timestep, or takes the usual one.
    pub fn set_zero_terminal_snr(&mut self, zero_terminal: bool) {
        let original = self.schedule.original();
        self.schedule = if zero_terminal {
            original.zero_terminal()
        } else {
            original.clone()
        };
    }

    /// Gives the VAE's memory back until it is asked for again.
    pub fn unload_vae(&mut self) {
        self.vae.take();
    }

    /// The file or folder of the VAE, where it is not the model's own.
    pub fn separate_vae(&self) -> Option<&Path> {
        self.separate_vae.as_deref()
    }

    /// Sizes of the VAE, known without loading it.
    pub fn vae_config(&self) -> &VaeConfig {
        &self.stored_vae.config
    }

    /// Tells the VAE apart by its sizes and stored weights, in hex. Reads them all.
    pub fn vae_digest(&self) -> String {
        self.stored_vae.digest()
    }

    /// Tells the text encoder, or both, apart by sizes and stored weights, in hex. Reads them all.
    pub fn text_encoder_digest(&self) -> String {
        let first = self.stored_text.first.digest();
        match &self.stored_text.second {
            None => first,
            Some(second) => format!("{first} {}", second.digest()),
        }
    }

    /// Reads only headers and configurations.
    ///
    /// # Errors
    /// When the path is no model, or a file is broken.
    pub fn inspect(path: &Path) -> Result<ModelInfo, LoadError> {
        let source = Source::find(path, None)?;
        let (schedule, prediction) = source.schedule()?;
        let unet = source.unet_files()?;
        let kind = source.check_kind(&source.unet()?);
        let size_bytes = match source.layout {
            Layout::SingleFile => unet.size_bytes(),
            // A model that cannot be trained may lack parts.
            Layout::Diffusers if kind.is_err() => unet.size_bytes(),
            Layout::Diffusers => {
                let second = source.text_encoder_2()?;
                unet.size_bytes()
                    + source.vae()?.size_bytes()
                    + source.text_encoder()?.size_bytes()
                    + second.map_or(0, |second| second.size_bytes())
            }
        };
        Ok(ModelInfo {
            layout: source.layout,
            family: source.family,
            prediction,
            zero_terminal_snr: schedule.is_zero_terminal(),
            size_bytes,
            dtype: main_dtype(&unet),
            unsupported: kind.err().map(|error| error.to_string()),
        })
    }

    /// As [`Self::inspect`], and every tensor that is needed is looked for; weights are not read.
    ///
    /// # Errors
    /// When the path is no model that can be loaded.
    pub fn check(path: &Path) -> Result<ModelInfo, LoadError> {
        let options = LoadOptions {
            only_shapes: true,
            ..LoadOptions::new(&Device::flex())
        };
        // Sizes come from strangers, and layers do arithmetic with them.
        let checked = std::panic::catch_unwind(|| {
            let model = Self::load(path, &options)?;
            model.vae().map(drop)
        });
        checked.unwrap_or_else(|_| Err(LoadError::config(path, "its sizes make no model")))?;
        Self::inspect(path)
    }

    /// What a VAE is that stands alone; reads only headers and configurations.
    ///
    /// # Errors
    /// When the path is none, or a file is broken.
    pub fn inspect_vae(path: &Path) -> Result<VaeInfo, LoadError> {
        VaeSource::find(path)?.info()
    }

    /// As [`Self::inspect_vae`], and every tensor that is needed is looked for; weights are not read.
    ///
    /// # Errors
    /// When the path is no VAE that can be loaded.
    pub fn check_vae(path: &Path) -> Result<VaeInfo, LoadError> {
        let options = LoadOptions {
            only_shapes: true,
            ..LoadOptions::new(&Device::flex())
        };
        let checked = std::panic::catch_unwind(|| {
            let source = VaeSource::find(path)?;
            let config = source.config(None, &Hints::SD1)?;
            Vae::load(&source.weights.with_options(&options).at(""), &config).map(drop)
        });
        checked.unwrap_or_else(|_| Err(LoadError::config(path, "its sizes make no VAE")))?;
        Self::inspect_vae(path)
    }

    /// What loading a model would take; reads only headers and configurations.
    ///
    /// # Errors
    /// When the path is no model, a file is broken, or the model is of a kind that is not handled.
    pub fn measure(path: &Path) -> Result<Footprint, LoadError> {
        let source = Source::find(path, None)?;
        let (unet, vae, text) = (source.unet()?, source.vae()?, source.text_encoder()?);
        source.check_kind(&unet)?;
        let (hints, _) = source.hints();
        let unet_config = source.unet_config(&unet, &hints)?;
        let vae_config = source.vae_config(&vae, &hints)?;
        let tensors = |weights: &Weights| -> Vec<StoredTensor> {
            let seen = weights.seen();
            seen.map(|(name, shape, size_bytes)| StoredTensor {
                name: name.to_owned(),
                shape,
                size_bytes: size_bytes as u64,
            })
            .collect()
        };
        let second = source.text_encoder_2()?;
        let mut text_encoders = tensors(&text);
        let second_text_encoder_at = text_encoders.len();
        text_encoders.extend(second.iter().flat_map(tensors));
        Ok(Footprint {
            family: source.family,
            unet: tensors(&unet),
            text_encoders,
            second_text_encoder_at,
            unet_layout: unet_config.layout(),
            vae: tensors(&vae),
            unet_channels: unet_config.block_out_channels[0],
            vae_channels: vae_config.block_out_channels[0],
            vae_factor: vae_config.factor(),
        })
    }

    /// Every layer that can carry an adapter, the text encoders' first, in the order of the reference's modules. Text
    /// encoders that were given back have none.
    pub fn layers_mut(&mut self) -> Vec<(Part, String, LayerMut<'_>)> {
        let text = self.text.get_mut().map(TextEncoders::layers_mut);
        let (first, second) = text.unwrap_or_default();
        fn of(
            part: Part,
            layers: Layers<'_>,
        ) -> impl Iterator<Item = (Part, String, LayerMut<'_>)> {
            let layers = layers.into_iter();
            layers.map(move |(path, layer)| (part, path, layer))
        }
        of(Part::TextEncoder, first)
            .chain(of(Part::TextEncoder2, second))
            .chain(of(Part::UNet, self.unet.layers_mut()))
            .collect()
    }
}

/// The VAE, or the one in its place.
fn stored_vae(source: &Source, options: &LoadOptions) -> Result<Stored<VaeConfig>, LoadError> {
    let (hints, _) = source.hints();
    let options = LoadOptions {
        precision: Precision::Fp32,
        ..options.clone()
    };
    let own = || -> Result<Stored<VaeConfig>, LoadError> {
        let weights = source.vae()?.with_options(&options);
        let config = source.vae_config(&weights, &hints)?;
        Ok(Stored { weights, config })
    };
    let Some(path) = &options.vae else {
        return own();
    };
    // A model may lack a VAE that is replaced.
    let replaced = own().ok().map(|own| own.config);
    let found = VaeSource::find(path)?;
    let config = found.config(replaced.as_ref(), &hints)?;
    let weights = found.weights.with_options(&options);
    Ok(Stored { weights, config })
}

/// The parts must speak to each other.
fn check_fit(
    path: &Path,
    unet: &UNetConfig,
    vae: &VaeConfig,
    text_width: usize,
) -> Result<(), LoadError> {
    let channels = [unet.in_channels, unet.out_channels];
    if channels != [vae.latent_channels; 2] {
        return Err(other_channels(path, channels, vae.latent_channels));
    }
    if unet.cross_attention_dim != text_width {
        let reason = format!(
            "the UNet attends to states of width {}, the text encoder's have {text_width}",
            unet.cross_attention_dim
        );
        return Err(LoadError::config(path, reason));
    }
    Ok(())
}

fn check_vocabulary(
    path: &Path,
    tokenizer: &Tokenizer,
    config: &TextEncoderConfig,
) -> Result<(), LoadError> {
    let (ids, embedded) = (tokenizer.vocabulary_size(), config.vocab_size);
    if ids > embedded {
        let reason = format!("the tokenizer has {ids} ids, the text encoder embeds {embedded}");
        return Err(LoadError::config(path, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use burn::tensor::{Device, Tensor};

    use super::*;

    fn fixture(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/tiny-sd15")
            .join(path)
    }

    #[test]
    fn both_layouts_are_told() {
        let folder = StableDiffusion::inspect(&fixture("diffusers")).expect("a model");
        let file =
            StableDiffusion::inspect(&fixture("tiny-sd15-ldm.safetensors")).expect("a model");
        assert_eq!(folder.layout, Layout::Diffusers);
        assert_eq!(file.layout, Layout::SingleFile);
        for info in [&folder, &file] {
            assert_eq!(info.family, Family::Sd1);
            assert_eq!(info.dtype, "F16");
            assert_eq!(info.unsupported, None);
        }
    }

    /// The tiny model has other attention heads than the family; shapes do not show that.
    #[test]
    fn a_single_file_takes_what_shapes_cannot_tell_from_a_folder() {
        let device = Device::flex();
        let predict = |path: &str, config_dir: Option<PathBuf>| {
            let options = LoadOptions {
                config_dir,
                ..LoadOptions::new(&device)
            };
            let model = StableDiffusion::load(&fixture(path), &options).expect("loads");
            let channels = model.unet.latent_channels();
            let sample = Tensor::<4>::full([1, channels, 8, 8], 0.5, &device);
            let captions = [model.tokens("a cat", 77)];
            let text = model.text().expect("loaded");
            let states = text.encode(&captions, 1).states;
            let output = model.unet.forward(sample, &[500.0], states);
            output.into_data().try_into_vec::<f32>().expect("numbers")
        };
        let folder = predict("diffusers", None);
        let file = "tiny-sd15-ldm.safetensors";
        assert_eq!(predict(file, Some(fixture("diffusers"))), folder);
        assert_ne!(predict(file, None), folder);
    }

    #[test]
    fn what_is_no_model_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = folder.path().join("model.txt");
        std::fs::write(&text, "hello").expect("written");
        for path in [folder.path().to_owned(), text, folder.path().join("absent")] {
            let error = StableDiffusion::inspect(&path).expect_err("no model");
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
