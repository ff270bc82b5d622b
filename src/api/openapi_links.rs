//! Links of the OpenAPI document: which operations take the id that an answer holds. Fuzzers follow them from what they
//! have made to what can be done with it, and pages of documentation show them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use utoipa::openapi::link::Link;
use utoipa::openapi::path::{Operation, ParameterIn};
use utoipa::openapi::{OpenApi, RefOr};

use super::openapi::{operations, operations_mut};

/// Where an answer has an id.
const MADE: &str = "$response.body#/id";
const FIRST: &str = "$response.body#/data/0/id";

/// Operations that answer with ids: operation, status, place of the id, the parameter that takes it.
const SOURCES: [(&str, &str, &str, &str); 22] = [
    ("create_dataset", "201", MADE, "dataset_id"),
    ("create_upload", "201", MADE, "upload_id"),
    ("create_captioning_job", "202", MADE, "captioning_job_id"),
    ("list_captioning_jobs", "200", FIRST, "captioning_job_id"),
    ("create_run", "201", MADE, "run_id"),
    ("extend_run", "201", MADE, "run_id"),
    ("create_webhook", "201", MADE, "webhook_id"),
    ("list_models", "200", FIRST, "model_id"),
    ("create_model", "201", MADE, "model_id"),
    ("list_vaes", "200", FIRST, "vae_id"),
    ("create_vae", "201", MADE, "vae_id"),
    ("list_datasets", "200", FIRST, "dataset_id"),
    ("list_subsets", "200", FIRST, "subset_id"),
    ("list_images", "200", FIRST, "image_id"),
    ("list_runs", "200", FIRST, "run_id"),
    ("list_samples", "200", FIRST, "sample_id"),
    ("upload_lora", "201", MADE, "lora_id"),
    ("merge_loras", "201", MADE, "lora_id"),
    ("convert_lora", "201", MADE, "lora_id"),
    ("resize_lora", "201", "$response.body#/lora/id", "lora_id"),
    ("list_loras", "200", FIRST, "lora_id"),
    ("list_checkpoints", "200", FIRST, "lora_id"),
];

/// Links every source to the operations on what its id names.
pub fn link(document: &mut OpenApi) {
    let takers: Vec<(String, BTreeSet<String>)> = document
        .paths
        .paths
        .values()
        .flat_map(operations)
        .filter_map(|(_, operation)| Some((operation.operation_id.clone()?, ids(operation))))
        .collect();
    for item in document.paths.paths.values_mut() {
        for (_, operation) in operations_mut(item) {
            let id = operation.operation_id.clone().unwrap_or_default();
            let source = SOURCES.iter().find(|(source, ..)| *source == id);
            if let Some((_, status, place, parameter)) = source {
                link_one(operation, status, place, parameter, &takers);
            }
        }
    }
}

fn link_one(
    operation: &mut Operation,
    status: &str,
    place: &str,
    parameter: &str,
    takers: &[(String, BTreeSet<String>)],
) {
    let known = ids(operation);
    let Some(RefOr::T(answer)) = operation.responses.responses.get_mut(status) else {
        return;
    };
    for (taker, wanted) in takers {
        if !wanted.contains(parameter) {
            continue;
        }
        let value = |name: &String| -> Option<(String, Value)> {
            if name == parameter {
                Some((name.clone(), json!(place)))
            } else if known.contains(name) {
                Some((name.clone(), json!(format!("$request.path.{name}"))))
            } else {
                None
            }
        };
        let parameters: BTreeMap<String, Value> = wanted.iter().filter_map(value).collect();
        if parameters.len() == wanted.len() {
            let mut link = Link::default();
            link.operation_id.clone_from(taker);
            link.parameters = parameters;
            answer.links.insert(taker.clone(), link.into());
        }
    }
}

/// The names in an operation's path.
fn ids(operation: &Operation) -> BTreeSet<String> {
    let parameters = operation.parameters.iter().flatten();
    let names = parameters.filter_map(|parameter| match parameter {
        RefOr::T(parameter) if parameter.parameter_in == ParameterIn::Path => {
            Some(parameter.name.clone())
        }
        _ => None,
    });
    names.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::openapi::openapi;
    use super::SOURCES;

    #[test]
    fn what_is_made_leads_to_what_can_be_done_with_it() {
        let document = serde_json::to_value(openapi()).unwrap();
        let text = document.to_string();
        for (source, ..) in SOURCES {
            assert!(
                text.contains(&format!("\"operationId\":\"{source}\"")),
                "{source}"
            );
        }
        let links = &document["paths"]["/v1/runs"]["post"]["responses"]["201"]["links"];
        assert_eq!(
            links["cancel_run"],
            json!({"operationId": "cancel_run", "parameters": {"run_id": "$response.body#/id"}})
        );
        let images = &document["paths"]["/v1/datasets/{dataset_id}/images"]["get"];
        let link = &images["responses"]["200"]["links"]["update_image"]["parameters"];
        assert_eq!(
            link,
            &json!({"dataset_id": "$request.path.dataset_id", "image_id": "$response.body#/data/0/id"})
        );
    }
}
