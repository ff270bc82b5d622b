//! What tells base models apart: SHA-256 over content, not over names. Reading gigabytes takes a while, so that a digest
//! is remembered, in memory and on disk, for as long as size and time of every file stay.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// How deep a diffusers folder is: its parts are folders of files.
const MAX_DEPTH: usize = 2;
/// Files of a folder that say what the model computes: weights, settings, vocabularies.
const ENDINGS: [&str; 3] = ["safetensors", "json", "txt"];
/// Weights as torch writes them, which count where there are no others beside them.
const TORCH_ENDING: &str = "bin";
const CHUNK_BYTES: usize = 1 << 20;

/// What a base model is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelDigest {
    /// Of a single file its SHA-256; of a folder the SHA-256 of the text that `sha256sum` would write of `files`:
    /// digest, two spaces, path, newline, in the order of the paths.
    pub sha256: String,
    /// The files.
    pub files: Vec<ModelFile>,
}

/// A file of a base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    /// Its path below the model's folder; of a single file its name.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// Digest of its content.
    pub sha256: String,
}

/// What tells, without reading them, that files have not changed: path, size, modification time in nanoseconds.
type Stamps = Vec<(String, u64, u128)>;

/// A digest, and what it was made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    stamps: Stamps,
    digest: ModelDigest,
}

/// Digests of models by path. Cloning is cheap. All functions block.
#[derive(Clone, Debug, Default)]
pub struct Digests {
    folder: Option<PathBuf>,
    known: Arc<Mutex<HashMap<PathBuf, Remembered>>>,
    /// Models that a thread reads just now.
    busy: Arc<Mutex<Vec<PathBuf>>>,
}

impl Digests {
    /// Digests that outlive the process, in `folder`.
    pub fn in_folder(folder: PathBuf) -> Self {
        Self {
            folder: Some(folder),
            ..Self::default()
        }
    }

    /// The digest of the model at `path`, if it is known; reads no weights.
    pub fn known(&self, path: &Path) -> Option<ModelDigest> {
        self.find(path, &stamps(path).ok()?)
    }

    /// The digest of the model at `path`. The first time all of it is read.
    ///
    /// # Errors
    /// When a file cannot be read, or changes meanwhile.
    pub fn get(&self, path: &Path) -> io::Result<ModelDigest> {
        let before = stamps(path)?;
        if let Some(known) = self.find(path, &before) {
            return Ok(known);
        }
        let digest = read(path, &before)?;
        if stamps(path)? != before {
            let message = "the model's files have changed while they were read";
            return Err(io::Error::other(message));
        }
        let remembered = Remembered {
            stamps: before,
            digest: digest.clone(),
        };
        if let Err(error) = self.keep(path, &remembered) {
            tracing::warn!(path = %path.display(), %error, "the digest of a base model cannot be remembered");
        }
        self.lock().insert(path.to_owned(), remembered);
        Ok(digest)
    }

    /// Has a thread read the model, unless its digest is known or is being made.
    pub fn prepare(&self, path: &Path) {
        if self.known(path).is_some() {
            return;
        }
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        // One at a time: reading more at once would only take memory and disk from what trains.
        if !busy.is_empty() {
            return;
        }
        busy.push(path.to_owned());
        drop(busy);
        let (own, path) = (self.clone(), path.to_owned());
        std::thread::spawn(move || {
            if let Err(error) = own.get(&path) {
                tracing::warn!(path = %path.display(), %error, "a base model cannot be read for its digest");
            }
            let mut busy = own.busy.lock().unwrap_or_else(PoisonError::into_inner);
            busy.retain(|busy| *busy != path);
        });
    }

    fn find(&self, path: &Path, stamps: &Stamps) -> Option<ModelDigest> {
        if let Some(known) = self.lock().get(path)
            && known.stamps == *stamps
        {
            return Some(known.digest.clone());
        }
        let bytes = fs::read(self.file(path)?).ok()?; // there is none yet
        let found: Remembered = serde_json::from_slice(&bytes).ok()?; // damaged: it is made again
        if found.stamps != *stamps {
            return None;
        }
        let digest = found.digest.clone();
        self.lock().insert(path.to_owned(), found);
        Some(digest)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, Remembered>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, path: &Path) -> Option<PathBuf> {
        let name = hex::encode(Sha256::digest(path.as_os_str().as_encoded_bytes()));
        Some(self.folder.as_ref()?.join(format!("{name}.json")))
    }

