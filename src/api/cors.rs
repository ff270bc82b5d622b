//! Cross-origin requests: which web pages may call, what they may send and what they may read (Fetch standard).

use actix_cors::Cors;
use actix_web::http::Method;
use actix_web::http::header::{self, HeaderName};

use super::idempotency::{IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED};
use super::middleware::X_REQUEST_ID;
use super::run_logs::NEXT_AFTER;

/// How long a browser remembers what is allowed.
const REMEMBERED_S: usize = 3600;

/// Answers preflight requests of `pages`, and lets them read answers. Others get no permission, and no error either:
/// whether a page may call at all is decided elsewhere.
pub fn cors(pages: &[String]) -> Cors {
    let mut cors = Cors::default()
        .block_on_origin_mismatch(false)
        .allowed_methods([
            Method::GET,
            Method::HEAD,
            Method::POST,
            Method::PUT,
            Method::PATCH,
            Method::DELETE,
        ])
        .allowed_headers([
            header::ACCEPT,
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            header::IF_MATCH,
            header::IF_NONE_MATCH,
            header::IF_RANGE,
            header::RANGE,
            HeaderName::from_static("content-digest"),
            HeaderName::from_static("last-event-id"),
            HeaderName::from_static("traceparent"),
            IDEMPOTENCY_KEY,
        ])
        .expose_headers([
            header::ACCEPT_RANGES,
            header::ALLOW,
            header::CONTENT_DISPOSITION,
            header::CONTENT_RANGE,
            header::ETAG,
            header::LOCATION,
            header::RETRY_AFTER,
            header::WWW_AUTHENTICATE,
            HeaderName::from_static("repr-digest"),
            IDEMPOTENCY_REPLAYED,
            NEXT_AFTER,
            X_REQUEST_ID,
        ])
        .max_age(REMEMBERED_S);
    for page in pages {
        cors = match page.as_str() {
            "*" => cors.allow_any_origin(),
            page => cors.allowed_origin(page),
        };
    }
    cors
}
