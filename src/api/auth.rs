//! Who may call: with keys, every route but the open ones wants one of the right scope as a bearer token; without, only
//! who calls this machine by its own name.

use actix_web::body::{EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::http::header::{self, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage as _, HttpRequest, web};
use uuid::Uuid;

use super::codes::Code;
use super::limits::{Limits, address_of};
use super::origin::Origins;
use super::problem::Problem;
use crate::access::{Access, Caller, Scope};

/// What needs no key: what orchestrators ask, and the documentation, which tells nothing of this service's data.
pub const OPEN: [&str; 5] = [
    "/livez",
    "/readyz",
    "/openapi.json",
    "/openapi-3.0.json",
    "/docs",
];

/// The scope that a request needs; `None` where no key is asked for. `path` is decoded, as the router reads it.
pub fn required_scope(method: &Method, path: &str) -> Option<Scope> {
    if OPEN.contains(&path) || path.starts_with("/docs/") {
        return None;
    }
    let below = |root: &str| {
        path.strip_prefix(root)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if below("/v1/webhooks") {
        return Some(Scope::Admin); // they send data to other machines
    }
    let looks = *method == Method::GET || *method == Method::HEAD;
    // A plan is computed and not kept.
    let looks = looks || (*method == Method::POST && path == "/v1/runs:plan");
    Some(if looks { Scope::Read } else { Scope::Write })
}

/// The key that a request came with; `None` for the one of the settings, and where none is asked for.
pub fn key_of(request: &HttpRequest) -> Option<Uuid> {
    request.extensions().get::<Caller>()?.key_id
}

/// Lets a request through, or answers 401 or 403.
///
/// # Errors
/// Those of the service further in.
pub async fn guard<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    match admit(&request).await {
        Ok(caller) => {
            if let Some(caller) = caller {
                request.extensions_mut().insert(caller);
            }
            Ok(next.call(request).await?.map_into_left_body())
        }
        Err(problem) => {
            let answer = problem.response(Some(request.path()));
            Ok(request.into_response(answer).map_into_right_body())
        }
    }
}

async fn admit(request: &ServiceRequest) -> Result<Option<Caller>, Problem> {
    let missing = || Problem::internal("the application has no keys and names");
    let access = request
        .app_data::<web::Data<Access>>()
        .ok_or_else(missing)?
        .clone();
    // Not `request.path()`: `/v1/%77ebhooks` reaches webhooks too.
    let path = request.match_info().as_str();
    let Some(needed) = required_scope(request.method(), path) else {
        return Ok(None);
    };
    if !access.is_required() {
        let origins = request.app_data::<web::Data<Origins>>();
        origins
            .ok_or_else(missing)?
            .check(request.uri(), request.headers())?;
        return Ok(None);
    }
    let token = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(bearer);
    let Some(token) = token else {
        let detail = "give an API key as `Authorization: Bearer <key>`";
        return Err(unauthorized(detail, "Bearer realm=\"lorasmith\""));
    };
    let found = access.recognise(token).await.map_err(Problem::internal)?;
    let Some(caller) = found else {
        if let Some(limits) = request.app_data::<web::Data<Limits>>() {
            limits.try_key(address_of(request))?;
        }
        let detail = "the API key is unknown, revoked or mistyped";
        let challenge = "Bearer realm=\"lorasmith\", error=\"invalid_token\"";
        return Err(unauthorized(detail, challenge));
    };
    if caller.scope < needed {
        return Err(forbidden(caller.scope, needed));
    }
    Ok(Some(caller))
}

fn unauthorized(detail: &str, challenge: &'static str) -> Problem {
    let challenge = HeaderValue::from_static(challenge);
    Problem::new(Code::Unauthorized, detail).with_header(header::WWW_AUTHENTICATE, challenge)
}

fn forbidden(found: Scope, needed: Scope) -> Problem {
    let detail = format!("the key has the scope `{found}`, this needs `{needed}`");
    let challenge = match needed {
        Scope::Read => "Bearer realm=\"lorasmith\", error=\"insufficient_scope\", scope=\"read\"",
        Scope::Write => "Bearer realm=\"lorasmith\", error=\"insufficient_scope\", scope=\"write\"",
        Scope::Admin => "Bearer realm=\"lorasmith\", error=\"insufficient_scope\", scope=\"admin\"",
    };
    let challenge = HeaderValue::from_static(challenge);
    Problem::new(Code::MissingScope, detail).with_header(header::WWW_AUTHENTICATE, challenge)
}

fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bearer_tokens_are_read() {
        for (header, token) in [
            ("Bearer secret", Some("secret")),
            ("bearer  secret ", Some("secret")),
            ("Bearer ", None),
            ("Basic secret", None),
            ("secret", None),
        ] {
            assert_eq!(bearer(header), token, "{header}");
        }
    }

    #[test]
    fn scopes_follow_method_and_path() {
        for (method, path, scope) in [
            (Method::GET, "/livez", None),
            (Method::GET, "/docs/index.html", None),
            (Method::GET, "/docsx", Some(Scope::Read)),
            (Method::GET, "/v1/runs", Some(Scope::Read)),
            (Method::HEAD, "/v1/loras/x/content", Some(Scope::Read)),
            (Method::POST, "/v1/runs:plan", Some(Scope::Read)),
            (Method::POST, "/v1/runs", Some(Scope::Write)),
            (Method::OPTIONS, "/v1/runs", Some(Scope::Write)),
            (Method::GET, "/v1/webhooks", Some(Scope::Admin)),
            (Method::GET, "/v1/webhooks/x", Some(Scope::Admin)),
        ] {
            assert_eq!(required_scope(&method, path), scope, "{method} {path}");
        }
    }
}
