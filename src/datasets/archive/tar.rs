//! Tar archives: ustar, with GNU's and POSIX' long names. Those names are read here, as a library would take whatever
//! length an archive says.

use std::io::{self, Read};
use std::path::Path;

use super::{ArchiveError, Budget, Entry, EntryError, check_size, largest, open, write_out};
use crate::datasets::layout::{PathError, Place};
use crate::datasets::limits::Limits;

/// Bytes of the records that say more about the next entry.
const MAX_RECORD_BYTES: u64 = 64 << 10;
const BLOCK_BYTES: usize = 512;

/// Whether a file begins with the header of an entry: its checksum is right.
pub fn is_header(head: &[u8]) -> bool {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let Some(block) = head.get(..BLOCK_BYTES) else {
        return false;
    };
    let digits = block[CHECKSUM].trim_ascii_start();
    let digits = digits.split(|byte| !byte.is_ascii_digit()).next();
    let said = digits
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| u32::from_str_radix(digits, 8).ok());
    let sum: u32 = (0..BLOCK_BYTES)
        .map(|at| {
            if CHECKSUM.contains(&at) {
                u32::from(b' ')
            } else {
                u32::from(block[at])
            }
        })
        .sum();
    block[0] != 0 && said == Some(sum)
}

pub fn unpack(
    archive: &Path,
    into: &Path,
    budget: &mut Budget,
) -> Result<Vec<Entry>, ArchiveError> {
    let limits = budget.limits;
    let mut tar = ::tar::Archive::new(open(archive)?);
    let mut unpacked = Vec::new();
    let mut long_name = None;
    let entries = tar.entries_with_seek().map_err(ArchiveError::damaged)?;
    for entry in entries.raw(true) {
        let mut entry = entry.map_err(ArchiveError::damaged)?;
        let kind = entry.header().entry_type();
        budget.count(1)?;
        if kind.is_gnu_longname() {
            let name = record(&mut entry)?;
            let end = name.iter().position(|byte| *byte == 0);
            long_name = Some(name[..end.unwrap_or(name.len())].to_vec());
            continue;
        }
        if kind.is_pax_local_extensions() {
            if let Some(name) = path_of(&record(&mut entry)?)? {
                long_name = Some(name);
            }
            continue;
        }
        if kind.is_pax_global_extensions() || kind.is_gnu_longlink() {
            continue;
        }
        let name = long_name
            .take()
            .unwrap_or_else(|| entry.path_bytes().into_owned());
        let name = String::from_utf8_lossy(&name).into_owned();
        let target = into.join(unpacked.len().to_string());
        let content = match accept(&entry, &name, &limits) {
            Ok(None) => continue, // a folder
            Ok(Some(place)) => {
                let (limit, size) = (largest(&place, &limits), entry.size());
                match write_out(&mut entry, &target, limit, budget)? {
                    Ok(written) if written < size => {
                        return Err(ArchiveError::damaged("it ends within a file"));
                    }
                    written => written.map(|_| (place, target)),
                }
            }
            Err(error) => Err(error),
        };
        unpacked.push(Entry { name, content });
    }
    Ok(unpacked)
}

/// The place of an entry that is a plain file, `None` for a folder.
fn accept<R: Read>(
    entry: &::tar::Entry<'_, R>,
    name: &str,
    limits: &Limits,
) -> Result<Option<Place>, EntryError> {
    let kind = entry.header().entry_type();
    let place = match Place::parse(name) {
        Err(PathError::Empty) if kind.is_dir() => return Ok(None),
        place => place?,
    };
    if kind.is_dir() {
        return Ok(None);
    }
    if kind.is_symlink() || kind.is_hard_link() {
        return Err(EntryError::Link);
    }
    if !kind.is_file() && !kind.is_contiguous() {
        return Err(EntryError::NotAFile);
    }
    check_size(entry.size(), &place, limits)?;
    Ok(Some(place))
}

fn record(entry: &mut impl Read) -> Result<Vec<u8>, ArchiveError> {
    let mut bytes = Vec::new();
    let read = entry
        .take(MAX_RECORD_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(ArchiveError::damaged)?;
    if read as u64 > MAX_RECORD_BYTES {
        return Err(ArchiveError::damaged("a name in it is too long"));
    }
    Ok(bytes)
}

/// The path among records `<length> <key>=<value>\n`. Sizes of 8 GiB and more are said there too; such a file is far
/// beyond what is taken, and where it ends could not be told.
fn path_of(records: &[u8]) -> Result<Option<Vec<u8>>, ArchiveError> {
    let mut path = None;
    let mut rest = records;
    while !rest.is_empty() && rest[0] != 0 {
        let (value, next) = pax_record(rest).map_err(ArchiveError::damaged)?;
        match value {
            (b"path", value) => path = Some(value.to_vec()),
            (b"size", _) => return Err(ArchiveError::damaged("a file in it is too large")),
            _ => {}
        }
        rest = next;
    }
    Ok(path)
}

type Pair<'a> = (&'a [u8], &'a [u8]);

fn pax_record(bytes: &[u8]) -> io::Result<(Pair<'_>, &[u8])> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
    let space = bytes.iter().position(|byte| *byte == b' ');
    let space = space.filter(|space| *space < 20).ok_or_else(wrong)?;
    let length = std::str::from_utf8(&bytes[..space]).map_err(|_| wrong())?;
    let length: usize = length.parse().map_err(|_| wrong())?;
    let record = bytes.get(space + 1..length).ok_or_else(wrong)?;
    let record = record.strip_suffix(b"\n").ok_or_else(wrong)?;
    let equals = record.iter().position(|byte| *byte == b'=');
    let equals = equals.ok_or_else(wrong)?;
    Ok(((&record[..equals], &record[equals + 1..]), &bytes[length..]))
}
