//! Tensors on disk that one run computes and later ones read: latents of pictures, states of captions.
//!
//! A file is named by a digest of all that decides its content. It is written under another name, flushed and renamed,
//! and a file that cannot be read back counts as absent: the cache can be shared by workers, deleted, or damaged, at
//! any time. A run never fails for its cache.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use sha2::{Digest as _, Sha256};

use super::DataError;

/// Goes into every key: files of another layout are never found.
const FORMAT: &str = "lorasmith tensor cache 1";
/// Name of the digest of a file's tensors in its metadata.
const CONTENT: &str = "content_sha256";
/// Ending of the files.
const ENDING: &str = "safetensors";
/// The most that is read: the moments of a picture of 8192 × 8192 are 32 MiB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// What is kept; each in a folder of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheKind {
    /// What a picture is encoded to.
    Latents,
    /// What a caption is encoded to.
    Text,
}

impl CacheKind {
    const ALL: [Self; 2] = [Self::Latents, Self::Text];

    fn folder(self) -> &'static str {
        match self {
            Self::Latents => "latents",
            Self::Text => "text",
        }
    }
}

/// Names one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheKey {
    kind: CacheKind,
    digest: String,
}

impl CacheKey {
    /// The key of a content that `parts`, in this order, decide.
    pub fn new(kind: CacheKind, parts: &[&str]) -> Self {
        let mut digest = Sha256::new();
        for part in [FORMAT, kind.folder()].iter().chain(parts) {
            // With its length before it no part can pass for two.
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        Self {
            kind,
            digest: hex::encode(digest.finalize()),
        }
    }
}

/// One of the tensors of a file.
#[derive(Clone, Copy, Debug)]
pub struct CachedTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its elements, row-major.
    pub values: &'a [f32],
}

/// A folder of tensors.
#[derive(Clone, Debug)]
pub struct TensorCache {
    root: PathBuf,
}

impl TensorCache {
    /// Opens a folder, making it if need be, and removes the files that were not used for longest until the others
    /// take no more than `max_bytes`.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(root: &Path, max_bytes: u64) -> Result<Self, DataError> {
        let cache = Self {
            root: root.to_owned(),
        };
        for kind in CacheKind::ALL {
            let folder = cache.folder(kind);
            fs::create_dir_all(&folder).map_err(|source| failed(&folder, source))?;
        }
        cache.shrink(max_bytes)?;
        Ok(cache)
    }

    /// The values of this key's tensors, in the order of `expected` names and shapes; `None` when there is no such
    /// file, or it is damaged or holds something else.
    pub fn get(&self, key: &CacheKey, expected: &[(&str, &[usize])]) -> Option<Vec<Vec<f32>>> {
        let path = self.path(key);
        let size = fs::metadata(&path).ok()?.len();
        let values = if size > MAX_FILE_BYTES {
            None
        } else {
            parse(&fs::read(&path).ok()?, expected)
        };
        match &values {
            Some(_) => touch(&path),
            None => {
                tracing::warn!(path = %path.display(), "a damaged file of the cache is not used");
            }
        }
        values
    }

    /// Keeps tensors under this key, in place of what may be there.
    pub fn put(&self, key: &CacheKey, tensors: &[CachedTensor<'_>]) {
        if let Err(error) = self.write(key, tensors) {
            let path = self.path(key);
            tracing::warn!(path = %path.display(), %error, "the cache cannot be written");
        }
    }

    fn write(&self, key: &CacheKey, tensors: &[CachedTensor<'_>]) -> io::Result<()> {
        let bytes = serialize(tensors)?;
        let mut file = tempfile::NamedTempFile::new_in(self.folder(key.kind))?;
        file.write_all(&bytes)?;
        file.as_file().sync_all()?;
        file.persist(self.path(key))?;
        Ok(())
    }

    fn folder(&self, kind: CacheKind) -> PathBuf {
        self.root.join(kind.folder())
    }

    fn path(&self, key: &CacheKey) -> PathBuf {
        let name = format!("{}.{ENDING}", key.digest);
        self.folder(key.kind).join(name)
    }

    /// Removes files, the least recently used first. All that lies in the folders counts: what a killed worker has
    /// left half written, too.
    fn shrink(&self, max_bytes: u64) -> Result<(), DataError> {
        let mut files = Vec::new();
        for kind in CacheKind::ALL {
            let folder = self.folder(kind);
            for entry in fs::read_dir(&folder).map_err(|source| failed(&folder, source))? {
                let entry = entry.map_err(|source| failed(&folder, source))?;
                // Another worker may be removing, too.
                if let Ok(found) = entry.metadata()
                    && found.is_file()
                {
                    let used = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                    files.push((used, entry.path(), found.len()));
                }
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, _, size)| size).sum();
        let mut removed = 0_u64;
        for (_, path, size) in &files {
            if total <= max_bytes {
                break;
            }
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a file of the cache was not removed");
                }
                _ => {
                    total -= size;
                    removed += 1;
                }
            }
        }
        if removed > 0 {
            tracing::info!(
                removed,
                kept_bytes = total,
                max_bytes,
                "the cache was shrunk"
            );
        }
        Ok(())
    }
}

fn failed(path: &Path, source: io::Error) -> DataError {
    DataError::Io {
        path: path.to_owned(),
        source,
    }
}

/// A file's time says when it was last used; where it cannot be set, it says when the file was made.
fn touch(path: &Path) {
    if let Ok(file) = File::options().write(true).open(path) {
        let _ = file.set_modified(SystemTime::now());
    }
}

