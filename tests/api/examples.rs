//! The examples of the document can be sent as they are, once ids and names of this service are put in: a LoRA can be
//! trained by hand from `/docs`.

use std::path::Path;

use lorasmith::api;
use serde_json::{Value, json};

use crate::support::{Answer, Service, png};

fn service() -> Service {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15");
    Service::start_with(|config| config.models_dir = models)
}

/// The example body of an operation.
fn example(document: &Value, path: &str, method: &str) -> Value {
    let content = &document["paths"][path][method]["requestBody"]["content"];
    let (_, content) = content
        .as_object()
        .and_then(|kinds| kinds.iter().next())
        .unwrap_or_else(|| panic!("{method} {path}: no body"));
    assert!(content["example"].is_object(), "{method} {path}: {content}");
    content["example"].clone()
}

/// Sends an example to a path with real ids.
fn send(service: &Service, document: &Value, at: (&str, &str), path: &str) -> Answer {
    let body = example(document, at.0, at.1);
    match at.1 {
        "patch" => service.patch(path, None, &body),
        _ => service.post(path, &body),
    }
}

#[test]
fn a_lora_can_be_trained_by_hand_from_the_examples() {
    let service = service();
    let document = service.get("/openapi.json").expect(200);
    let made = send(
        &service,
        &document,
        ("/v1/datasets", "post"),
        "/v1/datasets",
    )
    .expect(201);
    let dataset = format!("/v1/datasets/{}", made["id"].as_str().expect("an id"));
    let upload = service.upload(&format!("{dataset}/images"), &[], &[("a.png", &png(1))]);
    upload.expect(201);
    for (rows, path) in [
        ("images", "/v1/datasets/{dataset_id}/images/{image_id}"),
        ("subsets", "/v1/datasets/{dataset_id}/subsets/{subset_id}"),
    ] {
        let list = service.get(&format!("{dataset}/{rows}")).expect(200);
        let id = list["data"][0]["id"].as_str().expect("an id");
        let row = format!("{dataset}/{rows}/{id}");
        send(&service, &document, (path, "patch"), &row).expect(200);
    }

    let mut run = example(&document, "/v1/runs", "post");
    run["dataset_id"] = made["id"].clone();
    run["base_model"] = json!("diffusers");
    let plan = service.post("/v1/runs:plan", &run).expect(200);
    assert_eq!(plan["images"], 1, "{plan}");
    let made = service.post("/v1/runs", &run).expect(201);
    let path = format!("/v1/runs/{}", made["id"].as_str().expect("an id"));
    service
        .post(&format!("{path}/cancel"), &json!({}))
        .expect(200);
}

#[test]
fn a_webhook_can_be_made_and_changed_from_the_examples() {
    let service = service();
    let document = service.get("/openapi.json").expect(200);
    let made = send(
        &service,
        &document,
        ("/v1/webhooks", "post"),
        "/v1/webhooks",
    )
    .expect(201);
    let hook = format!("/v1/webhooks/{}", made["id"].as_str().expect("an id"));
    for (path, method, rest) in [
        ("/v1/webhooks/{webhook_id}", "patch", ""),
        ("/v1/webhooks/{webhook_id}/rotate", "post", "/rotate"),
    ] {
        let to = format!("{hook}{rest}");
        send(&service, &document, (path, method), &to).expect(200);
    }
}

/// What is shown, of answers too, is what the schema beside it allows.
#[test]
fn every_example_is_of_its_schema() {
    let document = serde_json::to_value(api::openapi()).expect("JSON");
    let mut wrong = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("an item") {
            let body = [("body", &operation["requestBody"])].into_iter();
            let answers = operation["responses"].as_object().expect("answers");
            let answers = answers
                .iter()
                .map(|(status, answer)| (status.as_str(), answer));
            for (name, holder) in body.chain(answers) {
                for (kind, content) in holder["content"].as_object().into_iter().flatten() {
                    let example = &content["example"];
                    if example.is_null() || !kind.contains("json") {
                        continue;
                    }
                    // The schema's references are those of the document.
                    let mut schema = content["schema"].clone();
                    schema["components"] = document["components"].clone();
                    let validator = jsonschema::validator_for(&schema).expect("a schema");
                    for error in validator.iter_errors(example) {
                        wrong.push(format!("{method} {path} {name}: {error}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
