//! `/v1/runs`: planned, queued, trained by worker processes on a tiny model.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lorasmith::config::Config;
use serde_json::{Value, json};

use crate::support::{Service, png};

const PATIENCE: Duration = Duration::from_secs(60);

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15")
}

pub fn settings(config: &mut Config) {
    config.models_dir = fixtures();
    config.device = "cpu".to_owned();
    config.max_concurrent_runs = 1;
}

/// A dataset of two pictures.
pub fn dataset(service: &Service) -> String {
    let path = service.dataset("a");
    let files = [png(1), png(2)];
    let files = [("a.png", files[0].as_slice()), ("b.png", &files[1])];
    service
        .upload(&format!("{path}/images"), &[], &files)
        .expect(201);
    path
}

/// The settings of a short run.
pub fn short(dataset: &str, more: &Value) -> Value {
    let mut body = json!({
        "name": "a", "dataset_id": dataset.rsplit('/').next(), "base_model": "tiny-sd15-ldm", "max_train_steps": 1,
        "network": {"rank": 2}, "resolution": {"width_px": 64, "height_px": 64}, "buckets": {"enabled": false},
    });
    for (name, value) in more.as_object().expect("settings") {
        body[name] = value.clone();
    }
    body
}

pub fn start(service: &Service, dataset: &str, more: &Value) -> String {
    let run = service.post("/v1/runs", &short(dataset, more)).expect(201);
    format!("/v1/runs/{}", run["id"].as_str().expect("an id"))
}

