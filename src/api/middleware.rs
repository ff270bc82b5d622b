//! Around every handler: a request id, the log span with the caller's `traceparent`, and errors as problems.

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::StatusCode;
use actix_web::http::header::{self, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage as _};
use tracing::Span;
use tracing_actix_web::{RequestId, RootSpanBuilder};

use super::codes::Code;
use super::problem::{PROBLEM_JSON, Problem};

pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The span of a request. Secrets do not get into it: no headers but `traceparent`, no query string.
pub struct RequestSpan;

impl RootSpanBuilder for RequestSpan {
    fn on_request_start(request: &ServiceRequest) -> Span {
        let traceparent = request
            .headers()
            .get("traceparent")
            .and_then(|value| value.to_str().ok())
            .filter(|value| is_traceparent(value));
        let request_id = request
            .extensions()
            .get::<RequestId>()
            .map(ToString::to_string);
        tracing::info_span!(
            "request",
            method = %request.method(),
            path = %request.path(),
            request_id,
            traceparent,
            status = tracing::field::Empty,
        )
    }

    fn on_request_end<B: MessageBody>(span: Span, outcome: &Result<ServiceResponse<B>, Error>) {
        let status = match outcome {
            Ok(response) => response.status(),
            Err(error) => error.as_response_error().status_code(),
        };
        span.record("status", status.as_u16());
        span.in_scope(|| tracing::debug!("answered"));
    }
}

/// `version-traceid-parentid-flags` of W3C Trace Context, in lower-case hex.
fn is_traceparent(value: &str) -> bool {
    let parts: Vec<&str> = value.split('-').collect();
    let lengths = [2, 32, 16, 2];
    parts.len() >= lengths.len()
        && parts.iter().zip(lengths).all(|(part, length)| {
            part.len() == length
                && part
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })
}

/// Adds `x-request-id` and turns every error answer, the web framework's own too, into a problem with its instance.
///
/// # Errors
/// Those of the service further in, which answers its own.
pub async fn finish<B: MessageBody + 'static>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let id = request
        .extensions()
        .get::<RequestId>()
        .map(ToString::to_string);
    let path = request.path().to_owned();
    // The router wants the request for itself: a clone held here would make it panic. What is further in answers its
    // own errors, so none is lost by passing one on.
    let response = next.call(request).await?;
    let mut response = describe(response.map_into_boxed_body(), &path);
    if let Some(id) = id.and_then(|id| HeaderValue::from_str(&id).ok()) {
        response.headers_mut().insert(X_REQUEST_ID, id);
    }
    Ok(response)
}

fn describe(response: ServiceResponse, path: &str) -> ServiceResponse {
    let status = response.status();
    let problem = match response.response().error() {
        Some(error) => problem_of(error, status),
        None if is_bare_error(&response) => {
            Problem::new(Code::for_status(status), "the request was not answered")
        }
        None => return response,
    };
    response.into_response(problem.response(Some(path)))
}

/// An error answer that nobody has written a problem for.
fn is_bare_error(response: &ServiceResponse) -> bool {
    let kind = response.headers().get(header::CONTENT_TYPE);
    let failed = response.status().is_client_error() || response.status().is_server_error();
    failed && kind.is_none_or(|kind| kind != PROBLEM_JSON)
}

/// The problem inside of an error, or one that says no more than the status does.
fn problem_of(error: &Error, status: StatusCode) -> Problem {
    if let Some(problem) = error.as_error::<Problem>() {
        return problem.clone();
    }
    if status.is_server_error() {
        return Problem::internal(error);
    }
    Problem::new(Code::for_status(status), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::is_traceparent;

    #[test]
    fn only_w3c_traceparents_are_logged() {
        assert!(is_traceparent(
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        ));
        assert!(!is_traceparent(
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01"
        ));
        assert!(!is_traceparent("x"));
        assert!(!is_traceparent(
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331\n-01"
        ));
    }
}
