//! Latents on disk, so that a picture is encoded once for many runs.
//!
//! A file is named by a digest of all that decides its content. It is written under another name and renamed, and a
//! file that cannot be read back counts as absent: the cache can be deleted, or damaged, at any time.

use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::DataError;

const MAGIC: &[u8; 8] = b"lslat\0\0\x01";
/// Magic, three sides, and the digest of the values.
const HEADER_BYTES: usize = 8 + 3 * 4 + 32;
/// The largest latent: 1024 × 1024 elements of 4 channels are 16 MiB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The latents of one picture.
#[derive(Clone, Debug, PartialEq)]
pub struct CachedLatent {
    /// `[channels, height, width]`
    pub shape: [usize; 3],
    /// Row-major.
    pub data: Vec<f32>,
}

/// A folder of latents.
#[derive(Clone, Debug)]
pub struct LatentCache {
    folder: PathBuf,
}

impl LatentCache {
    /// Opens a folder, making it if need be.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        std::fs::create_dir_all(folder).map_err(|source| DataError::Io {
            path: folder.to_owned(),
            source,
        })?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// The latents of this key; `None` when there are none, or the file is damaged.
    pub fn get(&self, key: &str) -> Option<CachedLatent> {
        let path = self.path(key)?;
        if std::fs::metadata(&path).ok()?.len() > MAX_FILE_BYTES {
            return None;
        }
        parse(&std::fs::read(path).ok()?)
    }

    /// Keeps latents under this key.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put(&self, key: &str, latent: &CachedLatent) -> Result<(), DataError> {
        let Some(path) = self.path(key) else {
            return Ok(());
        };
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
            file.write_all(&serialize(latent))?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|source| DataError::Io {
            path: path.clone(),
            source,
        })
    }

    /// Keys are digests; anything else has no place in the folder.
    fn path(&self, key: &str) -> Option<PathBuf> {
        let plain = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric());
        plain.then(|| self.folder.join(format!("{key}.latent")))
    }
}

fn serialize(latent: &CachedLatent) -> Vec<u8> {
    let values: Vec<u8> = latent
        .data
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + values.len());
    bytes.extend_from_slice(MAGIC);
    for side in latent.shape {
        bytes.extend_from_slice(&u32::try_from(side).unwrap_or(u32::MAX).to_le_bytes());
    }
    bytes.extend_from_slice(&Sha256::digest(&values));
    bytes.extend_from_slice(&values);
    bytes
}

fn parse(bytes: &[u8]) -> Option<CachedLatent> {
    let (header, values) = bytes.split_at_checked(HEADER_BYTES)?;
    let sides = header.strip_prefix(MAGIC)?;
    let side = |index: usize| {
        let bytes = sides[index * 4..][..4].try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let shape = [side(0)?, side(1)?, side(2)?];
    let elements = shape
        .iter()
        .try_fold(1_usize, |product, side| product.checked_mul(*side))?;
    if values.len() != elements.checked_mul(4)? || sides[12..] != Sha256::digest(values)[..] {
        return None;
    }
    let data = values
        .as_chunks::<4>()
        .0
        .iter()
        .map(|value| f32::from_le_bytes(*value))
        .collect();
    Some(CachedLatent { shape, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_got_and_damage_is_a_miss() {
        let folder = tempfile::tempdir().unwrap();
        let cache = LatentCache::open(&folder.path().join("latents")).unwrap();
        let latent = CachedLatent {
            shape: [4, 2, 3],
            data: (0..24_u8).map(f32::from).collect(),
        };
        assert_eq!(cache.get("abc"), None);
        cache.put("abc", &latent).unwrap();
        assert_eq!(cache.get("abc"), Some(latent));
        let path = cache.path("abc").unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(cache.get("abc"), None);
        std::fs::write(&path, &bytes[..20]).unwrap();
        assert_eq!(cache.get("abc"), None);
    }

    #[test]
    fn a_key_cannot_leave_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let cache = LatentCache::open(folder.path()).unwrap();
        assert_eq!(cache.path("../x"), None);
    }
}
