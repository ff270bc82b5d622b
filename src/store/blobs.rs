//! Files named by their SHA-256. A file is complete and on disk before it has its name.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tempfile::{NamedTempFile, TempDir};

use super::StoreError;

/// Bytes hashed at once.
const CHUNK_BYTES: usize = 1 << 20;

/// The blob folder of a data folder. All functions block.
#[derive(Clone, Debug)]
pub struct Blobs {
    root: PathBuf,
    scratch: PathBuf,
}

/// A blob that is safely on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBlob {
    /// SHA-256 of the content, lower-case hex.
    pub sha256: String,
    /// Its length.
    pub size_bytes: u64,
}

impl Blobs {
    /// Makes the folders where they are missing.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let blobs = Self {
            root: data_dir.join("blobs"),
            scratch: data_dir.join("scratch"),
        };
        for folder in [&blobs.root, &blobs.scratch] {
            fs::create_dir_all(folder).map_err(|source| StoreError::io(folder, source))?;
        }
        Ok(blobs)
    }

    /// Where the blob of this digest is.
    pub fn path(&self, sha256: &str) -> PathBuf {
        // Two levels keep folders short. A digest comes from a row, never from a request.
        self.root.join(sha256.get(..2).unwrap_or("__")).join(sha256)
    }

    /// A folder for unfinished files, on the same file system as the blobs; gone when dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch(&self) -> Result<TempDir, StoreError> {
        tempfile::Builder::new()
            .prefix("upload-")
            .tempdir_in(&self.scratch)
            .map_err(|source| StoreError::io(&self.scratch, source))
    }

    /// Removes what an earlier process left unfinished. Only for the one server of this data folder, at its start.
    ///
    /// # Errors
    /// When the folder cannot be read or cleared.
    pub fn clear_scratch(&self) -> Result<(), StoreError> {
        let io = |source| StoreError::io(&self.scratch, source);
        for entry in fs::read_dir(&self.scratch).map_err(io)? {
            let entry = entry.map_err(io)?;
            if entry.file_type().map_err(io)?.is_dir() {
                fs::remove_dir_all(entry.path()).map_err(io)?;
            } else {
                fs::remove_file(entry.path()).map_err(io)?;
            }
        }
        Ok(())
    }

    /// Takes over a finished file of the scratch folder: hashed, flushed to disk, renamed.
    ///
    /// # Errors
    /// When the file cannot be read, flushed or moved.
    pub fn adopt(&self, file: &Path) -> Result<StoredBlob, StoreError> {
        let io = |source| StoreError::io(file, source);
        let mut opened = File::open(file).map_err(io)?;
        let (sha256, size_bytes) = digest(&mut opened).map_err(io)?;
        let path = self.path(&sha256);
        if path.is_file() {
            fs::remove_file(file).map_err(io)?;
        } else {
            opened.sync_all().map_err(io)?;
            let folder = self.folder_of(&path)?;
            fs::rename(file, &path).map_err(io)?;
            sync_folder(&folder)?;
        }
        Ok(StoredBlob { sha256, size_bytes })
    }

    /// Stores bytes.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn put(&self, bytes: &[u8]) -> Result<StoredBlob, StoreError> {
        let sha256 = hex::encode(Sha256::digest(bytes));
        let path = self.path(&sha256);
        if !path.is_file() {
            let io = |source| StoreError::io(&path, source);
            let folder = self.folder_of(&path)?;
            let mut file = NamedTempFile::new_in(&self.scratch).map_err(io)?;
            file.write_all(bytes).map_err(io)?;
            file.as_file().sync_all().map_err(io)?;
            file.persist(&path).map_err(|error| io(error.error))?;
            sync_folder(&folder)?;
        }
        Ok(StoredBlob {
            sha256,
            size_bytes: bytes.len() as u64,
        })
    }

    fn folder_of(&self, path: &Path) -> Result<PathBuf, StoreError> {
        let folder = path.parent().unwrap_or(&self.root).to_owned();
        if !folder.is_dir() {
            fs::create_dir_all(&folder).map_err(|source| StoreError::io(&folder, source))?;
            sync_folder(&self.root)?;
        }
        Ok(folder)
    }
}

fn digest(file: &mut File) -> io::Result<(String, u64)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut size = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok((hex::encode(hasher.finalize()), size));
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
    }
}

/// A rename is durable only when its folder is.
fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    if cfg!(unix) {
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|source| StoreError::io(folder, source))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_content_is_one_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let blobs = Blobs::open(folder.path()).expect("a blob folder");
        let first = blobs.put(b"lumo").expect("stored");
        let scratch = blobs.scratch().expect("a folder");
        let upload = scratch.path().join("upload-0");
        fs::write(&upload, b"lumo").expect("written");
        let second = blobs.adopt(&upload).expect("stored");
        assert_eq!(first, second);
        assert!(!upload.exists());
        assert_eq!(fs::read(blobs.path(&first.sha256)).expect("there"), b"lumo");
        assert_eq!(first.sha256, hex::encode(Sha256::digest(b"lumo")));
    }

    #[test]
    fn unfinished_files_are_cleared() {
        let folder = tempfile::tempdir().expect("a folder");
        let blobs = Blobs::open(folder.path()).expect("a blob folder");
        let left = blobs.scratch().expect("a folder").keep();
        fs::write(left.join("half"), b"half").expect("written");
        blobs.clear_scratch().expect("cleared");
        assert!(!left.exists());
    }
}
