//! The queue: keys take turns, devices have their places, a key's answers are its own; and what a poller gets.

use std::time::{Duration, Instant};

use lorasmith::access::Scope;
use serde_json::{Value, json};

use crate::auth::make_key;
use crate::runs::{dataset, settings, short, start, wait};
use crate::support::{Answer, Service};

/// A service that trains one run at a time, and keys: one that makes the data, and so many others.
struct Shared {
    service: Service,
    keys: Vec<Value>,
}

impl Shared {
    fn start(keys: usize) -> Self {
        let mut made = Vec::new();
        let service = Service::start_with(|config| {
            settings(config);
            made = (0..keys).map(|_| make_key(config, Scope::Write)).collect();
        });
        Self {
            service,
            keys: made,
        }
    }

    /// A request of a key.
    fn send(
        &self,
        key: usize,
        method: &str,
        path: &str,
        more: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let bearer = format!("Bearer {}", self.keys[key]["key"].as_str().expect("a key"));
        let headers = [&[("authorization", bearer.as_str())], more].concat();
        self.service.send(method, path, &headers, body)
    }

    fn get(&self, path: &str) -> Value {
        self.send(0, "GET", path, &[], b"").expect(200)
    }

    fn post(&self, key: usize, path: &str, more: &[(&str, &str)], body: &Value) -> Answer {
        let headers = [&[("content-type", "application/json")], more].concat();
        self.send(key, "POST", path, &headers, body.to_string().as_bytes())
    }

    /// A dataset of one picture.
    fn dataset(&self) -> String {
        let made = self
            .post(0, "/v1/datasets", &[], &json!({"name": "a"}))
            .expect(201);
        let path = format!("/v1/datasets/{}", made["id"].as_str().expect("an id"));
        let mut form =
            b"--XYZ\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.png\"\r\n\r\n"
                .to_vec();
        form.extend(crate::support::png(1));
        form.extend(b"\r\n--XYZ--\r\n");
        let kind = [("content-type", "multipart/form-data; boundary=XYZ")];
        self.send(0, "POST", &format!("{path}/images"), &kind, &form)
            .expect(201);
        path
    }

    fn run(&self, key: usize, dataset: &str, more: &Value) -> String {
        let run = self
            .post(key, "/v1/runs", &[], &short(dataset, more))
            .expect(201);
        assert_eq!(run["api_key_id"], self.keys[key]["id"], "{run}");
        format!("/v1/runs/{}", run["id"].as_str().expect("an id"))
    }

    fn wait(&self, run: &str, state: &str) -> Value {
        let began = Instant::now();
        loop {
            let found = self.get(run);
            if found["state"] == state {
                return found;
            }
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "not {state}: {found}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn keys_take_turns() {
    let shared = Shared::start(3);
    let dataset = shared.dataset();
    let run = |key, more: Value| shared.run(key, &dataset, &more);
    let first = run(0, json!({"max_train_steps": 1_000_000}));
    shared.wait(&first, "running");
    // One key fills the queue before the others come.
    let [a1, a2, a3] = [(); 3].map(|()| run(0, json!({})));
    let [b1, b2] = [(); 2].map(|()| run(1, json!({})));
    let c1 = run(2, json!({}));
    let urgent = run(0, json!({"priority": 1}));
    // The first key has had its turn, and the urgent run is another one; then it goes round.
    let order = [&urgent, &b1, &c1, &a1, &b2, &a2, &a3];
    for (run, position) in order.into_iter().zip(1..) {
        assert_eq!(shared.get(run)["queue_position"], position);
    }
    // What is held back is passed by, and is released to where it belongs.
    let act = |run: &str, action: &str| {
        let path = format!("{run}/{action}");
        shared.post(0, &path, &[], &json!({})).expect(200)
    };
    assert_eq!(act(&b1, "pause")["state"], "paused");
    assert_eq!(shared.get(&b2)["queue_position"], 2);
    assert_eq!(act(&b1, "resume")["queue_position"], 2);
    act(&first, "cancel");
    let begun = order.map(|run| {
        let run = shared.wait(run, "succeeded");
        run["started_at"].as_str().expect("a time").to_owned()
    });
    assert!(begun.is_sorted(), "{begun:?}");
}

#[test]
fn a_device_has_as_many_places_as_are_configured() {
    let service = Service::start_with(|config| {
        settings(config);
        config.max_concurrent_runs = 16;
        config.max_runs_per_device = 2;
    });
    let dataset = dataset(&service);
    let long = json!({"max_train_steps": 1_000_000});
    let runs = [(); 3].map(|()| start(&service, &dataset, &long));
    wait(&service, &runs[0], "running");
    wait(&service, &runs[1], "running");
    // `auto` is a device that has its name from the machine.
    let last = service.get(&runs[2]).expect(200);
    assert_eq!(
        (&last["state"], &last["queue_position"]),
        (&json!("queued"), &json!(1))
    );
    service
        .post(&format!("{}/cancel", runs[0]), &json!({}))
        .expect(200);
    wait(&service, &runs[2], "running");
    for run in &runs[1..] {
        service
            .post(&format!("{run}/cancel"), &json!({}))
            .expect(200);
        wait(&service, run, "cancelled");
    }
}

#[test]
fn an_idempotency_key_belongs_to_an_api_key() {
    let shared = Shared::start(2);
    let header = [("idempotency-key", "the same")];
    let make = |key, name: &str| shared.post(key, "/v1/datasets", &header, &json!({"name": name}));
    let first = make(0, "mine");
    let again = make(0, "mine");
    assert_eq!(first.expect(201), again.expect(201));
    assert_eq!(again.header("idempotency-replayed"), "true");
    // Another key neither gets at that answer nor learns that there is one.
    let theirs = make(1, "theirs");
    assert_eq!(theirs.expect(201)["name"], "theirs");
    assert_eq!(theirs.header("idempotency-replayed"), "");
    make(0, "another").problem(422, "idempotency_key_reused");
}

#[test]
fn who_polls_a_run_is_told_that_nothing_is_new() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let run = start(&service, &dataset, &json!({}));
    wait(&service, &run, "succeeded");
    let found = service.get(&run);
    let tag = found.header("etag").to_owned();
    assert!(tag.starts_with('"') && tag.len() > 20, "{tag}");
    for known in [tag.clone(), format!("\"x\", W/{tag}"), "*".to_owned()] {
        let answer = service.send("GET", &run, &[("if-none-match", &known)], b"");
        assert_eq!((answer.status, answer.bytes.len()), (304, 0), "{known}");
        assert_eq!(answer.header("etag"), tag);
    }
    let other = start(&service, &dataset, &json!({"priority": 1}));
    let answer = service.send("GET", &other, &[("if-none-match", &tag)], b"");
    assert_eq!(answer.expect(200)["priority"], Value::Null);
    wait(&service, &other, "succeeded");
}
