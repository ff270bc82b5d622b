//! A whole Stable Diffusion model: found in a diffusers folder or a single `.safetensors` file, and loaded.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::PredictionType;
use super::config::{Hints, TextEncoderConfig, UNetConfig, VaeConfig, read_json};
use super::error::LoadError;
use super::layers::LayerMut;
use super::ldm;
use super::schedule::{BetaShape, NoiseSchedule};
use super::text_encoder::TextEncoder;
use super::tokenizer::Tokenizer;
use super::unet::UNet;
use super::vae::Vae;
use super::weights::{LoadOptions, Weights};
use crate::kernels::Precision;

/// File names of a component's weights in a diffusers folder, best first.
const WEIGHT_FILES: [&str; 4] = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
];
/// More timesteps than this make no schedule.
const MAX_TIMESTEPS: usize = 100_000;

/// Which half of a model a layer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The UNet.
    UNet,
    /// The text encoder.
    TextEncoder,
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
    /// Tensors of the text encoder.
    pub text_encoder: Vec<StoredTensor>,
    /// Tensors of the VAE.
    pub vae: Vec<StoredTensor>,
    /// Channels of the UNet at the latents' own size.
    pub unet_channels: usize,
    /// Channels of the VAE at the pictures' own size.
    pub vae_channels: usize,
    /// Pixels of a picture's side for each element of its latents'.
    pub vae_factor: usize,
}

/// The parts of a Stable Diffusion 1.x model.
#[derive(Debug)]
pub struct StableDiffusion {
    /// Text to token ids.
    pub tokenizer: Tokenizer,
    /// Token ids to states.
    pub text_encoder: TextEncoder,
    /// Noisy latents and states to noise.
    pub unet: UNet,
    /// Noise levels of the timesteps.
    pub schedule: NoiseSchedule,
    /// What the UNet predicts.
    pub prediction: PredictionType,
    /// Pictures to latents and back; loaded when it is first asked for.
    vae: OnceLock<Vae>,
    stored_vae: Stored<VaeConfig>,
    stored_text_encoder: Stored<TextEncoderConfig>,
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

impl StableDiffusion {
    /// Loads a diffusers folder, or a single file in LDM names.
    ///
    /// # Errors
    /// When the path is no model, a file is broken, a tensor is missing or has another shape than it must have, or
    /// the model is of a kind that is not handled.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        let source = Source::find(path, options.config_dir.as_deref())?;
        source.check_family()?;
        let hints = Hints::SD1;
        let unet_weights = source.unet()?.with_options(options);
        let vae_options = LoadOptions {
            precision: Precision::Fp32,
            ..options.clone()
        };
        let vae_weights = source.vae()?.with_options(&vae_options);
        let text_weights = source.text_encoder()?.with_options(options);

        let unet_config = source.unet_config(&unet_weights, &hints)?;
        let vae_config = source.vae_config(&vae_weights, &hints)?;
        let text_config = match source.config_file("text_encoder") {
            Some(file) => TextEncoderConfig::from_json(&file)?,
            None => TextEncoderConfig::infer(&text_weights.at(""), &hints)?,
        };
        check_fit(path, &unet_config, &vae_config, &text_config)?;

        let tokenizer = match source.folder("tokenizer") {
            Some(folder) => Tokenizer::load(&folder)?,
            None => Tokenizer::clip(),
        };
        if tokenizer.vocabulary_size() > text_config.vocab_size {
            let reason = format!(
                "the tokenizer has {} ids, the text encoder embeds {}",
                tokenizer.vocabulary_size(),
                text_config.vocab_size
            );
            return Err(LoadError::config(path, reason));
        }
        let (schedule, prediction) = source.schedule()?;
        Ok(Self {
            tokenizer,
            text_encoder: TextEncoder::load(&text_weights.at(""), &text_config)?,
            unet: UNet::load(&unet_weights.at(""), &unet_config)?,
            schedule,
            prediction,
            vae: OnceLock::new(),
            stored_vae: Stored {
                weights: vae_weights,
                config: vae_config,
            },
            stored_text_encoder: Stored {
                weights: text_weights,
                config: text_config,
            },
        })
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

