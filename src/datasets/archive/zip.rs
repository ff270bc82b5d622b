//! Zip archives. The central directory is read entry by entry, so that memory does not grow with it.

use std::io::Read;
use std::path::Path;

use ::zip::ZipReadOptions;
use ::zip::read::{Config, ZipFile};
use ::zip::unstable::read::ZipIterable;

use super::{ArchiveError, Budget, Entry, EntryError, check_size, largest, open, write_out};
use crate::datasets::layout::{PathError, Place};
use crate::datasets::limits::Limits;

pub fn unpack(
    archive: &Path,
    into: &Path,
    budget: &mut Budget,
) -> Result<Vec<Entry>, ArchiveError> {
    let limits = budget.limits;
    let mut zip =
        ZipIterable::try_new(open(archive)?, Config::default()).map_err(ArchiveError::damaged)?;
    budget.count(zip.len())?;
    let mut declared = budget.clone();
    for entry in zip.files().map_err(ArchiveError::damaged)? {
        declared.spend(entry.map_err(ArchiveError::damaged)?.size())?; // before a byte is written
    }
    let mut unpacked = Vec::new();
    let mut entries = zip
        .files_with_reader(
            open(archive)?,
            ZipReadOptions::new().ignore_encryption_flag(true),
        )
        .map_err(ArchiveError::damaged)?;
    while let Some(entry) = entries.next() {
        let mut entry = entry.map_err(ArchiveError::damaged)?;
        let name = entry.name().map_or_else(
            |_| String::from_utf8_lossy(entry.name_raw()).into_owned(),
            std::borrow::Cow::into_owned,
        );
        let target = into.join(unpacked.len().to_string());
        let content = match accept(&entry, &name, &limits) {
            Ok(None) => continue, // a folder
            Ok(Some(place)) => {
                let limit = largest(&place, &limits);
                write_out(&mut entry, &target, limit, budget)?.map(|_| (place, target))
            }
            Err(error) => Err(error),
        };
        unpacked.push(Entry { name, content });
    }
    Ok(unpacked)
}

/// The place of an entry that is a plain file, `None` for a folder.
fn accept<R: Read>(
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
        return Err(EntryError::Link);
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
    check_size(entry.size(), &place, limits)?;
    Ok(Some(place))
}