pub fn wait(service: &Service, run: &str, state: &str) -> Value {
    let began = Instant::now();
    loop {
        let found = service.get(run).expect(200);
        if found["state"] == state {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "not {state}: {found}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_plan_tells_what_a_run_would_do() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let subsets = service.get(&format!("{dataset}/subsets")).expect(200);
    let subset = subsets["data"][0]["id"].as_str().expect("an id");
    let repeats = json!({"repeats": 3});
    service
        .patch(&format!("{dataset}/subsets/{subset}"), None, &repeats)
        .expect(200);
    let more = json!({
        "max_train_steps": null, "max_train_epochs": 5, "batch_size": 4, "gradient_accumulation_steps": 2,
    });
    let plan = |more: &Value| service.post("/v1/runs:plan", &short(&dataset, more));
    let planned = plan(&more).expect(200);
    // 2 images × 3 repeats in batches of 4 and 2; both make one step.
    for (field, value) in [
        ("images", 2),
        ("images_per_epoch", 6),
        ("batches_per_epoch", 2),
        ("steps_per_epoch", 1),
        ("epochs", 5),
        ("total_steps", 5),
    ] {
        assert_eq!(planned[field], value, "{field}: {planned}");
    }
    let bucket = json!([{
        "width_px": 64, "height_px": 64, "images": 2, "images_per_epoch": 6, "batches_per_epoch": 2,
    }]);
    assert_eq!(planned["buckets"], bucket);
    assert_eq!(planned["device"], "cpu");
    let memory = &planned["memory"];
    let peak = memory["estimated_peak_bytes"].as_u64().expect("a size");
    let saving = &memory["savings"][0];
    let left = saving["estimated_peak_bytes"].as_u64().expect("a size");
    assert_eq!(saving["saved_bytes"], peak - left, "{memory}");
    assert_eq!(
        (&planned["refusal"], &planned["duration"]),
        (&Value::Null, &Value::Null)
    );
    assert!(
        service.get("/v1/runs").expect(200)["data"] == json!([]),
        "nothing was started"
    );

    // What nobody has the memory for.
    let huge =
        plan(&json!({"batch_size": 1024, "resolution": {"width_px": 4096, "height_px": 4096}}));
    let huge = huge.expect(200);
    assert_eq!(huge["refusal"]["code"], "memory_budget", "{huge}");

    let problem = plan(&json!({"network": {"rank": 0}})).problem(422, "invalid_settings");
    assert_eq!(problem["errors"][0]["pointer"], "/network/rank");
    plan(&json!({"base_model": "absent"})).problem(404, "model_not_found");

    // A run tells its pace to later ones.
    let run = start(&service, &dataset, &json!({"max_train_steps": 3}));
    assert_eq!(
        wait(&service, &run, "succeeded")["progress"]["total_steps"],
        3
    );
    let duration = plan(&more).expect(200)["duration"].clone();
    assert_eq!(
        Some(run.as_str()),
        duration["run_id"]
            .as_str()
            .map(|id| format!("/v1/runs/{id}"))
            .as_deref()
    );
    let (all, one) = (&duration["expected_s"], &duration["step_time_s"]);
    let ratio = all.as_f64().expect("seconds") / one.as_f64().expect("seconds");
    assert!((ratio - 5.0).abs() < 1e-9, "{duration}");
}

#[test]
fn the_queue_goes_by_priority_and_age_and_past_what_fails() {
    let models = tempfile::tempdir().expect("a folder");
    for name in ["tiny-sd15-ldm", "gone"] {
        let file = fixtures().join("tiny-sd15-ldm.safetensors");
        let copy = models.path().join(format!("{name}.safetensors"));
        std::fs::copy(file, copy).expect("copied");
    }
    let service = Service::start_with(|config| {
        settings(config);
        config.models_dir = models.path().to_owned();
    });
    let dataset = dataset(&service);
    let first = start(&service, &dataset, &json!({"max_train_steps": 1_000_000}));
    let began = wait(&service, &first, "running");
    assert_eq!(began["queue_position"], Value::Null);
    let start = |more: Value| start(&service, &dataset, &more);
    let last = start(json!({"priority": -5}));
    let old = start(json!({"priority": 0}));
    let broken = start(json!({"priority": 5, "base_model": "gone"}));
    let young = start(json!({"priority": 0}));
    let order = [&broken, &old, &young, &last];
    let list = service.get("/v1/runs?state=queued").expect(200);
    for (run, position) in order.into_iter().zip(1..) {
        let found = service.get(run).expect(200);
        assert_eq!(found["queue_position"], position, "{found}");
        let listed = list["data"].as_array().expect("runs").iter();
        let listed = listed.filter(|listed| listed["id"] == found["id"]);
        let positions: Vec<_> = listed
            .map(|listed| listed["queue_position"].clone())
            .collect();
        assert_eq!(positions, [json!(position)]);
    }
    // The one that trains tells when it will end, as soon as it has done a step.
    let began = Instant::now();
    while service.get(&broken).expect(200)["expected_start_at"].is_null() {
        assert!(began.elapsed() < PATIENCE, "nobody knows when it begins");
        std::thread::sleep(Duration::from_millis(50));
    }

    // Whoever rests is not in the queue, and keeps its age.
    service
        .post(&format!("{old}/pause"), &json!({}))
        .expect(200);
    assert_eq!(service.get(&young).expect(200)["queue_position"], 2);
    service
        .post(&format!("{old}/resume"), &json!({}))
        .expect(200);
    assert_eq!(service.get(&old).expect(200)["queue_position"], 2);

    std::fs::remove_file(models.path().join("gone.safetensors")).expect("removed");
    service
        .post(&format!("{first}/cancel"), &json!({}))
        .expect(200);
    let failed = wait(&service, &broken, "failed");
    assert!(failed["error"]["code"].is_string(), "{failed}");
    let ended = [&old, &young, &last].map(|run| wait(&service, run, "succeeded"));
    let begun: Vec<&str> = ended
        .iter()
        .map(|run| run["started_at"].as_str().expect("a time"))
        .collect();
    assert!(begun.is_sorted(), "{begun:?}");
}

#[test]
fn what_a_run_needs_stays_and_the_rest_can_go() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let first = start(&service, &dataset, &json!({"max_train_steps": 1_000_000}));
    wait(&service, &first, "running");
    let queued = start(&service, &dataset, &json!({}));
    for run in [&first, &queued] {
        service.delete(run).problem(409, "still_needed");
    }
    service.delete(&dataset).problem(409, "dataset_in_use");
    // The pictures of a run are those of the moment in which it was made.
    let images = service.get(&format!("{dataset}/images")).expect(200);
    for image in images["data"].as_array().expect("images") {
        let id = image["id"].as_str().expect("an id");
        service
            .delete(&format!("{dataset}/images/{id}"))
            .expect(204);
    }
    service
        .post(&format!("{first}/cancel"), &json!({}))
        .expect(200);
    wait(&service, &first, "cancelled");
    service.delete(&first).expect(204);
    service.get(&first).problem(404, "run_not_found");
    service.delete(&first).problem(404, "run_not_found");

    let ended = wait(&service, &queued, "succeeded");
    let lora = format!("/v1/loras/{}", ended["lora_id"].as_str().expect("a LoRA"));
    service.delete(&queued).problem(409, "still_needed");
    let longer = service.post(&format!("{queued}/extend"), &json!({"steps": 1_000_000}));
    let longer = longer.expect(201)["id"].as_str().expect("an id").to_owned();
    let longer = format!("/v1/runs/{longer}");
    service.delete(&lora).problem(409, "still_needed");
    let with_loras = format!("{queued}?with_loras=true");
    service.delete(&with_loras).problem(409, "still_needed");
    service
        .post(&format!("{longer}/cancel"), &json!({}))
        .expect(200);
    wait(&service, &longer, "cancelled");
    service
        .delete_if_match(&lora, "\"other\"")
        .problem(412, "precondition_failed");
    let tag = service
        .get(&format!("{lora}/content"))
        .header("etag")
        .to_owned();
    service.delete_if_match(&lora, &tag).expect(204);
    service.get(&lora).problem(404, "lora_not_found");
    for run in [&queued, &longer] {
        service.delete(run).expect(204);
    }
    service.delete(&dataset).expect(204);
}

/// Absurd learning rates: the run goes back to its start once, then fails and says what to change.
#[test]
fn a_run_that_diverges_goes_back_once_and_then_fails_with_advice() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let absurd = json!({"unet_lr": 1e30, "max_train_steps": 4});
    let run = start(&service, &dataset, &absurd);
    let found = wait(&service, &run, "failed");
    assert_eq!(found["settings"]["on_non_finite"], "halve_lr");
    assert_eq!(found["error"]["code"], "loss_not_finite", "{found}");
    let message = found["error"]["message"].as_str().expect("words");
    for part in ["had gone back", "5e29 (UNet)", "learning rates of a third"] {
        assert!(message.contains(part), "{message}");
    }
    let back = &found["rolled_back"];
    assert_eq!(
        (&back["to_step"], &back["lr_factor"]),
        (&json!(0), &json!(0.5))
    );
    let verdict = found["verdict"].as_str().expect("words");
    assert!(verdict.contains("went back to step 0"), "{verdict}");
    let accept = [("accept", "application/json")];
    let events = service.send("GET", &format!("{run}/events?after=0"), &accept, &[]);
    let events = events.expect(200);
    let events = events["data"].as_array().expect("a list");
    let told = events
        .iter()
        .filter(|event| event["event"] == "rolled_back");
    let told: Vec<_> = told.collect();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["data"]["at_step"], back["at_step"]);

    let stern = json!({"unet_lr": 1e30, "max_train_steps": 4, "on_non_finite": "fail"});
    let run = start(&service, &dataset, &stern);
    let found = wait(&service, &run, "failed");
    assert_eq!(found["rolled_back"], Value::Null);
    let message = found["error"]["message"].as_str().expect("words");
    assert!(message.contains("on_non_finite: halve_lr"), "{message}");
    let unknown = short(&dataset, &json!({"on_non_finite": "pray"}));
    let problem = service
        .post("/v1/runs", &unknown)
        .problem(422, "invalid_body");
    assert_eq!(problem["errors"][0]["pointer"], "/on_non_finite");
}