    /// Gives the VAE's memory back until it is asked for again.
    pub fn unload_vae(&mut self) {
        self.vae.take();
    }

    /// Sizes of the VAE, known without loading it.
    pub fn vae_config(&self) -> &VaeConfig {
        &self.stored_vae.config
    }

    /// Tells the VAE apart by its sizes and stored weights, in hex. Reads them all.
    pub fn vae_digest(&self) -> String {
        self.stored_vae.digest()
    }

    /// Tells the text encoder apart by its sizes and stored weights, in hex. Reads them all.
    pub fn text_encoder_digest(&self) -> String {
        self.stored_text_encoder.digest()
    }

    /// Reads only headers and configurations.
    ///
    /// # Errors
    /// When the path is no model, or a file is broken.
    pub fn inspect(path: &Path) -> Result<ModelInfo, LoadError> {
        let source = Source::find(path, None)?;
        let (_, prediction) = source.schedule()?;
        let unet = source.unet_files()?;
        let size_bytes = match source.layout {
            Layout::SingleFile => unet.size_bytes(),
            Layout::Diffusers => {
                unet.size_bytes() + source.vae()?.size_bytes() + source.text_encoder()?.size_bytes()
            }
        };
        Ok(ModelInfo {
            layout: source.layout,
            family: source.family,
            prediction,
            size_bytes,
            dtype: main_dtype(&unet),
            unsupported: source.check_family().err().map(|error| error.to_string()),
        })
    }

    /// What loading a model would take; reads only headers and configurations.
    ///
    /// # Errors
    /// When the path is no model, a file is broken, or the model is of a kind that is not handled.
    pub fn measure(path: &Path) -> Result<Footprint, LoadError> {
        let source = Source::find(path, None)?;
        source.check_family()?;
        let (unet, vae, text) = (source.unet()?, source.vae()?, source.text_encoder()?);
        let unet_config = source.unet_config(&unet, &Hints::SD1)?;
        let vae_config = source.vae_config(&vae, &Hints::SD1)?;
        let tensors = |weights: &Weights| -> Vec<StoredTensor> {
            let seen = weights.seen();
            seen.map(|(name, shape, size_bytes)| StoredTensor {
                name: name.to_owned(),
                shape: shape.to_vec(),
                size_bytes: size_bytes as u64,
            })
            .collect()
        };
        Ok(Footprint {
            unet: tensors(&unet),
            text_encoder: tensors(&text),
            vae: tensors(&vae),
            unet_channels: unet_config.block_out_channels[0],
            vae_channels: vae_config.block_out_channels[0],
            vae_factor: vae_config.factor(),
        })
    }

    /// Every layer that can carry an adapter, the text encoder's first, in the order of the reference's modules.
    pub fn layers_mut(&mut self) -> Vec<(Part, String, LayerMut<'_>)> {
        let text = self.text_encoder.layers_mut().into_iter();
        let unet = self.unet.layers_mut().into_iter();
        text.map(|(path, layer)| (Part::TextEncoder, path, layer))
            .chain(unet.map(|(path, layer)| (Part::UNet, path, layer)))
            .collect()
    }
}

/// The parts must speak to each other.
fn check_fit(
    path: &Path,
    unet: &UNetConfig,
    vae: &VaeConfig,
    text: &TextEncoderConfig,
) -> Result<(), LoadError> {
    if unet.in_channels != vae.latent_channels || unet.out_channels != vae.latent_channels {
        return Err(LoadError::Unsupported {
            path: path.to_owned(),
            found: format!(
                "a UNet of {} to {} channels with latents of {} (an inpainting or instruction model?)",
                unet.in_channels, unet.out_channels, vae.latent_channels
            ),
            expected: "a text-to-image model has a UNet with the channels of its latents"
                .to_owned(),
        });
    }
    if unet.cross_attention_dim != text.hidden_size {
        let reason = format!(
            "the UNet attends to states of width {}, the text encoder's have {}",
            unet.cross_attention_dim, text.hidden_size
        );
        return Err(LoadError::config(path, reason));
    }
    Ok(())
}

/// Where the parts of a model are.
struct Source {
    path: PathBuf,
    layout: Layout,
    family: Family,
    /// A diffusers folder whose configurations count; for a folder, itself.
    configs: Option<PathBuf>,
    /// The single file; opened once.
    single: Option<Weights>,
}

impl Source {
    fn find(path: &Path, config_dir: Option<&Path>) -> Result<Self, LoadError> {
        let no_model = |reason: &str| LoadError::NotAModel {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, error))?;
        if metadata.is_dir() {
            if !path.join("unet").is_dir() {
                return Err(no_model("a diffusers folder has a folder `unet`"));
            }
            return Ok(Self {
                path: path.to_owned(),
                layout: Layout::Diffusers,
                family: family_of_folder(path)?,
                configs: Some(path.to_owned()),
                single: None,
            });
        }
        if path.extension().is_none_or(|end| end != "safetensors") {
            return Err(no_model(
                "expected a diffusers folder or a `.safetensors` file",
            ));
        }
        let single = Weights::open(&[path.to_owned()])?;
        let family = family_of_file(&single).ok_or_else(|| {
            no_model("no tensor below `model.diffusion_model.` and a known text encoder's name")
        })?;
        Ok(Self {
            path: path.to_owned(),
            layout: Layout::SingleFile,
            family,
            configs: config_dir.map(Path::to_owned).or_else(|| beside(path)),
            single: Some(single),
        })
    }

