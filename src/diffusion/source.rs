//! Where the parts of a model are: in the folders of diffusers, or under the names of a single file. What kind of model
//! it is, told by its tensors.

use std::path::{Path, PathBuf};

use super::PredictionType;
use super::config::{Hints, TextEncoderConfig, UNetConfig, VaeConfig, read_json};
use super::error::LoadError;
use super::kinds::{self, Other, SUPPORTED};
use super::ldm::{self, KeyMap};
use super::model::{Family, Layout};
use super::schedule::NoiseSchedule;
use super::scheduler_config::SchedulerConfig;
use super::tokenizer::{Padding, Tokenizer};
use super::weights::Weights;

/// File names of a component's weights in a diffusers folder, best first.
const WEIGHT_FILES: [&str; 8] = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
    "pytorch_model.fp16.bin",
];
/// Endings of single files.
pub const FILE_ENDINGS: [&str; 3] = ["safetensors", "ckpt", "pt"];
/// Layers of OpenCLIP-H that Stable Diffusion 2 uses; its single files hold one more.
const SD2_TEXT_LAYERS: usize = 23;
/// Id that Stable Diffusion 2 and SDXL's second encoder pad with: that of `!`.
const EXCLAMATION_MARK: u32 = 0;
/// Training steps of the one published Stable Diffusion 2 that predicts the noise; told in its single file.
const SD2_BASE_STEPS: i64 = 875_000;

/// Where the parts of a model are.
pub struct Source {
    path: PathBuf,
    pub layout: Layout,
    pub family: Family,
    /// Whether there is SDXL's second text encoder alone: the refiner.
    refiner: bool,
    /// A diffusers folder whose configurations count; for a folder, itself.
    configs: Option<PathBuf>,
    /// The single file; opened once.
    single: Option<Weights>,
}

