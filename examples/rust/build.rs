//! Hands progenitor the document of version 3.0, less the two things that it does not know.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use serde_json::Value;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=LORASMITH_OPENAPI");
    let kept = || {
        concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../openapi/openapi-3.0.json"
        )
        .into()
    };
    let path = env::var("LORASMITH_OPENAPI").unwrap_or_else(|_| kept());
    println!("cargo::rerun-if-changed={path}");
    let mut document: Value = serde_json::from_slice(&fs::read(path)?)?;
    let paths = &mut document["paths"];
    // Forms: the example sends its own.
    for form in ["/v1/datasets/{dataset_id}/images", "/v1/loras"] {
        remove(&mut paths[form], "post");
    }
    // A second good answer, which is the streams' alone.
    for events in [
        "/v1/runs/{run_id}/events",
        "/v1/datasets/{dataset_id}/captioning-jobs/{captioning_job_id}/events",
    ] {
        remove(&mut paths[events]["get"]["responses"], "204");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?).join("openapi.json");
    Ok(fs::write(out, document.to_string())?)
}

fn remove(object: &mut Value, name: &str) {
    if let Some(object) = object.as_object_mut() {
        object.remove(name);
    }
}
