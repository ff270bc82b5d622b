//! The one error answer of the API: `application/problem+json` (RFC 9457). What can go wrong is listed in `codes`.

use std::fmt;

use actix_web::http::StatusCode;
use actix_web::http::header::{self, HeaderName, HeaderValue};
use actix_web::{HttpResponse, HttpResponseBuilder, ResponseError};
use serde::Serialize;
use utoipa::ToSchema;

use super::codes::Code;

pub const PROBLEM_JSON: &str = "application/problem+json";

/// An answer that says what went wrong (RFC 9457).
#[derive(Clone, Debug)]
pub struct Problem {
    code: Code,
    detail: String,
    errors: Vec<FieldError>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// One wrong value of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(example = json!({"pointer": "/network/rank", "code": "out_of_range", "message": "found 0, expected 1 to 1024"}))]
pub struct FieldError {
    /// Where in the body, as a JSON Pointer (RFC 6901); for a query parameter `/` and its name.
    pub pointer: String,
    /// `unknown_field`, `missing_field`, `wrong_type`, `out_of_range`, `invalid_value` or `not_found`.
    pub code: String,
    /// What was found and what was expected.
    pub message: String,
}

impl FieldError {
    pub fn new(pointer: impl Into<String>, code: &str, message: impl Into<String>) -> Self {
        Self {
            pointer: pointer.into(),
            code: code.to_owned(),
            message: message.into(),
        }
    }
}

/// The body of an error answer (RFC 9457).
#[derive(Serialize, ToSchema)]
#[schema(as = Problem, example = json!({
    "type": "urn:lorasmith:problem:invalid_settings",
    "title": "The settings have a wrong value",
    "status": 422,
    "detail": "1 value of the request is wrong",
    "code": "invalid_settings",
    "instance": "/v1/runs",
    "errors": [{"pointer": "/network/rank", "code": "out_of_range", "message": "found 0, expected 1 to 1024"}]
}))]
pub struct ProblemBody<'a> {
    /// `urn:lorasmith:problem:` and the code.
    #[serde(rename = "type")]
    pub type_uri: String,
    /// The same for every problem of this code.
    pub title: &'a str,
    /// The HTTP status.
    pub status: u16,
    /// What happened here.
    pub detail: &'a str,
    /// A stable word to branch on.
    pub code: &'a str,
    /// The path of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<&'a str>,
    /// The wrong values, one by one.
    #[serde(skip_serializing_if = "<[FieldError]>::is_empty")]
    pub errors: &'a [FieldError],
}

impl Problem {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
            errors: Vec::new(),
            headers: Vec::new(),
        }
    }

    /// One or more wrong values; the detail is written from them.
    pub fn fields(code: Code, errors: Vec<FieldError>) -> Self {
        let detail = match errors.as_slice() {
            [one] if one.pointer.is_empty() => one.message.clone(),
            [one] => format!("{}: {}", one.pointer, one.message),
            many => format!("{} values of the request are wrong", many.len()),
        };
        Self {
            code,
            detail,
            errors,
            headers: Vec::new(),
        }
    }

    /// One wrong value.
    pub fn field(code: Code, pointer: &str, kind: &str, message: impl Into<String>) -> Self {
        Self::fields(code, vec![FieldError::new(pointer, kind, message)])
    }

    /// A failure of ours: the cause goes to the log, the client learns only that there is one.
    pub fn internal(cause: impl fmt::Display) -> Self {
        tracing::error!(error = %cause, "a request has failed");
        Self::new(
            Code::InternalError,
            "The service has failed on this request; the log has the cause under its x-request-id.",
        )
    }

    /// Adds a header to the answer (`Allow`, `WWW-Authenticate`, `Content-Range`…).
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    pub fn code(&self) -> Code {
        self.code
    }

    pub fn detail(&self) -> &str {
        &self.detail
    }

    pub fn errors(&self) -> &[FieldError] {
        &self.errors
    }

    /// The answer; `instance` is the request's path.
    pub fn response(&self, instance: Option<&str>) -> HttpResponse {
        let mut answer = HttpResponseBuilder::new(self.code.status());
        for (name, value) in &self.headers {
            answer.insert_header((name.clone(), value.clone()));
        }
        answer.insert_header((header::CONTENT_TYPE, PROBLEM_JSON));
        answer.insert_header((header::CACHE_CONTROL, "no-store"));
        let body = ProblemBody {
            type_uri: format!("urn:lorasmith:problem:{}", self.code.as_str()),
            title: self.code.title(),
            status: self.code.status().as_u16(),
            detail: &self.detail,
            code: self.code.as_str(),
            instance,
            errors: &self.errors,
        };
        // A struct of strings and numbers always serializes.
        answer.body(serde_json::to_vec(&body).unwrap_or_default())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.detail)
    }
}

impl std::error::Error for Problem {}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        self.code.status()
    }

    fn error_response(&self) -> HttpResponse {
        self.response(None) // the middleware writes it again with the path
    }
}
