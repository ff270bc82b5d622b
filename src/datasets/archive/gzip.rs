//! Gzip: one packed file, most often a tar, that is looked at afterwards like any other.
//!
//! Its content is a deflate stream, as that of a zip's entry. It gets the head of one, so that it is unpacked, and its
//! checksum compared, by the same reader.

use std::fs::File;
use std::io::{BufReader, Cursor, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use ::zip::ZipReadOptions;
use ::zip::read::read_zipfile_from_stream_with_options;

use super::{ArchiveError, Budget, Entry, largest, write_out};
use crate::datasets::layout::Place;

/// Bytes of checksum and length behind the stream.
const TRAILER_BYTES: u64 = 8;
/// Bytes of names and comments before it.
const MAX_HEADER_BYTES: u64 = 64 << 10;
/// What the packed file is called; the archive's own name says nothing that the content does not say.
const NAME: &str = "content.tar";

/// The head of a zip's entry that is packed by deflate, whose size and checksum are said elsewhere, named `-`.
const ENTRY_HEAD: [u8; 31] = [
    b'P', b'K', 3, 4, 20, 0, 8, 0, 8, 0, 0, 0, 0x21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0,
    0, 0, b'-',
];

pub fn unpack(
    archive: &Path,
    into: &Path,
    budget: &mut Budget,
) -> Result<Vec<Entry>, ArchiveError> {
    budget.count(1)?;
    let mut file = File::open(archive)?;
    let length = file.metadata()?.len();
    let mut header = Vec::new();
    (&mut file)
        .take(MAX_HEADER_BYTES)
        .read_to_end(&mut header)?;
    let begin = header_bytes(&header)
        .ok_or_else(|| ArchiveError::damaged("its head is not that of a gzip file"))?;
    let packed = length
        .checked_sub(begin as u64 + TRAILER_BYTES)
        .ok_or_else(|| ArchiveError::damaged("it ends too early"))?;
    let mut trailer = [0; 4];
    file.seek(SeekFrom::Start(length - TRAILER_BYTES))?;
    file.read_exact(&mut trailer)?;
    file.seek(SeekFrom::Start(begin as u64))?;
    let mut stream = Cursor::new(ENTRY_HEAD).chain(BufReader::new(file));
    let options = ZipReadOptions::new()
        .override_compressed_size(packed)
        .override_crc(u32::from_le_bytes(trailer));
    let entry = read_zipfile_from_stream_with_options(&mut stream, options);
    let mut entry = entry
        .map_err(ArchiveError::damaged)?
        .ok_or_else(|| ArchiveError::damaged("it holds nothing"))?;
    let place = Place {
        folders: Vec::new(),
        file_name: NAME.to_owned(),
    };
    let target = into.join("0");
    let limit = largest(&place, &budget.limits);
    match write_out(&mut entry, &target, limit, budget)? {
        Ok(_) => Ok(vec![Entry {
            name: NAME.to_owned(),
            content: Ok((place, target)),
        }]),
        Err(error) => Err(ArchiveError::damaged(error)),
    }
}

/// Where the stream begins (RFC 1952).
fn header_bytes(bytes: &[u8]) -> Option<usize> {
    const CHECKSUM: u8 = 1 << 1;
    const EXTRA: u8 = 1 << 2;
    const NAME: u8 = 1 << 3;
    const COMMENT: u8 = 1 << 4;
    let flags = *bytes.get(3)?;
    let mut at = 10;
    if flags & EXTRA != 0 {
        at += 2 + usize::from(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    }
    for flag in [NAME, COMMENT] {
        if flags & flag != 0 {
            at += bytes.get(at..)?.iter().position(|byte| *byte == 0)? + 1;
        }
    }
    if flags & CHECKSUM != 0 {
        at += 2;
    }
    (at <= bytes.len()).then_some(at)
}
