//! The checked-in OpenAPI documents are those that the program serves.

use std::path::Path;

use lorasmith::api;

use crate::support::Service;

fn kept(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("openapi")
        .join(name);
    std::fs::read_to_string(path).expect(name)
}

#[test]
fn the_documents_are_checked_in() {
    let made = api::openapi().to_pretty_json().expect("JSON");
    assert!(
        kept("openapi.json").trim() == made.trim(),
        "the API has changed: run `cargo run --release -- openapi > openapi/openapi.json`"
    );
    let made = serde_json::to_string_pretty(&api::openapi30()).expect("JSON");
    assert!(
        kept("openapi-3.0.json").trim() == made.trim(),
        "the API has changed: run `cargo run --release -- openapi --spec 3.0 > openapi/openapi-3.0.json`"
    );
}

#[test]
fn the_documents_are_served() {
    let service = Service::start();
    for (path, version) in [("/openapi.json", "3.1"), ("/openapi-3.0.json", "3.0.3")] {
        let answer = service.get(path);
        let document = answer.expect(200);
        let found = document["openapi"].as_str().expect("a version");
        assert!(found.starts_with(version), "{path}: {found}");
        assert_eq!(answer.header("content-type"), "application/json", "{path}");
        assert!(document["paths"]["/v1/runs"]["post"].is_object(), "{path}");
    }
}