    fn check_family(&self) -> Result<(), LoadError> {
        let found = match self.family {
            Family::Sd1 => return Ok(()),
            Family::Sd2 => "a Stable Diffusion 2 model",
            Family::Sdxl => "a Stable Diffusion XL model",
        };
        Err(LoadError::Unsupported {
            path: self.path.clone(),
            found: found.to_owned(),
            expected: "this version trains Stable Diffusion 1 models".to_owned(),
        })
    }

    fn config_file(&self, component: &str) -> Option<PathBuf> {
        let file = self.configs.as_ref()?.join(component).join("config.json");
        file.is_file().then_some(file)
    }

    fn folder(&self, component: &str) -> Option<PathBuf> {
        let folder = self.configs.as_ref()?.join(component);
        folder.join("vocab.json").is_file().then_some(folder)
    }

    /// The files that hold the UNet, under the names they are stored with.
    fn unet_files(&self) -> Result<Weights, LoadError> {
        self.component_files("unet")
    }

    fn component_files(&self, component: &str) -> Result<Weights, LoadError> {
        match &self.single {
            Some(single) => Ok(single.clone()),
            None => Weights::open(&weight_files(&self.path.join(component))?),
        }
    }

    fn unet(&self) -> Result<Weights, LoadError> {
        let files = self.unet_files()?;
        Ok(match self.layout {
            Layout::Diffusers => files,
            Layout::SingleFile => {
                let map = ldm::unet(&files);
                files.with_key_map(map)
            }
        })
    }

    fn vae(&self) -> Result<Weights, LoadError> {
        let files = self.component_files("vae")?;
        let map = match self.layout {
            Layout::Diffusers => ldm::vae_of_folder(&files),
            Layout::SingleFile => ldm::vae(&files),
        };
        Ok(files.with_key_map(map))
    }

    fn text_encoder(&self) -> Result<Weights, LoadError> {
        let files = self.component_files("text_encoder")?;
        let map = match self.layout {
            Layout::Diffusers => ldm::text_encoder_of_folder(&files),
            Layout::SingleFile => ldm::text_encoder(&files),
        };
        Ok(files.with_key_map(map))
    }

    fn unet_config(&self, weights: &Weights, hints: &Hints) -> Result<UNetConfig, LoadError> {
        match self.config_file("unet") {
            Some(file) => UNetConfig::from_json(&file),
            None => UNetConfig::infer(&weights.at(""), hints),
        }
    }

    fn vae_config(&self, weights: &Weights, hints: &Hints) -> Result<VaeConfig, LoadError> {
        match self.config_file("vae") {
            Some(file) => VaeConfig::from_json(&file),
            None => VaeConfig::infer(&weights.at(""), hints),
        }
    }

