//! Optimizers that are more than a step: states in 8 bits, and two sets of weights, through the service.

use serde_json::{Value, json};

use crate::server::{Server, in_mid_run, kill_worker};

/// The `memory` event of a run.
fn memory(server: &Server, run: &str) -> Value {
    let events = server.get(&format!("/v1/runs/{run}/events?wait=0"));
    let events = events["data"].as_array().expect("events").iter();
    let mut found = events.filter(|event| event["event"] == "memory");
    found.next().expect("an event")["data"].clone()
}

/// A run that lost its worker ends as the one that did not, with previews and saved files on the way.
fn survives(server: &Server, dataset: &str, optimizer: &Value) -> String {
    let settings = json!({
        "optimizer": optimizer, "save": {"every_n_steps": 15},
        "samples": {"prompts": [{"prompt": "lumo", "width_px": 64, "height_px": 64, "steps": 2}], "every_n_steps": 20},
    });
    let whole = server.start_run_on(dataset, 60, &settings);
    let ended = server.wait(&whole, "succeeded", |run| run["state"] == "succeeded");
    let run = server.start_run_on(dataset, 60, &settings);
    server.wait(&run, "in mid-run", in_mid_run);
    kill_worker(&run);
    let end = server.wait(&run, "succeeded", |run| run["state"] == "succeeded");
    assert_eq!(end["attempt"], 2, "{end}");
    assert_eq!(server.losses(&run), server.losses(&whole), "{optimizer}");
    assert_eq!(server.result(&end), server.result(&ended), "{optimizer}");
    whole
}

#[test]
fn states_in_eight_bits_are_taken_up_and_take_a_quarter() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let dataset = server.make_dataset();
    let small = json!({"id": "AdamW8bit", "settings": {"min_8bit_size": 1}});
    let eight = survives(&server, &dataset, &small);
    let whole = server.start_run_on(&dataset, 1, &json!({"optimizer": {"id": "adamw"}}));
    server.wait(&whole, "succeeded", |run| run["state"] == "succeeded");
    let state = |run: &str| memory(&server, run)["optimizer_state_bytes"].as_f64();
    let ratio = state(&eight).expect("bytes") / state(&whole).expect("bytes");
    assert!((0.25..0.26).contains(&ratio), "{ratio}");
}

#[test]
fn weights_to_keep_and_weights_to_train_on_are_kept_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let dataset = server.make_dataset();
    let optimizer = json!({"id": "AdamWScheduleFree", "settings": {"warmup_steps": 5}});
    survives(&server, &dataset, &optimizer);
}