fn serialize(tensors: &[CachedTensor<'_>]) -> io::Result<Vec<u8>> {
    let views = tensors
        .iter()
        .map(|tensor| {
            let data = bytemuck::cast_slice(tensor.values);
            let view = TensorView::new(Dtype::F32, tensor.shape.to_vec(), data);
            view.map(|view| (tensor.name, view))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(io::Error::other)?;
    let content = content(views.iter().map(|(name, view)| (*name, view)));
    let metadata = HashMap::from([(CONTENT.to_owned(), content)]);
    safetensors::serialize(views, Some(metadata)).map_err(io::Error::other)
}

fn parse(bytes: &[u8], expected: &[(&str, &[usize])]) -> Option<Vec<Vec<f32>>> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    let stated = header.metadata().as_ref()?.get(CONTENT)?;
    let file = SafeTensors::deserialize(bytes).ok()?;
    let views: Vec<TensorView<'_>> = expected
        .iter()
        .map(|(name, shape)| {
            let view = file.tensor(name).ok()?;
            (view.dtype() == Dtype::F32 && view.shape() == *shape).then_some(view)
        })
        .collect::<Option<_>>()?;
    let names = expected.iter().map(|(name, _)| *name);
    if *stated != content(names.zip(&views)) {
        return None;
    }
    // The data section of a file is not aligned.
    let values = views
        .iter()
        .map(|view| bytemuck::pod_collect_to_vec(view.data()));
    Some(values.collect())
}

/// A digest of names, shapes and values.
fn content<'a>(tensors: impl Iterator<Item = (&'a str, &'a TensorView<'a>)>) -> String {
    let mut digest = Sha256::new();
    for (name, view) in tensors {
        digest.update(format!("{name} {:?}\n", view.shape()));
        digest.update(view.data());
    }
    hex::encode(digest.finalize())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SHAPE: [usize; 3] = [4, 2, 3];
    const EXPECTED: [(&str, &[usize]); 1] = [("mean", &SHAPE)];

    fn open(folder: &Path) -> TensorCache {
        TensorCache::open(folder, u64::MAX).expect("a cache")
    }

    fn key(name: &str) -> CacheKey {
        CacheKey::new(CacheKind::Latents, &[name])
    }

    fn values() -> Vec<f32> {
        (0..24_u8).map(|n| f32::from(n) + 0.1).collect()
    }

    fn put(cache: &TensorCache, key: &CacheKey) {
        let tensor = CachedTensor {
            name: "mean",
            shape: &SHAPE,
            values: &values(),
        };
        cache.put(key, &[tensor]);
    }

    #[test]
    fn what_was_put_is_got_and_damage_is_a_miss() {
        let folder = tempfile::tempdir().expect("a folder");
        let (cache, key) = (open(&folder.path().join("cache")), key("a"));
        assert_eq!(cache.get(&key, &EXPECTED), None);
        put(&cache, &key);
        assert_eq!(cache.get(&key, &EXPECTED), Some(vec![values()]));
        let path = cache.path(&key);
        let whole = fs::read(&path).expect("there");
        let mut flipped = whole.clone();
        *flipped.last_mut().expect("bytes") ^= 1;
        let longer = [whole.as_slice(), &[0]].concat();
        for damaged in [&flipped, &longer, &whole[..20].to_vec(), &Vec::new()] {
            fs::write(&path, damaged).expect("written");
            assert_eq!(cache.get(&key, &EXPECTED), None);
            put(&cache, &key);
            assert_eq!(cache.get(&key, &EXPECTED), Some(vec![values()]));
        }
    }

    #[test]
    fn other_tensors_than_expected_are_a_miss() {
        let folder = tempfile::tempdir().expect("a folder");
        let (cache, key) = (open(folder.path()), key("a"));
        put(&cache, &key);
        assert_eq!(cache.get(&key, &[("mean", &[4, 3, 2])]), None);
        assert_eq!(cache.get(&key, &[("logvar", &SHAPE)]), None);
    }

    #[test]
    fn every_part_of_a_key_counts() {
        let of = |parts: &[&str]| CacheKey::new(CacheKind::Latents, parts);
        assert_eq!(of(&["a", "b"]), of(&["a", "b"]));
        assert_ne!(of(&["a", "b"]), of(&["b", "a"]));
        assert_ne!(of(&["a", "b"]), of(&["ab", ""]));
        let text = CacheKey::new(CacheKind::Text, &["a", "b"]);
        assert_ne!(of(&["a", "b"]).digest, text.digest);
    }

    #[test]
    fn the_least_recently_used_files_go_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = open(folder.path());
        let keys = ["a", "b", "c"].map(key);
        for (key, hours) in keys.iter().zip([3, 2, 1]) {
            put(&cache, key);
            let file = File::options().write(true).open(cache.path(key));
            let then = SystemTime::now() - Duration::from_secs(3600 * hours);
            file.expect("there").set_modified(then).expect("set");
        }
        let size = fs::metadata(cache.path(&keys[0])).expect("there").len();
        // The oldest is used again.
        assert!(cache.get(&keys[0], &EXPECTED).is_some());
        let there = |cache: &TensorCache| keys.each_ref().map(|key| cache.path(key).exists());
        let cache = TensorCache::open(folder.path(), 3 * size).expect("a cache");
        assert_eq!(there(&cache), [true, true, true]);
        let cache = TensorCache::open(folder.path(), 2 * size).expect("a cache");
        assert_eq!(there(&cache), [true, false, true]);
        let cache = TensorCache::open(folder.path(), 2 * size - 1).expect("a cache");
        assert_eq!(there(&cache), [true, false, false]);
    }
}