    fn schedule(&self) -> Result<(NoiseSchedule, PredictionType), LoadError> {
        let file = self
            .configs
            .as_ref()
            .map(|folder| folder.join("scheduler/scheduler_config.json"))
            .filter(|file| file.is_file());
        match file {
            Some(file) => read_json::<SchedulerConfig>(&file)?
                .resolve()
                .map_err(|reason| LoadError::config(&file, reason)),
            None => Ok((NoiseSchedule::stable_diffusion(), self.stored_prediction())),
        }
    }

    /// What a single file says of its target: by the marker that v-prediction fine-tunes carry, or in its description.
    fn stored_prediction(&self) -> PredictionType {
        let Some(single) = &self.single else {
            return PredictionType::Epsilon;
        };
        let described = single.metadata().get("modelspec.prediction_type");
        if single.stores("v_pred") || described.is_some_and(|kind| kind == "v") {
            PredictionType::VPrediction
        } else {
            PredictionType::Epsilon
        }
    }
}

/// `scheduler_config.json`, as far as it says something about the noise.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct SchedulerConfig {
    beta_schedule: String,
    beta_start: f64,
    beta_end: f64,
    num_train_timesteps: usize,
    trained_betas: Option<Vec<f32>>,
    prediction_type: String,
    rescale_betas_zero_snr: bool,
}

impl Default for SchedulerConfig {
    /// diffusers' defaults, which a file leaves out.
    fn default() -> Self {
        Self {
            beta_schedule: "linear".to_owned(),
            beta_start: 0.0001,
            beta_end: 0.02,
            num_train_timesteps: 1000,
            trained_betas: None,
            prediction_type: "epsilon".to_owned(),
            rescale_betas_zero_snr: false,
        }
    }
}

impl SchedulerConfig {
    fn resolve(self) -> Result<(NoiseSchedule, PredictionType), String> {
        let prediction = match self.prediction_type.as_str() {
            "epsilon" => PredictionType::Epsilon,
            "v_prediction" => PredictionType::VPrediction,
            other => {
                return Err(format!(
                    "`prediction_type` is `{other}`, expected `epsilon` or `v_prediction`"
                ));
            }
        };
        let schedule = match self.trained_betas {
            Some(betas) => checked_betas(betas)?,
            None => self.computed()?,
        };
        Ok(if self.rescale_betas_zero_snr {
            (schedule.zero_terminal(), prediction)
        } else {
            (schedule, prediction)
        })
    }

    fn computed(&self) -> Result<NoiseSchedule, String> {
        let shape = match self.beta_schedule.as_str() {
            "linear" => BetaShape::Linear,
            "scaled_linear" => BetaShape::ScaledLinear,
            other => {
                return Err(format!(
                    "`beta_schedule` is `{other}`, expected `linear` or `scaled_linear`"
                ));
            }
        };
        let steps = self.num_train_timesteps;
        if !(1..=MAX_TIMESTEPS).contains(&steps) {
            return Err(format!(
                "`num_train_timesteps` is {steps}, expected 1 to {MAX_TIMESTEPS}"
            ));
        }
        for (name, beta) in [("beta_start", self.beta_start), ("beta_end", self.beta_end)] {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(format!(
                    "`{name}` is {beta}, expected a number between 0 and 1"
                ));
            }
        }
        Ok(NoiseSchedule::new(
            shape,
            self.beta_start,
            self.beta_end,
            steps,
        ))
    }
}

fn checked_betas(betas: Vec<f32>) -> Result<NoiseSchedule, String> {
    if betas.is_empty() || betas.len() > MAX_TIMESTEPS {
        return Err(format!(
            "`trained_betas` has {} entries, expected 1 to {MAX_TIMESTEPS}",
            betas.len()
        ));
    }
    if let Some(beta) = betas.iter().find(|beta| !(**beta > 0.0 && **beta < 1.0)) {
        return Err(format!(
            "`trained_betas` has {beta}, expected numbers between 0 and 1"
        ));
    }
    Ok(NoiseSchedule::from_betas(betas))
}

