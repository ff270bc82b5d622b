//! What holds for every operation of the OpenAPI document and is not repeated at each handler: scopes, the answers that
//! come before a handler is asked, and examples.

use std::collections::BTreeMap;

use actix_web::http::Method;
use serde_json::{Value, json};
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ArrayItems, KnownFormat, ObjectBuilder, SchemaFormat, Type};
use utoipa::openapi::{
    Content, OpenApi, Ref, RefOr, Response, ResponseBuilder, Schema, SecurityRequirement,
};

use super::auth::required_scope;
use super::codes::Code;
use super::openapi::operations_mut;
use super::problem::PROBLEM_JSON;

/// Answers that any operation can give: status, name in the document, codes, description.
const SHARED: [(&str, &str, &[Code], &str); 5] = [
    (
        "401",
        "Unauthorized",
        &[Code::Unauthorized],
        "no key, or not one of this service",
    ),
    (
        "403",
        "Forbidden",
        &[Code::MissingScope, Code::HostRefused, Code::OriginRefused],
        "the key does not allow this; or, without keys, the host or the page is not allowed",
    ),
    (
        "429",
        "TooManyRequests",
        &[Code::TooManyRequests],
        "more requests than allowed; `Retry-After` says when to come back",
    ),
    (
        "500",
        "InternalError",
        &[Code::InternalError],
        "a failure of the service",
    ),
    (
        "503",
        "Overloaded",
        &[Code::Overloaded],
        "too many requests at the same time; `Retry-After` says when to come back",
    ),
];
/// Answers to what is wrong with a JSON body before its fields are.
const JSON_BODY: [(&str, &[Code], &str); 3] = [
    (
        "400",
        &[Code::MalformedJson, Code::MalformedBody],
        "the body cannot be read",
    ),
    ("413", &[Code::PayloadTooLarge], "the body is too large"),
    (
        "415",
        &[Code::UnsupportedMediaType],
        "the body has another media type",
    ),
];
/// Ids of examples: the same in paths as in bodies.
const IDS: [(&str, &str); 13] = [
    ("captioning_job_id", "019a9c23-4400-7c30-a4b2-3d1f2f6f0a11"),
    ("model_id", "6d2a1f8b0c9e4a57"),
    ("vae_id", "9c1be2d07a5f3846"),
    ("dataset_id", "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11"),
    ("image_id", "019a9c1e-8a00-7c30-a4b2-3d1f2f6f0a11"),
    ("subset_id", "019a9c1e-9b00-7c30-a4b2-3d1f2f6f0a11"),
    ("upload_id", "019a9c1e-8b01-7f12-9b34-1a2b3c4d5e6f"),
    ("run_id", "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11"),
    ("sample_id", "019a9c1f-5a00-7c30-a4b2-3d1f2f6f0a11"),
    ("grid_id", "019a9c21-6a00-7c30-a4b2-3d1f2f6f0a11"),
    ("lora_id", "019a9c20-1111-7c30-a4b2-3d1f2f6f0a11"),
    ("delivery_id", "019a9c22-3333-7c30-a4b2-3d1f2f6f0a11"),
    ("webhook_id", "019a9c21-2222-7c30-a4b2-3d1f2f6f0a11"),
];

type Schemas = BTreeMap<String, RefOr<Schema>>;

/// Completes every operation.
pub fn complete(document: &mut OpenApi) {
    let components = document.components.get_or_insert_default();
    for (_, name, codes, description) in SHARED {
        let answer = problem_answer(codes, description);
        components.responses.insert(name.to_owned(), answer.into());
    }
    let schemas = components.schemas.clone();
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in operations_mut(item) {
            guard(operation, &method, path);
            refuse(operation, path);
            show(operation, &schemas, path);
            name_files(operation);
        }
    }
}

/// The scope, and what those hear who lack it.
fn guard(operation: &mut Operation, method: &Method, path: &str) {
    let scope = required_scope(method, path);
    operation.security = Some(match scope {
        // One or the other: a service on loopback may ask for no keys.
        Some(scope) => vec![
            SecurityRequirement::default(),
            SecurityRequirement::new("api_key", [scope.as_str()]),
        ],
        None => Vec::new(),
    });
    let responses = &mut operation.responses.responses;
    for (status, name, ..) in SHARED {
        if scope.is_some() || status == "500" {
            responses
                .entry(status.to_owned())
                .or_insert_with(|| Ref::from_response_name(name).into());
        }
    }
}

