//! Files named by their SHA-256. A file is complete and on disk before it has its name.
//!
//! A file's modification time says when it was last stored, or when a row last ceased to name it; [`Blobs::sweep`]
//! goes by it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};
use tempfile::{NamedTempFile, TempDir};

use super::StoreError;

/// Bytes hashed at once.
const CHUNK_BYTES: usize = 1 << 20;

/// A SHA-256.
pub type Digest = [u8; 32];

/// The blob folder of a data folder. All functions block.
#[derive(Clone, Debug)]
pub struct Blobs {
    root: PathBuf,
    scratch: PathBuf,
}

/// What a sweep has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many blobs.
    pub blobs: u64,
    /// How much room they took.
    pub size_bytes: u64,
}

/// Who else may be at the blobs, in this process or another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lock {
    /// Others who store, but none who removes.
    Store,
    /// Nobody.
    Remove,
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
        self.adopt_known(file, StoredBlob { sha256, size_bytes })
    }

    /// The same of a file whose digest and size are known, by whoever has just read it.
    ///
    /// # Errors
    /// When the file cannot be flushed or moved.
    pub fn adopt_known(&self, file: &Path, known: StoredBlob) -> Result<StoredBlob, StoreError> {
        let io = |source| StoreError::io(file, source);
        let opened = File::options().write(true).open(file).map_err(io)?;
        let path = self.path(&known.sha256);
        let _lock = self.lock(Lock::Store)?;
        if touch(&path)? {
            fs::remove_file(file).map_err(io)?;
        } else {
            // It may have been written long ago.
            opened.set_modified(SystemTime::now()).map_err(io)?;
            opened.sync_all().map_err(io)?;
            let folder = self.folder_of(&path)?;
            fs::rename(file, &path).map_err(io)?;
            sync_folder(&folder)?;
        }
        Ok(known)
    }

    /// Stores bytes.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn put(&self, bytes: &[u8]) -> Result<StoredBlob, StoreError> {
        let sha256 = hex::encode(Sha256::digest(bytes));
        let path = self.path(&sha256);
        let _lock = self.lock(Lock::Store)?;
        if !touch(&path)? {
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

    /// Makes a blob young again, if it is there: its last row may go now, and another be about to name it.
    ///
    /// # Errors
    /// When its time cannot be set.
    pub fn touch(&self, sha256: &str) -> Result<(), StoreError> {
        touch(&self.path(sha256)).map(|_| ())
    }

    /// Removes the blobs whose digest begins with `first`, is not `named`, and whose time is earlier than `before`.
    /// What cannot be removed is logged and stays.
    ///
    /// # Errors
    /// When their folder cannot be read.
    pub fn sweep(
        &self,
        first: u8,
        named: &HashSet<Digest>,
        before: SystemTime,
    ) -> Result<Swept, StoreError> {
        let folder = self.root.join(hex::encode([first]));
        let io = |source| StoreError::io(&folder, source);
        let mut swept = Swept::default();
        if !folder.is_dir() {
            return Ok(swept);
        }
        for entry in fs::read_dir(&folder).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            // A file with another name is not ours.
            let Some(digest) = name.to_str().and_then(parse_digest) else {
                continue;
            };
            if named.contains(&digest) {
                continue;
            }
            match self.remove_older(&folder.join(name), before) {
                Ok(Some(size_bytes)) => {
                    swept.blobs += 1;
                    swept.size_bytes += size_bytes;
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "a blob that no row names was not removed"),
            }
        }
        Ok(swept)
    }

    /// Removes a file whose time is earlier than `before`; its size, if it was.
    fn remove_older(&self, path: &Path, before: SystemTime) -> Result<Option<u64>, StoreError> {
        let io = |source| StoreError::io(path, source);
        // Nobody can find the file, and count on it, between the two looks at it.
        let _lock = self.lock(Lock::Remove)?;
        let found = fs::metadata(path).map_err(io)?;
        if found.modified().map_err(io)? >= before {
            return Ok(None);
        }
        fs::remove_file(path).map_err(io)?;
        Ok(Some(found.len()))
    }

    /// Waits until it may; ends when the file is dropped.
    fn lock(&self, lock: Lock) -> Result<File, StoreError> {
        let path = self.root.join(".lock");
        let io = |source| StoreError::io(&path, source);
        let mut options = File::options();
        let file = options.create(true).append(true).open(&path).map_err(io)?;
        let locked = match lock {
            Lock::Store => file.lock_shared(),
            Lock::Remove => file.lock(),
        };
        match locked {
            // Where files cannot be locked, nothing is removed.
            Err(error) if error.kind() == io::ErrorKind::Unsupported && lock == Lock::Store => {}
            locked => locked.map_err(io)?,
        }
        Ok(file)
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

/// Sets a file's time to now; `false` when there is no such file.
fn touch(path: &Path) -> Result<bool, StoreError> {
    let touched = match File::options().write(true).open(path) {
        Ok(file) => file.set_modified(SystemTime::now()).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    };
    touched.map_err(|source| StoreError::io(path, source))
}

/// The digest of 64 hex digits.
pub(super) fn parse_digest(text: &str) -> Option<Digest> {
    let mut digest = Digest::default();
    hex::decode_to_slice(text, &mut digest).ok()?;
    Some(digest)
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
    fn what_is_stored_again_is_young_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let blobs = Blobs::open(folder.path()).expect("a blob folder");
        let hour = std::time::Duration::from_secs(3600);
        let sweep = |sha256: &str| {
            let first = parse_digest(sha256).expect("a digest")[0];
            let swept = blobs.sweep(first, &HashSet::new(), SystemTime::now() - hour);
            swept.expect("swept").size_bytes
        };
        let sha256 = blobs.put(b"lumo").expect("stored").sha256;
        let age = || {
            let file = File::options().write(true).open(blobs.path(&sha256));
            let set = file
                .expect("there")
                .set_modified(SystemTime::now() - 2 * hour);
            set.expect("set");
        };
        age();
        blobs.put(b"lumo").expect("stored");
        assert_eq!(sweep(&sha256), 0);
        age();
        blobs.touch(&sha256).expect("touched");
        assert_eq!(sweep(&sha256), 0);
        age();
        let upload = blobs.scratch().expect("a folder").keep().join("upload-0");
        fs::write(&upload, b"lumo").expect("written");
        blobs.adopt(&upload).expect("stored");
        assert_eq!(sweep(&sha256), 0);
        age();
        assert_eq!(sweep(&sha256), 4);
        assert!(!blobs.path(&sha256).exists());

        let upload = blobs.scratch().expect("a folder").keep().join("upload-1");
        fs::write(&upload, b"slow").expect("written");
        let file = File::options().write(true).open(&upload).expect("there");
        file.set_modified(SystemTime::now() - 2 * hour)
            .expect("set");
        let sha256 = blobs.adopt(&upload).expect("stored").sha256;
        assert_eq!(sweep(&sha256), 0);
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