impl Source {
    /// Looks for a model at a path.
    ///
    /// # Errors
    /// When the path is no model, or a header is broken.
    pub fn find(path: &Path, config_dir: Option<&Path>) -> Result<Self, LoadError> {
        let no_model = |reason: &str| LoadError::NotAModel {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, error))?;
        if metadata.is_dir() {
            if !path.join("unet").is_dir() {
                return Err(other_folder(path));
            }
            let second = path.join("text_encoder_2").is_dir();
            return Ok(Self {
                path: path.to_owned(),
                layout: Layout::Diffusers,
                family: family_of_folder(path)?,
                refiner: second && !path.join("text_encoder").is_dir(),
                configs: Some(path.to_owned()),
                single: None,
            });
        }
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_none_or(|ending| !FILE_ENDINGS.contains(&ending)) {
            let endings = FILE_ENDINGS.join("`, `.");
            let reason =
                format!("expected a diffusers folder, or a file that ends in `.{endings}`");
            return Err(no_model(&reason));
        }
        let single = Weights::open(&[path.to_owned()])?;
        let family = family_of_file(&single).ok_or_else(|| other_file(path, &single))?;
        let first = |(key, ..): (&str, _, _)| key.starts_with(ldm::SDXL_TEXT_ENCODER_PREFIX);
        Ok(Self {
            path: path.to_owned(),
            layout: Layout::SingleFile,
            family,
            refiner: family == Family::Sdxl && !single.stored().any(first),
            configs: config_dir.map(Path::to_owned).or_else(|| beside(path)),
            single: Some(single),
        })
    }

    /// Whether it is a model that turns text into pictures by itself; its UNet's tensors say so.
    ///
    /// # Errors
    /// When it is not, or has no UNet.
    pub fn check_kind(&self, unet: &Weights) -> Result<(), LoadError> {
        let unsupported = |found: String, expected: &str| LoadError::Unsupported {
            path: self.path.clone(),
            found,
            expected: expected.to_owned(),
        };
        if kinds::is_video(unet) {
            return Err(unsupported("a video model".to_owned(), SUPPORTED));
        }
        if self.refiner {
            return Err(unsupported(
                "the refiner of Stable Diffusion XL".to_owned(),
                "LoRAs are trained on the base model",
            ));
        }
        if let Some(noise) = self.other_noise() {
            return Err(unsupported(
                format!("a model of another kind of noise ({noise})"),
                "epsilon and v-prediction on a discrete schedule are supported",
            ));
        }
        let unet = unet.at("");
        let (first, last) = (
            unet.shape("conv_in.weight")?,
            unet.shape("conv_out.weight")?,
        );
        let channels = [first.get(1), last.first()].map(|count| count.copied().unwrap_or(0));
        if channels[0] != channels[1] {
            return Err(other_channels(&self.path, channels, channels[1]));
        }
        if unet.has("time_embedding.cond_proj.weight") {
            return Err(unsupported(
                "a UNet that is told its guidance (a distilled model, LCM)".to_owned(),
                SUPPORTED,
            ));
        }
        let told = unet.has("add_embedding.linear_1.weight");
        if unet.has("class_embedding.linear_1.weight") || (told && self.family != Family::Sdxl) {
            return Err(unsupported(
                "a UNet that is told a picture (an unCLIP model or an upscaler?)".to_owned(),
                "a text-to-image model's UNet is told text alone",
            ));
        }
        if self.family == Family::Sdxl && !told {
            return Err(unsupported(
                "two text encoders with a UNet that is told no sizes".to_owned(),
                "Stable Diffusion XL's UNet has `add_embedding`",
            ));
        }
        Ok(())
    }

    /// The tensor by which a single file says that its noise has no discrete steps.
    fn other_noise(&self) -> Option<&str> {
        let mut stored = self.single.as_ref()?.stored();
        let found = stored.find(|(key, ..)| *key == "edm_mean" || key.starts_with("edm_vpred."));
        found.map(|(key, ..)| key)
    }

    /// What shapes cannot tell of the model, and of its second text encoder.
    pub fn hints(&self) -> (Hints, Hints) {
        match self.family {
            Family::Sd1 => (Hints::SD1, Hints::SD1),
            Family::Sd2 => (Hints::SD2, Hints::SD2),
            Family::Sdxl => (Hints::SDXL, Hints::SDXL_SECOND),
        }
    }

    fn config_file(&self, component: &str) -> Option<PathBuf> {
        let file = self.configs.as_ref()?.join(component).join("config.json");
        file.is_file().then_some(file)
    }

    /// The tokenizers of both text encoders, padded as sd-scripts pads.
    ///
    /// # Errors
    /// When a folder's vocabulary is broken.
    pub fn tokenizers(&self) -> Result<(Tokenizer, Option<Tokenizer>), LoadError> {
        let of = |component: &str| -> Result<Option<Tokenizer>, LoadError> {
            let folder = self.configs.as_ref().map(|configs| configs.join(component));
            let folder = folder.filter(|folder| folder.join("vocab.json").is_file());
            folder.map(|folder| Tokenizer::load(&folder)).transpose()
        };
        let first = of("tokenizer")?;
        let declared = Padding::Declared('!', EXCLAMATION_MARK);
        Ok(match self.family {
            Family::Sd1 => (first.unwrap_or_else(Tokenizer::clip), None),
            Family::Sd2 => {
                let own = || Tokenizer::clip().with_padding(declared);
                (first.unwrap_or_else(own), None)
            }
            Family::Sdxl => {
                let second = of("tokenizer_2")?.unwrap_or_else(Tokenizer::clip);
                // Whatever the folder declares: a `!` in the text stays a word.
                let second = second.with_padding(Padding::Id(EXCLAMATION_MARK));
                (first.unwrap_or_else(Tokenizer::clip), Some(second))
            }
        })
    }

    /// The files that hold the UNet, under the names they are stored with.
    ///
    /// # Errors
    /// When there are none, or they are broken.
    pub fn unet_files(&self) -> Result<Weights, LoadError> {
        self.component_files("unet")
    }

    fn component_files(&self, component: &str) -> Result<Weights, LoadError> {
        match &self.single {
            Some(single) => Ok(single.clone()),
            None => Weights::open(&weight_files(&self.path.join(component))?),
        }
    }

    fn component(
        &self,
        component: &str,
        of_folder: fn(&Weights) -> Option<KeyMap>,
        of_file: impl Fn(&Weights) -> KeyMap,
    ) -> Result<Weights, LoadError> {
        let files = self.component_files(component)?;
        let map = match self.layout {
            Layout::Diffusers => of_folder(&files),
            Layout::SingleFile => Some(of_file(&files)),
        };
        Ok(match map {
            Some(map) => files.with_key_map(map),
            None => files,
        })
    }

    /// The UNet under diffusers names.
    ///
    /// # Errors
    /// As [`Self::unet_files`].
    pub fn unet(&self) -> Result<Weights, LoadError> {
        self.component("unet", |_| None, ldm::unet)
    }

    /// The VAE under diffusers names.
    ///
    /// # Errors
    /// As [`Self::unet_files`].
    pub fn vae(&self) -> Result<Weights, LoadError> {
        self.component("vae", |files| Some(ldm::vae_of_folder(files)), ldm::vae)
    }

    /// The text encoder, or the first of two, under transformers' names.
    ///
    /// # Errors
    /// As [`Self::unet_files`].
    pub fn text_encoder(&self) -> Result<Weights, LoadError> {
        let of_folder = |files: &Weights| Some(ldm::text_encoder_of_folder(files));
        self.component("text_encoder", of_folder, |file| match self.family {
            Family::Sd1 => ldm::text_encoder(file, ldm::TEXT_ENCODER_PREFIX),
            Family::Sd2 => without_last_layer(ldm::open_clip(file, ldm::SD2_TEXT_ENCODER_PREFIX)),
            Family::Sdxl => ldm::text_encoder(file, ldm::SDXL_TEXT_ENCODER_PREFIX),
        })
    }

    /// The second text encoder, where there is one.
    ///
    /// # Errors
    /// As [`Self::unet_files`].
    pub fn text_encoder_2(&self) -> Result<Option<Weights>, LoadError> {
        if self.family != Family::Sdxl {
            return Ok(None);
        }
        let of_folder = |files: &Weights| Some(ldm::text_encoder_of_folder(files));
        let of_file = |file: &Weights| ldm::open_clip(file, ldm::SDXL_TEXT_ENCODER_2_PREFIX);
        self.component("text_encoder_2", of_folder, of_file)
            .map(Some)
    }

    /// Sizes of the UNet.
    ///
    /// # Errors
    /// When they are not stated and cannot be inferred, or make no sense.
    pub fn unet_config(&self, weights: &Weights, hints: &Hints) -> Result<UNetConfig, LoadError> {
        match self.config_file("unet") {
            Some(file) => UNetConfig::from_json(&file),
            None => UNetConfig::infer(&weights.at(""), hints),
        }
    }

    /// Sizes of the VAE.
    ///
    /// # Errors
    /// As [`Self::unet_config`].
    pub fn vae_config(&self, weights: &Weights, hints: &Hints) -> Result<VaeConfig, LoadError> {
        match self.config_file("vae") {
            Some(file) => VaeConfig::from_json(&file),
            None => VaeConfig::infer(&weights.at(""), hints),
        }
    }

    /// Sizes of a text encoder: `text_encoder` or `text_encoder_2`.
    ///
    /// # Errors
    /// As [`Self::unet_config`].
    pub fn text_config(
        &self,
        component: &str,
        weights: &Weights,
        hints: &Hints,
    ) -> Result<TextEncoderConfig, LoadError> {
        match self.config_file(component) {
            Some(file) => TextEncoderConfig::from_json(&file),
            None => TextEncoderConfig::infer(&weights.at(""), hints),
        }
    }

    /// The noise and what the UNet predicts, as the model's files have it.
    ///
    /// # Errors
    /// When a stated schedule makes no sense.
    pub fn schedule(&self) -> Result<(NoiseSchedule, PredictionType), LoadError> {
        let file = self
            .configs
            .as_ref()
            .map(|folder| folder.join("scheduler/scheduler_config.json"))
            .filter(|file| file.is_file());
        if let Some(file) = file {
            return read_json::<SchedulerConfig>(&file)?
                .resolve()
                .map_err(|reason| LoadError::config(&file, reason));
        }
        let schedule = NoiseSchedule::stable_diffusion();
        let zero_terminal = self
            .single
            .as_ref()
            .is_some_and(|file| file.stores("ztsnr"));
        let schedule = if zero_terminal {
            schedule.zero_terminal()
        } else {
            schedule
        };
        Ok((schedule, self.stored_prediction()))
    }

    /// What a single file says of its target: by the marker that v-prediction fine-tunes carry, or in its description.
    /// Of Stable Diffusion 2 all but one published model predict the velocity, and nothing in their shapes tells.
    fn stored_prediction(&self) -> PredictionType {
        let Some(single) = &self.single else {
            return PredictionType::Epsilon;
        };
        if single.stores("v_pred") {
            return PredictionType::VPrediction;
        }
        let described = |key: &str| single.metadata().get(key).map(String::as_str);
        match described("modelspec.prediction_type") {
            Some("v") => return PredictionType::VPrediction,
            Some("epsilon") => return PredictionType::Epsilon,
            _ => {}
        }
        let architecture = described("modelspec.architecture").unwrap_or_default();
        let noise = || {
            let steps = single.read_bytes("global_step").ok();
            let steps = steps.and_then(|(bytes, ..)| Some(i64::from_le_bytes(*bytes.as_array()?)));
            let beside = || described("global_step")?.parse().ok();
            steps.or_else(beside) == Some(SD2_BASE_STEPS)
                || architecture.starts_with("stable-diffusion-v2-512")
        };
        if self.family == Family::Sd2 && !noise() {
            PredictionType::VPrediction
        } else {
            PredictionType::Epsilon
        }
    }
}

