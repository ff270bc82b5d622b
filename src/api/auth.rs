//! Who may call: nobody asks on loopback without a key; with a key every route but health wants it as a bearer token.

use actix_web::body::{EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, web};
use sha2::{Digest as _, Sha256};

use super::codes::Code;
use super::problem::Problem;

/// What orchestrators ask without credentials.
const OPEN: [&str; 2] = ["/livez", "/readyz"];

/// The key requests must carry. Only its digest is held.
#[derive(Clone)]
pub struct ApiKey(Option<[u8; 32]>);

impl ApiKey {
    /// `None`, or an empty key, lets everybody in; the settings refuse that for addresses others can reach.
    pub fn new(key: Option<&str>) -> Self {
        Self(
            key.filter(|key| !key.is_empty())
                .map(|key| Sha256::digest(key).into()),
        )
    }

    fn admits(&self, authorization: Option<&HeaderValue>) -> bool {
        let Some(expected) = &self.0 else { return true };
        let given = authorization
            .and_then(|value| value.to_str().ok())
            .and_then(bearer)
            .unwrap_or_default();
        let given: [u8; 32] = Sha256::digest(given).into();
        // Over digests and without an early end: the time says nothing about where keys differ.
        given
            .iter()
            .zip(expected)
            .fold(0, |difference, (a, b)| difference | (a ^ b))
            == 0
    }
}

fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then_some(token.trim())
}

/// Lets a request through or answers 401.
///
/// # Errors
/// Those of the service further in.
pub async fn guard<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    let admitted = request
        .app_data::<web::Data<ApiKey>>()
        .is_some_and(|key| key.admits(request.headers().get(header::AUTHORIZATION)));
    if admitted || OPEN.contains(&request.path()) {
        return Ok(next.call(request).await?.map_into_left_body());
    }
    let problem = Problem::new(
        Code::Unauthorized,
        "give the API key as `Authorization: Bearer <key>`",
    );
    let problem = problem.with_header(
        header::WWW_AUTHENTICATE,
        HeaderValue::from_static("Bearer realm=\"lorasmith\""),
    );
    let answer = problem.response(Some(request.path()));
    Ok(request.into_response(answer).map_into_right_body())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_opens() {
        let admits = |key: Option<&str>, header: Option<&str>| {
            let header = header.map(|text| HeaderValue::from_str(text).expect("a header"));
            ApiKey::new(key).admits(header.as_ref())
        };
        assert!(admits(None, None) && admits(Some(""), None));
        assert!(
            admits(Some("secret"), Some("Bearer secret"))
                && admits(Some("secret"), Some("bearer  secret"))
        );
        for wrong in [
            "Bearer Secret",
            "Bearer secre",
            "Bearer ",
            "Basic secret",
            "secret",
            "Bearer secret2",
        ] {
            assert!(!admits(Some("secret"), Some(wrong)), "{wrong}");
        }
        assert!(!admits(Some("secret"), None));
    }
}
