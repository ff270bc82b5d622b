//! A run whose worker and server are killed again and again gives what it would have given.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{PATIENCE, Random, Server, tiny_models, try_to_kill_worker, worker_pid};

/// How long a run is between two kills, and what that may be in optimizer steps: machines differ.
const SECONDS_PER_KILL: f64 = 0.6;
const STEPS_PER_KILL: (u64, u64) = (4, 80);
/// How long to wait for a worker, and for it to write a resume point.
const WRITES_WITHIN: Duration = Duration::from_secs(5);

/// Five kills, seeded.
#[test]
fn a_run_survives_kills_to_the_bit() {
    survive(5, 1);
}

/// The same for long: `cargo test --release --test e2e -- --ignored hundred`.
#[test]
#[ignore = "takes several minutes"]
fn a_run_survives_a_hundred_kills_to_the_bit() {
    survive(100, 2);
}

/// What a client has heard: number, kind and data of each event.
type Heard = Vec<(u64, String, Value)>;

/// What is killed, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kill {
    /// The worker, at any moment of its training.
    Worker,
    /// The worker, while it writes a resume point.
    WorkerInWriting,
    /// The worker, soon after the kill before: it may still load the model.
    WorkerSoon,
    /// The server alone; its worker goes on.
    Server,
    /// Both.
    Both,
}

impl Kill {
    /// Never two of those in a row that may leave a worker no time to come further: it would be given up.
    fn random(random: &mut Random, before: Option<Self>) -> Self {
        match random.below(8) {
            0 => Self::Server,
            1 | 2 => Self::Both,
            3 if before == Some(Self::Worker) => Self::WorkerSoon,
            3 | 4 => Self::Worker,
            _ => Self::WorkerInWriting,
        }
    }

    fn kills_server(self) -> bool {
        matches!(self, Self::Server | Self::Both)
    }
}

