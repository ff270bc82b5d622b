//! Small pictures on disk, named by all that decides them. The folder can be deleted at any time.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use sha2::{Digest as _, Sha256};

/// Sides that a thumbnail may have.
pub const MIN_SIDE_PX: u32 = 16;
pub const MAX_SIDE_PX: u32 = 1024;
/// Part of every name: another program makes others.
const FORMAT: &str = concat!("thumbnail 1 ", env!("CARGO_PKG_VERSION"));
/// The most that the folder takes.
const MAX_BYTES: u64 = 512 << 20;
/// What is left when it took more.
const KEPT_BYTES: u64 = MAX_BYTES / 4 * 3;
const QUALITY: u8 = 85;

/// A JPEG.
#[derive(Clone, Debug)]
pub struct Thumbnail {
    /// The file.
    pub bytes: Vec<u8>,
}

/// The folder. Cloning is cheap. All functions block.
#[derive(Clone, Debug)]
pub struct Thumbnails {
    root: PathBuf,
    /// What is in it; `None` before it was looked at.
    size: Arc<Mutex<Option<u64>>>,
}

/// The name of a thumbnail: a digest of all that decides it, in hex.
pub fn name(parts: &[&str]) -> String {
    let mut digest = Sha256::new();
    for part in [FORMAT].iter().chain(parts) {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    hex::encode(&digest.finalize()[..20])
}

/// The largest size of the same shape within a square; a picture is not enlarged.
pub fn fit_within((width, height): (u32, u32), side: u32) -> (u32, u32) {
    let longest = width.max(height).max(1);
    if longest <= side {
        return (width, height);
    }
    let scaled = |length: u32| {
        let scaled =
            (u64::from(length) * u64::from(side) + u64::from(longest) / 2) / u64::from(longest);
        (scaled as u32).clamp(1, side)
    };
    (scaled(width), scaled(height))
}

/// A picture as a JPEG.
///
/// # Errors
/// With the reason, when it cannot be written.
pub fn encode(picture: &RgbImage) -> Result<Thumbnail, String> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, QUALITY)
        .encode_image(picture)
        .map_err(|error| error.to_string())?;
    Ok(Thumbnail { bytes })
}

impl Thumbnails {
    /// Below the data folder; made when something is kept.
    pub fn new(data_dir: &Path) -> Self {
        Self {
            root: data_dir.join("thumbnails"),
            size: Arc::default(),
        }
    }

    /// What is kept under a name.
    pub fn get(&self, name: &str) -> Option<Thumbnail> {
        let path = self.path(name);
        let bytes = fs::read(&path).ok()?;
        // Cut off by a power failure, it has no end.
        if !bytes.ends_with(&[0xFF, 0xD9]) {
            return None;
        }
        if let Ok(file) = fs::File::options().write(true).open(&path) {
            let _ = file.set_modified(SystemTime::now()); // it may have been removed just now
        }
        Some(Thumbnail { bytes })
    }

    /// Keeps a thumbnail; where that is not possible it is made again next time.
    pub fn put(&self, name: &str, thumbnail: &Thumbnail) {
        if let Err(error) = self.write(name, &thumbnail.bytes) {
            tracing::warn!(%error, folder = %self.root.display(), "a thumbnail was not kept");
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        file.persist(&path)?; // not flushed: a torn one is known by its end
        let mut size = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        let total = match *size {
            Some(size) => size + bytes.len() as u64,
            None => files(&self.root).iter().map(|(_, _, size)| size).sum(),
        };
        *size = Some(match total > MAX_BYTES {
            true => shrink(&self.root, KEPT_BYTES),
            false => total,
        });
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root
            .join(name.get(..2).unwrap_or("__"))
            .join(format!("{name}.jpg"))
    }
}

/// When each file was last used, and its size.
fn files(root: &Path) -> Vec<(SystemTime, PathBuf, u64)> {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    entries(root)
        .flat_map(|folder| entries(&folder.path()))
        .filter_map(|entry| {
            let found = entry.metadata().ok().filter(fs::Metadata::is_file)?;
            let used = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            Some((used, entry.path(), found.len()))
        })
        .collect()
}

/// Removes files, the least recently used first, and tells what is left.
fn shrink(root: &Path, kept: u64) -> u64 {
    let mut files = files(root);
    files.sort();
    let mut total: u64 = files.iter().map(|(_, _, size)| size).sum();
    for (_, path, size) in files {
        if total <= kept {
            break;
        }
        if fs::remove_file(path).is_ok() {
            total -= size;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_was_kept_is_found_and_a_torn_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let thumbnails = Thumbnails::new(folder.path());
        let name = name(&["a", "b"]);
        assert!(thumbnails.get(&name).is_none());
        let made = encode(&RgbImage::new(20, 10)).unwrap();
        thumbnails.put(&name, &made);
        assert_eq!(thumbnails.get(&name).unwrap().bytes, made.bytes);
        let path = thumbnails.path(&name);
        fs::write(&path, &made.bytes[..made.bytes.len() / 2]).unwrap();
        assert!(thumbnails.get(&name).is_none());
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for (index, name) in ["aa/1", "bb/2", "bb/3"].iter().enumerate() {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, [0; 100]).unwrap();
            let file = fs::File::options().write(true).open(&path).unwrap();
            let then = SystemTime::now() - Duration::from_secs(100 - index as u64);
            file.set_modified(then).unwrap();
        }
        assert_eq!(shrink(root, 250), 200);
        assert!(!root.join("aa/1").exists() && root.join("bb/3").exists());
    }

    #[test]
    fn shapes_are_kept() {
        assert_eq!(fit_within((1000, 500), 100), (100, 50));
        assert_eq!(fit_within((3, 9000), 300), (1, 300));
        assert_eq!(fit_within((40, 30), 300), (40, 30));
    }
}
