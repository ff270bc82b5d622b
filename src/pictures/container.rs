//! Where a picture ends in its file. Decoders fill in what is missing at the end of some formats, and do not look behind
//! it; containers tell.

use super::{Format, PictureError};

/// What a walk over the container has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ending {
    pub has_more_frames: bool,
    pub has_trailing_bytes: bool,
    /// Of a JPEG: that all its coefficients are held at once.
    pub is_progressive: bool,
}

/// Walks to the end of the picture.
///
/// # Errors
/// [`PictureError::Truncated`] where the format tells that something is missing.
pub fn walk(format: Format, bytes: &[u8]) -> Result<Ending, PictureError> {
    let walked = match format {
        Format::Jpeg => jpeg(bytes),
        Format::Png => png(bytes),
        Format::WebP => webp(bytes),
        Format::Gif => return Ok(gif(bytes).unwrap_or_default()), // a missing end mark is common
        Format::Tiff => return Ok(tiff(bytes).unwrap_or_default()),
        Format::Bmp | Format::Avif => return Ok(Ending::default()),
    };
    walked.ok_or(PictureError::Truncated)
}

/// Padding is nothing.
fn trailing(bytes: &[u8], end: usize) -> bool {
    let rest = bytes.get(end..).unwrap_or_default();
    rest.iter().any(|byte| !matches!(byte, 0 | b'\r' | b'\n'))
}

/// Walks the segments to the end-of-image marker. Thumbnails inside of segments are skipped with them.
fn jpeg(bytes: &[u8]) -> Option<Ending> {
    let mut ending = Ending::default();
    let mut at = 2_usize; // after the start of the image
    loop {
        while *bytes.get(at)? != 0xff {
            at += 1; // entropy-coded data, or padding between segments
        }
        while *bytes.get(at)? == 0xff {
            at += 1;
        }
        match *bytes.get(at)? {
            0xd9 => {
                ending.has_trailing_bytes = trailing(bytes, at + 1);
                return Some(ending);
            }
            0x00 | 0x01 | 0xd0..=0xd8 => at += 1, // a stuffed byte, or a marker without a length
            marker => {
                ending.is_progressive |= marker == 0xc2;
                let length = [*bytes.get(at + 1)?, *bytes.get(at + 2)?];
                at += 1 + usize::from(u16::from_be_bytes(length));
            }
        }
    }
}

/// Walks the chunks to `IEND`.
fn png(bytes: &[u8]) -> Option<Ending> {
    let mut ending = Ending::default();
    let mut at = 8_usize; // after the signature
    loop {
        let header = bytes.get(at..at.checked_add(8)?)?;
        let length = u32::from_be_bytes(header[..4].try_into().ok()?) as usize;
        at = at.checked_add(12)?.checked_add(length)?; // length, kind, content, checksum
        match &header[4..] {
            b"acTL" => ending.has_more_frames = true,
            b"IEND" => {
                ending.has_trailing_bytes = trailing(bytes, at);
                return (at <= bytes.len()).then_some(ending);
            }
            _ => {}
        }
    }
}

fn webp(bytes: &[u8]) -> Option<Ending> {
    const ANIMATION: u8 = 1 << 1;
    let size = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?) as usize;
    let end = size.checked_add(8)?;
    let is_extended = bytes.get(12..16)? == b"VP8X";
    let flags = bytes.get(20).copied().unwrap_or_default();
    (end <= bytes.len()).then(|| Ending {
        has_more_frames: is_extended && flags & ANIMATION != 0,
        has_trailing_bytes: trailing(bytes, end),
        is_progressive: false,
    })
}

/// Walks the blocks to the trailer.
fn gif(bytes: &[u8]) -> Option<Ending> {
    let table = |flags: u8| {
        if flags & 0x80 == 0 {
            0
        } else {
            3 << ((flags & 7) + 1)
        }
    };
    let mut frames = 0_usize;
    let mut at = 13 + table(*bytes.get(10)?);
    loop {
        match *bytes.get(at)? {
            0x21 => at = sub_blocks(bytes, at + 2)?,
            0x2c => {
                frames += 1;
                at = sub_blocks(bytes, at + 11 + table(*bytes.get(at + 9)?))?;
            }
            0x3b => {
                return Some(Ending {
                    has_more_frames: frames > 1,
                    has_trailing_bytes: trailing(bytes, at + 1),
                    is_progressive: false,
                });
            }
            _ => return None,
        }
    }
}

fn sub_blocks(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            length => at += 1 + usize::from(length),
        }
    }
}

/// Whether the first directory is followed by another one. Pixels may lie anywhere, so that no end can be told.
fn tiff(bytes: &[u8]) -> Option<Ending> {
    let is_little = bytes.starts_with(b"II");
    let array = |at: usize| bytes.get(at..at.checked_add(4)?)?.try_into().ok();
    let long = |at: usize| {
        let four: [u8; 4] = array(at)?;
        Some(if is_little {
            u32::from_le_bytes(four)
        } else {
            u32::from_be_bytes(four)
        })
    };
    let short = |at: usize| {
        let two: [u8; 2] = bytes.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(if is_little {
            u16::from_le_bytes(two)
        } else {
            u16::from_be_bytes(two)
        })
    };
    if short(2)? != 42 {
        return None; // the 64-bit kind
    }
    let directory = long(4)? as usize;
    let entries = usize::from(short(directory)?);
    let next = long(directory.checked_add(2 + 12 * entries)?)?;
    Some(Ending {
        has_more_frames: next != 0,
        ..Ending::default()
    })
}