/// What is wrong with a request before a handler sees it.
fn refuse(operation: &mut Operation, path: &str) {
    let takes_json = matches!(&operation.request_body, Some(RefOr::T(body))
        if body.content.keys().any(|kind| kind.contains("json")));
    let has_ids = path.contains('{');
    let asks = parameters(operation).any(|parameter| parameter.parameter_in == ParameterIn::Query);
    let responses = &mut operation.responses.responses;
    let mut add = |status: &str, codes: &[Code], description: &str| {
        responses
            .entry(status.to_owned())
            .or_insert_with(|| problem_answer(codes, description).into());
    };
    if takes_json {
        for (status, codes, description) in JSON_BODY {
            add(status, codes, description);
        }
        add(
            "422",
            &[Code::InvalidBody],
            "the body has other fields than expected",
        );
    }
    if has_ids {
        add("404", &[Code::NotFound], "the id is none");
    }
    if asks {
        add(
            "422",
            &[Code::InvalidQuery],
            "a query parameter cannot be used",
        );
    }
}

fn problem_answer(codes: &[Code], description: &str) -> Response {
    let words: Vec<String> = codes
        .iter()
        .map(|code| format!("`{}`", code.as_str()))
        .collect();
    let schema = Ref::from_schema_name("Problem");
    ResponseBuilder::new()
        .description(format!("{}: {description}", words.join(", ")))
        .content(PROBLEM_JSON, Content::new(Some(schema)))
        .build()
}

fn parameters(operation: &Operation) -> impl Iterator<Item = &Parameter> {
    operation
        .parameters
        .iter()
        .flatten()
        .filter_map(|parameter| match parameter {
            RefOr::T(parameter) => Some(parameter),
            RefOr::Ref(_) => None,
        })
}

/// Files are bytes, not lists of numbers; a part of one is of the same kind as the whole.
fn name_files(operation: &mut Operation) {
    let bytes = || {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary)))
    };
    if let Some(RefOr::T(body)) = &mut operation.request_body {
        for (kind, content) in &mut body.content {
            if is_file(kind)
                && let RefOr::T(content) = content
            {
                content.schema = Some(bytes().into());
            }
        }
    }
    let responses = &mut operation.responses.responses;
    for answer in responses.values_mut() {
        let RefOr::T(answer) = answer else { continue };
        for (kind, content) in &mut answer.content {
            if is_file(kind)
                && let RefOr::T(content) = content
            {
                content.schema = Some(bytes().into());
            }
        }
    }
    let whole = match responses.get("200") {
        Some(RefOr::T(whole)) => whole.content.clone(),
        _ => return,
    };
    if let Some(RefOr::T(part)) = responses.get_mut("206") {
        part.content = whole;
    }
}

fn is_file(kind: &str) -> bool {
    kind.starts_with("image/") || ["application/octet-stream", "application/zip"].contains(&kind)
}

/// Examples of ids, bodies and answers.
fn show(operation: &mut Operation, schemas: &Schemas, path: &str) {
    for parameter in operation.parameters.iter_mut().flatten() {
        if let RefOr::T(parameter) = parameter
            && let Some((_, id)) = IDS.iter().find(|(name, _)| *name == parameter.name)
            && parameter.parameter_in == ParameterIn::Path
        {
            *parameter = ParameterBuilder::from(parameter.clone())
                .example(Some(json!(id)))
                .build();
        }
    }
    if let Some(RefOr::T(body)) = &mut operation.request_body {
        for content in body.content.values_mut() {
            show_content(content, schemas);
        }
    }
    for answer in operation.responses.responses.values_mut() {
        let RefOr::T(answer) = answer else { continue };
        let code = first_code(&answer.description);
        for (kind, content) in &mut answer.content {
            match (kind.as_str(), code, content) {
                (PROBLEM_JSON, Some(code), RefOr::T(content)) => {
                    content.example = Some(problem_example(code, path));
                }
                (_, _, content) => show_content(content, schemas),
            }
        }
    }
}

fn show_content(content: &mut RefOr<Content>, schemas: &Schemas) {
    if let RefOr::T(content) = content
        && content.example.is_none()
        && let Some(RefOr::Ref(schema)) = &content.schema
    {
        content.example = example_of(name_in(schema), schemas);
    }
}

