//! Work on kept files: a few at a time, on threads of their own, and its result is a file like the others.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::{LoraError, Origin, OriginKind, Source};
use crate::lora_tools::{
    self, AdapterFile, Conversion, Ingredient, Inspection, Merge, Method, ResizeReport, Resizing,
    ToolError,
};
use crate::networks::SavePrecision;
use crate::store::loras::{Lora, OtherLora};
use crate::store::{Store, StoreError};

/// Files that are worked on at the same time.
const SLOTS: usize = 2;
/// How long a request waits for one of them.
const WAIT: Duration = Duration::from_secs(20);
/// Largest file that is taken.
pub const MAX_UPLOAD_BYTES: u64 = lora_tools::file::MAX_FILE_BYTES;
/// Longest file name, without its ending.
const MAX_NAME: usize = 150;

/// What is to be merged.
#[derive(Clone, Debug)]
pub struct MergeRequest {
    /// Files and how much of them is taken.
    pub sources: Vec<(Uuid, f64)>,
    pub method: Method,
    pub precision: Option<SavePrecision>,
    /// The result's name; made up without.
    pub file_name: Option<String>,
}

/// A file that was made, and what there is to say about it.
#[derive(Debug)]
pub struct Work<T> {
    pub lora: Lora,
    pub report: T,
}

/// LoRA files. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct LoraService {
    store: Store,
    slots: Arc<Semaphore>,
}

impl LoraService {
    /// On the files of a store.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            slots: Arc::new(Semaphore::new(SLOTS)),
        }
    }

    /// A folder for an upload.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch(&self) -> Result<TempDir, LoraError> {
        Ok(self.store.blobs().scratch()?)
    }

    /// Looks into a file.
    ///
    /// # Errors
    /// [`LoraError::NotFound`], [`LoraError::Busy`], [`LoraError::Unusable`].
    pub async fn inspect(&self, id: Uuid) -> Result<Inspection, LoraError> {
        let lora = self.find(id).await?;
        let path = self.store.blobs().path(&lora.sha256);
        let names = Names(vec![(path.clone(), lora.file_name)]);
        self.work(move || lora_tools::inspect(&path).map_err(|error| names.told(error)))
            .await
    }

    /// Takes an uploaded file: its adapters are read once, all of them.
    ///
    /// # Errors
    /// [`LoraError::Unusable`], [`LoraError::Busy`], [`LoraError::StorageFull`].
    pub async fn upload(&self, path: PathBuf, name: &str) -> Result<Lora, LoraError> {
        let file_name = clean(name);
        let names = Names(vec![(path.clone(), file_name.clone())]);
        let read = path.clone();
        self.work(move || lora_tools::check::read_all(&read).map_err(|error| names.told(error)))
            .await?;
        let origin = Origin {
            kind: OriginKind::Uploaded,
            sources: Vec::new(),
        };
        self.keep(path, file_name, &origin).await
    }

    /// Merges files into a new one.
    ///
    /// # Errors
    /// As [`Self::inspect`], and [`LoraError::Option`].
    pub async fn merge(&self, request: MergeRequest) -> Result<Lora, LoraError> {
        let mut sources = Vec::with_capacity(request.sources.len());
        for (id, strength) in &request.sources {
            sources.push((self.find(*id).await?, *strength));
        }
        let file_name = named(request.file_name.as_deref(), "merged");
        let (wish, blobs) = (
            Merge {
                method: request.method,
                precision: request.precision,
                title: stem(&file_name).to_owned(),
            },
            self.store.blobs().clone(),
        );
        let origin = Origin {
            kind: OriginKind::Merged,
            sources: sources
                .iter()
                .map(|(lora, strength)| source(lora, Some(*strength)))
                .collect(),
        };
        let names = Names(
            sources
                .iter()
                .map(|(lora, _)| (blobs.path(&lora.sha256), lora.file_name.clone()))
                .collect(),
        );
        self.make(file_name, &origin, names, move |output| {
            let mut ingredients = Vec::with_capacity(sources.len());
            for (lora, strength) in &sources {
                let mut one = Ingredient::open(&blobs.path(&lora.sha256), *strength)?;
                stem(&lora.file_name).clone_into(&mut one.title);
                ingredients.push(one);
            }
            lora_tools::merge(&ingredients, &wish, output, &mut ()).map(|_| ())
        })
        .await
        .map(|work| work.lora)
    }

    /// Makes a file with other ranks.
    ///
    /// # Errors
    /// As [`Self::merge`].
    pub async fn resize(
        &self,
        id: Uuid,
        wish: Resizing,
        file_name: Option<String>,
    ) -> Result<Work<ResizeReport>, LoraError> {
        let lora = self.find(id).await?;
        let base = format!("{}-resized", stem(&lora.file_name));
        let file_name = named(file_name.as_deref(), &base);
        let origin = made_of(OriginKind::Resized, &lora);
        let path = self.store.blobs().path(&lora.sha256);
        let names = Names(vec![(path.clone(), lora.file_name)]);
        self.make(file_name, &origin, names, move |output| {
            lora_tools::resize(&AdapterFile::open_known(&path)?, &wish, output, &mut ())
        })
        .await
    }

    /// Makes a file with other names.
    ///
    /// # Errors
    /// As [`Self::merge`].
    pub async fn convert(
        &self,
        id: Uuid,
        wish: Conversion,
        file_name: Option<String>,
    ) -> Result<Lora, LoraError> {
        let lora = self.find(id).await?;
        let base = format!("{}-converted", stem(&lora.file_name));
        let file_name = named(file_name.as_deref(), &base);
        let origin = made_of(OriginKind::Converted, &lora);
        let path = self.store.blobs().path(&lora.sha256);
        let names = Names(vec![(path.clone(), lora.file_name)]);
        self.make(file_name, &origin, names, move |output| {
            let file = AdapterFile::open_known(&path)?;
            lora_tools::convert(&file, &wish, output, &mut ()).map(|_| ())
        })
        .await
        .map(|work| work.lora)
    }

    async fn find(&self, id: Uuid) -> Result<Lora, LoraError> {
        self.store.lora(id).await.map_err(|error| match error {
            StoreError::NotFound => LoraError::NotFound(id),
            other => LoraError::Store(other),
        })
    }

    /// Has a file made in the scratch folder, and keeps it.
    async fn make<T: Send + 'static>(
        &self,
        file_name: String,
        origin: &Origin,
        names: Names,
        write: impl FnOnce(&Path) -> Result<T, ToolError> + Send + 'static,
    ) -> Result<Work<T>, LoraError> {
        let scratch = self.scratch()?;
        let output = scratch.path().join("result");
        let target = output.clone();
        let mut names = names;
        names.0.push((output.clone(), file_name.clone()));
        let report = self
            .work(move || write(&target).map_err(|error| names.told(error)))
            .await?;
        let lora = self.keep(output, file_name, origin).await?;
        Ok(Work { lora, report })
    }

    /// Does blocking work once there is a place for it.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, LoraError> + Send + 'static,
    ) -> Result<T, LoraError> {
        let waiting = self.slots.clone().acquire_owned();
        let permit: OwnedSemaphorePermit = match tokio::time::timeout(WAIT, waiting).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) | Err(_) => return Err(LoraError::Busy),
        };
        // The place is taken until the work is done, also where nobody waits for it any more.
        let done = spawn_blocking(move || {
            let done = work();
            drop(permit);
            done
        });
        done.await
            .map_err(|error| LoraError::Failed(error.to_string()))?
    }

    async fn keep(
        &self,
        path: PathBuf,
        file_name: String,
        origin: &Origin,
    ) -> Result<Lora, LoraError> {
        let blobs = self.store.blobs().clone();
        let blob = spawn_blocking(move || blobs.adopt(&path))
            .await
            .map_err(StoreError::from)?;
        let blob = blob.map_err(|error| match error {
            error if error.is_storage_full() => LoraError::StorageFull,
            error => LoraError::Store(error),
        })?;
        let origin = serde_json::to_string(origin);
        let new = OtherLora {
            id: Uuid::now_v7(),
            file_name,
            sha256: blob.sha256,
            size_bytes: blob.size_bytes,
            origin: origin.map_err(|error| LoraError::Failed(error.to_string()))?,
        };
        Ok(self.store.add_lora(new).await?)
    }
}

