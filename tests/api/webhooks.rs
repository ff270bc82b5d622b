//! `/v1/webhooks`: a receiver that checks signatures, goes away and comes back, and hears everything in its order.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lorasmith::config::Config;
use serde_json::{Value, json};
use ureq::http::{HeaderMap, HeaderName, HeaderValue};

use crate::support::{Service, png};

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
struct Message {
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Message {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    /// By the reference implementation of Standard Webhooks.
    fn is_signed_with(&self, secret: &str) -> bool {
        let webhook = standardwebhooks::Webhook::new(secret).expect("a secret");
        webhook.verify(&self.body, &self.headers).is_ok()
    }
}

/// An HTTP server that answers what it is told to answer and keeps what it hears.
struct Receiver {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<Message>>>,
    status: Arc<Mutex<u16>>,
    open: Arc<Mutex<bool>>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    fn at(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let (heard, status) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(200)));
        let open = Arc::new(Mutex::new(true));
        let shared = (heard.clone(), status.clone(), open.clone());
        let thread = std::thread::spawn(move || {
            let (heard, status, open) = shared;
            for stream in listener.incoming() {
                if !*open.lock().expect("unpoisoned") {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let status = *status.lock().expect("unpoisoned");
                if let Some(message) = answer(stream, status)
                    && status < 500
                {
                    heard.lock().expect("unpoisoned").push(message);
                }
            }
        });
        Self {
            address,
            heard,
            status,
            open,
            thread: Some(thread),
        }
    }

    fn anywhere() -> Self {
        Self::at("127.0.0.1:0".parse().expect("an address"))
    }

    fn answers(&self, status: u16) {
        *self.status.lock().expect("unpoisoned") = status;
    }

    fn heard(&self) -> Vec<Message> {
        self.heard.lock().expect("unpoisoned").clone()
    }

    fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        *self.open.lock().expect("unpoisoned") = false;
        let _ = TcpStream::connect(self.address); // wakes it
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a receiver without panics");
        }
    }
}

fn answer(stream: TcpStream, status: u16) -> Option<Message> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut headers = HeaderMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else {
            break;
        };
        let name: HeaderName = name.parse().ok()?;
        headers.insert(name, HeaderValue::from_str(value.trim()).ok()?);
    }
    let length = headers.get("content-length")?.to_str().ok()?;
    let mut body = vec![0; length.parse().ok()?];
    reader.read_exact(&mut body).ok()?;
    let mut stream = stream;
    let location = "http://127.0.0.1:1/elsewhere";
    let head = format!(
        "HTTP/1.1 {status} x\r\nlocation: {location}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).ok()?;
    Some(Message { headers, body })
}

fn settings(config: &mut Config) {
    config.webhook_allowed_networks = vec!["127.0.0.0/8".parse().expect("a network")];
    config.webhook_retry_s = 0.05;
    config.models_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15");
    config.device = "cpu".to_owned();
}

