//! `/v1/devices`.

use serde_json::{Value, json};

use crate::support::Service;

#[test]
fn devices_tell_what_is_remembered_of_them() {
    let service = Service::start();
    let devices = service.get("/v1/devices").expect(200);
    let devices = devices["data"].as_array().expect("devices");
    assert!(devices.iter().any(|device| device["id"] == "cpu"));
    // The data folder is empty, and a GET checks nothing.
    let unknown: Value = json!({"status": "not_run", "checked_at": null, "failed_checks": []});
    for device in devices {
        assert_eq!(device["self_check"], unknown, "{device}");
    }
}
