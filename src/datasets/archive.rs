//! Zip archives: unpacked under numbers, within limits. No name of an archive ever becomes a path on our disk.

use std::fs::File;
use std::io::{self, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use zip::ZipReadOptions;
use zip::read::{Config, ZipFile};
use zip::result::ZipError;
use zip::unstable::read::ZipIterable;

use super::layout::{PathError, Place};
use super::limits::Limits;

/// What was in an archive.
#[derive(Debug, Default)]
pub struct Unpacked {
    pub entries: Vec<Entry>,
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
    #[error("the entry is a symbolic link")]
    Symlink,
    #[error("the entry is a device, a pipe or a socket")]
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
            Self::Symlink => "symlink",
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
    #[error("the archive cannot be read: {0}")]
    Damaged(#[from] ZipError),
    #[error("reading or writing a file: {0}")]
    Io(#[from] io::Error),
}

impl ArchiveError {
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::TooManyEntries { .. } => "too_many_files",
            Self::UnpacksTooLarge { .. } | Self::Ratio { .. } => "unpacks_too_large",
            Self::Damaged(_) => "damaged",
            Self::Io(_) => "unreadable",
        }
    }
}

/// Whether a file begins like a zip archive (an empty one too).
pub fn is_zip(head: &[u8]) -> bool {
    head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06")
}

/// Unpacks an archive into `into`, where the files are called `0`, `1`, … Blocks; the central directory is read
/// entry by entry, so that memory does not grow with it.
///
/// # Errors
/// When the archive as a whole is not to be trusted. Nothing of it is used then.
pub fn unpack(archive: &Path, into: &Path, limits: &Limits) -> Result<Unpacked, ArchiveError> {
    let packed = std::fs::metadata(archive)?.len();
    if packed > limits.archive_bytes {
        return Err(ArchiveError::TooLarge {
            found: packed,
            limit: limits.archive_bytes,
        });
    }
    let open = || File::open(archive).map(BufReader::new);
    let mut zip = ZipIterable::try_new(open()?, Config::default())?;
    if zip.len() > limits.files {
        return Err(ArchiveError::TooManyEntries {
            found: zip.len(),
            limit: limits.files,
        });
    }
    let mut declared = Budget::new(packed, limits);
    for entry in zip.files()? {
        declared.spend(entry?.size())?; // before a byte is written
    }
    let mut actual = Budget::new(packed, limits);
    let mut unpacked = Unpacked::default();
    let mut entries =
        zip.files_with_reader(open()?, ZipReadOptions::new().ignore_encryption_flag(true))?;
    while let Some(entry) = entries.next() {
        let mut entry = entry?;
        let name = entry.name().map_or_else(
            |_| String::from_utf8_lossy(entry.name_raw()).into_owned(),
            std::borrow::Cow::into_owned,
        );
        let target = into.join(unpacked.entries.len().to_string());
        let content = match accept(&entry, &name, limits) {
            Ok(None) => continue, // a folder
            Ok(Some(place)) => match write_out(&mut entry, &target, limits) {
                Ok(size) => {
                    actual.spend(size)?;
                    Ok((place, target))
                }
                Err(error) if is_full(&error) => return Err(error.into()),
                Err(error) => Err(EntryError::Damaged(error.to_string())),
            },
            Err(error) => Err(error),
        };
        unpacked.entries.push(Entry { name, content });
    }
    Ok(unpacked)
}

/// The place of an entry that is a plain file, `None` for a folder.
fn accept<R: io::Read>(
    entry: &ZipFile<'_, R>,
    name: &str,
    limits: &Limits,
) -> Result<Option<Place>, EntryError> {
    const KIND_OF_FILE: u32 = 0o170_000;
    const REGULAR: u32 = 0o100_000;
    let place = match Place::parse(name) {
        Err(PathError::Empty) if entry.is_dir() => return Ok(None),
        place => place?,
    };
    if entry.is_symlink() {
        return Err(EntryError::Symlink);
    }
    if entry.is_dir() {
        return Ok(None);
    }
    let kind = entry.unix_mode().unwrap_or_default() & KIND_OF_FILE;
    if kind != 0 && kind != REGULAR {
        return Err(EntryError::NotAFile);
    }
    if entry.encrypted() {
        return Err(EntryError::Encrypted);
    }
    if entry.size() > limits.image_bytes {
        return Err(EntryError::TooLarge {
            found: entry.size(),
            limit: limits.image_bytes,
        });
    }
    Ok(Some(place))
}

/// Writes an entry out; its declared size was checked and bounds what the reader gives, but we count ourselves.
fn write_out<R: io::Read>(
    entry: &mut ZipFile<'_, R>,
    target: &Path,
    limits: &Limits,
) -> io::Result<u64> {
    let mut file = File::create_new(target)?;
    let size = io::copy(&mut entry.take(limits.image_bytes + 1), &mut file)?;
    if size > limits.image_bytes {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        return Err(io::Error::other("the entry is larger than it says"));
    }
    Ok(size)
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Counts unpacked bytes against the limits.
struct Budget<'a> {
    packed: u64,
    unpacked: u64,
    limits: &'a Limits,
}

impl<'a> Budget<'a> {
    fn new(packed: u64, limits: &'a Limits) -> Self {
        Self {
            packed,
            unpacked: 0,
            limits,
        }
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use zip::write::SimpleFileOptions;

    fn archive(write: impl FnOnce(&mut zip::ZipWriter<File>)) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut zip = zip::ZipWriter::new(file.reopen().expect("the file"));
        write(&mut zip);
        zip.finish().expect("finished");
        file
    }

    fn add(zip: &mut zip::ZipWriter<File>, name: &str, content: &[u8]) {
        zip.start_file(name, SimpleFileOptions::default())
            .expect("started");
        zip.write_all(content).expect("written");
    }

    /// An entry's name, and its content or why it was left out.
    type Read = (String, Result<Vec<u8>, &'static str>);

    fn unpacked(
        file: &tempfile::NamedTempFile,
        limits: &Limits,
    ) -> Result<Vec<Read>, ArchiveError> {
        let folder = tempfile::tempdir().expect("a folder");
        let entries = unpack(file.path(), folder.path(), limits)?.entries;
        let read = |entry: Entry| match entry.content {
            Ok((_, path)) => {
                assert_eq!(path.parent(), Some(folder.path()));
                (entry.name, Ok(std::fs::read(path).expect("unpacked")))
            }
            Err(error) => (entry.name, Err(error.code())),
        };
        Ok(entries.into_iter().map(read).collect())
    }

    #[test]
    fn hostile_entries_are_named_and_the_others_kept() {
        let file = archive(|zip| {
            add(zip, "../evil.png", b"1");
            add(zip, "/etc/evil.png", b"2");
            zip.add_directory("10_a", SimpleFileOptions::default())
                .expect("added");
            add(zip, "10_a/good.png", b"good");
            zip.add_symlink("10_a/link.png", "/etc/passwd", SimpleFileOptions::default())
                .expect("added");
        });
        let found = unpacked(&file, &Limits::default()).expect("readable");
        let expected = [
            ("../evil.png", Err("unsafe_path")),
            ("/etc/evil.png", Err("unsafe_path")),
            ("10_a/good.png", Ok(b"good".to_vec())),
            ("10_a/link.png", Err("symlink")),
        ];
        assert_eq!(
            found,
            expected.map(|(name, content)| (name.to_owned(), content))
        );
    }

    #[test]
    fn limits_hold() {
        let file = archive(|zip| {
            add(zip, "a", &[0; 1000]);
            add(zip, "b", &[0; 1000]);
        });
        let refused = |limits: Limits| unpacked(&file, &limits).expect_err("refused").code();
        assert_eq!(
            refused(Limits {
                files: 1,
                ..Limits::default()
            }),
            "too_many_files"
        );
        assert_eq!(
            refused(Limits {
                unpacked_bytes: 1999,
                ..Limits::default()
            }),
            "unpacks_too_large"
        );
        assert_eq!(
            refused(Limits {
                archive_bytes: 10,
                ..Limits::default()
            }),
            "too_large"
        );
        let small = unpacked(
            &file,
            &Limits {
                image_bytes: 999,
                ..Limits::default()
            },
        )
        .expect("readable");
        assert!(
            small
                .iter()
                .all(|(_, content)| *content == Err("too_large"))
        );

        let bomb = archive(|zip| {
            zip.start_file("zeros", SimpleFileOptions::default())
                .expect("started");
            for _ in 0..65 {
                zip.write_all(&vec![0; 1 << 20]).expect("written");
            }
        });
        let error = unpacked(&bomb, &Limits::default()).expect_err("refused");
        assert!(matches!(error, ArchiveError::Ratio { .. }), "{error}");
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let file = archive(|zip| {
            add(
                zip,
                "a.png",
                b"some content that is long enough to be compressed, compressed, compressed",
            );
            add(zip, "b.png", b"other");
        });
        let bytes = std::fs::read(file.path()).expect("readable");
        let cut = tempfile::NamedTempFile::new().expect("a file");
        for keep in 0..bytes.len() {
            std::fs::write(cut.path(), &bytes[..keep]).expect("written");
            assert!(unpacked(&cut, &Limits::default()).is_err(), "cut at {keep}");
        }
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 0xff;
            std::fs::write(cut.path(), &wrong).expect("written");
            let _ = unpacked(&cut, &Limits::default());
        }
    }
}
