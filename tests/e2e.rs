//! The program as a whole, as a newcomer meets it: the demo, and what is left after processes are killed.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
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
        let mut process = Command::new(env!("CARGO_BIN_EXE_lorasmith"))
            .args(["serve", "--bind", "127.0.0.1:0", "--device", "cpu"])
            .arg("--data-dir")
            .arg(data)
            .arg("--models-dir")
            .arg(root().join("examples/demo"))
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

    /// A dataset of three pictures and a run on it.
    fn start_run(&self, steps: u64) -> String {
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
        let run = self.post(
            "/v1/runs",
            &json!({
                "name": "crash", "dataset_id": id, "base_model": "base", "max_train_steps": steps,
                "network": {"rank": 4, "alpha": 4.0}, "resolution": {"width_px": 64, "height_px": 64},
                "buckets": {"enabled": false, "min_px": 32, "max_px": 128, "step_px": 16},
            }),
        );
        run["id"].as_str().expect("an id").to_owned()
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

#[test]
fn a_killed_worker_is_started_once_more_and_then_given_up() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Server::start(folder.path());
    let run = server.start_run(100_000);
    server.wait(&run, "in mid-run", in_mid_run);
    kill_worker(&run);
    let again = server.wait(&run, "begun again", |run| {
        run["attempt"] == 2 && in_mid_run(run)
    });
    assert_eq!(again["error"], Value::Null);
    kill_worker(&run);
    let end = server.wait(&run, "failed", |run| run["state"] == "failed");
    assert_eq!(end["error"]["code"], "worker_lost", "{end}");
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
