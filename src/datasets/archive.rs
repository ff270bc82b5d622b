//! Archives: unpacked under numbers, within limits. No name of an archive ever becomes a path on our disk.

mod gzip;
mod tar;
#[cfg(test)]
mod tests;
mod zip;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use super::layout::{PathError, Place};
use super::limits::Limits;

/// Bytes read, or written, at once.
const BUFFER_BYTES: usize = 256 << 10;

/// What kind of archive a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Zip,
    Tar,
    /// A packed file, most often a tar.
    Gzip,
}

impl Kind {
    /// Bytes that [`Kind::of`] looks at.
    pub const HEAD_BYTES: usize = 512;

    /// Told by the first bytes; `None` for what is no archive. An empty zip is one.
    pub fn of(head: &[u8]) -> Option<Self> {
        if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
            Some(Self::Zip)
        } else if head.starts_with(b"\x1f\x8b\x08") {
            Some(Self::Gzip)
        } else if tar::is_header(head) {
            Some(Self::Tar)
        } else {
            None
        }
    }
}

/// One file of an archive.
#[derive(Debug)]
pub struct Entry {
    /// As the archive has it.
    pub name: String,
    pub content: Result<(Place, PathBuf), EntryError>,
}

/// Why one entry is left out; the others are kept.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    #[error(transparent)]
    UnsafePath(#[from] PathError),
    #[error("the entry is a link")]
    Link,
    #[error("the entry is a device, a pipe, a socket or a sparse file")]
    NotAFile,
    #[error("the entry is encrypted")]
    Encrypted,
    #[error("the entry unpacks to {found} bytes, expected at most {limit}")]
    TooLarge { found: u64, limit: u64 },
    #[error("the entry cannot be unpacked: {0}")]
    Damaged(String),
}

impl EntryError {
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnsafePath(_) => "unsafe_path",
            Self::Link => "symlink",
            Self::NotAFile => "not_a_file",
            Self::Encrypted => "encrypted",
            Self::TooLarge { .. } => "too_large",
            Self::Damaged(_) => "damaged",
        }
    }
}

/// Why a whole archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("found {found} bytes, expected at most {limit}")]
    TooLarge { found: u64, limit: u64 },
    #[error("found {found} entries, expected at most {limit}")]
    TooManyEntries { found: usize, limit: usize },
    #[error("the archive unpacks to {found} bytes, expected at most {limit}")]
    UnpacksTooLarge { found: u64, limit: u64 },
    #[error(
        "the archive of {packed} bytes unpacks to {unpacked}, more than {limit} times its size"
    )]
    Ratio {
        packed: u64,
        unpacked: u64,
        limit: u64,
    },
    #[error("archives lie in archives, expected at most {0} deep")]
    TooDeep(usize),
    #[error("the archive cannot be read: {0}")]
    Damaged(String),
    #[error("reading or writing a file: {0}")]
    Io(#[from] io::Error),
}

impl ArchiveError {
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::TooManyEntries { .. } => "too_many_files",
            Self::UnpacksTooLarge { .. } | Self::Ratio { .. } => "unpacks_too_large",
            Self::TooDeep(_) => "too_deep",
            Self::Damaged(_) => "damaged",
            Self::Io(_) => "unreadable",
        }
    }

    /// What an archive's reader says; what our disk says is told apart where it is written to.
    fn damaged(error: impl ToString) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// What one uploaded archive may unpack to, those inside of it included.
#[derive(Clone, Debug)]
pub struct Budget {
    packed: u64,
    unpacked: u64,
    entries: usize,
    limits: Limits,
}

impl Budget {
    /// # Errors
    /// When the archive itself is too large, or cannot be looked at.
    pub fn of(archive: &Path, limits: &Limits) -> Result<Self, ArchiveError> {
        let packed = std::fs::metadata(archive)?.len();
        if packed > limits.archive_bytes {
            return Err(ArchiveError::TooLarge {
                found: packed,
                limit: limits.archive_bytes,
            });
        }
        Ok(Self {
            packed,
            unpacked: 0,
            entries: 0,
            limits: *limits,
        })
    }

