//! The program as a server, and what tests do to it.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ureq::http::Request;

/// The program.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lorasmith");
/// Long enough for a slow machine; a run of these tests takes seconds.
pub const PATIENCE: Duration = Duration::from_secs(180);

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Base models that take milliseconds for a step.
pub fn tiny_models() -> std::path::PathBuf {
    root().join("tests/fixtures/tiny-sd15")
}

/// `lorasmith serve` on a free port.
pub struct Server {
    pub process: Child,
    pub base: String,
    /// What requests are made with.
    pub key: Option<String>,
}

impl Server {
    pub fn start(data: &Path) -> Self {
        Self::start_with(data, &root().join("examples/demo"))
    }

    /// With base models of another folder.
    pub fn start_with(data: &Path, models: &Path) -> Self {
        Self::run(Command::new(PROGRAM), data, models)
    }

    /// By a command to which the arguments of the program are added.
    pub fn run(mut command: Command, data: &Path, models: &Path) -> Self {
        let mut process = command
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
        let key = None;
        Self { process, base, key }
    }

    /// Any request; the status and JSON of the answer.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("accept", "application/json")
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = config.build().new_agent();
        let mut answer = agent
            .run(request.body(body).expect("a request"))
            .expect(path);
        let status = answer.status().as_u16();
        let json = answer.body_mut().read_json().unwrap_or(Value::Null);
        (status, json)
    }

    pub fn get(&self, path: &str) -> Value {
        let (status, json) = self.ask("GET", path, None);
        assert!(status < 300, "{path}: {json}");
        json
    }

    pub fn post(&self, path: &str, body: &Value) -> Value {
        let (status, json) = self.ask("POST", path, Some(body));
        assert!(status < 300, "{path}: {json}");
        json
    }

    /// A dataset of three pictures.
    pub fn make_dataset(&self) -> String {
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
        let mut upload = ureq::post(format!("{}/v1/datasets/{id}/images", self.base));
        if let Some(key) = &self.key {
            upload = upload.header("authorization", format!("Bearer {key}"));
        }
        upload
            .header("content-type", "multipart/form-data; boundary=x")
            .send(&body)
            .expect("an upload");
        id.to_owned()
    }

    /// A dataset of three pictures and a run on it.
    pub fn start_run(&self, steps: u64) -> String {
        let dataset = self.make_dataset();
        self.start_run_on(&dataset, steps, &json!({}))
    }

    /// A run with other settings than the rest.
    pub fn start_run_on(&self, dataset: &str, steps: u64, more: &Value) -> String {
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

    pub fn act(&self, run: &str, action: &str) -> Value {
        self.post(&format!("/v1/runs/{run}/{action}"), &json!({}))
    }

    /// Step and loss of the whole run.
    pub fn losses(&self, run: &str) -> Vec<(u64, f64)> {
        let series = self.get(&format!("/v1/runs/{run}/metrics"));
        let points = series["data"].as_array().expect("points");
        let losses = points.iter().filter_map(|point| {
            let loss = point["loss"].as_f64()?;
            Some((point["step"].as_u64()?, loss))
        });
        losses.collect()
    }

    /// SHA-256 of the result.
    pub fn result(&self, run: &Value) -> String {
        let id = run["lora_id"].as_str().expect("a LoRA");
        let lora = self.get(&format!("/v1/loras/{id}"));
        lora["sha256"].as_str().expect("a digest").to_owned()
    }

    /// A run when something has become true of it; there is patience as long as it moves.
    pub fn wait(&self, run: &str, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let mut moved = ([const { Value::Null }; 5], Instant::now());
        loop {
            let found = self.get(&format!("/v1/runs/{run}"));
            if done(&found) {
                return found;
            }
            let place = [
                "state",
                "attempt",
                "progress",
                "queue_position",
                "expected_start_at",
            ]
            .map(|field| found[field].clone());
            if place != moved.0 {
                moved = (place, Instant::now());
            }
            assert!(moved.1.elapsed() < PATIENCE, "not {what}: {found}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn kill(mut self) {
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

pub fn in_mid_run(run: &Value) -> bool {
    run["state"] == "running" && run["progress"]["step"].as_u64() >= Some(2)
}

/// The worker with a run's id in its command line.
pub fn kill_worker(run: &str) {
    let status = Command::new("pkill")
        .args(["-9", "-f", &format!("worker --run {run}")])
        .status();
    assert!(status.expect("pkill").success(), "there is no worker");
}

/// The process of a run's worker.
#[cfg(unix)]
pub fn worker_pid(run: &str) -> Option<i32> {
    let found = Command::new("pgrep")
        .args(["-f", &format!("worker --run {run}")])
        .output();
    let text = String::from_utf8(found.expect("pgrep").stdout).expect("numbers");
    text.lines().next()?.parse().ok()
}

/// Whether the run's worker was there to be killed.
pub fn try_to_kill_worker(run: &str) -> bool {
    let status = Command::new("pkill")
        .args(["-9", "-f", &format!("worker --run {run}")])
        .status();
    status.expect("pkill").success()
}

/// A small generator: the same kills for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        // The constants of Knuth's MMIX.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