/// A diffusers folder that describes the single file: `name/` or `name.config/` beside `name.safetensors`.
fn beside(file: &Path) -> Option<PathBuf> {
    let stem = file.file_stem()?.to_str()?;
    [format!("{stem}.config"), stem.to_owned()]
        .iter()
        .map(|name| file.with_file_name(name))
        .find(|folder| folder.join("unet/config.json").is_file())
}

fn family_of_file(weights: &Weights) -> Option<Family> {
    let (mut unet, mut family) = (false, None);
    for (key, ..) in weights.stored() {
        unet |= key.starts_with(ldm::UNET_PREFIX);
        if key.starts_with("conditioner.embedders.") {
            family = Some(Family::Sdxl);
        } else if key.starts_with("cond_stage_model.model.") {
            family = Some(Family::Sd2);
        } else if key.starts_with(ldm::TEXT_ENCODER_PREFIX) {
            family = Some(Family::Sd1);
        }
    }
    family.filter(|_| unet)
}

fn family_of_folder(folder: &Path) -> Result<Family, LoadError> {
    if folder.join("text_encoder_2").is_dir() {
        return Ok(Family::Sdxl);
    }
    let file = folder.join("text_encoder/config.json");
    let text = TextEncoderConfig::from_json(&file)?;
    // OpenCLIP's encoder is the only one of the two with an exact GELU.
    Ok(if text.hidden_act == "gelu" {
        Family::Sd2
    } else {
        Family::Sd1
    })
}

/// The weight files of one component of a diffusers folder: one, or several numbered ones.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    if let Some(file) = WEIGHT_FILES
        .iter()
        .map(|name| folder.join(name))
        .find(|file| file.is_file())
    {
        return Ok(vec![file]);
    }
    let entries = std::fs::read_dir(folder).map_err(|error| LoadError::io(folder, error))?;
    let mut shards: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            name.contains("-of-") && name.ends_with(".safetensors") && !name.contains(".fp16")
        })
        .collect();
    shards.sort();
    if shards.is_empty() {
        return Err(LoadError::NotAModel {
            path: folder.to_owned(),
            reason: format!("expected one of {}", WEIGHT_FILES.join(", ")),
        });
    }
    Ok(shards)
}

/// The number format that most elements have.
fn main_dtype(weights: &Weights) -> String {
    let mut elements = std::collections::BTreeMap::new();
    for (_, shape, dtype) in weights.stored() {
        *elements.entry(format!("{dtype:?}")).or_insert(0_usize) += shape.iter().product::<usize>();
    }
    let most = elements.into_iter().max_by_key(|(_, count)| *count);
    most.map_or_else(String::new, |(dtype, _)| dtype)
}

#[cfg(test)]
mod tests {
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
            let states = model
                .text_encoder
                .forward(&model.tokenizer.chunks("a cat", 77), 1);
            let output = model.unet.forward(sample, &[500.0], states);
            output.into_data().try_into_vec::<f32>().expect("numbers")
        };
        let folder = predict("diffusers", None);
        let file = "tiny-sd15-ldm.safetensors";
        assert_eq!(predict(file, Some(fixture("diffusers"))), folder);
        assert_ne!(predict(file, None), folder);
    }

    #[test]
    fn a_schedule_is_read_or_refused() {
        let parse = |text: &str| {
            serde_json::from_str::<SchedulerConfig>(text)
                .expect("JSON")
                .resolve()
        };
        let (schedule, prediction) = parse(
            r#"{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                "prediction_type": "v_prediction"}"#,
        )
        .expect("a schedule");
        assert_eq!(schedule, NoiseSchedule::stable_diffusion());
        assert_eq!(prediction, PredictionType::VPrediction);
        for (text, named) in [
            (r#"{"beta_schedule": "squaredcos_cap_v2"}"#, "beta_schedule"),
            (r#"{"prediction_type": "sample"}"#, "prediction_type"),
            (r#"{"beta_end": 2.0}"#, "beta_end"),
            (r#"{"num_train_timesteps": 0}"#, "num_train_timesteps"),
            (r#"{"trained_betas": []}"#, "trained_betas"),
        ] {
            let error = parse(text).expect_err("wrong");
            assert!(error.contains(named), "{error}");
        }
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
