//! PATCH by JSON merge-patch (RFC 7396), and the ETag / If-Match pair that keeps two editors apart (RFC 9110).

use std::future::Future;
use std::pin::Pin;

use actix_web::dev::Payload;
use actix_web::http::header;
use actix_web::{FromRequest, HttpRequest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::codes::Code;
use super::decode;
use super::extract::read_json;
use super::problem::Problem;

/// The body of a PATCH request, not yet applied.
#[derive(Debug)]
pub struct MergePatch(Value);

impl MergePatch {
    pub fn new(patch: Value) -> Self {
        Self(patch)
    }

    /// Applies the patch to the changeable part of a resource. `T` refuses unknown fields;
    /// `null` removes a field, so that it takes `T`'s serde default or is missing.
    ///
    /// # Errors
    /// 422 that names the field, when the outcome is no `T`.
    pub fn apply_to<T: Serialize + DeserializeOwned>(&self, current: &T) -> Result<T, Problem> {
        if !self.0.is_object() {
            return Err(Problem::field(
                Code::InvalidBody,
                "",
                "wrong_type",
                "a merge-patch is a JSON object",
            ));
        }
        let mut target = serde_json::to_value(current).map_err(Problem::internal)?;
        merge(&mut target, &self.0);
        decode::from_json(target).map_err(|error| Problem::fields(Code::InvalidBody, vec![error]))
    }
}

/// RFC 7396, section 2.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    if let Value::Object(fields) = target {
        for (name, value) in patch {
            if value.is_null() {
                fields.remove(name);
            } else {
                merge(fields.entry(name.as_str()).or_insert(Value::Null), value);
            }
        }
    }
}

impl FromRequest for MergePatch {
    type Error = Problem;
    type Future = Pin<Box<dyn Future<Output = Result<Self, Problem>>>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let (request, payload) = (request.clone(), payload.take());
        Box::pin(async move {
            read_json(
                &request,
                payload,
                &["application/merge-patch+json", "application/json"],
            )
            .await
            .map(MergePatch)
        })
    }
}

/// The strong ETag of a resource that counts its revisions.
pub fn etag(revision: i64) -> String {
    format!("\"{revision}\"")
}

/// Checks `If-Match` against the current ETag. Without the header everything is allowed.
///
/// # Errors
/// 412 that names both tags. A weak tag never matches (RFC 9110, section 13.1.1).
pub fn check_if_match(request: &HttpRequest, current: &str) -> Result<(), Problem> {
    let mut given = request.headers().get_all(header::IF_MATCH).peekable();
    if given.peek().is_none() {
        return Ok(());
    }
    let mut listed = Vec::new();
    for value in given {
        let value = value
            .to_str()
            .map_err(|_| Problem::new(Code::InvalidHeader, "If-Match is not ASCII text"))?;
        listed.extend(value.split(',').map(str::trim));
    }
    if listed.iter().any(|tag| *tag == "*" || *tag == current) {
        return Ok(());
    }
    let detail = format!(
        "If-Match has {}, the resource is at {current}",
        listed.join(", ")
    );
    Err(Problem::new(Code::PreconditionFailed, detail))
}

/// As [`check_if_match`]; also tells the revision that a request with `If-Match` insists on.
///
/// # Errors
/// 412 that names both tags.
pub fn insisted_revision(request: &HttpRequest, current: i64) -> Result<Option<i64>, Problem> {
    check_if_match(request, &etag(current))?;
    let given = request.headers().contains_key(header::IF_MATCH);
    Ok(given.then_some(current))
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::test::TestRequest;
    use serde::Deserialize;
    use serde_json::json;

    #[test]
    fn the_examples_of_rfc_7396_hold() {
        // appendix A
        for (target, patch, expected) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": "b"}),
                json!({"b": "c"}),
                json!({"a": "b", "b": "c"}),
            ),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (
                json!({"a": "b", "b": "c"}),
                json!({"a": null}),
                json!({"b": "c"}),
            ),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (
                json!({"a": [{"b": "c"}]}),
                json!({"a": [1]}),
                json!({"a": [1]}),
            ),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "b"}), json!(["c"]), json!(["c"])),
            (json!({"a": "foo"}), json!(null), json!(null)),
            (
                json!({"e": null}),
                json!({"a": 1}),
                json!({"e": null, "a": 1}),
            ),
            (
                json!([1, 2]),
                json!({"a": "b", "c": null}),
                json!({"a": "b"}),
            ),
            (
                json!({}),
                json!({"a": {"bb": {"ccc": null}}}),
                json!({"a": {"bb": {}}}),
            ),
        ] {
            let mut merged = target.clone();
            merge(&mut merged, &patch);
            assert_eq!(merged, expected, "{target} with {patch}");
        }
    }

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Caption {
        caption: Option<String>,
    }

    #[test]
    fn a_patch_keeps_null_and_refuses_unknown_fields() {
        let current = Caption {
            caption: Some("old".to_owned()),
        };
        let apply = |patch| MergePatch::new(patch).apply_to(&current);
        assert_eq!(
            apply(json!({})).expect("right").caption.as_deref(),
            Some("old")
        );
        assert_eq!(
            apply(json!({"caption": null})).expect("right").caption,
            None
        );
        assert_eq!(
            apply(json!({"captoin": "x"})).expect_err("wrong").errors()[0].pointer,
            "/captoin"
        );
        assert_eq!(
            apply(json!({"caption": 3})).expect_err("wrong").errors()[0].pointer,
            "/caption"
        );
        assert_eq!(
            apply(json!([])).expect_err("wrong").code(),
            Code::InvalidBody
        );
    }

    #[test]
    fn if_match_compares_strongly() {
        let check = |value: &str| {
            let request = TestRequest::default()
                .insert_header((header::IF_MATCH, value))
                .to_http_request();
            check_if_match(&request, &etag(3)).is_ok()
        };
        assert!(check("\"3\"") && check("*") && check("\"1\", \"3\""));
        assert!(!check("\"2\"") && !check("W/\"3\"") && !check("3"));
        assert!(check_if_match(&TestRequest::default().to_http_request(), "\"1\"").is_ok());
    }
}