/// Stable Diffusion 2 takes the states before the last layer of its text encoder, and single files hold that layer
/// too.
fn without_last_layer(map: KeyMap) -> KeyMap {
    let layer = |name: &str| -> Option<usize> {
        let rest = name.strip_prefix("text_model.encoder.layers.")?;
        rest.split('.').next()?.parse().ok()
    };
    let count = map.keys().filter_map(|name| layer(name)).max();
    let last = count.filter(|last| last + 1 != SD2_TEXT_LAYERS && *last > 0);
    map.into_iter()
        .filter(|(name, _)| last.is_none() || layer(name) != last)
        .collect()
}

/// A UNet that is told more than a noisy latent and text, or predicts something else.
pub fn other_channels(path: &Path, [c_in, c_out]: [usize; 2], latent: usize) -> LoadError {
    let what = kinds::of_channels(c_in, latent);
    LoadError::Unsupported {
        path: path.to_owned(),
        found: format!("a UNet of {c_in} to {c_out} channels with latents of {latent} ({what})"),
        expected: format!("{SUPPORTED}, whose UNet goes from {latent} to {latent} channels"),
    }
}

/// A file that is no model of a known generation.
fn other_file(path: &Path, file: &Weights) -> LoadError {
    match kinds::other(file) {
        Some(Other::Model(found)) => LoadError::Unsupported {
            path: path.to_owned(),
            found: found.to_owned(),
            expected: SUPPORTED.to_owned(),
        },
        Some(Other::Part(found)) => LoadError::NotAModel {
            path: path.to_owned(),
            reason: format!("it is {found}"),
        },
        None => LoadError::NotAModel {
            path: path.to_owned(),
            reason: "no tensor below `model.diffusion_model.` and a known text encoder's name"
                .to_owned(),
        },
    }
}

