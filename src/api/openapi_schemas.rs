//! Schemas as generators of clients want them: a name for everything that is a type, once.
//!
//! utoipa writes the row of a generic list and the choices of a query parameter out where they are used; a generated
//! client would have a second `Run` and a second `RunState` of them.

use std::collections::BTreeMap;

use actix_web::http::Method;
use utoipa::openapi::path::{Operation, ParameterIn};
use utoipa::openapi::schema::{AdditionalProperties, ArrayItems, Object, Schema, SchemaType, Type};
use utoipa::openapi::{OpenApi, Ref, RefOr};

use super::openapi::operations_mut;

type Schemas = BTreeMap<String, RefOr<Schema>>;

/// What utoipa puts before the name of a list's rows.
const PAGE: &str = "Page_";

/// Names pages, rows and choices, and opens objects of any fields.
pub fn name_types(document: &mut OpenApi) {
    let schemas = &mut document.components.get_or_insert_default().schemas;
    name_pages(schemas);
    for schema in schemas.values_mut() {
        open_objects(schema);
    }
    let choices = choices(schemas);
    for item in document.paths.paths.values_mut() {
        for (method, operation) in operations_mut(item) {
            refer(operation, &choices);
            if method == Method::HEAD {
                empty(operation);
            }
        }
    }
}

/// `Page_Run` becomes `RunPage`, a list of `Run`.
fn name_pages(schemas: &mut Schemas) {
    let pages: Vec<String> = schemas
        .keys()
        .filter(|name| name.starts_with(PAGE))
        .cloned()
        .collect();
    for page in pages {
        let row = page.trim_start_matches(PAGE);
        let Some(mut schema) = schemas.remove(&page) else {
            continue;
        };
        if schemas.contains_key(row)
            && let RefOr::T(Schema::Object(object)) = &mut schema
            && let Some(RefOr::T(Schema::Array(rows))) = object.properties.get_mut("data")
        {
            rows.items = ArrayItems::RefOrSchema(Box::new(Ref::from_schema_name(row).into()));
        }
        schemas.insert(page_name(row), schema);
    }
}

fn page_name(row: &str) -> String {
    format!("{row}Page")
}

/// An object without named fields may have any; not to say so means none to some generators.
fn open_objects(schema: &mut RefOr<Schema>) {
    let RefOr::T(Schema::Object(object)) = schema else {
        return;
    };
    let is_object = matches!(object.schema_type, SchemaType::Type(Type::Object));
    if is_object && object.properties.is_empty() && object.additional_properties.is_none() {
        object.additional_properties = Some(Box::new(AdditionalProperties::FreeForm(true)));
    }
    for property in object.properties.values_mut() {
        open_objects(property);
    }
}

/// The types that are one of several words, by their words.
fn choices(schemas: &Schemas) -> BTreeMap<String, String> {
    let words = |(name, schema): (&String, &RefOr<Schema>)| match schema {
        RefOr::T(Schema::Object(object)) => Some((words(object)?, name.clone())),
        _ => None,
    };
    schemas.iter().filter_map(words).collect()
}

fn words(object: &Object) -> Option<String> {
    let values = object.enum_values.as_ref()?;
    serde_json::to_string(values).ok()
}

/// Uses the names of pages and choices. A header or a query has no way to say `null`.
fn refer(operation: &mut Operation, choices: &BTreeMap<String, String>) {
    for parameter in operation.parameters.iter_mut().flatten() {
        let RefOr::T(parameter) = parameter else {
            continue;
        };
        let Some(schema) = &mut parameter.schema else {
            continue;
        };
        let RefOr::T(Schema::Object(object)) = schema else {
            continue;
        };
        if parameter.parameter_in != ParameterIn::Path
            && let SchemaType::Array(types) = &mut object.schema_type
        {
            types.retain(|kind| *kind != Type::Null);
            if let [only] = types.as_slice() {
                object.schema_type = SchemaType::Type(only.clone());
            }
        }
        if parameter.name == "Idempotency-Key" {
            object.pattern = Some("^[!-~]([ -~]{0,253}[!-~])?$".to_owned());
        }
        if let Some(name) = words(object).and_then(|words| choices.get(&words)) {
            *schema = Ref::from_schema_name(name).into();
        }
    }
    for answer in operation.responses.responses.values_mut() {
        let RefOr::T(answer) = answer else { continue };
        for content in answer.content.values_mut() {
            if let RefOr::T(content) = content
                && let Some(RefOr::Ref(schema)) = &mut content.schema
                && let Some((_, row)) = schema.ref_location.split_once(PAGE)
            {
                *schema = Ref::from_schema_name(page_name(row));
            }
        }
    }
}

/// The answer to HEAD has the headers of the one to GET, and no body.
fn empty(operation: &mut Operation) {
    for (status, answer) in &mut operation.responses.responses {
        if let RefOr::T(answer) = answer
            && status.starts_with('2')
        {
            answer.content.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::openapi::openapi;

    #[test]
    fn every_type_has_one_name() {
        let document = serde_json::to_value(openapi()).unwrap();
        let schemas = &document["components"]["schemas"];
        assert_eq!(
            schemas["RunPage"]["properties"]["data"]["items"],
            json!({"$ref": "#/components/schemas/Run"})
        );
        let text = document.to_string();
        assert!(!text.contains("Page_"));
        let runs = &document["paths"]["/v1/runs"]["get"];
        let answer = &runs["responses"]["200"]["content"]["application/json"]["schema"];
        assert_eq!(answer["$ref"], "#/components/schemas/RunPage");
        let parameters = runs["parameters"].as_array().unwrap();
        let state = parameters.iter().find(|found| found["name"] == "state");
        let state = &state.unwrap()["schema"]["$ref"];
        assert_eq!(state, "#/components/schemas/RunState");
    }

    #[test]
    fn headers_and_queries_are_never_null() {
        let document = serde_json::to_value(openapi()).unwrap();
        for item in document["paths"].as_object().unwrap().values() {
            for operation in item.as_object().unwrap().values() {
                for parameter in operation["parameters"].as_array().into_iter().flatten() {
                    assert!(parameter["schema"]["type"] != json!(["string", "null"]));
                    let types: &Value = &parameter["schema"]["type"];
                    assert!(types.is_string() || types.is_null(), "{parameter}");
                }
            }
        }
    }
}
