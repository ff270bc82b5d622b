//! A VAE that is used in place of a model's own: a file of its tensors alone, the one of a whole checkpoint, or that of
//! a diffusers folder.

use std::path::{Path, PathBuf};

use super::config::{Hints, VaeConfig};
use super::error::LoadError;
use super::kinds;
use super::ldm;
use super::source::{FILE_ENDINGS, main_dtype, weight_files};
use super::weights::Weights;

/// What can be told of a VAE without loading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaeInfo {
    /// Whether it is a folder of diffusers.
    pub is_folder: bool,
    /// Channels of its latents.
    pub latent_channels: usize,
    /// Number format of most of its weights.
    pub dtype: String,
    /// What its tensors take in memory.
    pub size_bytes: u64,
}

/// Where a VAE is.
pub struct VaeSource {
    path: PathBuf,
    config: Option<PathBuf>,
    /// Under diffusers names.
    pub weights: Weights,
}

impl VaeSource {
    /// Looks for a VAE at a path.
    ///
    /// # Errors
    /// When there is none, or a file is broken.
    pub fn find(path: &Path) -> Result<Self, LoadError> {
        let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, error))?;
        let found = if metadata.is_dir() {
            Self::of_folder(path)
        } else {
            Self::of_file(path)
        }?;
        let at = found.weights.at("");
        let needed = ["encoder.conv_in.weight", "decoder.conv_in.weight"];
        if needed.iter().any(|name| !at.has(name)) {
            return Err(LoadError::NotAModel {
                path: path.to_owned(),
                reason: "expected a VAE, with tensors below `encoder.` and `decoder.`".to_owned(),
            });
        }
        Ok(found)
    }

    /// The folder itself, or its part `vae`.
    fn of_folder(path: &Path) -> Result<Self, LoadError> {
        let part = path.join("vae");
        let folder = if part.is_dir() { part } else { path.to_owned() };
        let files = Weights::open(&weight_files(&folder)?)?;
        let map = ldm::vae_of_folder(&files);
        let config = folder.join("config.json");
        Ok(Self {
            path: path.to_owned(),
            config: config.is_file().then_some(config),
            weights: files.with_key_map(map),
        })
    }

    fn of_file(path: &Path) -> Result<Self, LoadError> {
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_none_or(|ending| !FILE_ENDINGS.contains(&ending)) {
            let endings = FILE_ENDINGS.join("`, `.");
            return Err(LoadError::NotAModel {
                path: path.to_owned(),
                reason: format!("expected a folder, or a file that ends in `.{endings}`"),
            });
        }
        let file = Weights::open(&[path.to_owned()])?;
        let has = |start: &str| file.stored().any(|(key, ..)| key.starts_with(start));
        let map = if has(ldm::VAE_PREFIX) {
            ldm::vae(&file)
        } else if has("encoder.down_blocks.") {
            ldm::vae_of_folder(&file)
        } else if has("encoder.down.") {
            ldm::vae_below(&file, "")
        } else {
            let what = match kinds::other(&file) {
                Some(kinds::Other::Model(what) | kinds::Other::Part(what)) => what,
                None => "something else",
            };
            return Err(LoadError::NotAModel {
                path: path.to_owned(),
                reason: format!("expected a VAE, found {what}"),
            });
        };
        Ok(Self {
            path: path.to_owned(),
            config: None,
            weights: file.with_key_map(map),
        })
    }

    /// Its sizes. What shapes do not tell is as in the VAE that it takes the place of: latents are scaled as the UNet
    /// expects them, whatever the file says.
    ///
    /// # Errors
    /// When the sizes make no sense.
    pub fn config(
        &self,
        replaced: Option<&VaeConfig>,
        hints: &Hints,
    ) -> Result<VaeConfig, LoadError> {
        let config = match &self.config {
            Some(file) => VaeConfig::from_json(file)?,
            None => {
                let mut hints = hints.clone();
                if let Some(replaced) = replaced {
                    hints.norm_groups = replaced.norm_num_groups;
                }
                VaeConfig::infer(&self.weights.at(""), &hints)?
            }
        };
        let scaling_factor = replaced.map_or(hints.vae_scaling_factor, |own| own.scaling_factor);
        Ok(VaeConfig {
            scaling_factor,
            ..config
        })
    }

    /// What it is, told by headers.
    ///
    /// # Errors
    /// As [`Self::config`].
    pub fn info(&self) -> Result<VaeInfo, LoadError> {
        let config = self.config(None, &Hints::SD1)?;
        let tensors = self.weights.seen();
        Ok(VaeInfo {
            is_folder: self.path.is_dir(),
            latent_channels: config.latent_channels,
            dtype: main_dtype(&self.weights),
            size_bytes: tensors.map(|(.., size)| size as u64).sum(),
        })
    }
}
