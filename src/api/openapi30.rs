//! The OpenAPI document once more as version 3.0.3, for generators that do not know 3.1.
//!
//! 3.1 is JSON Schema, 3.0 a dialect of its own: no `null` type, no `const`, no number as `exclusiveMinimum`, nothing
//! beside `$ref`. Schemas are looked for where they can be; examples and defaults are data and stay as they are.

use actix_web::HttpResponse;
use actix_web::http::header::ContentType;
use serde_json::{Map, Value, json};

use super::openapi::openapi;

/// Keywords of JSON Schema that 3.0 does not know and that only narrow what is said without them.
const UNKNOWN: [&str; 17] = [
    "$anchor",
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "contains",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "if",
    "maxContains",
    "minContains",
    "patternProperties",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
];

/// The document of the whole API in version 3.0.3.
pub fn openapi30() -> Value {
    // What was written out of Rust types always is JSON.
    down_convert(serde_json::to_value(openapi()).unwrap_or_default())
}

/// Answers with the document.
pub async fn get_document(document: actix_web::web::Data<Document30>) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header(ContentType::json())
        .body(document.0.clone())
}

/// The document as it is sent; made once.
pub struct Document30(String);

impl Document30 {
    /// Makes it.
    pub fn new() -> Self {
        Self(openapi30().to_string())
    }
}

impl Default for Document30 {
    fn default() -> Self {
        Self::new()
    }
}

/// A 3.1 document as 3.0.3.
pub fn down_convert(mut document: Value) -> Value {
    document["openapi"] = json!("3.0.3");
    for (parent, field) in [
        ("", "jsonSchemaDialect"),
        ("", "webhooks"),
        ("/info", "summary"),
        ("/info/license", "identifier"),
        ("/components", "pathItems"),
    ] {
        if let Some(Value::Object(parent)) = document.pointer_mut(parent) {
            parent.remove(field);
        }
    }
    empty_scopes(&mut document);
    for schema in members(&mut document, "/components/schemas") {
        convert(schema);
    }
    for kind in ["responses", "requestBodies", "parameters", "headers"] {
        for holder in members(&mut document, &format!("/components/{kind}")) {
            convert_holder(holder);
        }
    }
    for item in members(&mut document, "/paths") {
        convert_parameters(item);
        for operation in item.as_object_mut().into_iter().flat_map(Map::values_mut) {
            empty_scopes(operation);
            convert_parameters(operation);
            if let Some(body) = operation.get_mut("requestBody") {
                convert_holder(body);
                call_patches_json(body);
                prefer_json(body);
            }
            for answer in members(operation, "/responses") {
                convert_holder(answer);
            }
        }
    }
    document
}

fn members<'a>(value: &'a mut Value, pointer: &str) -> impl Iterator<Item = &'a mut Value> {
    let found = value.pointer_mut(pointer).and_then(Value::as_object_mut);
    found.into_iter().flat_map(Map::values_mut)
}

/// Scopes of bearer keys are 3.1's; 3.0 knows those of OAuth alone.
fn empty_scopes(holder: &mut Value) {
    let requirements = holder.get_mut("security").and_then(Value::as_array_mut);
    for requirement in requirements.into_iter().flatten() {
        for scopes in members(requirement, "") {
            *scopes = json!([]);
        }
    }
}

/// The service takes a merge-patch as JSON too, the one name that every generator for 3.0 knows.
fn call_patches_json(body: &mut Value) {
    let content = body.get_mut("content").and_then(Value::as_object_mut);
    if let Some(content) = content
        && let Some(patch) = content.remove("application/merge-patch+json")
    {
        content.insert("application/json".to_owned(), patch);
    }
}

/// Generators for 3.0 know one kind of body for each operation: where there is JSON among several, that.
fn prefer_json(body: &mut Value) {
    let content = body.get_mut("content").and_then(Value::as_object_mut);
    if let Some(content) = content
        && content.contains_key("application/json")
    {
        content.retain(|kind, _| kind == "application/json");
    }
}

fn convert_parameters(holder: &mut Value) {
    let parameters = holder.get_mut("parameters").and_then(Value::as_array_mut);
    for parameter in parameters.into_iter().flatten() {
        convert_holder(parameter);
    }
}

/// A parameter, header, body or answer: whatever has a `schema`, `content` or `headers`.
fn convert_holder(holder: &mut Value) {
    if let Some(schema) = holder.get_mut("schema") {
        convert(schema);
    }
    for content in members(holder, "/content") {
        let Some(content) = content.as_object_mut() else {
            continue;
        };
        content.remove("itemSchema");
        if let Some(schema) = content.get_mut("schema") {
            convert(schema);
        }
    }
    for header in members(holder, "/headers") {
        convert_holder(header);
    }
}