    fn keep(&self, path: &Path, remembered: &Remembered) -> io::Result<()> {
        let (Some(folder), Some(file)) = (&self.folder, self.file(path)) else {
            return Ok(());
        };
        fs::create_dir_all(folder)?;
        let mut written = tempfile::NamedTempFile::new_in(folder)?;
        written.write_all(&serde_json::to_vec_pretty(remembered)?)?;
        written.as_file().sync_all()?;
        written.persist(file).map_err(|error| error.error)?;
        Ok(())
    }
}

/// Path below the model, size and time of each of its files, in the order of the paths.
fn stamps(path: &Path) -> io::Result<Stamps> {
    let mut found = Vec::new();
    if path.is_dir() {
        collect(path, "", MAX_DEPTH, &mut found)?;
    } else {
        let name = path.file_name().unwrap_or(path.as_os_str());
        found.push(stamp(name.to_string_lossy().into_owned(), path)?);
    }
    found.sort();
    Ok(found)
}

fn stamp(name: String, path: &Path) -> io::Result<(String, u64, u128)> {
    let found = fs::metadata(path)?;
    let changed = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let changed = changed.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok((name, found.len(), changed.as_nanos()))
}

fn collect(folder: &Path, below: &str, depth: usize, found: &mut Stamps) -> io::Result<()> {
    let (mut torch, mut safe) = (Vec::new(), false);
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        let name = format!("{below}{name}");
        let ending = path.extension().and_then(|ending| ending.to_str());
        if path.is_dir() {
            if depth > 0 {
                collect(&path, &format!("{name}/"), depth - 1, found)?;
            }
        } else if ending.is_some_and(|ending| ENDINGS.contains(&ending)) {
            safe |= ending == Some("safetensors");
            found.push(stamp(name, &path)?);
        } else if ending == Some(TORCH_ENDING) {
            torch.push(stamp(name, &path)?);
        }
    }
    if !safe {
        found.append(&mut torch);
    }
    Ok(())
}

fn read(path: &Path, stamps: &Stamps) -> io::Result<ModelDigest> {
    let mut files = Vec::with_capacity(stamps.len());
    let mut list = String::new();
    for (name, size_bytes, _) in stamps {
        let file = if path.is_dir() {
            path.join(name)
        } else {
            path.to_owned()
        };
        let sha256 = digest(&file)?;
        list.push_str(&format!("{sha256}  {name}\n"));
        files.push(ModelFile {
            path: name.clone(),
            size_bytes: *size_bytes,
            sha256,
        });
    }
    let sha256 = if path.is_dir() {
        hex::encode(Sha256::digest(list.as_bytes()))
    } else {
        files[0].sha256.clone()
    };
    Ok(ModelDigest { sha256, files })
}

fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex::encode(digest.finalize()));
        }
        digest.update(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let model = folder.path().join("model");
        fs::create_dir_all(model.join("unet")).expect("made");
        fs::write(model.join("model_index.json"), "{}").expect("written");
        fs::write(model.join("unet/w.safetensors"), "weights").expect("written");
        fs::write(model.join("README.md"), "words").expect("written");
        folder
    }

    #[test]
    fn a_folder_is_told_by_what_sha256sum_says_of_its_files() {
        let folder = folder();
        let model = folder.path().join("model");
        let digests = Digests::in_folder(folder.path().join("digests"));
        assert_eq!(digests.known(&model), None);
        let found = digests.get(&model).expect("readable");
        let paths: Vec<&str> = found.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths, ["model_index.json", "unet/w.safetensors"]);
        let of = |text: &str| hex::encode(Sha256::digest(text));
        let list = format!(
            "{}  {}\n{}  {}\n",
            of("{}"),
            paths[0],
            of("weights"),
            paths[1]
        );
        assert_eq!(found.sha256, of(&list));

        // Another process knows it without reading, and a copy elsewhere is the same model.
        let later = Digests::in_folder(folder.path().join("digests"));
        assert_eq!(later.known(&model).as_ref(), Some(&found));
        let copy = folder.path().join("copy");
        fs::rename(&model, &copy).expect("moved");
        assert_eq!(later.get(&copy).expect("readable"), found);
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let folder = folder();
        let file = folder.path().join("model/unet/w.safetensors");
        let digests = Digests::default();
        let before = digests.get(&file).expect("readable");
        assert_eq!(before.sha256, hex::encode(Sha256::digest("weights")));
        fs::write(&file, "WEIGHTS").expect("written");
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        let opened = File::options().write(true).open(&file).expect("there");
        opened.set_modified(later).expect("set");
        assert_eq!(digests.known(&file), None);
        assert_ne!(digests.get(&file).expect("readable"), before);
        assert!(digests.get(&folder.path().join("absent")).is_err());
    }
}
