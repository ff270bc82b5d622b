//! Base models: what lies in the model folder, told by its content.

mod digest;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

pub use digest::{ModelDigest, ModelFile};

use digest::Digests;

pub use crate::diffusion::{Family, Layout, ModelInfo, PredictionType};
use crate::diffusion::{LoadError, StableDiffusion};

/// How deep folders are searched.
const MAX_DEPTH: usize = 4;
/// The folder of the model folder that has models of another kind.
const CAPTIONERS: &str = crate::captioning::catalog::FOLDER;
/// The folder of the model folder that has LoRA files.
const LORAS: &str = "lora";
/// The most models that are listed; a folder with more is not a model folder.
const MAX_MODELS: usize = 10_000;

/// A base model of the model folder.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseModel {
    /// The same as long as the model stays where it is.
    pub id: String,
    /// Its path below the model folder, without `.safetensors`.
    pub name: String,
    /// The file or folder.
    pub path: PathBuf,
    /// What it is; or why it cannot be read.
    pub info: Result<ModelInfo, String>,
}

impl BaseModel {
    /// Why it cannot be trained; `None` when it can.
    pub fn problem(&self) -> Option<&str> {
        match &self.info {
            Ok(info) => info.unsupported.as_deref(),
            Err(message) => Some(message),
        }
    }
}

/// The model folder cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the model folder {}: {source}", path.display())]
pub struct ModelFolderError {
    path: PathBuf,
    source: std::io::Error,
}

/// What tells that a file has not changed.
type Stamp = (u64, Option<SystemTime>);

/// What was found at a path; `None` for what is no model.
type Found = Option<Result<ModelInfo, String>>;

/// Finds models; remembers what it has read. Cloning is cheap. All functions block.
#[derive(Clone, Debug)]
pub struct ModelCatalog {
    folder: PathBuf,
    read: Arc<Mutex<HashMap<PathBuf, (Stamp, Found)>>>,
    digests: Digests,
}

impl ModelCatalog {
    /// The models below `folder`.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            read: Arc::default(),
            digests: Digests::default(),
        }
    }

    /// With digests that are remembered in `folder`, for later processes too.
    #[must_use]
    pub fn remembering_in(self, folder: PathBuf) -> Self {
        Self {
            digests: Digests::in_folder(folder),
            ..self
        }
    }

    /// The model folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a LoRA file of this name is that runs may begin with; it need not be there.
    pub fn lora_file(&self, name: &str) -> PathBuf {
        self.folder.join(LORAS).join(name)
    }

    /// What tells the model apart by content, if that is known; reads no weights.
    pub fn known_digest(&self, model: &BaseModel) -> Option<ModelDigest> {
        self.digests.known(&model.path)
    }

    /// What tells the model apart by content; the first time all of it is read.
    ///
    /// # Errors
    /// When a file cannot be read, or changes meanwhile.
    pub fn digest(&self, model: &BaseModel) -> std::io::Result<ModelDigest> {
        self.digests.get(&model.path)
    }

    /// Has the digest made by a thread, unless it is known; one model at a time.
    pub fn prepare_digest(&self, model: &BaseModel) {
        self.digests.prepare(&model.path);
    }

    /// The model's path below the model folder, with slashes.
    pub fn path_below(&self, model: &BaseModel) -> String {
        let below = model.path.strip_prefix(&self.folder);
        let below = below.unwrap_or(&model.path).to_string_lossy();
        below.replace('\\', "/")
    }

    /// Every model, by name.
    ///
    /// A file that is no model at all (a LoRA, a VAE) is left out; one that is broken is listed with its problem.
    /// A folder that does not exist yet has no models.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> Result<Vec<BaseModel>, ModelFolderError> {
        let mut paths = Vec::new();
        if self.folder.exists() {
            find(&self.folder, MAX_DEPTH, &mut paths).map_err(|source| ModelFolderError {
                path: self.folder.clone(),
                source,
            })?;
        }
        // What lies there makes captions.
        let captioners = self.folder.join(CAPTIONERS);
        paths.retain(|path| !path.starts_with(&captioners));
        paths.sort();
        Ok(paths
            .into_iter()
            .filter_map(|path| self.describe(path))
            .collect())
    }

    /// The model of this id or name.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn find(&self, id_or_name: &str) -> Result<Option<BaseModel>, ModelFolderError> {
        let models = self.list()?;
        let by = |wanted: fn(&BaseModel) -> &str| {
            models.iter().find(|model| wanted(model) == id_or_name)
        };
        Ok(by(|model| &model.id)
            .or_else(|| by(|model| &model.name))
            .cloned())
    }

    fn describe(&self, path: PathBuf) -> Option<BaseModel> {
        let info = self.inspect(&path)?;
        let below = path.strip_prefix(&self.folder).unwrap_or(&path);
        let slashed = below.to_string_lossy().replace('\\', "/");
        Some(BaseModel {
            id: hex::encode(&Sha256::digest(slashed.as_bytes())[..8]),
            name: slashed.trim_end_matches(".safetensors").to_owned(),
            info,
            path,
        })
    }

    fn inspect(&self, path: &Path) -> Found {
        let stamp = stamp(path);
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, info)) = read.get(path)
            && *known == stamp
        {
            return info.clone();
        }
        let info = match StableDiffusion::inspect(path) {
            Ok(info) => Some(Ok(info)),
            Err(LoadError::NotAModel { .. }) => None,
            Err(error) => Some(Err(error.to_string())),
        };
        read.insert(path.to_owned(), (stamp, info.clone()));
        info
    }
}

