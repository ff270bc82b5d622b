//! Rates, concurrency, cross-origin requests and request ids.

use lorasmith::config::Config;
use serde_json::json;

use crate::support::{Answer, Service};

#[test]
fn who_asks_too_often_is_told_when_to_come_back() {
    let service = Service::start_with(|config: &mut Config| {
        config.rate_limit_per_s = 1;
        config.rate_limit_burst = 3;
    });
    let answers: Vec<Answer> = (0..8).map(|_| service.get("/v1/runs")).collect();
    assert!(answers[..3].iter().all(|answer| answer.status == 200));
    let refused = answers.last().expect("an answer");
    refused.problem(429, "too_many_requests");
    let wait: u64 = refused.header("retry-after").parse().expect("seconds");
    assert!((1..=8).contains(&wait), "{wait}");
    assert_eq!(service.get("/livez").status, 200);
}

#[test]
fn unknown_keys_cannot_be_tried_for_long() {
    let service = Service::start_with(|config| config.api_key = Some("secret".to_owned()));
    let key = format!("Bearer lorasmith_{}", "0".repeat(72));
    let answers: Vec<_> = (0..80)
        .map(|_| service.send("GET", "/v1/runs", &[("authorization", &key)], b""))
        .collect();
    answers[79].problem(429, "too_many_requests");
    let right = [("authorization", "Bearer secret")];
    assert_eq!(service.send("GET", "/v1/runs", &right, b"").status, 200);
}

#[test]
fn every_answer_has_its_own_id() {
    let service = Service::start();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let ids: Vec<String> = ["/livez", "/v1/runs", "/v1/nothing", "/docs/"]
        .into_iter()
        .map(|path| {
            let answer = service.send("GET", path, &[("traceparent", trace)], b"");
            answer.header("x-request-id").to_owned()
        })
        .collect();
    assert!(ids.iter().all(|id| id.len() == 36), "{ids:?}");
    assert_ne!(ids[0], ids[1]);
}

#[test]
fn only_named_pages_may_read_answers() {
    let page = "https://studio.example";
    let service = Service::start_with(|config| {
        config.cors_origins = vec![page.to_owned()];
        config.api_key = Some("secret".to_owned());
    });
    let preflight = |origin: &str| {
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            (
                "access-control-request-headers",
                "authorization,content-type",
            ),
        ];
        service.send("OPTIONS", "/v1/runs", &headers, b"")
    };
    let allowed = preflight(page);
    assert_eq!(allowed.status, 200);
    assert_eq!(allowed.header("access-control-allow-origin"), page);
    assert!(
        allowed
            .header("access-control-allow-methods")
            .contains("POST")
    );
    assert!(!allowed.header("x-request-id").is_empty());
    let other = preflight("https://evil.example");
    assert_eq!(other.header("access-control-allow-origin"), "");

    let headers = [("origin", page), ("authorization", "Bearer secret")];
    let read = service.send("GET", "/v1/runs", &headers, b"");
    assert_eq!(read.status, 200);
    assert_eq!(read.header("access-control-allow-origin"), page);
    assert!(
        read.header("access-control-expose-headers")
            .contains("x-request-id")
    );
    // What is refused can be read as well.
    let refused = service.send("GET", "/v1/runs", &[("origin", page)], b"");
    refused.problem(401, "unauthorized");
    assert_eq!(refused.header("access-control-allow-origin"), page);
}

#[test]
fn a_page_may_call_a_service_without_keys_when_it_is_named() {
    let page = "http://localhost:3000";
    let post = |service: &Service| {
        let headers = [("origin", page)];
        service.post_with("/v1/datasets", &headers, &json!({"name": "a"}))
    };
    let open = Service::start_with(|config| config.cors_origins = vec![page.to_owned()]);
    post(&open).expect(201);
    post(&Service::start()).problem(403, "origin_refused");
}