/// A schema and all within it.
fn convert(schema: &mut Value) {
    match schema {
        Value::Bool(true) => *schema = json!({}),
        Value::Bool(false) => *schema = json!({"not": {}}),
        Value::Object(fields) => {
            for name in UNKNOWN {
                fields.remove(name);
            }
            convert_inner(fields);
            constants(fields);
            limits(fields);
            binary(fields);
            types(fields);
            alternatives(fields);
            reference(fields);
        }
        _ => {}
    }
}

fn convert_inner(fields: &mut Map<String, Value>) {
    let properties = fields.get_mut("properties").and_then(Value::as_object_mut);
    for property in properties.into_iter().flat_map(Map::values_mut) {
        convert(property);
    }
    if let Some(Value::Array(first)) = fields.remove("prefixItems") {
        let length = first.len();
        fields.insert("items".to_owned(), json!({"anyOf": first}));
        fields.entry("minItems").or_insert(json!(length));
        fields.entry("maxItems").or_insert(json!(length));
    }
    for name in ["items", "not"] {
        if let Some(inner) = fields.get_mut(name) {
            convert(inner);
        }
    }
    // A boolean is right here in 3.0 too.
    if let Some(inner @ Value::Object(_)) = fields.get_mut("additionalProperties") {
        convert(inner);
    }
    for name in ["oneOf", "anyOf", "allOf"] {
        let inner = fields.get_mut(name).and_then(Value::as_array_mut);
        for schema in inner
            .into_iter()
            .flatten()
            .filter(|schema| !is_null(schema))
        {
            convert(schema);
        }
    }
}

fn is_null(schema: &Value) -> bool {
    schema["type"] == "null"
}

fn constants(fields: &mut Map<String, Value>) {
    if let Some(only) = fields.remove("const") {
        fields.insert("enum".to_owned(), json!([only]));
    }
    if let Some(Value::Array(examples)) = fields.remove("examples")
        && let Some(first) = examples.into_iter().next()
    {
        fields.entry("example").or_insert(first);
    }
}

/// A number as `exclusiveMinimum` becomes the limit and a flag.
fn limits(fields: &mut Map<String, Value>) {
    for (exclusive, inclusive, tighter) in [
        (
            "exclusiveMinimum",
            "minimum",
            f64::gt as fn(&f64, &f64) -> bool,
        ),
        ("exclusiveMaximum", "maximum", f64::lt),
    ] {
        let Some(limit) = fields.get(exclusive).and_then(Value::as_f64) else {
            continue;
        };
        let other = fields.get(inclusive).and_then(Value::as_f64);
        let number = fields.remove(exclusive).unwrap_or_default();
        if other.is_none_or(|other| tighter(&limit, &other) || limit == other) {
            fields.insert(inclusive.to_owned(), number);
            fields.insert(exclusive.to_owned(), json!(true));
        }
    }
}

fn binary(fields: &mut Map<String, Value>) {
    let encoding = fields.remove("contentEncoding");
    let media = fields.remove("contentMediaType");
    fields.remove("contentSchema");
    if fields.contains_key("format") {
        return;
    }
    if encoding.is_some_and(|encoding| encoding == "base64") {
        fields.insert("format".to_owned(), json!("byte"));
    } else if media.is_some() {
        fields.entry("type").or_insert(json!("string"));
        fields.insert("format".to_owned(), json!("binary"));
    }
}

/// `null` among the types becomes `nullable`; several types become alternatives.
fn types(fields: &mut Map<String, Value>) {
    let mut types = match fields.get("type") {
        Some(Value::Array(types)) => types.clone(),
        Some(Value::String(only)) if only == "null" => vec![json!("null")],
        _ => return,
    };
    let count = types.len();
    types.retain(|kind| kind != "null");
    if types.len() < count {
        fields.insert("nullable".to_owned(), json!(true));
    }
    fields.remove("type");
    match types.as_slice() {
        [] => {
            fields.insert("enum".to_owned(), json!([null]));
        }
        [only] => {
            fields.insert("type".to_owned(), only.clone());
        }
        several => {
            let several: Vec<Value> = several.iter().map(|kind| json!({"type": kind})).collect();
            fields.insert("anyOf".to_owned(), json!(several));
        }
    }
}

/// `{"type": "null"}` among alternatives becomes `nullable`.
fn alternatives(fields: &mut Map<String, Value>) {
    for name in ["oneOf", "anyOf"] {
        let Some(list) = fields.get_mut(name).and_then(Value::as_array_mut) else {
            continue;
        };
        let count = list.len();
        list.retain(|schema| !is_null(schema));
        let nullable = list.len() < count;
        let only = if list.len() == 1 { list.pop() } else { None };
        if nullable {
            fields.insert("nullable".to_owned(), json!(true));
        }
        if let Some(only) = only {
            fields.remove(name);
            merge(fields, only);
        }
    }
}

