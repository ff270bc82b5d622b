//! What a run refuses, and what it tells of its settings.

use serde_json::{Value, json};

use crate::server::Server;

#[test]
fn wrong_requests_are_answered_with_their_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let run = server.start_run(1);
    let settings = server.get(&format!("/v1/runs/{run}"))["settings"].clone();
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .build();
    let agent = config.new_agent();
    let refused = |pointer: &str, value: Value| {
        let mut body = settings.clone();
        let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
        body.pointer_mut(parent).expect("a parent")[field] = value;
        let answer = agent
            .post(format!("{}/v1/runs", server.base))
            .send_json(&body);
        let problem: Value = answer
            .expect("an answer")
            .body_mut()
            .read_json()
            .expect("JSON");
        problem
    };
    for (pointer, value) in [
        ("/network/rank", json!(0)),
        ("/network/rnak", json!(4)),
        ("/unet_rate", json!(1e-4)),
        ("/unet_lr", json!(-1.0)),
        ("/optimizer/settings/weight_dekay", json!(1)),
        ("/device", json!("vulkan:99")),
        ("/resolution/width_px", json!(100)),
    ] {
        let problem = refused(pointer, value);
        assert_eq!(problem["status"], 422, "{problem}");
        let places: Vec<&Value> = problem["errors"]
            .as_array()
            .expect("errors")
            .iter()
            .map(|error| &error["pointer"])
            .collect();
        assert!(places.contains(&&json!(pointer)), "{pointer}: {problem}");
    }
    assert_eq!(
        refused("/base_model", json!("absent"))["code"],
        "model_not_found"
    );
    assert_eq!(
        refused("/optimizer/id", json!("adamv"))["errors"][0]["pointer"],
        "/optimizer/id"
    );
    let end = server.wait(&run, "succeeded", |run| run["state"] == "succeeded");
    // What a run shows of its settings starts the same run.
    let again = server.post("/v1/runs", &end["settings"]);
    assert_eq!(again["settings"], end["settings"]);
}