    fn count(&mut self, entries: usize) -> Result<(), ArchiveError> {
        self.entries = self.entries.saturating_add(entries);
        if self.entries > self.limits.files {
            return Err(ArchiveError::TooManyEntries {
                found: self.entries,
                limit: self.limits.files,
            });
        }
        Ok(())
    }

    fn spend(&mut self, bytes: u64) -> Result<(), ArchiveError> {
        self.unpacked = self.unpacked.saturating_add(bytes);
        let (packed, unpacked) = (self.packed, self.unpacked);
        if unpacked > self.limits.unpacked_bytes {
            return Err(ArchiveError::UnpacksTooLarge {
                found: unpacked,
                limit: self.limits.unpacked_bytes,
            });
        }
        let limit = self.limits.unpacked_ratio;
        if unpacked > Limits::RATIO_FREE_BYTES && unpacked / limit > packed {
            return Err(ArchiveError::Ratio {
                packed,
                unpacked,
                limit,
            });
        }
        Ok(())
    }

    /// What may still be spent.
    fn left(&self) -> u64 {
        let by_ratio = (self.packed + 1).saturating_mul(self.limits.unpacked_ratio);
        let most = by_ratio.max(Limits::RATIO_FREE_BYTES);
        most.min(self.limits.unpacked_bytes)
            .saturating_sub(self.unpacked)
    }
}

/// Unpacks an archive into `into`, where the files are called `0`, `1`, … Blocks; no archive is ever in memory.
///
/// # Errors
/// When the archive as a whole is not to be trusted. Nothing of it is used then.
pub fn unpack(
    kind: Kind,
    archive: &Path,
    into: &Path,
    budget: &mut Budget,
) -> Result<Vec<Entry>, ArchiveError> {
    match kind {
        Kind::Zip => zip::unpack(archive, into, budget),
        Kind::Tar => tar::unpack(archive, into, budget),
        Kind::Gzip => gzip::unpack(archive, into, budget),
    }
}

/// The most bytes of an entry. Only what may be an archive by its name may be as large as one.
fn largest(place: &Place, limits: &Limits) -> u64 {
    let is_archive = matches!(place.extension().as_str(), "zip" | "tar" | "tgz" | "gz");
    if is_archive {
        limits.archive_bytes
    } else {
        limits.image_bytes
    }
}

fn check_size(found: u64, place: &Place, limits: &Limits) -> Result<(), EntryError> {
    let limit = largest(place, limits);
    if found > limit {
        return Err(EntryError::TooLarge { found, limit });
    }
    Ok(())
}

/// Writes an entry out, and counts for itself: what an archive says of its entries was said by whoever made it.
///
/// The outer error is of the whole archive, the inner one of the entry.
fn write_out(
    entry: &mut impl Read,
    target: &Path,
    limit: u64,
    budget: &mut Budget,
) -> Result<Result<u64, EntryError>, ArchiveError> {
    let most = limit.min(budget.left());
    let mut file = BufWriter::with_capacity(BUFFER_BYTES, File::create_new(target)?);
    let copied = io::copy(&mut entry.take(most + 1), &mut file);
    match copied.and_then(|size| file.flush().map(|()| size)) {
        Ok(size) if size <= most => {
            budget.spend(size)?;
            Ok(Ok(size))
        }
        Ok(size) => {
            file.get_mut().set_len(0)?;
            budget.spend(size)?;
            Ok(Err(EntryError::Damaged(
                "the entry is larger than it says".to_owned(),
            )))
        }
        Err(error) if is_full(&error) => Err(error.into()),
        Err(error) => {
            budget.spend(file.stream_position()?)?;
            file.get_mut().set_len(0)?;
            Ok(Err(EntryError::Damaged(error.to_string())))
        }
    }
}

fn open(archive: &Path) -> io::Result<BufReader<File>> {
    Ok(BufReader::with_capacity(BUFFER_BYTES, File::open(archive)?))
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
