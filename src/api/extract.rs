//! Extractors for JSON bodies and query parameters. Where they fail, they answer with a problem that names the field.

use std::future::{Future, Ready, ready};
use std::pin::Pin;

use actix_web::dev::Payload;
use actix_web::http::header;
use actix_web::{FromRequest, HttpRequest, web};
use futures_util::StreamExt as _;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::codes::Code;
use super::decode;
use super::problem::{FieldError, Problem};

/// The largest JSON body. Captions and settings stay far below it.
pub const MAX_JSON_BYTES: usize = 4 << 20;

/// A JSON body that has become a `T`.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<T> Json<T> {
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T: DeserializeOwned + 'static> FromRequest for Json<T> {
    type Error = Problem;
    type Future = Pin<Box<dyn Future<Output = Result<Self, Problem>>>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let (request, payload) = (request.clone(), payload.take());
        Box::pin(async move {
            let value = read_json(&request, payload, &["application/json"]).await?;
            decode::from_json(value)
                .map(Json)
                .map_err(|error| Problem::fields(Code::InvalidBody, vec![error]))
        })
    }
}

/// Query parameters that have become a `T`.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<T> Query<T> {
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T: DeserializeOwned> FromRequest for Query<T> {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(
            query_pairs(request.query_string())
                .and_then(decode::from_pairs)
                .map(Query)
                .map_err(|error| Problem::fields(Code::InvalidQuery, vec![error])),
        )
    }
}

fn query_pairs(query: &str) -> Result<Vec<(String, String)>, FieldError> {
    web::Query::<Vec<(String, String)>>::from_query(query)
        .map(web::Query::into_inner)
        .map_err(|error| {
            FieldError::new(
                "",
                "invalid_value",
                format!("the query string cannot be read: {error}"),
            )
        })
}

/// Reads a bounded JSON body of one of the given media types. A body without a type is taken as JSON.
///
/// # Errors
/// 415 for another media type, 413 above [`MAX_JSON_BYTES`], 400 for what is not JSON.
pub async fn read_json(
    request: &HttpRequest,
    mut payload: Payload,
    types: &[&str],
) -> Result<Value, Problem> {
    if let Some(found) = request.headers().get(header::CONTENT_TYPE) {
        let found = found.to_str().unwrap_or_default();
        let essence = found
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase();
        if !types.contains(&essence.as_str()) {
            let expected = types.join(" or ");
            return Err(Problem::new(
                Code::UnsupportedMediaType,
                format!("found the content type `{found}`, expected {expected}"),
            ));
        }
    }
    let mut body = web::BytesMut::new();
    while let Some(chunk) = payload.next().await {
        let chunk = chunk.map_err(|error| {
            Problem::new(Code::MalformedBody, format!("the body broke off: {error}"))
        })?;
        if body.len() + chunk.len() > MAX_JSON_BYTES {
            return Err(Problem::new(
                Code::PayloadTooLarge,
                format!("the JSON body is larger than {MAX_JSON_BYTES} bytes"),
            ));
        }
        body.extend_from_slice(&chunk);
    }
    serde_json::from_slice(&body).map_err(|error| {
        Problem::new(
            Code::MalformedJson,
            format!("the body is not JSON: {error}"),
        )
    })
}

/// The configuration under which a malformed path segment (an id that is no UUID) answers 404: it names nothing.
pub fn path_config() -> web::PathConfig {
    web::PathConfig::default().error_handler(|error, request| {
        let detail = format!("`{}` names nothing here: {error}", request.path());
        Problem::new(Code::NotFound, detail).into()
    })
}
