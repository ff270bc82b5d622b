//! `/v1/runs/{id}/grids`: asked for, drawn by a worker in its turn, read, cancelled.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Service, png};

const PATIENCE: Duration = Duration::from_secs(60);

fn wait(service: &Service, path: &str, state: &str) -> Value {
    let began = Instant::now();
    loop {
        let found = service.get(path).expect(200);
        if found["state"] == state {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "not {state}: {found}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn path_of(run: &Value) -> String {
    format!("/v1/runs/{}", run["id"].as_str().expect("an id"))
}

#[test]
fn a_grid_shows_each_file_at_each_strength() {
    let service = Service::start_with(|config| {
        config.models_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15");
        config.device = "cpu".to_owned();
        config.max_concurrent_runs = 1;
    });
    let dataset = service.dataset("a");
    let picture = png(1);
    service
        .upload(
            &format!("{dataset}/images"),
            &[],
            &[("a.png", picture.as_slice())],
        )
        .expect(201);
    let start = |steps: u32| {
        let body = json!({
            "name": "a", "dataset_id": dataset.rsplit('/').next(), "base_model": "tiny-sd15-ldm",
            "max_train_steps": steps, "network": {"rank": 2}, "resolution": {"width_px": 64, "height_px": 64},
            "buckets": {"enabled": false}, "unet_lr": 0.1, "save": {"every_n_steps": 1},
        });
        path_of(&service.post("/v1/runs", &body).expect(201))
    };
    let run = start(2);
    let grids = format!("{run}/grids");
    let refused = |body: Value, pointer: &str| {
        let problem = service.post(&grids, &body).problem(422, "invalid_settings");
        let errors = problem["errors"].as_array().expect("a list");
        assert!(
            errors.iter().any(|error| error["pointer"] == pointer),
            "{problem}"
        );
    };
    let prompt = |seed: u64| json!({"prompt": "lumo", "seed": seed, "steps": 2, "width_px": 64, "height_px": 64});
    refused(json!({"prompts": [prompt(1)]}), "/lora_ids"); // it has none yet
    wait(&service, &run, "succeeded");
    refused(
        json!({"prompts": [prompt(1)], "strengths": [1, 9]}),
        "/strengths/1",
    );
    refused(
        json!({"prompts": [prompt(1)], "lora_ids": [uuid::Uuid::nil()]}),
        "/lora_ids/0",
    );
    refused(json!({"prompts": []}), "/prompts");
    let mut odd = prompt(1);
    odd["steps"] = json!(0);
    refused(json!({"prompts": [odd]}), "/prompts/0/steps");
    let many: Vec<f64> = (0..100).map(f64::from).map(|n| n / 100.0).collect();
    refused(json!({"prompts": [prompt(1)], "strengths": many}), "");
    service
        .post(&grids, &json!({"prompts": [prompt(1)], "size": 1}))
        .problem(422, "invalid_body");

    // One worker: the grid waits for the run before it.
    let long = start(1_000_000);
    wait(&service, &long, "running");
    let body = json!({"prompts": [prompt(1), prompt(2)], "strengths": [0, 1]});
    let answer = service.post(&grids, &body);
    let grid = answer.expect(202);
    let path = answer.header("location").to_owned();
    assert_eq!(
        (&grid["state"], &grid["pictures"]),
        (&json!("queued"), &json!(12))
    );
    service
        .get(&format!("{path}/content"))
        .problem(409, "grid_not_ready");
    let own = format!("/v1/runs/{}", grid["id"].as_str().expect("an id"));
    service.get(&own).problem(404, "run_not_found");
    let all = service.get("/v1/runs").expect(200);
    assert_eq!(
        all["data"].as_array().expect("runs").len(),
        2,
        "a grid is no run"
    );
    service.delete(&run).problem(409, "still_needed");
    let other = service.post(&grids, &body).expect(202);
    let other = format!("{grids}/{}", other["id"].as_str().expect("an id"));
    for _ in 0..2 {
        let cancelled = service.post(&format!("{other}/cancel"), &json!({}));
        assert_eq!(cancelled.expect(200)["state"], "cancelled");
    }
    std::thread::sleep(Duration::from_millis(700)); // longer than the supervisor's turn
    assert_eq!(service.get(&path).expect(200)["state"], "queued");
    service
        .post(&format!("{long}/cancel"), &json!({}))
        .expect(200);
    wait(&service, &long, "cancelled");

    let done = wait(&service, &path, "succeeded");
    assert_eq!(done["pictures_done"], 12);
    let content = service.get(&format!("{path}/content"));
    assert_eq!(
        (content.status, content.header("content-type")),
        (200, "image/png")
    );
    let sheet = image::load_from_memory(&content.bytes)
        .expect("a PNG")
        .to_rgb8();
    assert_eq!(done["image"]["width_px"], sheet.width());
    if let Ok(folder) = std::env::var("TEST_PICTURES") {
        sheet
            .save(Path::new(&folder).join("grid.png"))
            .expect("written");
    }
    // Where the columns are: a margin of 12 beside labels of 220, pictures of 64; a prompt's title takes 34.
    let cell = |block: u32, row: u32, column: u32| {
        let (x, y) = (
            220 + column * 76,
            36 + block * (34 + 3 * 76) + 34 + row * 76,
        );
        image::imageops::crop_imm(&sheet, x, y, 64, 64).to_image()
    };
    for block in 0..2 {
        assert_eq!(
            cell(block, 0, 0),
            cell(block, 1, 0),
            "strength 0 is the base model"
        );
        assert_ne!(cell(block, 0, 0), cell(block, 0, 1), "strength 1 is not");
        assert_ne!(cell(block, 0, 1), cell(block, 1, 1), "files differ");
        assert_eq!(
            cell(block, 1, 1),
            cell(block, 2, 1),
            "the last two are of one step"
        );
    }
    assert_ne!(cell(0, 0, 0), cell(1, 0, 0), "seeds differ");
    let list = service.get(&grids).expect(200);
    assert_eq!(list["data"].as_array().expect("grids").len(), 2);
    service
        .post(&format!("{path}/cancel"), &json!({}))
        .problem(409, "illegal_transition");
    let nobody = format!("{grids}/{}", uuid::Uuid::nil());
    service.get(&nobody).problem(404, "grid_not_found");
    service
        .delete(&format!("{run}?with_loras=true"))
        .expect(204);
    service.get(&path).problem(404, "run_not_found");
}
