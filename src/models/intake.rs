//! Models that come in by the API: registered where they lie, or uploaded. Each is opened, and every tensor that it needs
//! looked for, before anybody is offered it.

use std::io;
use std::path::{Component, Path, PathBuf};

use tempfile::TempDir;

use super::records::Record;
use super::vaes::VAES;
use super::{BaseModel, CAPTIONERS, ModelCatalog, ModelFolderError, Vae, id_of, is_model_file};
use crate::diffusion::{FILE_ENDINGS, LoadError, StableDiffusion};

/// Longest name of an uploaded file, in characters.
const MAX_NAME_CHARS: usize = 128;
/// Longest path of a registered one, in bytes.
const MAX_PATH_BYTES: usize = 1024;
/// Begins the names of folders that uploads are received in; names with a dot at their start are not listed.
const SCRATCH: &str = ".upload-";

/// What kind of thing comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A base model.
    Model,
    /// A VAE.
    Vae,
}

/// What has come in.
#[derive(Clone, Debug)]
pub enum Taken {
    /// A base model.
    Model(Box<BaseModel>),
    /// A VAE.
    Vae(Box<Vae>),
}

/// Why something is not taken in, or stays.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// The name of an upload cannot be used.
    #[error("{0}")]
    Name(String),
    /// The path to register cannot be used.
    #[error("{0}")]
    Path(String),
    /// There is nothing at the path.
    #[error("there is no file or folder `{0}` in the model folder")]
    Missing(String),
    /// Something has this name already.
    #[error("there is already a `{0}` in the model folder")]
    Exists(String),
    /// The file is not what it should be.
    #[error("{0}")]
    Refused(String),
    /// It did not come by an upload.
    #[error("`{0}` was not uploaded: remove it from the model folder")]
    NotUploaded(String),
    /// The model folder cannot be read.
    #[error(transparent)]
    Folder(#[from] ModelFolderError),
    /// The file system said no.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

impl IntakeError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Io { path, source }
    }

    /// Whether there is no room left.
    pub fn is_storage_full(&self) -> bool {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        matches!(self, Self::Io { source, .. } if full.contains(&source.kind()))
    }
}

/// An upload that is being received: a folder of its own in the model folder, which goes when this is dropped.
#[derive(Debug)]
pub struct Receiving(TempDir);

impl Receiving {
    /// Where its bytes are to be written.
    pub fn folder(&self) -> &Path {
        self.0.path()
    }
}

impl ModelCatalog {
    /// Whether a file of this name can come in.
    ///
    /// # Errors
    /// [`IntakeError::Name`], [`IntakeError::Exists`].
    pub fn check_name(&self, kind: Kind, name: &str) -> Result<(), IntakeError> {
        let target = self.folder_for(kind).join(file_name(name)?);
        match target.symlink_metadata() {
            Ok(_) => Err(IntakeError::Exists(self.below(&target))),
            Err(_) => Ok(()),
        }
    }

    /// Begins an upload.
    ///
    /// # Errors
    /// When the model folder cannot be written to.
    pub fn receive(&self) -> Result<Receiving, IntakeError> {
        std::fs::create_dir_all(self.folder()).map_err(IntakeError::io(self.folder()))?;
        let scratch = tempfile::Builder::new()
            .prefix(SCRATCH)
            .tempdir_in(self.folder());
        scratch
            .map(Receiving)
            .map_err(IntakeError::io(self.folder()))
    }

