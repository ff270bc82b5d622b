//! Caption files as text: which encoding, which line, and what has to be reported about it.

use encoding_rs::{Encoding, UTF_16BE, UTF_16LE, WINDOWS_1252};

/// The text of a caption file and what was odd about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caption {
    pub text: String,
    pub remarks: Vec<CaptionRemark>,
}

/// Something the owner of a caption should know; the caption is kept all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaptionRemark {
    #[error("the file is not UTF-8; it was read as Windows-1252 (Latin-1)")]
    ReadAsWindows1252,
    #[error("the file is not UTF-8; it was read as UTF-16, which its zeros say")]
    ReadAsUtf16,
    #[error("the caption is empty")]
    Empty,
    #[error(
        "there are several lines: the first is used, or with `enable_wildcards` one of them each time"
    )]
    OnlyFirstLine,
}

impl CaptionRemark {
    pub fn code(self) -> &'static str {
        match self {
            Self::ReadAsWindows1252 => "read_as_windows_1252",
            Self::ReadAsUtf16 => "read_as_utf_16",
            Self::Empty => "empty_caption",
            Self::OnlyFirstLine => "only_first_line",
        }
    }
}

/// Text that cannot be a caption.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaptionError {
    #[error(
        "found bytes that are neither UTF-8, UTF-16 with a byte order mark nor Windows-1252 text"
    )]
    NotText,
    #[error("found {found} bytes, expected at most {limit}")]
    TooLarge { found: u64, limit: u64 },
    #[error("found the control character U+{0:04X}; a caption is lines of text")]
    ControlCharacter(u32),
}

/// Reads the bytes of a caption file.
///
/// Its lines are stripped and empty ones go, as sd-scripts does with wildcards; without them a run uses the first. UTF-8 and UTF-16 are told by
/// byte order mark or validity; anything else is Windows-1252, if that gives no control characters.
///
/// # Errors
/// [`CaptionError::NotText`] when no encoding gives plain text.
pub fn read(bytes: &[u8]) -> Result<Caption, CaptionError> {
    let (text, guessed) = decode(bytes)?;
    let lines = text.split(['\n', '\r']).map(str::trim);
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    let mut remarks = Vec::new();
    remarks.extend(guessed);
    if lines.is_empty() {
        remarks.push(CaptionRemark::Empty);
    }
    if lines.len() > 1 {
        remarks.push(CaptionRemark::OnlyFirstLine);
    }
    Ok(Caption {
        text: lines.join("\n"),
        remarks,
    })
}

/// Checks a caption that was given as text.
///
/// # Errors
/// When it is too long, or is not text.
pub fn check(text: &str, limit_bytes: u64) -> Result<(), CaptionError> {
    let found = text.len() as u64;
    if found > limit_bytes {
        return Err(CaptionError::TooLarge {
            found,
            limit: limit_bytes,
        });
    }
    match text
        .chars()
        .find(|c| c.is_control() && !matches!(c, '\t' | '\n'))
    {
        Some(control) => Err(CaptionError::ControlCharacter(control.into())),
        None => Ok(()),
    }
}

/// The text, and how its encoding was guessed, if it was.
fn decode(bytes: &[u8]) -> Result<(String, Option<CaptionRemark>), CaptionError> {
    let strict = |encoding: &'static Encoding, rest: &[u8]| {
        encoding
            .decode_without_bom_handling_and_without_replacement(rest)
            .map(std::borrow::Cow::into_owned)
            .filter(|text| is_plain(text))
            .ok_or(CaptionError::NotText)
    };
    if let Some((encoding, length)) = Encoding::for_bom(bytes) {
        debug_assert!(
            encoding == UTF_16BE || encoding == UTF_16LE || encoding == encoding_rs::UTF_8
        );
        return strict(encoding, &bytes[length..]).map(|text| (text, None));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if is_plain(text) => Ok((text.to_owned(), None)),
        // Binary, or UTF-16 without a mark.
        _ if bytes.contains(&0) => {
            let encoding = utf_16_of(bytes).ok_or(CaptionError::NotText)?;
            strict(encoding, bytes).map(|text| (text, Some(CaptionRemark::ReadAsUtf16)))
        }
        Ok(_) => Err(CaptionError::NotText),
        Err(_) => {
            strict(WINDOWS_1252, bytes).map(|text| (text, Some(CaptionRemark::ReadAsWindows1252)))
        }
    }
}

/// Which UTF-16 it may be: one half of nearly every unit is zero in text that is mostly Latin, and never the other half.
fn utf_16_of(bytes: &[u8]) -> Option<&'static Encoding> {
    let (units, rest) = bytes.as_chunks::<2>();
    let zeros = |half: usize| units.iter().filter(|unit| unit[half] == 0).count();
    let mostly = |zeros: usize| zeros * 4 >= units.len() * 3;
    match (zeros(0), zeros(1)) {
        (0, high) if rest.is_empty() && mostly(high) && units.len() > 2 => Some(UTF_16LE),
        (high, 0) if rest.is_empty() && mostly(high) && units.len() > 2 => Some(UTF_16BE),
        _ => None,
    }
}

fn is_plain(text: &str) -> bool {
    !text
        .chars()
        .any(|c| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{c}'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(bytes: &[u8]) -> (String, Vec<CaptionRemark>) {
        let caption = read(bytes).expect("a caption");
        (caption.text, caption.remarks)
    }

    #[test]
    fn encodings_are_told_apart() {
        let expected = "a café, 5 €".to_owned();
        assert_eq!(ok("a café, 5 €\n".as_bytes()), (expected.clone(), vec![]));
        assert_eq!(
            ok("\u{feff}a café, 5 €".as_bytes()),
            (expected.clone(), vec![])
        );
        let utf16: Vec<u8> = "\u{feff}a café, 5 €"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        assert_eq!(ok(&utf16), (expected.clone(), vec![]));
        let utf16: Vec<u8> = "\u{feff}a café, 5 €"
            .encode_utf16()
            .flat_map(u16::to_be_bytes)
            .collect();
        assert_eq!(ok(&utf16), (expected.clone(), vec![]));
        assert_eq!(
            ok(b"a caf\xe9, 5 \x80"),
            (expected, vec![CaptionRemark::ReadAsWindows1252])
        );
    }

    #[test]
    fn binary_is_not_text() {
        for bytes in [
            b"\x89PNG\r\n\x1a\n".as_slice(),
            b"a\0b\0",
            b"\xff\xfea",
            b"caf\xe9 \x81",
            b"\xef\xbb\xbf\xff",
        ] {
            assert_eq!(read(bytes), Err(CaptionError::NotText), "{bytes:?}");
        }
    }

    #[test]
    fn lines_are_kept_without_empty_ones() {
        assert_eq!(
            ok(b"  one, two \r\nthree\n"),
            (
                "one, two\nthree".to_owned(),
                vec![CaptionRemark::OnlyFirstLine]
            )
        );
        assert_eq!(ok(b""), (String::new(), vec![CaptionRemark::Empty]));
        assert_eq!(ok(b"one\n\n"), ("one".to_owned(), vec![]));
    }

    #[test]
    fn given_captions_are_text() {
        assert_eq!(check("one, two", 8), Ok(()));
        assert_eq!(check("one\ntwo", 8), Ok(()));
        assert_eq!(
            check("one\rtwo", 8),
            Err(CaptionError::ControlCharacter(13))
        );
        assert_eq!(
            check("one, two!", 8),
            Err(CaptionError::TooLarge { found: 9, limit: 8 })
        );
    }
}