/// One alternative that is left says what the whole schema is.
fn merge(fields: &mut Map<String, Value>, only: Value) {
    let Value::Object(only) = only else { return };
    let clashes = only.iter().any(|(name, value)| {
        name != "description" && fields.get(name).is_some_and(|other| other != value)
    });
    if clashes {
        fields.insert("allOf".to_owned(), json!([only]));
        return;
    }
    for (name, value) in only {
        fields.entry(name).or_insert(value);
    }
}

/// Beside `$ref` everything is ignored in 3.0.
fn reference(fields: &mut Map<String, Value>) {
    if fields.len() > 1
        && let Some(target) = fields.remove("$ref")
    {
        fields.insert("allOf".to_owned(), json!([{"$ref": target}]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(mut schema: Value) -> Value {
        convert(&mut schema);
        schema
    }

    #[test]
    fn schemas_become_those_of_3_0() {
        for (schema, expected) in [
            (
                json!({"type": ["string", "null"]}),
                json!({"type": "string", "nullable": true}),
            ),
            (
                json!({"type": "null"}),
                json!({"nullable": true, "enum": [null]}),
            ),
            (
                json!({"type": ["string", "integer"]}),
                json!({"anyOf": [{"type": "string"}, {"type": "integer"}]}),
            ),
            (json!({"const": "lora"}), json!({"enum": ["lora"]})),
            (
                json!({"type": "string", "examples": ["a", "b"]}),
                json!({"type": "string", "example": "a"}),
            ),
            (
                json!({"exclusiveMinimum": 0.0, "maximum": 1}),
                json!({"minimum": 0.0, "exclusiveMinimum": true, "maximum": 1}),
            ),
            (
                json!({"exclusiveMinimum": 0, "minimum": 3}),
                json!({"minimum": 3}),
            ),
            (
                json!({"exclusiveMaximum": 5, "maximum": 5}),
                json!({"maximum": 5, "exclusiveMaximum": true}),
            ),
            (json!({"$ref": "#/a"}), json!({"$ref": "#/a"})),
            (
                json!({"$ref": "#/a", "description": "b"}),
                json!({"allOf": [{"$ref": "#/a"}], "description": "b"}),
            ),
            (
                json!({"oneOf": [{"type": "null"}, {"$ref": "#/a", "description": "b"}]}),
                json!({"nullable": true, "allOf": [{"$ref": "#/a"}], "description": "b"}),
            ),
            (
                json!({"oneOf": [{"type": "null"}, {"$ref": "#/a"}], "default": null}),
                json!({"nullable": true, "allOf": [{"$ref": "#/a"}], "default": null}),
            ),
            (
                json!({"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]}),
                json!({"anyOf": [{"type": "string"}, {"type": "integer"}], "nullable": true}),
            ),
            (
                json!({"contentMediaType": "application/octet-stream"}),
                json!({"type": "string", "format": "binary"}),
            ),
            (
                json!({"type": "string", "contentEncoding": "base64"}),
                json!({"type": "string", "format": "byte"}),
            ),
            (
                json!({"type": "array", "prefixItems": [{"type": "integer"}], "items": false}),
                json!({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 1}),
            ),
            (
                json!({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": ["null", "number"]}}),
                json!({"type": "object", "additionalProperties": {"type": "number", "nullable": true}}),
            ),
            (json!(true), json!({})),
        ] {
            let text = schema.to_string();
            assert_eq!(converted(schema), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_schema_stays() {
        let example = json!({"type": ["a", "null"], "const": 1, "examples": [2]});
        let schema = converted(json!({"type": "object", "example": example, "default": example}));
        assert_eq!(
            (&schema["example"], &schema["default"]),
            (&example, &example)
        );
        // A property may be called as a keyword is.
        let schema = converted(json!({"properties": {"const": {"type": "string"}}}));
        assert_eq!(schema["properties"]["const"], json!({"type": "string"}));
    }

    #[test]
    fn no_schema_of_3_1_is_left() {
        let document = openapi30();
        assert_eq!(document["openapi"], "3.0.3");
        let text = document.to_string();
        for left in [
            "\"const\":",
            "\"type\":[",
            "\"type\":\"null\"",
            "\"contentMediaType\"",
            "application/merge-patch+json",
        ] {
            assert!(!text.contains(left), "{left}");
        }
        let get = &document["paths"]["/v1/runs"]["get"];
        assert_eq!(get["security"], json!([{}, {"api_key": []}]));
    }
}
