//! `/v1/devices` and `/metrics`.

use serde_json::{Value, json};

use crate::support::Service;

#[test]
fn devices_tell_what_is_remembered_of_them() {
    let service = Service::start();
    let devices = service.get("/v1/devices").expect(200);
    let devices = devices["data"].as_array().expect("devices");
    assert!(devices.iter().any(|device| device["id"] == "cpu"));
    assert!(devices.iter().all(|device| device["compiler"].is_string()));
    // The data folder is empty, and a GET checks nothing.
    let unknown: Value = json!({"status": "not_run", "checked_at": null, "failed_checks": []});
    for device in devices {
        assert_eq!(device["self_check"], unknown, "{device}");
    }
}

#[test]
fn a_build_tells_what_it_holds() {
    let service = Service::start();
    let answer = service.get("/v1/devices").expect(200);
    let backends = answer["backends"].as_array().expect("backends");
    let reaches = |name: &str, code: Option<&str>, device: &str| {
        backends.iter().any(|backend| {
            backend["name"] == name
                && code.is_none_or(|code| backend["code"] == code)
                && backend["reaches"]
                    .as_array()
                    .is_some_and(|all| all.contains(&json!(device)))
        })
    };
    assert!(reaches("flex", None, "cpu"), "{answer}");
    if cfg!(target_os = "linux") {
        assert!(reaches("wgpu", Some("wgsl"), "vulkan"), "{answer}");
        let native = cfg!(feature = "vulkan");
        assert_eq!(reaches("wgpu", Some("spirv"), "vulkan"), native, "{answer}");
    }
    assert_eq!(
        reaches("cuda", None, "cuda"),
        cfg!(feature = "cuda"),
        "{answer}"
    );
    assert_eq!(
        reaches("rocm", None, "rocm"),
        cfg!(feature = "rocm"),
        "{answer}"
    );
}

#[test]
fn metrics_count_requests_and_runs() {
    let service = Service::start();
    service.get("/v1/runs").expect(200);
    service.get("/v1/runs/019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11");
    service.get("/nothing/at/all");
    let answer = service.get("/metrics");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "text/plain; version=0.0.4");
    let text = String::from_utf8(answer.bytes).expect("UTF-8");
    for line in [
        "lorasmith_http_requests_total{method=\"GET\",route=\"/v1/runs\",status=\"200\"} 1",
        "lorasmith_http_requests_total{method=\"GET\",route=\"/v1/runs/{run_id}\",status=\"404\"} 1",
        "lorasmith_http_requests_total{method=\"GET\",route=\"none\",status=\"404\"} 1",
        "lorasmith_http_request_duration_seconds_count{method=\"GET\",route=\"/v1/runs\"} 1",
        "lorasmith_runs{state=\"running\"} 0",
        "lorasmith_queue_length 0",
        "lorasmith_webhook_deliveries{state=\"pending\"} 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(text.contains("process_resident_memory_bytes "), "{text}");
}