/// Where files are, and what clients call them: messages name no path of this machine.
struct Names(Vec<(PathBuf, String)>);

impl Names {
    fn told(&self, error: ToolError) -> LoraError {
        match LoraError::from(error) {
            LoraError::Unusable(message) => LoraError::Unusable(self.replace(message)),
            LoraError::Option { field, message } => LoraError::Option {
                field,
                message: self.replace(message),
            },
            other => other,
        }
    }

    fn replace(&self, mut message: String) -> String {
        for (path, name) in &self.0 {
            message = message.replace(&path.display().to_string(), name);
        }
        message
    }
}

fn source(lora: &Lora, strength: Option<f64>) -> Source {
    Source {
        lora_id: lora.id,
        file_name: lora.file_name.clone(),
        sha256: lora.sha256.clone(),
        strength,
    }
}

fn made_of(kind: OriginKind, lora: &Lora) -> Origin {
    Origin {
        kind,
        sources: vec![source(lora, None)],
    }
}

fn stem(file_name: &str) -> &str {
    file_name.strip_suffix(".safetensors").unwrap_or(file_name)
}

/// The wanted name, or one that is made up.
fn named(wanted: Option<&str>, otherwise: &str) -> String {
    clean(wanted.unwrap_or(otherwise))
}

/// A file name that every system takes, with the right ending.
fn clean(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let kept: String = stem(last)
        .chars()
        .map(|c| {
            if c.is_control() || "<>:\"|?*".contains(c) {
                '_'
            } else {
                c
            }
        })
        .take(MAX_NAME)
        .collect();
    let kept = kept.trim().trim_start_matches('.');
    let kept = if kept.is_empty() { "lora" } else { kept };
    format!("{kept}.safetensors")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned() {
        assert_eq!(clean("lumo.safetensors"), "lumo.safetensors");
        assert_eq!(clean("../../etc/lumo"), "lumo.safetensors");
        assert_eq!(clean("a:b\n"), "a_b_.safetensors");
        assert_eq!(clean(".."), "lora.safetensors");
        assert_eq!(clean(""), "lora.safetensors");
    }
}