fn stamp(path: &Path) -> Stamp {
    // A diffusers folder changes with its largest part.
    let file = if path.is_dir() {
        path.join("unet")
    } else {
        path.to_owned()
    };
    match std::fs::metadata(file) {
        Ok(metadata) => (metadata.len(), metadata.modified().ok()),
        Err(_) => (0, None),
    }
}

fn find(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        if found.len() >= MAX_MODELS {
            break;
        }
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_none_or(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            if path.join("model_index.json").is_file() {
                found.push(path);
            } else if depth > 0 && find(&path, depth - 1, found).is_err() {
                tracing::warn!(path = %path.display(), "a folder below the model folder cannot be read");
            }
        } else if path.extension().is_some_and(|end| end == "safetensors") {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15")
    }

    #[test]
    fn models_are_found_by_content() {
        // The folder also holds golden tensors and LoRA files, which are no models.
        let catalog = ModelCatalog::new(fixture());
        let models = catalog.list().expect("readable");
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        assert_eq!(names, ["diffusers", "tiny-sd15-ldm"]);
        for model in &models {
            assert_eq!(model.problem(), None);
            for key in [&model.id, &model.name] {
                assert_eq!(catalog.find(key).expect("readable").as_ref(), Some(model));
            }
        }
        assert_eq!(catalog.find("absent").expect("readable"), None);
    }

    #[test]
    fn a_broken_file_is_listed_with_its_problem() {
        let folder = tempfile::tempdir().expect("a folder");
        let whole = std::fs::read(fixture().join("tiny-sd15-ldm.safetensors")).expect("there");
        let broken = folder.path().join("sub/broken.safetensors");
        std::fs::create_dir(folder.path().join("sub")).expect("made");
        std::fs::write(&broken, &whole[..whole.len() / 2]).expect("written");
        std::fs::write(folder.path().join("notes.txt"), "no model").expect("written");
        let models = ModelCatalog::new(folder.path()).list().expect("readable");
        assert_eq!(models.len(), 1);
        assert_eq!(models[0].name, "sub/broken");
        assert!(
            models[0]
                .problem()
                .is_some_and(|text| text.contains("broken.safetensors"))
        );
    }

    #[test]
    fn a_missing_folder_has_no_models() {
        let models = ModelCatalog::new("/nowhere/at/all").list();
        assert_eq!(models.expect("no error"), []);
    }
}