/// Kills the worker, or the server, of a run at random moments, and compares what comes out with a run that was left
/// alone.
fn survive(kills: usize, seed: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let models = tiny_models();
    let start = || Server::start_with(folder.path(), &models);
    let server = start();
    let dataset = server.make_dataset();
    let images = server.get(&format!("/v1/datasets/{dataset}/images"));
    let per_kill = steps_per_kill(&server, &dataset);
    let steps = per_kill * (kills as u64 + 4); // the last kill is not too late
    let settings = json!({
        "base_model": "tiny-sd15-ldm", "resolution": {"width_px": 32, "height_px": 32},
        "resume": {"every_n_steps": (per_kill / 3).max(1)},
        "save": {"every_n_steps": steps / 3 + 1},
        "validation": {"image_ids": [images["data"][2]["id"]], "every_n_steps": 20},
    });
    let whole = server.start_run_on(&dataset, steps, &settings);
    let ended = server.wait(&whole, "succeeded", |run| run["state"] == "succeeded");
    let (expected, expected_losses) = (server.result(&ended), server.losses(&whole));

    let run = server.start_run_on(&dataset, steps, &settings);
    let run_folder = folder.path().join("runs").join(&run);
    let base = Arc::new(Mutex::new(server.base.clone()));
    let listener = {
        let (base, run) = (base.clone(), run.clone());
        std::thread::spawn(move || listen(&base, &run, Random(seed)))
    };
    let mut random = Random(seed);
    let mut alive = server;
    let (mut before, mut in_writing, mut done, mut reached) = (None, 0, 0, 0);
    for kill in 0..kills {
        let kind = Kill::random(&mut random, before);
        before = Some(kind);
        if kind != Kill::WorkerSoon {
            // Whoever is killed has come further than those before; it would be given up otherwise.
            let at = (per_kill * kill as u64 + random.below(per_kill)).max(reached + 2);
            let found = alive.wait(&run, "far enough", |run| {
                let step = run["progress"]["step"].as_u64();
                has_ended(run) || run["state"] == "running" && step >= Some(at)
            });
            if has_ended(&found) {
                break;
            }
            reached = found["progress"]["step"].as_u64().expect("a step");
        }
        done += 1;
        std::thread::sleep(Duration::from_millis(random.below(400)));
        if kind == Kill::WorkerInWriting {
            in_writing += u64::from(kill_in_writing(&run, &run_folder.join("resume")));
        } else if kind != Kill::Server {
            // It may have gone with the kill before, and the next one not be there yet.
            let began = Instant::now();
            while !try_to_kill_worker(&run) && began.elapsed() < WRITES_WITHIN {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if kind.kills_server() {
            alive.kill();
            alive = start();
            alive.base.clone_into(&mut base.lock().expect("no panic"));
        }
    }
    let end = alive.wait(&run, "at its end", has_ended);
    println!("{done} kills, {in_writing} in the middle of a resume point");
    assert!(
        10 * done >= 9 * kills,
        "only {done} of {kills} kills: the run was too short"
    );
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(alive.losses(&run), expected_losses);
    assert_eq!(alive.result(&end), expected, "another file");
    check(&listener.join().expect("a listener"), steps);
    judged(&alive, &end);
    assert!(!try_to_kill_worker(&run));
    assert_eq!(leftovers(&run_folder), Vec::<String>::new());
    assert!(
        kills < 50 || in_writing > 0,
        "no kill came while a resume point was written"
    );
}

fn has_ended(run: &Value) -> bool {
    run["state"] == "succeeded" || run["state"] == "failed"
}

/// By the time of a step on this machine, once the first ones are done.
fn steps_per_kill(server: &Server, dataset: &str) -> u64 {
    let probe = server.start_run_on(
        dataset,
        8,
        &json!({"base_model": "tiny-sd15-ldm", "resolution": {"width_px": 32, "height_px": 32}}),
    );
    server.wait(&probe, "succeeded", |run| run["state"] == "succeeded");
    let series = server.get(&format!("/v1/runs/{probe}/metrics"));
    let steps = series["data"].as_array().expect("steps").iter();
    let mut times: Vec<f64> = steps
        .filter_map(|step| step["step_time_s"].as_f64())
        .collect();
    times.sort_by(f64::total_cmp);
    let (least, most) = STEPS_PER_KILL;
    ((SECONDS_PER_KILL / times[times.len() / 2]) as u64).clamp(least, most)
}

/// Kills the worker as soon as there is an unfinished resume point; whether it has left one behind.
fn kill_in_writing(run: &str, points: &Path) -> bool {
    let pid = || worker_pid(run).and_then(rustix::process::Pid::from_raw);
    let unfinished = || {
        let entries = std::fs::read_dir(points).into_iter().flatten().flatten();
        let mut names = entries.map(|entry| entry.file_name());
        names.any(|name| name.to_string_lossy().starts_with(".tmp"))
    };
    let began = Instant::now();
    let mut worker = pid();
    while !(unfinished() && worker.is_some()) && began.elapsed() < WRITES_WITHIN {
        std::thread::sleep(Duration::from_micros(200));
        if worker.is_none() {
            worker = pid();
        }
    }
    let Some(worker) = worker else { return false };
    // It may have ended by itself.
    let _ = rustix::process::kill_process(worker, rustix::process::Signal::KILL);
    unfinished()
}

/// What workers leave that none needs any more.
fn leftovers(run_folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for folder in [run_folder.to_owned(), run_folder.join("resume")] {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        found.extend(names.filter(|name| name.ends_with(".lock") || name.starts_with(".tmp")));
    }
    found
}

/// Every file has its validation loss, one of them is the best, and the run has a verdict.
fn judged(server: &Server, run: &Value) {
    let id = run["id"].as_str().expect("an id");
    let files = server.get(&format!("/v1/runs/{id}/checkpoints"));
    let files = files["data"].as_array().expect("files");
    let loss = |file: &Value| file["validation_loss"].as_f64().expect("a loss");
    let lowest = files.iter().map(loss).fold(f64::INFINITY, f64::min);
    let best: Vec<&Value> = files.iter().filter(|file| file["best"] == true).collect();
    assert_eq!((files.len(), best.len()), (3, 1), "{files:?}");
    assert_eq!(loss(best[0]), lowest);
    assert!(best[0]["validation_error"].as_f64() > Some(0.0));
    let verdict = run["verdict"].as_str().expect("a verdict");
    assert!(verdict.starts_with("validation loss "), "{verdict}");
    assert_eq!(run["early_stop"], Value::Null);
}

/// Every event once and in order, and everything that was done told once.
fn check(heard: &Heard, steps: u64) {
    let numbers: Vec<u64> = heard.iter().map(|(number, ..)| *number).collect();
    assert_eq!(numbers, (1..=heard.len() as u64).collect::<Vec<u64>>());
    let of = |wanted: &str, field: &str| -> Vec<Value> {
        let events = heard.iter().filter(|(_, kind, _)| kind == wanted);
        events.map(|(.., data)| data[field].clone()).collect()
    };
    let told: Vec<u64> = of("progress", "step")
        .iter()
        .filter_map(Value::as_u64)
        .collect();
    assert!(told.is_sorted_by(|a, b| a < b), "{told:?}");
    assert_eq!(told.last(), Some(&steps));
    let saved = (0..steps).step_by(steps as usize / 3 + 1);
    let mut measured: Vec<u64> = (0..steps).step_by(20).chain(saved).collect();
    measured.push(steps);
    measured.sort_unstable();
    measured.dedup();
    assert_eq!(
        of("validation", "step"),
        measured.iter().map(|step| json!(step)).collect::<Vec<_>>()
    );
    let mut files = of("lora", "file_name");
    let all = files.len();
    files.dedup();
    assert_eq!((files.len(), all), (3, 3), "{files:?}");
    assert_eq!(heard.last().expect("events").2["state"], "succeeded");
}

/// Follows a run to its end, through any number of servers; now and then it hangs up by itself.
fn listen(base: &Mutex<String>, run: &str, mut random: Random) -> Heard {
    let mut heard = Heard::new();
    let began = Instant::now();
    while began.elapsed() < 10 * PATIENCE {
        let url = format!("{}/v1/runs/{run}/events", base.lock().expect("no panic"));
        let last = heard.last().map_or(0, |(number, ..)| *number);
        let answer = ureq::get(&url)
            .header("last-event-id", last.to_string())
            .call();
        let Ok(answer) = answer else {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        if answer.status() == 204 {
            return heard;
        }
        let (mut number, mut kind) = (0, String::new());
        let hangs_up = heard.len() + 1 + random.below(60) as usize;
        for line in BufReader::new(answer.into_body().into_reader()).lines() {
            let Ok(line) = line else { break };
            if heard.len() >= hangs_up {
                break;
            }
            if let Some(id) = line.strip_prefix("id: ") {
                number = id.parse().expect("a number");
            } else if let Some(name) = line.strip_prefix("event: ") {
                name.clone_into(&mut kind);
            } else if let Some(data) = line.strip_prefix("data: ") {
                // A line that was cut off is no event.
                if let Ok(data) = serde_json::from_str(data) {
                    heard.push((number, kind.clone(), data));
                }
            }
        }
    }
    panic!("the run has no end");
}
