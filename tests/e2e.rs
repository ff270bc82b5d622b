//! The program as a whole, as a newcomer meets it: the demo, and what is left after processes are killed.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lorasmith::demo::{self, DemoOptions};
use serde_json::{Value, json};

/// Long enough for a slow machine; a run of these tests takes seconds.
const PATIENCE: Duration = Duration::from_secs(180);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The mascot is learned: the loss on held-out pictures falls to at most half.
#[test]
fn the_demo_learns_the_mascot() {
    let folder = tempfile::tempdir().expect("a folder");
    let report = demo::run(&DemoOptions {
        output: folder.path().to_owned(),
        assets: Some(root().join("examples/demo")),
        steps: 400,
        device: "cpu".to_owned(),
        quiet: true,
    })
    .expect("the demo");
    assert!(report.ratio() <= 0.5, "{report}");
    for file in [&report.lora, &report.sheet, &report.plot, &report.script] {
        assert!(
            file.metadata().expect("written").len() > 500,
            "{}",
            file.display()
        );
    }
    let script = std::fs::read_to_string(&report.script).expect("a script");
    for call in ["/v1/datasets", "/v1/runs", "/content", "if-match"] {
        assert!(script.contains(call), "{call}");
    }
}

/// `lorasmith serve` on a free port.
struct Server {
    process: Child,
    base: String,
}

impl Server {
    fn start(data: &Path) -> Self {
        Self::start_with(data, &root().join("examples/demo"))
    }

    /// With base models of another folder.
    fn start_with(data: &Path, models: &Path) -> Self {
        Self::start_as(data, models, &[])
    }

    /// With settings in the environment.
    fn start_as(data: &Path, models: &Path, environment: &[(&str, &str)]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_lorasmith"))
            .envs(environment.iter().copied())
            .args(["serve", "--bind", "127.0.0.1:0", "--device", "cpu"])
            .arg("--data-dir")
            .arg(data)
            .arg("--models-dir")
            .arg(models)
            // Two runs of the same settings then write the same file, time and all.
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program");
        let mut lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let first = lines.next().expect("a line").expect("UTF-8");
        let at = first.find("http://").expect("an address");
        let base = first[at..]
            .split(' ')
            .next()
            .expect("an address")
            .to_owned();
        Self { process, base }
    }

    fn get(&self, path: &str) -> Value {
        let mut answer = ureq::get(format!("{}{path}", self.base))
            .call()
            .expect(path);
        answer.body_mut().read_json().expect("JSON")
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let mut answer = ureq::post(format!("{}{path}", self.base))
            .send_json(body)
            .expect(path);
        answer.body_mut().read_json().expect("JSON")
    }

    /// A dataset of three pictures.
    fn make_dataset(&self) -> String {
        let dataset = self.post("/v1/datasets", &json!({"name": "lumo"}));
        let id = dataset["id"].as_str().expect("an id");
        let mut body = Vec::new();
        for index in 0..3 {
            let name = format!("lumo_{index:02}.png");
            let picture = find(&root().join("examples/demo/dataset"), &name);
            let head = format!(
                "--x\r\ncontent-disposition: form-data; name=\"f\"; filename=\"{name}\"\r\n\r\n"
            );
            body.extend(head.into_bytes());
            body.extend(std::fs::read(picture).expect("a picture"));
            body.extend(b"\r\n");
        }
        body.extend(b"--x--\r\n");
        ureq::post(format!("{}/v1/datasets/{id}/images", self.base))
            .header("content-type", "multipart/form-data; boundary=x")
            .send(&body)
            .expect("an upload");
        id.to_owned()
    }

    /// A dataset of three pictures and a run on it.
    fn start_run(&self, steps: u64) -> String {
        let dataset = self.make_dataset();
        self.start_run_on(&dataset, steps, &json!({}))
    }

    /// A run with other settings than the rest.
    fn start_run_on(&self, dataset: &str, steps: u64, more: &Value) -> String {
        let mut settings = json!({
            "name": "crash", "dataset_id": dataset, "base_model": "base", "max_train_steps": steps,
            "network": {"rank": 4, "alpha": 4.0}, "resolution": {"width_px": 64, "height_px": 64},
            "buckets": {"enabled": false, "min_px": 32, "max_px": 128, "step_px": 16},
        });
        for (name, value) in more.as_object().expect("settings") {
            settings[name] = value.clone();
        }
        let run = self.post("/v1/runs", &settings);
        run["id"].as_str().expect("an id").to_owned()
    }

    fn act(&self, run: &str, action: &str) -> Value {
        self.post(&format!("/v1/runs/{run}/{action}"), &json!({}))
    }

    /// Step and loss of the whole run.
    fn losses(&self, run: &str) -> Vec<(u64, f64)> {
        let series = self.get(&format!("/v1/runs/{run}/metrics"));
        let points = series["data"].as_array().expect("points");
        let losses = points.iter().filter_map(|point| {
            let loss = point["loss"].as_f64()?;
            Some((point["step"].as_u64()?, loss))
        });
        losses.collect()
    }

    /// SHA-256 of the result.
    fn result(&self, run: &Value) -> String {
        let id = run["lora_id"].as_str().expect("a LoRA");
        let lora = self.get(&format!("/v1/loras/{id}"));
        lora["sha256"].as_str().expect("a digest").to_owned()
    }

