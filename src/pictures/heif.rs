//! What an AVIF file says about its main picture besides the pixels: how it is turned, and what its colours mean.
//!
//! Only the boxes on the way there are read: `meta` with `pitm`, and `iprp` with `ipco` and `ipma` (ISO/IEC 23008-12).

use image::metadata::Orientation;

/// Properties of the main picture.
#[derive(Debug, Default)]
pub struct Properties<'a> {
    /// By how many quarters against the clock it is to be turned.
    quarters: u8,
    /// Mirrored after that: top and bottom (`false`), left and right (`true`).
    mirrored: Option<bool>,
    pub icc: Option<&'a [u8]>,
    pub cicp: Option<Cicp>,
}

/// Numbers of ITU-T H.273.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cicp {
    pub primaries: u8,
    pub transfer: u8,
    pub matrix: u8,
    pub full_range: bool,
}

impl Properties<'_> {
    pub fn orientation(&self) -> Orientation {
        match (self.quarters & 3, self.mirrored) {
            (0, None) => Orientation::NoTransforms,
            (1, None) => Orientation::Rotate270,
            (2, None) => Orientation::Rotate180,
            (_, None) => Orientation::Rotate90,
            // Turned by half and mirrored one way is mirrored the other way.
            (0, Some(true)) | (2, Some(false)) => Orientation::FlipHorizontal,
            (0, Some(false)) | (2, Some(true)) => Orientation::FlipVertical,
            (1, Some(true)) | (3, Some(false)) => Orientation::Rotate270FlipH,
            (_, Some(_)) => Orientation::Rotate90FlipH,
        }
    }
}

/// Reads the properties; what cannot be read is not there.
pub fn properties(file: &[u8]) -> Properties<'_> {
    read(file).unwrap_or_default()
}

fn read(file: &[u8]) -> Option<Properties<'_>> {
    let meta = find(file, b"meta")?.get(4..)?; // after version and flags
    let main = main_item(find(meta, b"pitm")?)?;
    let properties = find(meta, b"iprp")?;
    let all: Vec<([u8; 4], &[u8])> = Boxes(find(properties, b"ipco")?).collect();
    let mut found = Properties::default();
    for index in associated(find(properties, b"ipma")?, main)? {
        let Some((kind, content)) = index.checked_sub(1).and_then(|index| all.get(index)) else {
            continue;
        };
        match kind {
            b"irot" => found.quarters = *content.first()? & 3,
            b"imir" => found.mirrored = Some(*content.first()? & 1 == 1),
            b"colr" => match content.get(..4)? {
                b"prof" | b"rICC" => found.icc = content.get(4..),
                b"nclx" => found.cicp = cicp(content.get(4..)?),
                _ => {}
            },
            _ => {}
        }
    }
    Some(found)
}

fn cicp(bytes: &[u8]) -> Option<Cicp> {
    let number = |at: usize| {
        let wide = u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?);
        u8::try_from(wide).ok()
    };
    Some(Cicp {
        primaries: number(0)?,
        transfer: number(2)?,
        matrix: number(4)?,
        full_range: bytes.get(6)? & 0x80 != 0,
    })
}

fn main_item(content: &[u8]) -> Option<u32> {
    match *content.first()? {
        0 => Some(u32::from(u16_at(content, 4)?)),
        _ => u32_at(content, 4),
    }
}

/// The numbers, from 1, of an item's properties in their order.
fn associated(content: &[u8], item: u32) -> Option<Vec<usize>> {
    let version = *content.first()?;
    let is_wide = *content.get(3)? & 1 == 1;
    let entries = u32_at(content, 4)?;
    let mut at = 8;
    for _ in 0..entries {
        let id = if version < 1 {
            at += 2;
            u32::from(u16_at(content, at - 2)?)
        } else {
            at += 4;
            u32_at(content, at - 4)?
        };
        let count = usize::from(*content.get(at)?);
        at += 1;
        let width = if is_wide { 2 } else { 1 };
        if id == item {
            let number = |index: usize| {
                let at = at + index * width;
                if is_wide {
                    Some(usize::from(u16_at(content, at)? & 0x7fff))
                } else {
                    Some(usize::from(content.get(at)? & 0x7f))
                }
            };
            return (0..count).map(number).collect();
        }
        at += count * width;
    }
    Some(Vec::new())
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn find<'a>(boxes: &'a [u8], kind: &[u8; 4]) -> Option<&'a [u8]> {
    Boxes(boxes)
        .find(|(found, _)| found == kind)
        .map(|(_, content)| content)
}

/// Kinds and contents of boxes one after the other; ends where they make no sense.
struct Boxes<'a>(&'a [u8]);

impl<'a> Iterator for Boxes<'a> {
    type Item = ([u8; 4], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.0;
        let kind = rest.get(4..8)?.try_into().ok()?;
        let (head, size) = match u32_at(rest, 0)? {
            0 => (8, rest.len()),
            1 => {
                let size = u64::from_be_bytes(rest.get(8..16)?.try_into().ok()?);
                (16, usize::try_from(size).ok()?)
            }
            size => (8, size as usize),
        };
        let content = rest.get(head..size)?;
        self.0 = &rest[size..];
        Some((kind, content))
    }
}
