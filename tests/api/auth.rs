//! Keys, scopes, and from where a service without keys may be called.

use std::path::Path;

use lorasmith::access::Scope;
use lorasmith::app;
use lorasmith::cli::{JsonArgs, KeysArgs, KeysCommand};
use lorasmith::config::Config;
use lorasmith::key_commands;
use serde_json::{Value, json};

use crate::support::{Answer, Service, config_in};

const NOBODY: &str = "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11";
/// What is answered without a key.
const OPEN: [&str; 2] = ["/livez", "/readyz"];

fn keys(config: &Config, command: KeysCommand) -> String {
    let args = KeysArgs {
        command,
        data_dir: None,
    };
    key_commands::run(&args, config.clone()).expect("a working command")
}

pub fn make_key(config: &Config, scope: Scope) -> Value {
    let made = keys(
        config,
        KeysCommand::Create {
            name: scope.to_string(),
            scopes: vec![scope],
            json: true,
        },
    );
    serde_json::from_str(&made).expect("JSON")
}

/// A service with a key of each scope, and the keys.
fn with_keys() -> (Service, [Value; 3]) {
    let mut made = [Value::Null, Value::Null, Value::Null];
    let service = Service::start_with(|config| {
        for (scope, slot) in Scope::ALL.into_iter().zip(&mut made) {
            *slot = make_key(config, scope);
        }
    });
    (service, made)
}

pub fn ask(service: &Service, method: &str, path: &str, key: Option<&Value>) -> Answer {
    let bearer = key.map(|key| format!("Bearer {}", key["key"].as_str().expect("a key")));
    let mut headers = vec![("content-type", "application/json")];
    headers.extend(bearer.as_deref().map(|value| ("authorization", value)));
    service.send(method, path, &headers, b"")
}

/// Every method and path of the document, with ids of nothing.
fn operations() -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.json");
    let text = std::fs::read_to_string(path).expect("a document");
    let document: Value = serde_json::from_str(&text).expect("JSON");
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        let parts: Vec<&str> = path
            .split('/')
            .map(|part| if part.starts_with('{') { NOBODY } else { part })
            .collect();
        for method in item.as_object().expect("an item").keys() {
            found.push((method.to_uppercase(), parts.join("/")));
        }
    }
    assert!(found.len() > 20, "{found:?}");
    found
}

#[test]
fn every_route_but_health_wants_a_key() {
    let (service, [read, write, admin]) = with_keys();
    for (method, path) in operations() {
        let place = format!("{method} {path}");
        let refused = ask(&service, &method, &path, None);
        if OPEN.contains(&path.as_str()) {
            assert_eq!(refused.status, 200, "{place}");
            continue;
        }
        assert_eq!(refused.status, 401, "{place}");
        assert_eq!(
            refused.header("www-authenticate"),
            "Bearer realm=\"lorasmith\"",
            "{place}"
        );
        if method != "HEAD" {
            refused.problem(401, "unauthorized");
        }
        let hooks = path.starts_with("/v1/webhooks");
        let looks = method == "GET" || method == "HEAD" || path == "/v1/runs:plan";
        let refuses = |key: &Value, needed: &str| {
            let answer = ask(&service, &method, &path, Some(key));
            assert_eq!(answer.status, 403, "{place}");
            let challenge = answer.header("www-authenticate").to_owned();
            assert!(
                challenge.contains(&format!("scope=\"{needed}\"")),
                "{place}: {challenge}"
            );
            if method != "HEAD" {
                let detail = answer.problem(403, "missing_scope")["detail"].clone();
                let detail = detail.as_str().expect("words");
                assert!(detail.contains(needed), "{place}: {detail}");
            }
        };
        let admits = |key: &Value| {
            let answer = ask(&service, &method, &path, Some(key));
            assert!(
                !matches!(answer.status, 401 | 403 | 500..),
                "{place}: {answer:?}"
            );
        };
        if hooks {
            refuses(&read, "admin");
            refuses(&write, "admin");
        } else if looks {
            admits(&read);
        } else {
            refuses(&read, "write");
            admits(&write);
        }
        admits(&admin);
    }
    // What is not there is not told either.
    ask(&service, "GET", "/v1/nothing", None).problem(401, "unauthorized");
    ask(&service, "GET", "/v1/nothing", Some(&read)).problem(404, "not_found");
    // Another spelling of a path is no way around its scope.
    let hidden = ask(&service, "GET", "/v1/%77ebhooks", Some(&read));
    assert_ne!(hidden.status, 200, "{hidden:?}");
    for page in ["/docs/", "/openapi.json", "/openapi-3.0.json"] {
        assert_eq!(ask(&service, "GET", page, None).status, 200, "{page}");
    }
}