/// The example of a schema; a list's is made of one of its rows.
fn example_of(name: &str, schemas: &Schemas) -> Option<Value> {
    let RefOr::T(Schema::Object(object)) = schemas.get(name)? else {
        return None;
    };
    if object.example.is_some() {
        return object.example.clone();
    }
    let RefOr::T(Schema::Array(rows)) = object.properties.get("data")? else {
        return None;
    };
    let ArrayItems::RefOrSchema(row) = &rows.items else {
        return None;
    };
    let row = match row.as_ref() {
        RefOr::Ref(row) => example_of(name_in(row), schemas)?,
        RefOr::T(Schema::Object(row)) => row.example.clone()?,
        RefOr::T(_) => return None,
    };
    let mut list = json!({"data": [row]});
    for next in ["next_cursor", "next_since", "next_after"] {
        if object.properties.contains_key(next) {
            list[next] = Value::Null;
        }
    }
    Some(list)
}

/// The name of a component.
fn name_in(reference: &Ref) -> &str {
    let location = &reference.ref_location;
    location.rsplit('/').next().unwrap_or_default()
}

/// The first code that a description of an answer names.
fn first_code(description: &str) -> Option<Code> {
    description
        .split('`')
        .find_map(|word| Code::ALL.iter().copied().find(|code| code.as_str() == word))
}

fn problem_example(code: Code, path: &str) -> Value {
    let mut instance = path.to_owned();
    for (name, id) in IDS {
        instance = instance.replace(&format!("{{{name}}}"), id);
    }
    json!({
        "type": format!("urn:lorasmith:problem:{}", code.as_str()),
        "title": code.title(),
        "status": code.status().as_u16(),
        "detail": code.title(),
        "code": code.as_str(),
        "instance": instance,
    })
}

#[cfg(test)]
mod tests {
    use super::super::openapi::{openapi, operations};
    use super::*;

    /// The codes that a description names between backticks, among other words.
    fn codes(description: &str) -> Vec<Code> {
        description
            .split('`')
            .filter_map(|word| Code::ALL.iter().copied().find(|code| code.as_str() == word))
            .collect()
    }

    #[test]
    fn every_refusal_names_its_codes() {
        let document = openapi();
        for (path, item) in &document.paths.paths {
            for (method, operation) in operations(item) {
                for (status, answer) in &operation.responses.responses {
                    let RefOr::T(answer) = answer else { continue };
                    if !status.starts_with(['4', '5']) {
                        continue;
                    }
                    let place = format!("{method} {path} {status}");
                    let named = codes(&answer.description);
                    assert!(!named.is_empty(), "{place}: no code");
                    for code in named {
                        assert_eq!(code.status().as_str(), status, "{place}: {}", code.as_str());
                    }
                    assert!(answer.content.contains_key(PROBLEM_JSON), "{place}");
                }
            }
        }
    }

    #[test]
    fn every_operation_has_examples() {
        let document = openapi();
        let has = |content: &RefOr<Content>| match content {
            RefOr::T(content) => content.example.is_some() || !content.examples.is_empty(),
            RefOr::Ref(_) => true,
        };
        let mut missing = Vec::new();
        for (path, item) in &document.paths.paths {
            for (method, operation) in operations(item) {
                let place = format!("{method} {path}");
                for parameter in parameters(operation) {
                    let wire = json!(parameter);
                    if parameter.parameter_in == ParameterIn::Path && wire["example"].is_null() {
                        missing.push(format!("{place}: parameter {}", parameter.name));
                    }
                }
                let mut contents: Vec<(&String, &RefOr<Content>)> = Vec::new();
                if let Some(RefOr::T(body)) = &operation.request_body {
                    contents.extend(&body.content);
                }
                for answer in operation.responses.responses.values() {
                    if let RefOr::T(answer) = answer {
                        contents.extend(&answer.content);
                    }
                }
                for (kind, content) in contents {
                    let needless = is_file(kind) || kind == "multipart/form-data";
                    if !needless && !has(content) {
                        missing.push(format!("{place}: {kind}"));
                    }
                }
            }
        }
        assert!(missing.is_empty(), "no example:\n{}", missing.join("\n"));
    }
}