/// A folder without a UNet; if it says what it is, that is told.
fn other_folder(path: &Path) -> LoadError {
    #[derive(serde::Deserialize)]
    struct Index {
        #[serde(rename = "_class_name")]
        class_name: String,
    }
    match read_json::<Index>(&path.join("model_index.json")) {
        Ok(Index { class_name }) => LoadError::Unsupported {
            path: path.to_owned(),
            found: format!(
                "a `{}` without a UNet",
                class_name.chars().take(100).collect::<String>()
            ),
            expected: SUPPORTED.to_owned(),
        },
        Err(_) => LoadError::NotAModel {
            path: path.to_owned(),
            reason: "a diffusers folder has a folder `unet`".to_owned(),
        },
    }
}

/// A diffusers folder that describes the single file: `name/` or `name.config/` beside `name.safetensors`.
fn beside(file: &Path) -> Option<PathBuf> {
    let stem = file.file_stem()?.to_str()?;
    [format!("{stem}.config"), stem.to_owned()]
        .iter()
        .map(|name| file.with_file_name(name))
        .find(|folder| folder.join("unet/config.json").is_file())
}

/// The generation of a single file; `None` where its UNet or its text encoder is not known.
pub fn family_of_file(weights: &Weights) -> Option<Family> {
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

/// The generation of a diffusers folder.
///
/// # Errors
/// When its text encoder's configuration cannot be read.
pub fn family_of_folder(folder: &Path) -> Result<Family, LoadError> {
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
///
/// # Errors
/// When there are none.
pub fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
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
            let known = name.ends_with(".safetensors") || name.ends_with(".bin");
            name.contains("-of-") && known && !name.contains(".fp16")
        })
        .collect();
    let is_safe = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors");
    if shards.iter().any(is_safe) {
        shards.retain(is_safe);
    }
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
pub fn main_dtype(weights: &Weights) -> String {
    let mut elements = std::collections::BTreeMap::new();
    for (_, shape, dtype) in weights.stored() {
        *elements.entry(format!("{dtype:?}")).or_insert(0_usize) += shape.iter().product::<usize>();
    }
    let most = elements.into_iter().max_by_key(|(_, count)| *count);
    most.map_or_else(String::new, |(dtype, _)| dtype)
}
