//! The zip archives that torch writes: `NAME/data.pkl` and `NAME/data/0`, `NAME/data/1`, … stored as they are. Only the
//! directory is read; a compressed entry is refused, so that nothing can unpack to more than the file has.

use std::collections::HashMap;
use std::ops::Range;

use super::PickleError;

/// Entries of an archive; Stable Diffusion XL's have 2 700.
const MAX_ENTRIES: u64 = 1 << 17;
/// Bytes of an entry's name.
const MAX_NAME_BYTES: usize = 1024;

const LOCAL: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const LOCATOR64: &[u8] = b"PK\x06\x07";
const END_BYTES: usize = 22;
const LOCATOR64_BYTES: usize = 20;
const MAX_COMMENT_BYTES: usize = 65_535;

/// Whether a file begins as zip archives do.
pub fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(LOCAL)
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    method: u16,
    encrypted: bool,
    size: u64,
    stored_size: u64,
    header: u64,
}

/// The directory of a checkpoint.
#[derive(Debug)]
pub struct Archive<'a> {
    bytes: &'a [u8],
    entries: HashMap<&'a str, Entry>,
    /// The folder that everything is in.
    root: String,
}

impl<'a> Archive<'a> {
    /// Reads the directory.
    ///
    /// # Errors
    /// When the archive is broken, or torch has not written it.
    pub fn read(bytes: &'a [u8]) -> Result<Self, PickleError> {
        let (count, start) = directory(bytes)?;
        if count > MAX_ENTRIES {
            return Err(PickleError::Broken(format!(
                "its zip archive has {count} entries, at most {MAX_ENTRIES} are read"
            )));
        }
        let mut entries = HashMap::new();
        let mut at = start;
        for _ in 0..count {
            let (name, entry, next) =
                central(bytes, at).ok_or_else(|| broken("a broken directory"))?;
            at = next;
            let Some(name) = name else {
                continue; // not one of torch's
            };
            if entries.insert(name, entry).is_some() {
                return Err(broken("two entries of the same name"));
            }
        }
        let pickles = entries
            .keys()
            .filter_map(|name| name.strip_suffix("/data.pkl"));
        let mut roots = pickles.filter(|root| !root.contains('/'));
        let (Some(root), None) = (roots.next(), roots.next()) else {
            return Err(broken(
                "no `data.pkl` (an archive of something else? only what torch.save writes is read)",
            ));
        };
        let archive = Self {
            bytes,
            root: root.to_owned(),
            entries,
        };
        archive.check_kind()?;
        Ok(archive)
    }

    fn check_kind(&self) -> Result<(), PickleError> {
        let has = |name: &str| {
            self.entries
                .contains_key(format!("{}/{name}", self.root).as_str())
        };
        if has("constants.pkl") {
            return Err(PickleError::broken(
                "it is a TorchScript program; only what torch.save writes is read",
            ));
        }
        if has("byteorder") && self.content("byteorder")? != *b"little" {
            return Err(PickleError::broken(
                "its numbers are big-endian; only little-endian ones are read",
            ));
        }
        Ok(())
    }

    /// The pickle.
    ///
    /// # Errors
    /// When it is compressed, or lies outside of the file.
    pub fn pickle(&self) -> Result<&'a [u8], PickleError> {
        self.content("data.pkl")
    }

    fn content(&self, name: &str) -> Result<&'a [u8], PickleError> {
        self.place(name).map(|range| &self.bytes[range])
    }

    /// Where the bytes of a storage are.
    ///
    /// # Errors
    /// As [`Self::pickle`].
    pub fn storage(&self, key: &str) -> Result<Range<usize>, PickleError> {
        self.place(&format!("data/{key}"))
    }

    fn place(&self, name: &str) -> Result<Range<usize>, PickleError> {
        let short: String = name.chars().take(100).collect();
        let wrong = |reason: &str| PickleError::Broken(format!("an entry `{short}` that {reason}"));
        let entry = self.entries.get(format!("{}/{name}", self.root).as_str());
        let entry = entry.ok_or_else(|| wrong("is not in the archive"))?;
        if entry.encrypted {
            return Err(wrong("is encrypted"));
        }
        if entry.method != 0 || entry.size != entry.stored_size {
            return Err(wrong(
                "is compressed; torch stores entries as they are (was the file packed again?)",
            ));
        }
        self.data(entry)
            .ok_or_else(|| wrong("lies outside of the file (truncated?)"))
    }

    fn data(&self, entry: &Entry) -> Option<Range<usize>> {
        let header = usize::try_from(entry.header).ok()?;
        let fixed = self.bytes.get(header..header.checked_add(30)?)?;
        if !fixed.starts_with(LOCAL) {
            return None;
        }
        let names = usize::from(u16_at(fixed, 26)?) + usize::from(u16_at(fixed, 28)?);
        let start = header + 30 + names;
        let end = start.checked_add(usize::try_from(entry.size).ok()?)?;
        (end <= self.bytes.len()).then_some(start..end)
    }
}