#[test]
fn the_series_has_norms_by_part_and_speed() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let run = start(&service, &dataset, &json!({"max_train_steps": 3}));
    wait(&service, &run, "succeeded");
    let series = service.get(&format!("{run}/metrics")).expect(200);
    let points = series["data"].as_array().expect("points");
    assert_eq!(points.len(), 3);
    for point in points {
        let number = |name: &str| {
            point[name]
                .as_f64()
                .unwrap_or_else(|| panic!("{name}: {point}"))
        };
        let parts = number("grad_norm_unet").hypot(number("grad_norm_text_encoder"));
        assert!((parts / number("grad_norm") - 1.0).abs() < 1e-9);
        assert!(number("images_per_s") > 0.0 && number("eta_s") >= 0.0);
        assert_eq!(point["device_memory_bytes"], Value::Null);
    }
    let table = service.send(
        "GET",
        &format!("{run}/metrics"),
        &[("accept", "text/csv")],
        &[],
    );
    let text = String::from_utf8(table.bytes).expect("UTF-8");
    let columns: Vec<usize> = text.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(columns, [16; 4]);
    let fields: Vec<&str> = text.lines().next().expect("a head").split(',').collect();
    for field in fields {
        assert!(points[0].get(field).is_some(), "{field}");
    }
}

