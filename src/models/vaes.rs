//! VAEs that take the place of a base model's own: files and folders of the folder `vae` in the model folder.

use std::path::{Path, PathBuf};

use super::{ModelCatalog, ModelFolderError, id_of, stamp_of_vae, walk};
use crate::diffusion::{LoadError, StableDiffusion, VaeInfo};

/// The folder of the model folder that has them.
pub const VAES: &str = "vae";

/// A VAE of the model folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vae {
    /// The same as long as it stays where it is.
    pub id: String,
    /// Its path below the folder `vae`, without `.safetensors`.
    pub name: String,
    /// The file or folder.
    pub path: PathBuf,
    /// What it is; or why it cannot be read.
    pub info: Result<VaeInfo, String>,
    /// Whether it came by an upload.
    pub uploaded: bool,
}

impl ModelCatalog {
    /// The folder of VAEs.
    pub fn vae_folder(&self) -> PathBuf {
        self.folder().join(VAES)
    }

    /// Every VAE, by path; whatever else lies there is listed with what is wrong.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn vaes(&self) -> Result<Vec<Vae>, ModelFolderError> {
        let folder = self.vae_folder();
        let whole = |path: &Path| {
            ["config.json", "model_index.json"]
                .iter()
                .any(|name| path.join(name).is_file())
        };
        let mut paths = walk(&folder, whole)?;
        let records = self.records.all();
        let registered = records
            .values()
            .map(|record| self.folder().join(&record.path));
        paths.extend(registered.filter(|path| path.starts_with(&folder) && path.exists()));
        paths.sort();
        paths.dedup();
        Ok(paths
            .into_iter()
            .map(|path| self.describe_vae(path))
            .collect())
    }

    /// The VAE of this id or name.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn find_vae(&self, id_or_name: &str) -> Result<Option<Vae>, ModelFolderError> {
        let vaes = self.vaes()?;
        let by = |wanted: fn(&Vae) -> &str| vaes.iter().find(|vae| wanted(vae) == id_or_name);
        Ok(by(|vae| &vae.id).or_else(|| by(|vae| &vae.name)).cloned())
    }

    pub(super) fn describe_vae(&self, path: PathBuf) -> Vae {
        let below = self.below(&path);
        let name = below.strip_prefix("vae/").unwrap_or(&below);
        let id = id_of(&below);
        let uploaded = self.records.get(&id).is_some_and(|record| record.uploaded);
        Vae {
            name: name.trim_end_matches(".safetensors").to_owned(),
            info: self.inspect_vae(&path),
            id,
            path,
            uploaded,
        }
    }

    fn inspect_vae(&self, path: &Path) -> Result<VaeInfo, String> {
        let stamp = stamp_of_vae(path);
        let mut read = self.lock_vaes();
        if let Some((known, info)) = read.get(path)
            && *known == stamp
        {
            return info.clone();
        }
        let info = StableDiffusion::inspect_vae(path).map_err(|error: LoadError| error.to_string());
        read.insert(path.to_owned(), (stamp, info.clone()));
        info
    }
}