/// How many entries there are, and where the directory begins.
fn directory(bytes: &[u8]) -> Result<(u64, usize), PickleError> {
    let none = || broken("no directory at its end (truncated?)");
    let first = bytes.len().saturating_sub(END_BYTES + MAX_COMMENT_BYTES);
    let tail = &bytes[first..];
    let end = tail.windows(END.len()).rposition(|window| window == END);
    let end = first + end.ok_or_else(none)?;
    let record = bytes.get(end..end + END_BYTES).ok_or_else(none)?;
    let short = u16_at(record, 10)
        .zip(u32_at(record, 16))
        .ok_or_else(none)?;
    let (mut count, mut start) = (u64::from(short.0), u64::from(short.1));
    if let Some(large) = large_directory(bytes, end) {
        (count, start) = large;
    }
    let start = usize::try_from(start)
        .ok()
        .filter(|start| *start <= bytes.len());
    Ok((count, start.ok_or_else(none)?))
}

/// The same of archives beyond 4 GB or 65 535 entries.
fn large_directory(bytes: &[u8], end: usize) -> Option<(u64, u64)> {
    let locator = bytes.get(end.checked_sub(LOCATOR64_BYTES)?..end)?;
    if !locator.starts_with(LOCATOR64) {
        return None;
    }
    let at = usize::try_from(u64_at(locator, 8)?).ok()?;
    let record = bytes.get(at..at.checked_add(56)?)?;
    if !record.starts_with(END64) {
        return None;
    }
    Some((u64_at(record, 32)?, u64_at(record, 48)?))
}

/// One entry of the directory, and where the next one is. Its name is `None` where it is no text.
fn central(bytes: &[u8], at: usize) -> Option<(Option<&str>, Entry, usize)> {
    let fixed = bytes.get(at..at.checked_add(46)?)?;
    if !fixed.starts_with(CENTRAL) {
        return None;
    }
    let lengths = [28, 30, 32].map(|offset| u16_at(fixed, offset).map(usize::from));
    let [name_length, extra_length, comment_length] = [lengths[0]?, lengths[1]?, lengths[2]?];
    let name = bytes.get(at + 46..at + 46 + name_length)?;
    let extra_at = at + 46 + name_length;
    let extra = bytes.get(extra_at..extra_at + extra_length)?;
    let mut entry = Entry {
        encrypted: u16_at(fixed, 8)? & 1 != 0,
        method: u16_at(fixed, 10)?,
        stored_size: u64::from(u32_at(fixed, 20)?),
        size: u64::from(u32_at(fixed, 24)?),
        header: u64::from(u32_at(fixed, 42)?),
    };
    widen(&mut entry, extra);
    let name = (name_length <= MAX_NAME_BYTES).then(|| std::str::from_utf8(name).ok());
    Some((
        name.flatten(),
        entry,
        extra_at + extra_length + comment_length,
    ))
}

/// Sizes and places that do not fit into 32 bits stand in an extra field, in this order, each only where it is needed.
fn widen(entry: &mut Entry, mut extra: &[u8]) {
    while let (Some(kind), Some(length)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let end = (4 + usize::from(length)).min(extra.len());
        if kind == 1 {
            let mut large = &extra[4..end];
            for value in [&mut entry.size, &mut entry.stored_size, &mut entry.header] {
                if *value == u64::from(u32::MAX)
                    && let Some(found) = u64_at(large, 0)
                {
                    *value = found;
                    large = &large[8..];
                }
            }
        }
        extra = &extra[end..];
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn broken(found: &str) -> PickleError {
    PickleError::Broken(format!("its zip archive has {found}"))
}
