//! Files as answers: ranges, validators, HEAD, digest and a safe file name (RFC 9110, RFC 9530, RFC 6266).

use std::ops::RangeInclusive;
use std::path::Path;

use actix_web::body::SizedStream;
use actix_web::http::header::{
    self, ContentDisposition, DispositionParam, DispositionType, HeaderValue,
};
use actix_web::http::{Method, StatusCode};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::io::ReaderStream;

use super::codes::Code;
use super::problem::Problem;

/// Bytes read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// A stored file whose content never changes.
#[derive(Clone, Copy, Debug)]
pub struct Download<'a> {
    pub path: &'a Path,
    /// In hex: the ETag and the digest.
    pub sha256: &'a str,
    pub media_type: &'a str,
    pub file_name: &'a str,
    /// Whether a browser shows the file or offers to save it.
    pub inline: bool,
}

/// Answers GET and HEAD for a file: 200, 206, 304 or 416.
///
/// # Errors
/// 416 when no byte of the wanted range exists; 500 when the file cannot be read.
pub async fn serve(request: &HttpRequest, download: Download<'_>) -> Result<HttpResponse, Problem> {
    let mut file = tokio::fs::File::open(download.path)
        .await
        .map_err(|error| unreadable(download.path, &error))?;
    let size = file
        .metadata()
        .await
        .map_err(|error| unreadable(download.path, &error))?
        .len();
    let etag = format!("\"{}\"", download.sha256);
    if matches_any(request, &etag) {
        let mut answer = HttpResponseBuilder::new(StatusCode::NOT_MODIFIED);
        answer
            .insert_header((header::ETAG, etag))
            .insert_header((header::CACHE_CONTROL, "private, no-cache"));
        return Ok(answer.finish());
    }
    let range = wanted_range(request, &etag, size)?;
    let mut answer = HttpResponseBuilder::new(match range {
        Some(_) => StatusCode::PARTIAL_CONTENT,
        None => StatusCode::OK,
    });
    answer
        .insert_header((header::CONTENT_TYPE, download.media_type))
        .insert_header((header::ETAG, etag))
        .insert_header((header::ACCEPT_RANGES, "bytes"))
        .insert_header((header::CACHE_CONTROL, "private, no-cache"))
        .insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header(disposition(download.file_name, download.inline));
    if let Ok(digest) = hex::decode(download.sha256) {
        answer.insert_header((
            "repr-digest",
            format!("sha-256=:{}:", STANDARD.encode(digest)),
        ));
    }
    let (start, length) = match &range {
        Some(range) => {
            let content = format!("bytes {}-{}/{size}", range.start(), range.end());
            answer.insert_header((header::CONTENT_RANGE, content));
            (*range.start(), range.end() - range.start() + 1)
        }
        None => (0, size),
    };
    if start > 0 {
        file.seek(std::io::SeekFrom::Start(start))
            .await
            .map_err(|error| unreadable(download.path, &error))?;
    }
    let body = ReaderStream::with_capacity(file.take(length), CHUNK_BYTES);
    Ok(answer.body(SizedStream::new(length, body)))
}

fn unreadable(path: &Path, error: &std::io::Error) -> Problem {
    Problem::internal(format!("reading {}: {error}", path.display()))
}

/// `If-None-Match`: compared weakly (RFC 9110, section 13.1.2).
pub fn matches_any(request: &HttpRequest, etag: &str) -> bool {
    request
        .headers()
        .get_all(header::IF_NONE_MATCH)
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
}