#[test]
fn a_wrong_key_is_told_from_a_missing_one() {
    let (service, [read, ..]) = with_keys();
    let key = read["key"].as_str().expect("a key");
    let send = |header: &str| {
        let headers = [("authorization", header)];
        service.send("GET", "/v1/runs", &headers, b"")
    };
    assert_eq!(send(&format!("Bearer {key}")).status, 200);
    assert_eq!(send(&format!("bearer {key}")).status, 200);
    for wrong in [
        format!("Bearer {}", &key[..key.len() - 1]),
        format!("Bearer {}", key.to_uppercase()),
        "Bearer x".to_owned(),
    ] {
        let answer = send(&wrong);
        answer.problem(401, "unauthorized");
        assert!(answer.header("www-authenticate").contains("invalid_token"));
    }
    for other in [format!("Basic {key}"), key.to_owned(), "Bearer".to_owned()] {
        send(&other).problem(401, "unauthorized");
    }
}

#[test]
fn a_key_is_listed_without_itself_and_revoked_while_the_service_runs() {
    let mut settings = None;
    let mut key = Value::Null;
    let service = Service::start_with(|config| {
        key = make_key(config, Scope::Read);
        settings = Some(config.clone());
    });
    let settings = settings.expect("settings");
    assert_eq!(ask(&service, "GET", "/v1/runs", Some(&key)).status, 200);
    let list = || -> Value {
        let listed = keys(&settings, KeysCommand::List(JsonArgs { json: true }));
        assert!(!listed.contains(key["key"].as_str().expect("a key")));
        serde_json::from_str(&listed).expect("JSON")
    };
    let listed = list();
    assert_eq!(
        (&listed[0]["scopes"], &listed[0]["revoked_at"]),
        (&json!(["read"]), &Value::Null)
    );
    assert!(listed[0]["last_used_at"].is_string(), "{listed}");
    // A key that is made now opens at once.
    let later = make_key(&settings, Scope::Write);
    assert_eq!(ask(&service, "GET", "/v1/runs", Some(&later)).status, 200);

    let id = key["id"].as_str().expect("an id").parse().expect("an id");
    keys(&settings, KeysCommand::Revoke { id });
    std::thread::sleep(std::time::Duration::from_millis(1100));
    ask(&service, "GET", "/v1/runs", Some(&key)).problem(401, "unauthorized");
    assert!(list()[0]["revoked_at"].is_string());
}

#[test]
fn an_address_that_others_can_reach_needs_a_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = Config {
        bind: "0.0.0.0:0".parse().expect("an address"),
        ..config_in(folder.path())
    };
    let refused = app::Service::start_in_background(open.clone())
        .err()
        .expect("no start without a key");
    assert!(
        refused.to_string().contains("lorasmith keys create"),
        "{refused}"
    );
    make_key(&open, Scope::Read);
    let started = app::Service::start_in_background(open).expect("with a key it starts");
    started.stop().expect("stopped");
}

#[test]
fn without_keys_only_this_machine_is_answered() {
    let service = Service::start_with(|config| {
        config.allowed_hosts = vec!["trainer.lan".to_owned()];
    });
    let from = |headers: &[(&str, &str)]| {
        let mut headers = headers.to_vec();
        headers.push(("content-type", "application/json"));
        service.send("POST", "/v1/datasets", &headers, b"{\"name\": \"a\"}")
    };
    assert_eq!(from(&[]).status, 201);
    assert_eq!(from(&[("host", "localhost:1")]).status, 201);
    assert_eq!(from(&[("host", "trainer.lan")]).status, 201);
    from(&[("host", "evil.example")]).problem(403, "host_refused");
    from(&[("origin", "https://evil.example")]).problem(403, "origin_refused");
    from(&[("host", "localhost:1"), ("origin", "http://localhost:1")]).expect(201);
    // A probe calls by address, whatever the name.
    let probe = service.send("GET", "/livez", &[("host", "pod-1")], b"");
    assert_eq!(probe.status, 200);
}
