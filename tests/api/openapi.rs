//! The checked-in OpenAPI document is the one that the program serves.

use std::path::Path;

#[test]
fn the_document_is_checked_in() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.json");
    let kept = std::fs::read_to_string(path).expect("openapi/openapi.json");
    let made = lorasmith::api::openapi().to_pretty_json().expect("JSON");
    assert!(
        kept.trim() == made.trim(),
        "the API has changed: run `cargo run --release -- openapi > openapi/openapi.json`"
    );
}
