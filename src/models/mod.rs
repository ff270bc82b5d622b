//! Base models: what lies in the model folder, told by its content.

mod digest;
mod intake;
mod records;
mod vaes;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

pub use digest::{ModelDigest, ModelFile};
pub use intake::{IntakeError, Kind, Receiving, Taken};
pub use records::Record;
pub use vaes::Vae;

use digest::Digests;
use records::Records;
use vaes::VAES;

use crate::diffusion::{FILE_ENDINGS, LoadError, StableDiffusion};
pub use crate::diffusion::{Family, Layout, ModelInfo, PredictionType, VaeInfo};

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
    /// What it is, as its files tell; or why it cannot be read.
    pub info: Result<ModelInfo, String>,
    /// What was corrected of that, and whether it was uploaded.
    pub record: Record,
}

impl BaseModel {
    /// Why it cannot be trained; `None` when it can.
    pub fn problem(&self) -> Option<&str> {
        match &self.info {
            Ok(info) => info.unsupported.as_deref(),
            Err(message) => Some(message),
        }
    }

    /// What its UNet predicts: as was corrected, or as its files tell.
    pub fn prediction_type(&self) -> Option<PredictionType> {
        let told = || self.info.as_ref().ok().map(|info| info.prediction);
        self.record.prediction_type.or_else(told)
    }

    /// Whether nothing of the picture is left at its last timestep: as was corrected, or as its files tell.
    pub fn zero_terminal_snr(&self) -> Option<bool> {
        let told = || self.info.as_ref().ok().map(|info| info.zero_terminal_snr);
        self.record.zero_terminal_snr.or_else(told)
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
type FoundVae = Result<VaeInfo, String>;

/// Finds models; remembers what it has read. Cloning is cheap. All functions block.
#[derive(Clone, Debug)]
pub struct ModelCatalog {
    folder: PathBuf,
    read: Arc<Mutex<HashMap<PathBuf, (Stamp, Found)>>>,
    read_vaes: Arc<Mutex<HashMap<PathBuf, (Stamp, FoundVae)>>>,
    digests: Digests,
    records: Records,
}

impl ModelCatalog {
    /// The models below `folder`.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            read: Arc::default(),
            read_vaes: Arc::default(),
            digests: Digests::default(),
            records: Records::default(),
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

    /// With what is known of models kept in `folder`.
    #[must_use]
    pub fn keeping_in(self, folder: PathBuf) -> Self {
        Self {
            records: Records::in_folder(folder),
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

    /// What tells a model or VAE apart by content, if that is known; reads no weights.
    pub fn known_digest(&self, path: &Path) -> Option<ModelDigest> {
        self.digests.known(path)
    }

    /// What tells a model or VAE apart by content; the first time all of it is read.
    ///
    /// # Errors
    /// When a file cannot be read, or changes meanwhile.
    pub fn digest(&self, path: &Path) -> std::io::Result<ModelDigest> {
        self.digests.get(path)
    }

    /// Has the digest made by a thread, unless it is known; one model at a time.
    pub fn prepare_digest(&self, path: &Path) {
        self.digests.prepare(path);
    }

    /// A path below the model folder, with slashes.
    pub fn below(&self, path: &Path) -> String {
        let below = path.strip_prefix(&self.folder);
        below.unwrap_or(path).to_string_lossy().replace('\\', "/")
    }

    /// Keeps a record in place of the one before, if that is still of revision `before`; says whether it was.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn correct(&self, id: &str, before: i64, record: &Record) -> std::io::Result<bool> {
        self.records.replace(id, before, record)
    }

    /// Every model, by name.
    ///
    /// A file that is no model at all (a LoRA, a VAE) is left out; one that is broken is listed with its problem.
    /// A folder that does not exist yet has no models.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> Result<Vec<BaseModel>, ModelFolderError> {
        let whole = |path: &Path| path.join("model_index.json").is_file();
        let mut paths = walk(&self.folder, whole)?;
        // What lies there are no base models.
        let others = [CAPTIONERS, VAES].map(|name| self.folder.join(name));
        paths.retain(|path| !others.iter().any(|other| path.starts_with(other)));
        let records = self.records.all();
        let registered = records
            .values()
            .map(|record| self.folder.join(&record.path));
        paths.extend(
            registered.filter(|path| {
                !others.iter().any(|other| path.starts_with(other)) && path.exists()
            }),
        );
        paths.sort();
        paths.dedup();
        Ok(paths
            .into_iter()
            .filter_map(|path| self.describe_with(path, |id| records.get(id).cloned()))
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
        self.describe_with(path, |id| self.records.get(id))
    }

    fn describe_with(
        &self,
        path: PathBuf,
        record: impl Fn(&str) -> Option<Record>,
    ) -> Option<BaseModel> {
        let info = self.inspect(&path)?;
        let below = self.below(&path);
        let id = id_of(&below);
        Some(BaseModel {
            name: below.trim_end_matches(".safetensors").to_owned(),
            record: record(&id).unwrap_or_default(),
            id,
            info,
            path,
        })
    }

    fn lock_vaes(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, (Stamp, FoundVae)>> {
        self.read_vaes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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

/// The same as long as the model stays where it is.
fn id_of(below: &str) -> String {
    hex::encode(&Sha256::digest(below.as_bytes())[..8])
}

/// Whether a file's name ends as those of models do.
fn is_model_file(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| FILE_ENDINGS.contains(&ending))
}

/// A folder that is a VAE changes with its weights.
fn stamp_of_vae(path: &Path) -> Stamp {
    let part = path.join("vae");
    stamp_of_file(if part.is_dir() { &part } else { path })
}

fn stamp(path: &Path) -> Stamp {
    // A diffusers folder changes with its largest part.
    let file = if path.is_dir() {
        path.join("unet")
    } else {
        path.to_owned()
    };
    stamp_of_file(&file)
}

fn stamp_of_file(file: &Path) -> Stamp {
    match std::fs::metadata(file) {
        Ok(metadata) => (metadata.len(), metadata.modified().ok()),
        Err(_) => (0, None),
    }
}

/// Files that may be models, and folders that are `whole`, below a folder. One that does not exist yet has none.
fn walk(folder: &Path, whole: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>, ModelFolderError> {
    let mut found = Vec::new();
    if folder.exists() {
        find(folder, &whole, MAX_DEPTH, &mut found).map_err(|source| ModelFolderError {
            path: folder.to_owned(),
            source,
        })?;
    }
    Ok(found)
}

fn find(
    folder: &Path,
    whole: &impl Fn(&Path) -> bool,
    depth: usize,
    found: &mut Vec<PathBuf>,
) -> std::io::Result<()> {
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
            if whole(&path) {
                found.push(path);
            } else if depth > 0 && find(&path, whole, depth - 1, found).is_err() {
                tracing::warn!(path = %path.display(), "a folder below the model folder cannot be read");
            }
        } else if is_model_file(&path) {
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
