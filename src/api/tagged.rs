//! A resource with the ETag of its representation, so that whoever polls it is told in a few bytes that nothing is new.

use actix_web::http::header::{self, ContentType};
use actix_web::{HttpRequest, HttpResponse};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::download::matches_any;
use super::problem::Problem;

/// So much of a digest tells two representations apart.
const TAG_BYTES: usize = 16;

/// 200 with a resource, or 304 when `If-None-Match` names what the client would get.
///
/// # Errors
/// 500 when the resource is no JSON.
pub fn tagged(request: &HttpRequest, resource: &impl Serialize) -> Result<HttpResponse, Problem> {
    let body = serde_json::to_vec(resource).map_err(Problem::internal)?;
    let etag = format!("\"{}\"", hex::encode(&Sha256::digest(&body)[..TAG_BYTES]));
    if matches_any(request, &etag) {
        let mut answer = HttpResponse::NotModified();
        return Ok(answer.insert_header((header::ETAG, etag)).finish());
    }
    let mut answer = HttpResponse::Ok();
    Ok(answer
        .insert_header((header::ETAG, etag))
        .content_type(ContentType::json())
        .body(body))
}