/// The frames of an event file, each with the right length.
fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        for (data, place) in [(&bytes[..8], 8), (&bytes[12..12 + length], 12 + length)] {
            let masked = bytes[place..place + 4].try_into().expect("four bytes");
            let crc = u32::from_le_bytes(masked)
                .wrapping_sub(0xa282_ead8)
                .rotate_left(15);
            assert_eq!(crc32c::crc32c(data), crc);
        }
        records.push(&bytes[12..12 + length]);
        bytes = &bytes[16 + length..];
    }
    records
}

#[test]
fn a_run_can_be_read_by_tensorboard() {
    let service = Service::start_with(settings);
    let dataset = dataset(&service);
    let prompt = json!({"prompt": "a", "width_px": 64, "height_px": 64, "steps": 1});
    let more =
        json!({"max_train_steps": 3, "samples": {"prompts": [prompt]}, "ema": {"decay": 0.9}});
    let run = start(&service, &dataset, &more);
    let found = wait(&service, &run, "succeeded");
    assert_eq!(
        found["settings"]["ema"],
        json!({"decay": 0.9, "warm_up": true})
    );
    let answer = service.get(&format!("{run}/tensorboard?pictures=true"));
    assert_eq!(answer.status, 200);
    let name = answer.header("content-disposition");
    assert!(name.contains("events.out.tfevents."), "{name}");
    if let Ok(folder) = std::env::var("KEEP_EVENT_FILE") {
        std::fs::write(
            Path::new(&folder).join("events.out.tfevents.1.test"),
            &answer.bytes,
        )
        .expect("written");
    }
    let found = records(&answer.bytes);
    assert_eq!(found.len(), 1 + 3 + 1, "a head, three steps, a picture");
    assert!(found[0].ends_with(b"brain.Event:2"));
    let has = |record: &[u8], part: &[u8]| record.windows(part.len()).any(|found| found == part);
    let series = service.get(&format!("{run}/metrics")).expect(200);
    for (point, record) in series["data"]
        .as_array()
        .expect("points")
        .iter()
        .zip(&found[1..])
    {
        let loss = point["loss"].as_f64().expect("a loss") as f32;
        let value = [b"\x0a\x09loss/step\x15".as_slice(), &loss.to_le_bytes()].concat();
        assert!(has(record, &value), "{point}");
        assert!(has(record, b"grad_norm/text_encoder"));
    }
    assert!(has(found[4], b"samples/0") && has(found[4], b"\x89PNG"));
    let every = service.get(&format!("{run}/tensorboard?every=2"));
    assert_eq!(records(&every.bytes).len(), 2);
    let zero = service.get(&format!("{run}/tensorboard?every=0"));
    zero.problem(422, "invalid_query");
    let wrong = short(&dataset, &json!({"ema": {"decay": 1.0}}));
    let problem = service
        .post("/v1/runs", &wrong)
        .problem(422, "invalid_settings");
    assert_eq!(problem["errors"][0]["pointer"], "/ema/decay");
}