fn make(service: &Service, url: &str, events: &[&str]) -> (String, String) {
    let body = json!({"url": url, "events": events});
    let made = service.post("/v1/webhooks", &body);
    let secret = made.expect(201)["secret"]
        .as_str()
        .expect("a secret")
        .to_owned();
    (made.header("location").to_owned(), secret)
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "not {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Makes a run and ends it.
fn short_run(service: &Service, dataset: &str) -> String {
    let id = dataset.rsplit('/').next().expect("an id");
    let run = service.post(
        "/v1/runs",
        &json!({"name": "a", "dataset_id": id, "base_model": "diffusers", "max_train_steps": 100}),
    );
    let run = run.expect(201)["id"].as_str().expect("an id").to_owned();
    service
        .post(&format!("/v1/runs/{run}/cancel"), &json!({}))
        .expect(200);
    run
}

/// What the run itself tells of its story, once it has ended.
fn story(service: &Service, run: &str) -> Vec<Value> {
    let events = || {
        let accept = [("accept", "application/json")];
        let path = format!("/v1/runs/{run}/events?wait=1");
        service.send("GET", &path, &accept, b"").expect(200)
    };
    wait("ended", || events()["next_after"].is_null());
    events()["data"].as_array().expect("events").clone()
}

#[test]
fn a_receiver_that_was_away_hears_everything_in_order() {
    let address = Receiver::anywhere().address; // closed again: nobody listens there
    let service = Service::start_with(settings);
    let (hook, secret) = make(&service, &format!("http://{address}/hook"), &["*"]);
    let dataset = service.dataset("a");
    service
        .upload(&format!("{dataset}/images"), &[], &[("a.png", &png(1))])
        .expect(201);
    let mut runs: Vec<String> = (0..3).map(|_| short_run(&service, &dataset)).collect();
    let failed = || {
        let log = service.get(&format!("{hook}/deliveries?state=pending"));
        let log = log.expect(200);
        let mut rows = log["data"].as_array().expect("a list").iter();
        rows.any(|row| row["attempts"].as_u64() > Some(0) && row["last_error"].is_string())
    };
    wait("tried", failed);

    // Neither a restart nor an hour of 503 loses a message.
    let service = service.restart_with(settings);
    let receiver = Receiver::at(address);
    receiver.answers(503);
    runs.push(short_run(&service, &dataset));
    let stories: HashMap<String, Vec<Value>> = runs
        .iter()
        .map(|run| (run.clone(), story(&service, run)))
        .collect();
    receiver.answers(200);
    let expected: usize = stories.values().map(Vec::len).sum();
    assert!(expected >= 8, "{stories:?}");
    wait("heard", || receiver.heard().len() >= expected);

    let mut told: HashMap<String, Vec<Value>> = HashMap::new();
    for message in receiver.heard() {
        assert!(message.is_signed_with(&secret));
        assert!(!message.is_signed_with("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"));
        let body = message.json();
        let run = body["data"]["run_id"].as_str().expect("a run").to_owned();
        let list = told.entry(run).or_default();
        // A message that was answered just as the service ended comes twice.
        if list.last().map(|last: &Value| &last["data"]["id"]) != Some(&body["data"]["id"]) {
            list.push(body);
        }
    }
    for (run, story) in stories {
        let told = &told[&run];
        let ids = |list: &[Value], pointer: &str| -> Vec<Value> {
            list.iter()
                .map(|value| value.pointer(pointer).expect("there").clone())
                .collect()
        };
        assert_eq!(ids(told, "/data/id"), ids(&story, "/id"), "{run}");
        assert_eq!(ids(told, "/data/data"), ids(&story, "/data"), "{run}");
        assert_eq!(told.first().expect("one")["type"], "run.queued");
        assert_eq!(told.last().expect("one")["type"], "run.cancelled");
    }
    let left = || {
        service
            .get(&format!("{hook}/deliveries?state=pending"))
            .expect(200)
    };
    wait("done", || {
        left()["data"].as_array().is_some_and(Vec::is_empty)
    });
}

#[test]
fn a_secret_is_rotated_with_an_overlap() {
    let service = Service::start_with(settings);
    let receiver = Receiver::anywhere();
    let (hook, old) = make(&service, &receiver.url(), &["run.succeeded"]);
    let ping = |count: usize| {
        service
            .post(&format!("{hook}/ping"), &json!({}))
            .expect(202);
        wait("pinged", || receiver.heard().len() == count);
        receiver.heard()[count - 1].clone()
    };
    let first = ping(1);
    assert_eq!(first.json()["type"], "ping");
    assert!(first.is_signed_with(&old));

    let rotated = service.post(&format!("{hook}/rotate"), &json!({"overlap_s": 60}));
    let new = rotated.expect(200)["secret"]
        .as_str()
        .expect("a secret")
        .to_owned();
    let second = ping(2);
    assert!(second.is_signed_with(&old) && second.is_signed_with(&new));
    let shown = service.get(&hook).expect(200);
    assert!(shown["previous_secret_until"].is_string(), "{shown}");
    assert!(!shown.to_string().contains("whsec_"), "{shown}");

    let rotated = service.post(&format!("{hook}/rotate"), &json!({"overlap_s": 0}));
    let newest = rotated.expect(200)["secret"]
        .as_str()
        .expect("a secret")
        .to_owned();
    let third = ping(3);
    assert!(third.is_signed_with(&newest) && !third.is_signed_with(&new));
    let wrong = service.post(&format!("{hook}/rotate"), &json!({"overlap_s": 1_000_000}));
    wrong.problem(422, "invalid_webhook");
}

#[test]
fn a_receiver_that_is_gone_is_not_asked_again_and_redirects_are_not_followed() {
    let service = Service::start_with(settings);
    let receiver = Receiver::anywhere();
    let (hook, _) = make(&service, &receiver.url(), &["*"]);
    let log = || service.get(&format!("{hook}/deliveries")).expect(200);
    receiver.answers(307);
    let ping = || {
        service
            .post(&format!("{hook}/ping"), &json!({}))
            .expect(202)
    };
    ping();
    wait("refused", || log()["data"][0]["last_status"] == 307);
    receiver.answers(410);
    wait("stopped", || log()["data"][0]["state"] == "failed");
    let shown = service.get(&hook);
    assert_eq!(shown.expect(200)["enabled"], false);
    assert!(shown.json()["disabled_reason"].is_string());

    receiver.answers(200);
    let count = receiver.heard().len();
    ping();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(
        receiver.heard().len(),
        count,
        "a stopped webhook was called"
    );
    let tag = shown.header("etag");
    service
        .patch(&hook, Some(tag), &json!({"enabled": true}))
        .expect(200);
    wait("sent", || receiver.heard().len() > count);
    service
        .patch(&hook, Some(tag), &json!({"enabled": false}))
        .problem(412, "precondition_failed");
    assert_eq!(service.delete(&hook).status, 204);
    service.get(&hook).problem(404, "webhook_not_found");
}

#[test]
fn what_may_not_be_called_is_refused() {
    let service = Service::start();
    let refused = |body: Value, pointer: &str| {
        let problem = service
            .post("/v1/webhooks", &body)
            .problem(422, "invalid_webhook");
        let errors = problem["errors"].as_array().expect("errors");
        assert!(
            errors.iter().any(|error| error["pointer"] == pointer),
            "{problem}"
        );
    };
    for url in [
        "https://127.0.0.1/",
        "https://localhost/",
        "https://[::ffff:169.254.169.254]/",
        "http://1.1.1.1/",
        "https://a@1.1.1.1/",
        "gopher://1.1.1.1/",
        "",
    ] {
        refused(json!({"url": url, "events": ["*"]}), "/url");
    }
    refused(json!({"url": "https://1.1.1.1/", "events": []}), "/events");
    refused(
        json!({"url": "https://1.1.1.1/", "events": ["*", "run.succeded"]}),
        "/events/1",
    );
    // The guard stands at the connection too: a network that was allowed once is not called when it no longer is.
    let (service, receiver) = (Service::start_with(settings), Receiver::anywhere());
    let (hook, _) = make(&service, &receiver.url(), &["*"]);
    let service = service.restart_with(|_| {});
    service
        .post(&format!("{hook}/ping"), &json!({}))
        .expect(202);
    let log = || service.get(&format!("{hook}/deliveries")).expect(200);
    wait("refused", || log()["data"][0]["last_error"].is_string());
    assert!(receiver.heard().is_empty());
}
