//! Runs whose workers or servers go, and runs that rest and end as they are asked to.

use std::process::Command;

use serde_json::{Value, json};

use crate::server::{PROGRAM, Server, in_mid_run, kill_worker, root, try_to_kill_worker};

#[test]
fn a_run_whose_workers_do_not_come_further_is_given_up() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let run = server.start_run(100_000);
    server.wait(&run, "in mid-run", |run| {
        run["progress"]["step"].as_u64() >= Some(10)
    });
    kill_worker(&run);
    for attempt in 2..=4 {
        let again = server.wait(&run, "begun again", |run| run["attempt"] == attempt);
        assert_eq!(again["error"], Value::Null);
        kill_worker(&run);
    }
    let end = server.wait(&run, "failed", |run| run["state"] == "failed");
    assert_eq!(end["error"]["code"], "worker_lost", "{end}");
    let message = end["error"]["message"].as_str().expect("words");
    for part in ["SIGKILL", "gone on with 3 times", "GiB", "batch_size"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_paused_run_gives_back_its_device_and_goes_on_exactly() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let dataset = server.make_dataset();
    let settings = json!({"samples": {"prompts": [{"prompt": "lumo", "width_px": 64, "height_px": 64, "steps": 2}]}});
    let whole = server.start_run_on(&dataset, 60, &settings);
    let ended = server.wait(&whole, "succeeded", |run| run["state"] == "succeeded");

    let run = server.start_run_on(&dataset, 60, &settings);
    server.wait(&run, "in mid-run", in_mid_run);
    server.act(&run, "save");
    server.act(&run, "sample");
    server.wait(&run, "saved", |_| {
        let loras = server.get(&format!("/v1/loras?run_id={run}"));
        loras["data"]
            .as_array()
            .is_some_and(|loras| !loras.is_empty())
    });
    server.act(&run, "pause");
    server.act(&run, "pause");
    let paused = server.wait(&run, "paused", |run| run["state"] == "paused");
    assert_eq!(
        paused["resumable_step"], paused["progress"]["step"],
        "{paused}"
    );
    assert!(!try_to_kill_worker(&run), "it has given back the device");
    // Another service may go on with it.
    server.kill();
    let server = Server::start(folder.path());
    server.act(&run, "resume");
    let end = server.wait(&run, "succeeded", |run| run["state"] == "succeeded");
    assert_eq!(end["attempt"], 2);
    assert_eq!(server.losses(&run), server.losses(&whole));
    assert_eq!(server.result(&end), server.result(&ended));
    let samples = server.get(&format!("/v1/runs/{run}/samples"));
    assert_eq!(samples["data"].as_array().expect("samples").len(), 2);

    // A run that has ended can be made longer, as another one.
    let longer = server.post(&format!("/v1/runs/{run}/extend"), &json!({"steps": 10}));
    assert_eq!(longer["continued_from"], run.as_str());
    let longer = longer["id"].as_str().expect("an id");
    let end = server.wait(longer, "succeeded", |run| run["state"] == "succeeded");
    assert_eq!(end["progress"]["step"], 70);
    let steps: Vec<u64> = server
        .losses(longer)
        .iter()
        .map(|(step, _)| *step)
        .collect();
    assert_eq!(steps, (61..=70).collect::<Vec<u64>>());
}

#[test]
fn a_data_folder_has_one_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let second = Command::new(env!("CARGO_BIN_EXE_lorasmith"))
        .args(["serve", "--bind", "127.0.0.1:0", "--data-dir"])
        .arg(folder.path())
        .output()
        .expect("the program");
    assert!(!second.status.success());
    let message = String::from_utf8_lossy(&second.stderr).into_owned();
    let pid = format!("process {}", server.process.id());
    assert!(message.contains(&pid), "{message}");
    server.kill();
    drop(Server::start(folder.path()));
}

#[test]
fn a_killed_server_finds_its_runs_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let run = server.start_run(40);
    server.wait(&run, "in mid-run", |run| run["state"] == "running");
    server.kill();
    // With its worker gone too, only the lease tells: the run must not stay `running`.
    kill_worker(&run);
    let server = Server::start(folder.path());
    let end = server.wait(&run, "succeeded", |run| run["state"] == "succeeded");
    assert_eq!(end["attempt"], 2);
    assert!(end["lora_id"].is_string(), "{end}");
}

#[test]
fn a_run_ends_when_it_is_asked_to() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let run = server.start_run(100_000);
    server.wait(&run, "in mid-run", in_mid_run);
    server.post(&format!("/v1/runs/{run}/cancel"), &json!({}));
    let end = server.wait(&run, "cancelled", |run| run["state"] == "cancelled");
    assert!(end["finished_at"].is_string());
}

#[test]
fn another_instruction_set_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let models = root().join("examples/demo");
    let server = Server::start(folder.path());
    let dataset = server.make_dataset();
    let small = json!({"resolution": {"width_px": 32, "height_px": 32}});
    let whole = server.start_run_on(&dataset, 3, &small);
    server.wait(&whole, "succeeded", |run| run["state"] == "succeeded");
    let run = server.start_run_on(&dataset, 100_000, &small);
    server.wait(&run, "in mid-run", in_mid_run);
    server.act(&run, "pause");
    server.wait(&run, "paused", |run| run["state"] == "paused");
    let record = server.get(&format!("/v1/runs/{whole}/provenance"));
    let best = record["attempts"][0]["environment"]["instructions"].clone();
    server.kill();
    if best == "portable" {
        return; // this machine has no other
    }

    let mut limited = Command::new(PROGRAM);
    limited.env("LORASMITH_INSTRUCTIONS", "portable");
    let server = Server::run(limited, folder.path(), &models);
    let again = server.act(&whole, "reproduce");
    let again = again["id"].as_str().expect("an id");
    let end = server.wait(again, "succeeded", |run| run["state"] == "succeeded");
    let found = &end["reproduction"];
    assert_eq!(found["state"], "different", "{found}");
    let step = found["first_differing_step"].as_u64();
    assert!(step.is_some_and(|step| (1..=3).contains(&step)), "{found}");
    let told = json!({"what": "instructions", "original": best, "reproduction": "portable"});
    let differences = found["differences"].as_array().expect("a list");
    assert!(differences.contains(&told), "{found}");
    let message = found["message"].as_str().expect("words");
    assert!(message.contains("instructions was"), "{message}");

    // A run that goes on says so, too.
    server.act(&run, "resume");
    server.wait(&run, "in mid-run", |run| {
        run["attempt"] == 2 && in_mid_run(run)
    });
    let record = server.get(&format!("/v1/runs/{run}/provenance"));
    let history = record["history"].as_array().expect("events").iter();
    let mut changed = history.filter(|event| event["event"] == "environment_changed");
    let changed = &changed.next().expect("an event")["data"];
    assert_eq!(changed["attempt"], 2);
    let told = json!([{"what": "instructions", "before": best, "now": "portable"}]);
    assert_eq!(changed["changes"], told);
    server.act(&run, "cancel");
    server.wait(&run, "cancelled", |run| run["state"] == "cancelled");
}
