//! What is known of a model besides its files: corrections of what they tell, and whether it was uploaded. Kept in the
//! data folder, not beside the model: the model folder may be read-only, or belong to several services.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::diffusion::PredictionType;

/// The largest file that is one of ours.
const MAX_BYTES: u64 = 64 << 10;
const MAX_RECORDS: usize = 10_000;

/// What is known of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its path below the model folder, with slashes.
    pub path: String,
    /// Whether it came by an upload.
    #[serde(default)]
    pub uploaded: bool,
    /// What its UNet predicts, whatever its files say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction_type: Option<PredictionType>,
    /// Whether nothing of the picture is left at its last timestep, whatever its files say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_terminal_snr: Option<bool>,
    /// Counts the changes.
    #[serde(default)]
    pub revision: i64,
}

/// Records by the ids of models. Cloning is cheap. All functions block.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// `None` keeps them in memory.
    folder: Option<PathBuf>,
    kept: Arc<Mutex<HashMap<String, Record>>>,
}

impl Records {
    /// Records that outlive the process.
    pub fn in_folder(folder: PathBuf) -> Self {
        Self {
            folder: Some(folder),
            ..Self::default()
        }
    }

    /// The record of this id.
    pub fn get(&self, id: &str) -> Option<Record> {
        match &self.folder {
            Some(folder) => read(&folder.join(format!("{id}.json"))),
            None => self.lock().get(id).cloned(),
        }
    }

    /// All records, by id.
    pub fn all(&self) -> HashMap<String, Record> {
        let Some(folder) = &self.folder else {
            return self.lock().clone();
        };
        let Ok(entries) = fs::read_dir(folder) else {
            return HashMap::new(); // there is none yet
        };
        let records = entries.take(MAX_RECORDS).filter_map(|entry| {
            let path = entry.ok()?.path();
            let id = path.file_name()?.to_str()?.strip_suffix(".json")?;
            Some((id.to_owned(), read(&path)?))
        });
        records.collect()
    }

    /// Keeps a record in place of the one before, if that still is of revision `before`; says whether it was.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn replace(&self, id: &str, before: i64, record: &Record) -> io::Result<bool> {
        let mut kept = self.lock(); // one writer at a time: workers only read
        let current = match &self.folder {
            Some(folder) => read(&folder.join(format!("{id}.json"))),
            None => kept.get(id).cloned(),
        };
        if current.map_or(0, |record| record.revision) != before {
            return Ok(false);
        }
        let Some(folder) = &self.folder else {
            kept.insert(id.to_owned(), record.clone());
            return Ok(true);
        };
        fs::create_dir_all(folder)?;
        let mut written = tempfile::NamedTempFile::new_in(folder)?;
        written.write_all(&serde_json::to_vec_pretty(record)?)?;
        written.as_file().sync_all()?;
        let path = folder.join(format!("{id}.json"));
        written.persist(path).map_err(|error| error.error)?;
        Ok(true)
    }

    /// Forgets a record.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        self.lock().remove(id);
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        match fs::remove_file(folder.join(format!("{id}.json"))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Record>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A record that cannot be read counts as none: it only corrects what files tell.
fn read(path: &Path) -> Option<Record> {
    let size = fs::metadata(path).ok()?.len();
    let bytes = (size <= MAX_BYTES).then(|| fs::read(path))?.ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "what was kept of a model cannot be read");
            None
        }
    }
}