    fn wait(&self, run: &str, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let found = self.get(&format!("/v1/runs/{run}"));
            if done(&found) {
                return found;
            }
            assert!(began.elapsed() < PATIENCE, "not {what}: {found}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn kill(mut self) {
        self.process.kill().expect("killed");
        self.process.wait().expect("gone");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone after `kill`.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn find(folder: &Path, name: &str) -> std::path::PathBuf {
    let folders = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path());
    let mut files = folders.map(|folder| folder.join(name));
    files.find(|file| file.is_file()).expect(name)
}

fn in_mid_run(run: &Value) -> bool {
    run["state"] == "running" && run["progress"]["step"].as_u64() >= Some(2)
}

/// The worker with a run's id in its command line.
fn kill_worker(run: &str) {
    let status = Command::new("pkill")
        .args(["-9", "-f", &format!("worker --run {run}")])
        .status();
    assert!(status.expect("pkill").success(), "there is no worker");
}

/// Whether the run's worker was there to be killed.
fn try_to_kill_worker(run: &str) -> bool {
    let status = Command::new("pkill")
        .args(["-9", "-f", &format!("worker --run {run}")])
        .status();
    status.expect("pkill").success()
}

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

    let limited = [("LORASMITH_INSTRUCTIONS", "portable")];
    let server = Server::start_as(folder.path(), &models, &limited);
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

/// Five kills, seeded.
#[test]
#[cfg(unix)]
fn a_run_survives_kills_to_the_bit() {
    survive(5, 10.0, 1);
}

/// The same for long: `cargo test --release --test e2e -- --ignored hundred`.
#[test]
#[cfg(unix)]
#[ignore = "takes several minutes"]
fn a_run_survives_a_hundred_kills_to_the_bit() {
    survive(100, 200.0, 2);
}

/// What a client has heard: number, kind and data of each event.
type Heard = Vec<(u64, String, Value)>;

/// Kills the worker, or the server, of a run of so many seconds at random moments, and compares what comes out with a
/// run that was left alone.
#[cfg(unix)]
fn survive(kills: usize, seconds: f64, seed: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let models = root().join("tests/fixtures/tiny-sd15");
    let start = || Server::start_with(folder.path(), &models);
    let server = start();
    let dataset = server.make_dataset();
    let images = server.get(&format!("/v1/datasets/{dataset}/images"));
    let tiny = json!({"base_model": "tiny-sd15-ldm"});
    let probe = server.start_run_on(&dataset, 8, &tiny);
    server.wait(&probe, "succeeded", |run| run["state"] == "succeeded");
    let series = server.get(&format!("/v1/runs/{probe}/metrics"));
    let step_s = series["data"][7]["step_time_s"].as_f64().expect("a time");
    let steps = ((seconds / step_s) as u64).clamp(30, 20_000);
    let settings = json!({
        "base_model": "tiny-sd15-ldm", "resume": {"every_n_steps": (steps / (4 * kills as u64)).max(1)},
        "save": {"every_n_steps": steps / 3 + 1},
        "validation": {"image_ids": [images["data"][2]["id"]], "every_n_steps": 20},
    });
    let whole = server.start_run_on(&dataset, steps, &settings);
    let ended = server.wait(&whole, "succeeded", |run| run["state"] == "succeeded");
    let (expected, expected_losses) = (server.result(&ended), server.losses(&whole));

    let run = server.start_run_on(&dataset, steps, &settings);
    let base = Arc::new(Mutex::new(server.base.clone()));
    let listener = {
        let (base, run) = (base.clone(), run.clone());
        std::thread::spawn(move || listen(&base, &run))
    };
    let mut random = Random(seed);
    let mut server = Some(server);
    let mut done = 0;
    while done < kills {
        std::thread::sleep(Duration::from_millis(100 + random.below(900)));
        let alive = server.take().expect("a server");
        let state = alive.get(&format!("/v1/runs/{run}"))["state"].clone();
        if state == "succeeded" || state == "failed" {
            server = Some(alive);
            break;
        }
        let (kills_server, kills_worker) = (random.below(3) == 0, random.below(3) != 0);
        if kills_worker && try_to_kill_worker(&run) {
            done += 1;
        }
        server = Some(if kills_server {
            done += 1;
            alive.kill();
            let next = start();
            next.base.clone_into(&mut base.lock().expect("no panic"));
            next
        } else {
            alive
        });
    }
    assert!(
        2 * done >= kills,
        "only {done} of {kills} kills: the run is too short"
    );
    let server = server.expect("a server");
    let end = server.wait(&run, "at its end", |run| {
        run["state"] == "succeeded" || run["state"] == "failed"
    });
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(server.losses(&run), expected_losses);
    assert_eq!(server.result(&end), expected, "another file");
    check(&listener.join().expect("a listener"), steps);
    judged(&server, &end);
    assert!(!try_to_kill_worker(&run));
}

/// Every file has its validation loss, one of them is the best, and the run has a verdict.
#[cfg(unix)]
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
#[cfg(unix)]
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

/// Follows a run to its end, through any number of servers.
#[cfg(unix)]
fn listen(base: &Mutex<String>, run: &str) -> Heard {
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
        for line in BufReader::new(answer.into_body().into_reader()).lines() {
            let Ok(line) = line else { break };
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

/// A small generator: the same kills for the same seed.
#[cfg(unix)]
struct Random(u64);

#[cfg(unix)]
impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        // The constants of Knuth's MMIX.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
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
