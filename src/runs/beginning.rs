//! The LoRA file that a run begins with: where it is, and whether it is still the one that was meant.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::models::ModelCatalog;
use crate::networks::InitFrom;
use crate::store::Store;
use crate::store::runs::RunFailure;

/// Where the file is; `None` where the settings name none.
pub fn place(store: &Store, models: &ModelCatalog, from: &InitFrom) -> Option<PathBuf> {
    match (&from.file, &from.sha256) {
        (Some(name), _) => Some(models.lora_file(name)),
        (None, Some(sha256)) => Some(store.blobs().path(sha256)),
        (None, None) => None,
    }
}

/// The SHA-256 of a file.
///
/// # Errors
/// When it cannot be read.
pub fn sha256(path: &Path) -> io::Result<String> {
    let (mut digest, mut file) = (Sha256::new(), File::open(path)?);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex::encode(digest.finalize()));
        }
        digest.update(&buffer[..count]);
    }
}

/// The file of a run that is about to begin.
///
/// # Errors
/// When it is gone, or another one than when the run was made.
pub fn find(store: &Store, models: &ModelCatalog, from: &InitFrom) -> Result<PathBuf, RunFailure> {
    let failed = |message: String| RunFailure::new("inputs_changed", message);
    let named = from.file.as_deref().or(from.lora_id.as_deref());
    let named = named.unwrap_or("without a name");
    let path = place(store, models, from)
        .ok_or_else(|| failed(format!("the LoRA {named} to begin with has no digest")))?;
    let found = sha256(&path)
        .map_err(|error| failed(format!("the LoRA {named} to begin with: {error}")))?;
    match &from.sha256 {
        Some(expected) if *expected != found => Err(failed(format!(
            "the LoRA {named} to begin with has the SHA-256 {found}, expected {expected} as when the run was made"
        ))),
        _ => Ok(path),
    }
}
