//! Many runs of several keys, cancelled, paused and resumed at random: each ends where its history leads.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};

use crate::server::{PATIENCE, PROGRAM, Random, Server, tiny_models};

const KEYS: usize = 4;

/// Twelve runs.
#[test]
fn a_crowd_of_runs_ends_where_each_was_led() {
    crowd(12, 3);
}

/// The same for long: `cargo test --release --test e2e -- --ignored fifty`.
#[test]
#[ignore = "takes minutes"]
fn a_crowd_of_fifty_runs_ends_where_each_was_led() {
    crowd(50, 4);
}

/// What was asked of a run, as far as the service agreed.
#[derive(Debug, Default)]
struct Led {
    cancelled: bool,
    /// It rests, and nobody has resumed it.
    paused: bool,
    pauses: usize,
}

fn crowd(runs: usize, seed: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let keys: Vec<String> = (0..KEYS).map(|_| make_key(folder.path())).collect();
    let mut command = Command::new(PROGRAM);
    command.env("LORASMITH_MAX_RUNS_PER_DEVICE", "2");
    let mut server = Server::run(command, folder.path(), &tiny_models());
    server.key = Some(keys[0].clone());
    let dataset = server.make_dataset();
    let mut random = Random(seed);
    let mut led: HashMap<String, Led> = HashMap::new();
    let mut ids = Vec::new();
    for index in 0..runs {
        server.key = Some(keys[index % KEYS].clone());
        let settings = json!({"base_model": "tiny-sd15-ldm", "priority": random.below(2), "resolution": {"width_px": 32, "height_px": 32}});
        let steps = 2 + random.below(12);
        let id = server.start_run_on(&dataset, steps, &settings);
        led.insert(id.clone(), Led::default());
        ids.push(id);
    }
    for _ in 0..2 * runs {
        std::thread::sleep(Duration::from_millis(random.below(250)));
        let id = &ids[random.below(runs as u64) as usize];
        let action = ["cancel", "pause", "pause", "resume", "resume"][random.below(5) as usize];
        act(&server, id, action, led.get_mut(id).expect("known"));
    }
    // Whoever rests does so for as long as nobody resumes it; the others end.
    for id in &ids {
        if !led[id].paused {
            server.wait(id, "at its end", has_ended);
        }
    }
    for id in &ids {
        if led[id].paused {
            let run = server.wait(id, "paused or at its end", |run| {
                run["state"] == "paused" || has_ended(run)
            });
            // A wish to rest can come after the last step.
            assert!(
                run["state"] == "paused" || run["state"] == "succeeded",
                "{run}"
            );
            if run["state"] == "paused" {
                act(&server, id, "resume", led.get_mut(id).expect("known"));
            }
        }
    }
    let mut ends: HashMap<String, usize> = HashMap::new();
    for id in &ids {
        let end = server.wait(id, "at its end", has_ended);
        let expected = if led[id].cancelled {
            "cancelled"
        } else {
            "succeeded"
        };
        assert_eq!(end["state"], expected, "{:?}: {end}", led[id]);
        let pauses = check_history(&server, id, &end);
        assert!(pauses <= led[id].pauses, "{:?}: {pauses} pauses", led[id]);
        *ends.entry(expected.to_owned()).or_default() += 1;
    }
    println!("{runs} runs: {ends:?}");
    assert_eq!(ends.len(), 2, "{ends:?}");
    nothing_is_left(&server, folder.path());
}

fn has_ended(run: &Value) -> bool {
    ["succeeded", "failed", "cancelled"]
        .iter()
        .any(|end| run["state"] == *end)
}

/// Asks for something, and notes it where the service agrees; it may only refuse what the state does not allow.
fn act(server: &Server, id: &str, action: &str, led: &mut Led) {
    let (status, answer) = server.ask("POST", &format!("/v1/runs/{id}/{action}"), Some(&json!({})));
    match (status, action) {
        (200, "cancel") => led.cancelled = true,
        (200, "pause") => {
            led.paused = true;
            led.pauses += 1;
        }
        (200, _) => led.paused = false,
        (409, _) => assert_eq!(answer["code"], "illegal_transition", "{answer}"),
        _ => panic!("{action}: {status} {answer}"),
    }
    if led.cancelled {
        led.paused = false;
    }
}

/// The events have no gap, each state follows the one before, and nothing follows an end. The result is how often the
/// run has rested.
fn check_history(server: &Server, id: &str, run: &Value) -> usize {
    let answer = server.get(&format!("/v1/runs/{id}/events"));
    assert_eq!(answer["next_after"], Value::Null);
    let events = answer["data"].as_array().expect("events");
    let numbers: Vec<u64> = events
        .iter()
        .filter_map(|event| event["id"].as_u64())
        .collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<u64>>());
    let mut state = Value::Null;
    let (mut begun, mut pauses) = (0, 0);
    for event in events {
        assert!(
            !has_ended(&json!({"state": state})),
            "{event} after {state}"
        );
        if event["event"] == "state" {
            let data = &event["data"];
            assert_eq!(data["previous"], state, "{event}");
            state = data["state"].clone();
            begun += u64::from(state == "preparing");
            pauses += usize::from(state == "paused");
        }
    }
    assert_eq!((&state, &json!(begun)), (&run["state"], &run["attempt"]));
    pauses
}

/// No process, dead or alive, no lease, and no lock.
fn nothing_is_left(server: &Server, data: &Path) {
    #[cfg(target_os = "linux")]
    {
        let began = Instant::now();
        loop {
            let children = children(server.process.id());
            if children.is_empty() {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "{children:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    for run in std::fs::read_dir(data.join("runs"))
        .expect("a folder")
        .flatten()
    {
        for file in std::fs::read_dir(run.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = file.file_name();
            assert!(!name.to_string_lossy().ends_with(".lock"), "{name:?}");
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let held = runtime.expect("a runtime").block_on(async {
        let url = format!("sqlite://{}", data.join("lorasmith.sqlite3").display());
        let database = sea_orm::Database::connect(url).await.expect("the database");
        let count = "SELECT count(*) AS n FROM runs WHERE lease_owner IS NOT NULL OR worker_pid IS NOT NULL";
        let row = database.query_one_raw(sea_orm::Statement::from_string(sea_orm::DbBackend::Sqlite, count));
        let row = row.await.expect("an answer").expect("a row");
        row.try_get::<i64>("", "n").expect("a number")
    });
    assert_eq!(held, 0, "leases of runs that have ended");
}

/// The children of a process, as `pid (name) state`; one that nobody waits for is a `Z`.
#[cfg(target_os = "linux")]
fn children(parent: u32) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let stats =
        processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let of_parent = |stat: &String| {
        let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        after_name.split(' ').nth(1) == Some(&parent.to_string())
    };
    stats.filter(of_parent).collect()
}

fn make_key(data: &Path) -> String {
    let made = Command::new(PROGRAM)
        .args([
            "keys",
            "create",
            "--name",
            "one of four",
            "--scope",
            "write",
            "--json",
            "--data-dir",
        ])
        .arg(data)
        .output()
        .expect("the program");
    let made: Value = serde_json::from_slice(&made.stdout).expect("JSON");
    made["key"].as_str().expect("a key").to_owned()
}