/// The one range that is wanted. Several ranges, other units and nonsense are answered with the whole file, as
/// RFC 9110 allows; so is a range whose `If-Range` is about another content.
fn wanted_range(
    request: &HttpRequest,
    etag: &str,
    size: u64,
) -> Result<Option<RangeInclusive<u64>>, Problem> {
    let same = request
        .headers()
        .get(header::IF_RANGE)
        .is_none_or(|value| value == etag);
    let wanted = request
        .headers()
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok());
    let Some(wanted) = wanted.filter(|_| same && request.method() == Method::GET) else {
        return Ok(None);
    };
    match parse_range(wanted, size) {
        Wanted::Whole => Ok(None),
        Wanted::Part(range) => Ok(Some(range)),
        Wanted::Nothing => {
            let problem = Problem::new(
                Code::RangeNotSatisfiable,
                format!("found `{wanted}`, the file has {size} bytes"),
            );
            let content =
                HeaderValue::from_str(&format!("bytes */{size}")).map_err(Problem::internal)?;
            Err(problem.with_header(header::CONTENT_RANGE, content))
        }
    }
}

#[derive(Debug, PartialEq)]
enum Wanted {
    Whole,
    Part(RangeInclusive<u64>),
    Nothing,
}

fn parse_range(header: &str, size: u64) -> Wanted {
    let parts = header
        .strip_prefix("bytes=")
        .and_then(|range| range.trim().split_once('-'));
    let Some((first, last)) = parts else {
        return Wanted::Whole;
    };
    let number = |text: &str| -> Option<u64> {
        text.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse().ok())?
    };
    match (first, last) {
        ("", suffix) => match number(suffix) {
            Some(0) => Wanted::Nothing,
            Some(_) if size == 0 => Wanted::Nothing,
            Some(length) => Wanted::Part(size.saturating_sub(length)..=size - 1),
            None => Wanted::Whole,
        },
        (first, last) => match (number(first), number(last), last) {
            (Some(first), _, "") if first < size => Wanted::Part(first..=size - 1),
            (Some(first), Some(last), _) if first <= last && first < size => {
                Wanted::Part(first..=last.min(size - 1))
            }
            (Some(first), Some(last), _) if first > last => Wanted::Whole,
            (Some(_), Some(_), _) | (Some(_), None, "") => Wanted::Nothing,
            _ => Wanted::Whole,
        },
    }
}

/// A name any file system takes; names beyond ASCII go along in the extended form.
fn disposition(file_name: &str, inline: bool) -> ContentDisposition {
    let safe: String = file_name
        .chars()
        .map(|c| {
            if c.is_control() || matches!(c, '/' | '\\' | '"') {
                '_'
            } else {
                c
            }
        })
        .collect();
    let mut parameters = Vec::new();
    if !safe.is_ascii() {
        parameters.push(DispositionParam::FilenameExt(header::ExtendedValue {
            charset: header::Charset::Ext("UTF-8".to_owned()),
            language_tag: None,
            value: safe.clone().into_bytes(),
        }));
    }
    let ascii: String = safe
        .chars()
        .map(|c| if c.is_ascii() { c } else { '_' })
        .collect();
    parameters.push(DispositionParam::Filename(ascii));
    let kind = if inline {
        DispositionType::Inline
    } else {
        DispositionType::Attachment
    };
    ContentDisposition {
        disposition: kind,
        parameters,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        for (header, expected) in [
            ("bytes=0-9", Wanted::Part(0..=9)),
            ("bytes=90-", Wanted::Part(90..=99)),
            ("bytes=-10", Wanted::Part(90..=99)),
            ("bytes=-1000", Wanted::Part(0..=99)),
            ("bytes=50-1000", Wanted::Part(50..=99)),
            ("bytes=100-", Wanted::Nothing),
            ("bytes=100-200", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=9-5", Wanted::Whole),
            ("bytes=0-1,5-6", Wanted::Whole),
            ("bytes=a-b", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("lines=0-9", Wanted::Whole),
            ("bytes=99999999999999999999-", Wanted::Whole),
        ] {
            assert_eq!(parse_range(header, 100), expected, "{header}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Wanted::Nothing);
    }

    #[test]
    fn file_names_cannot_break_the_header() {
        assert_eq!(
            disposition("a\"\r\n.png", true).to_string(),
            "inline; filename=\"a___.png\""
        );
        let name = disposition("é.png", false).to_string();
        assert!(
            name.contains("filename*=UTF-8''%C3%A9.png") && name.contains("filename=\"_.png\""),
            "{name}"
        );
    }
}