    /// Takes in the file `content` of what was received: it is opened, made durable and given its name.
    ///
    /// # Errors
    /// [`IntakeError::Name`]; [`IntakeError::Refused`] when it is no model, and is gone then; [`IntakeError::Exists`]
    /// when something has this name.
    pub fn take_in(
        &self,
        kind: Kind,
        received: Receiving,
        content: &Path,
        name: &str,
    ) -> Result<Taken, IntakeError> {
        self.check_name(kind, name)?;
        let path = received.folder().join("named").join(name);
        let folder = received.folder().join("named");
        std::fs::create_dir(&folder).map_err(IntakeError::io(&folder))?;
        std::fs::rename(content, &path).map_err(IntakeError::io(&path))?;
        check(kind, &path).map_err(|message| {
            // Where it lay for a moment is nobody's business.
            IntakeError::Refused(message.replace(&format!("{}/", folder.display()), ""))
        })?;
        let file = std::fs::File::options().write(true).open(&path);
        let synced = file.and_then(|file| file.sync_all());
        synced.map_err(IntakeError::io(&path))?;
        let folder = self.folder_for(kind);
        std::fs::create_dir_all(&folder).map_err(IntakeError::io(&folder))?;
        let target = folder.join(name);
        // Never over another file: a link fails where a name is taken.
        match std::fs::hard_link(&path, &target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(IntakeError::Exists(self.below(&target)));
            }
            // A file system without links.
            Err(_) => std::fs::rename(&path, &target).map_err(IntakeError::io(&target))?,
        }
        sync_folder(&folder).map_err(IntakeError::io(&folder))?;
        self.note(kind, &target, true)
    }

    /// Registers what lies in the model folder already: it is opened, and listed from now on wherever it lies there.
    ///
    /// # Errors
    /// [`IntakeError::Path`] for one that leads outside, [`IntakeError::Missing`], [`IntakeError::Refused`].
    pub fn register(&self, kind: Kind, below: &str) -> Result<Taken, IntakeError> {
        let path = self.inside(kind, below)?;
        check(kind, &path).map_err(IntakeError::Refused)?;
        self.note(kind, &path, false)
    }

    /// Removes an uploaded model or VAE with its record.
    ///
    /// # Errors
    /// [`IntakeError::NotUploaded`]; or when it cannot be removed.
    pub fn remove(&self, id: &str, path: &Path) -> Result<(), IntakeError> {
        if !self.records.get(id).is_some_and(|record| record.uploaded) {
            return Err(IntakeError::NotUploaded(self.below(path)));
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(IntakeError::io(path)(error));
            }
            _ => {}
        }
        self.records.remove(id).map_err(IntakeError::io(path))
    }

    /// Removes what uploads have left that were received when a service ended. Only its server may call this.
    pub fn clear_uploads(&self) {
        let Ok(entries) = std::fs::read_dir(self.folder()) else {
            return;
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(SCRATCH)
                && let Err(error) = std::fs::remove_dir_all(&path)
            {
                tracing::warn!(path = %path.display(), %error, "a broken upload cannot be removed");
            }
        }
    }

    fn folder_for(&self, kind: Kind) -> PathBuf {
        match kind {
            Kind::Model => self.folder().to_owned(),
            Kind::Vae => self.vae_folder(),
        }
    }

    fn note(&self, kind: Kind, path: &Path, uploaded: bool) -> Result<Taken, IntakeError> {
        let below = self.below(path);
        let id = id_of(&below);
        let before = self.records.get(&id);
        let revision = before.as_ref().map_or(0, |record| record.revision);
        let record = match before {
            // What was corrected of a file that was there under this name does not hold for another one.
            Some(record) if !uploaded => record,
            _ => Record {
                path: below,
                uploaded,
                revision: revision + 1,
                ..Record::default()
            },
        };
        let kept = self.records.replace(&id, revision, &record);
        kept.map_err(IntakeError::io(path))?;
        Ok(match kind {
            Kind::Model => {
                let described = self.describe(path.to_owned());
                let gone = || IntakeError::Missing(record.path.clone());
                Taken::Model(Box::new(described.ok_or_else(gone)?))
            }
            Kind::Vae => Taken::Vae(Box::new(self.describe_vae(path.to_owned()))),
        })
    }

    /// A path of the model folder that leads nowhere else, by whatever links.
    fn inside(&self, kind: Kind, below: &str) -> Result<PathBuf, IntakeError> {
        let wrong = |reason: &str| IntakeError::Path(format!("`{}` {reason}", short(below)));
        if below.is_empty() || below.len() > MAX_PATH_BYTES || below.contains(['\0', '\\']) {
            return Err(wrong("is no path below the model folder"));
        }
        let relative = Path::new(below);
        let mut parts = Vec::new();
        for part in relative.components() {
            match part {
                Component::Normal(part) => parts.push(part.to_string_lossy()),
                _ => {
                    return Err(wrong(
                        "is no path below the model folder; expected one without `..`",
                    ));
                }
            }
        }
        if parts.iter().any(|part| part.starts_with('.')) {
            return Err(wrong(
                "is hidden: names with a dot at their start are not listed",
            ));
        }
        let first = parts.first().map(AsRef::as_ref);
        if first == Some(CAPTIONERS) || (first == Some(VAES)) != (kind == Kind::Vae) {
            return Err(match kind {
                Kind::Model => wrong("lies in a folder for other things than base models"),
                Kind::Vae => wrong("is not in the folder `vae`, where VAEs belong"),
            });
        }
        let path = self.folder().join(relative);
        let found = path
            .canonicalize()
            .map_err(|_| IntakeError::Missing(short(below)))?;
        let folder = self
            .folder()
            .canonicalize()
            .map_err(IntakeError::io(self.folder()))?;
        if !found.starts_with(&folder) || found == folder {
            return Err(wrong("leads out of the model folder"));
        }
        if found.is_file() && !is_model_file(&path) {
            let endings = FILE_ENDINGS.join("`, `.");
            return Err(wrong(&format!("does not end in `.{endings}`")));
        }
        // Without dots and double slashes, so that it has one id.
        Ok(parts.iter().fold(self.folder().to_owned(), |path, part| {
            path.join(part.as_ref())
        }))
    }
}

/// Opens a file and looks for every tensor; what is wrong with it.
fn check(kind: Kind, path: &Path) -> Result<(), String> {
    let text = |error: LoadError| error.to_string();
    match kind {
        Kind::Model => StableDiffusion::check(path).map(drop).map_err(text),
        Kind::Vae => StableDiffusion::check_vae(path).map(drop).map_err(text),
    }
}

/// A name that every file system takes, and that is nothing but a name.
fn file_name(name: &str) -> Result<String, IntakeError> {
    let wrong =
        |reason: &str| IntakeError::Name(format!("the file name `{}` {reason}", short(name)));
    let chars = name.chars().count();
    if !(1..=MAX_NAME_CHARS).contains(&chars) {
        return Err(wrong(&format!(
            "has {chars} characters, expected 1 to {MAX_NAME_CHARS}"
        )));
    }
    let harmful = |c: char| c.is_control() || "/\\:*?\"<>|".contains(c);
    if name.contains(harmful) || name.starts_with(['.', ' ', '-']) {
        return Err(wrong("is not one that every system takes"));
    }
    if !is_model_file(Path::new(name)) {
        let endings = FILE_ENDINGS.join("`, `.");
        return Err(wrong(&format!("does not end in `.{endings}`")));
    }
    Ok(name.to_owned())
}

fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) {
        std::fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}
