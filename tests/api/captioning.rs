//! `/v1/captioners` and `/v1/datasets/{id}/captioning-jobs`: tiny taggers caption, and what is missing is told.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Service, png};

const PATIENCE: Duration = Duration::from_secs(60);

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/taggers")
}

/// Puts a tiny tagger of the fixtures into the model folder.
fn install(models: &Path, captioner: &str, name: &str) {
    let to = models.join("captioners").join(captioner).join(name);
    std::fs::create_dir_all(&to).expect("a folder");
    for entry in std::fs::read_dir(fixtures().join(name)).expect("a fixture") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

/// A service with two taggers, and where its files are.
fn start() -> (Service, PathBuf, PathBuf) {
    let mut folders = (PathBuf::new(), PathBuf::new());
    let service = Service::start_with(|config| {
        config.max_concurrent_runs = 1;
        config.device = "cpu".to_owned();
        config.webhook_allowed_networks = vec!["127.0.0.0/8".parse().expect("a network")];
        install(&config.models_dir, "wd14", "wd-vit");
        install(&config.models_dir, "deepdanbooru", "deepdanbooru");
        folders = (config.models_dir.clone(), config.data_dir.clone());
    });
    (service, folders.0, folders.1)
}

/// A dataset of the fixtures' pictures; one has a caption.
fn pictures(service: &Service) -> String {
    let dataset = service.dataset("pictures");
    let files: Vec<(String, Vec<u8>)> = ["small", "square", "tall-alpha", "wide"]
        .into_iter()
        .map(|name| {
            let file = format!("{name}.png");
            let bytes = std::fs::read(fixtures().join("pictures").join(&file));
            (file, bytes.expect("a picture"))
        })
        .collect();
    let mut files: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    files.push(("wide.txt", b"a wave, Solo"));
    let images = format!("{dataset}/images");
    service.upload(&images, &[], &files).expect(201);
    dataset
}

fn ask(service: &Service, dataset: &str, body: &Value) -> String {
    let answer = service.post(&format!("{dataset}/captioning-jobs"), body);
    answer.expect(202);
    answer.header("location").to_owned()
}

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

/// Caption and revision by file name, without its ending.
fn captions(service: &Service, dataset: &str) -> Value {
    let images = service.get(&format!("{dataset}/images")).expect(200);
    let mut found = json!({});
    for image in images["data"].as_array().expect("images") {
        let name = image["file_name"].as_str().expect("a name");
        found[name.trim_end_matches(".png")] = image["caption"].clone();
    }
    found
}

/// What onnxruntime and sd-scripts' thresholds make of a picture: the tags in the order of the list.
fn golden(picture: &str) -> Vec<(String, f64)> {
    let text = std::fs::read_to_string(fixtures().join("goldens.json")).expect("goldens");
    let goldens: Value = serde_json::from_str(&text).expect("JSON");
    let rows = std::fs::read_to_string(fixtures().join("wd-vit/selected_tags.csv")).expect("tags");
    let names = rows.lines().skip(1).map(|row| row.split(',').nth(1));
    let probabilities = &goldens["wd-vit"][picture]["probabilities"];
    names
        .zip(probabilities.as_array().expect("numbers"))
        .map(|(name, p)| {
            (
                name.expect("a name").to_owned(),
                p.as_f64().expect("a number"),
            )
        })
        .collect()
}

#[test]
fn captioners_and_their_models_are_listed() {
    let (service, models, _) = start();
    let half = models.join("captioners/wd14/half");
    std::fs::create_dir_all(&half).expect("a folder");
    std::fs::copy(
        fixtures().join("wd-vit/model.onnx"),
        half.join("model.onnx"),
    )
    .expect("copied");
    let blip = models.join("captioners/blip/base");
    std::fs::create_dir_all(&blip).expect("a folder");
    std::fs::write(blip.join("model.safetensors"), b"nothing").expect("written");
    let found = service.get("/v1/captioners").expect(200);
    let [blip, wd, danbooru] = found["data"].as_array().expect("captioners").as_slice() else {
        panic!("{found}");
    };
    assert_eq!((&blip["id"], &wd["id"]), (&json!("blip"), &json!("wd14")));
    assert_eq!(danbooru["models"][0]["complete"], true);
    assert_eq!(blip["models"][0]["complete"], false);
    let missing = blip["models"][0]["missing"].as_array().expect("files");
    assert!(missing.contains(&json!("config.json")), "{blip}");
    let [half, vit] = wd["models"].as_array().expect("models").as_slice() else {
        panic!("{wd}");
    };
    assert_eq!(vit["complete"], true);
    assert_eq!(half["missing"], json!(["selected_tags.csv"]));
    assert!(
        half["problem"]
            .as_str()
            .expect("words")
            .contains("wd14/half has no selected_tags.csv")
    );
    let threshold = &wd["settings_schema"]["properties"]["general_threshold"];
    assert_eq!(
        (
            &threshold["default"],
            &threshold["minimum"],
            &threshold["maximum"]
        ),
        (&json!(0.35), &json!(0.05), &json!(1))
    );
    let models = service.get("/v1/models").expect(200);
    assert_eq!(models["data"], json!([]), "they are no base models");
}

#[test]
fn what_cannot_be_asked_for_is_refused() {
    let (service, models, _) = start();
    let dataset = pictures(&service);
    let jobs = format!("{dataset}/captioning-jobs");
    let refused = |body: Value, pointer: &str| {
        let problem = service.post(&jobs, &body).problem(422, "invalid_settings");
        let errors = problem["errors"].as_array().expect("a list");
        assert!(
            errors.iter().any(|error| error["pointer"] == pointer),
            "{problem}"
        );
    };
    refused(
        json!({"captioner": "wd14", "tagger": {"general_threshold": 0}}),
        "/tagger/general_threshold",
    );
    refused(
        json!({"captioner": "wd14", "tagger": {"separator": " "}}),
        "/tagger/separator",
    );
    refused(json!({"captioner": "wd14", "blip": {}}), "/blip");
    refused(json!({"captioner": "blip", "tagger": {}}), "/tagger");
    refused(
        json!({"captioner": "blip", "blip": {"beams": 99}}),
        "/blip/beams",
    );
    refused(
        json!({"captioner": "wd14", "device": "vulkan:0"}),
        "/device",
    );
    refused(json!({"captioner": "wd14", "prefix": "a\nb"}), "/prefix");
    refused(
        json!({"captioner": "wd14", "image_ids": [uuid::Uuid::nil()]}),
        "/image_ids/0",
    );
    refused(
        json!({"captioner": "wd14", "subset_id": uuid::Uuid::nil()}),
        "/subset_id",
    );
    service
        .post(&jobs, &json!({"captioner": "wd15"}))
        .problem(422, "invalid_body");
    service
        .post(&jobs, &json!({"captioner": "wd14", "tagger": {"x": 1}}))
        .problem(422, "invalid_body");
    let missing = service.post(&jobs, &json!({"captioner": "blip"}));
    let missing = missing.problem(409, "captioner_model_missing");
    let words = missing["detail"].as_str().expect("words");
    let folder = models.join("captioners/blip");
    for part in [
        "config.json",
        "model.safetensors",
        "vocab.txt",
        folder.to_str().expect("UTF-8"),
        "Salesforce",
    ] {
        assert!(words.contains(part), "{words}");
    }
    let unknown = service.post(&jobs, &json!({"captioner": "wd14", "model": "vit-2"}));
    let unknown = unknown.problem(409, "captioner_model_missing");
    assert!(
        unknown["detail"]
            .as_str()
            .expect("words")
            .contains("wd14/vit-2"),
        "{unknown}"
    );
    let nobody = format!("/v1/datasets/{}/captioning-jobs", uuid::Uuid::nil());
    service
        .post(&nobody, &json!({"captioner": "wd14"}))
        .problem(404, "dataset_not_found");
    service.get(&nobody).problem(404, "dataset_not_found");
    service
        .get(&format!("{jobs}/{}", uuid::Uuid::nil()))
        .problem(404, "captioning_job_not_found");
    let empty = service.dataset("empty");
    let empty = service.post(
        &format!("{empty}/captioning-jobs"),
        &json!({"captioner": "wd14"}),
    );
    empty.problem(422, "invalid_settings");
}

#[test]
fn a_tagger_captions_in_each_mode() {
    let (service, ..) = start();
    let dataset = pictures(&service);
    let tags = |picture: &str, separator: &str| {
        let mut found: Vec<(String, f64)> = golden(picture);
        found.drain(..4); // ratings
        found.retain(|(name, p)| {
            let character = ["hatsune_miku", "lumo_(mascot)", "saber", "rem_(re:zero)"];
            *p >= if character.contains(&name.as_str()) {
                0.85
            } else {
                0.35
            }
        });
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        let written = found.into_iter().map(|(name, _)| match name.len() {
            0..=3 => name,
            _ => name.replace('_', " "),
        });
        written.collect::<Vec<_>>().join(separator)
    };

    // What is there stays, and a dry run changes nothing.
    let dry = ask(
        &service,
        &dataset,
        &json!({"captioner": "wd14", "dry_run": true, "mode": "overwrite"}),
    );
    let job = wait(&service, &dry, "succeeded");
    assert_eq!((&job["captioned"], &job["images"]), (&json!(4), &json!(4)));
    assert_eq!(captions(&service, &dataset)["small"], Value::Null);
    let body = json!({"captioner": "wd14", "model": "wd-vit", "prefix": "lumo, "});
    let first = ask(&service, &dataset, &body);
    let job = wait(&service, &first, "succeeded");
    assert_eq!(
        (
            &job["captioned"],
            &job["skipped"],
            &job["failed"],
            &job["images_done"]
        ),
        (&json!(3), &json!(1), &json!(0), &json!(4))
    );
    assert_eq!(
        (&job["mode"], &job["blip"]),
        (&json!("only_empty"), &Value::Null)
    );
    let found = captions(&service, &dataset);
    assert_eq!(found["wide"], "a wave, Solo");
    for name in ["small", "square", "tall-alpha"] {
        assert_eq!(found[name], format!("lumo, {}", tags(name, ", ")), "{name}");
    }

    // Results tell every confidence.
    let results = service.get(&format!("{first}/results")).expect(200);
    let results = results["data"].as_array().expect("results");
    assert_eq!(results.len(), 4);
    for result in results {
        let name = result["file_name"]
            .as_str()
            .expect("a name")
            .trim_end_matches(".png");
        if name == "wide" {
            assert_eq!(
                (&result["outcome"], &result["message"]),
                (&json!("skipped"), &json!("it has a caption"))
            );
            continue;
        }
        assert_eq!(result["caption"], found[name]);
        let goldens = golden(name);
        for tag in result["tags"].as_array().expect("tags") {
            let golden = goldens
                .iter()
                .find(|(name, _)| tag["name"] == name.as_str());
            let difference =
                tag["confidence"].as_f64().expect("a number") - golden.expect("known").1;
            assert!(difference.abs() < 1e-4, "{name}, {tag}");
        }
    }
    let page = service
        .get(&format!("{first}/results?limit=1&outcome=captioned"))
        .expect(200);
    let cursor = page["next_cursor"].as_str().expect("more");
    let next = service.get(&format!(
        "{first}/results?limit=200&outcome=captioned&cursor={cursor}"
    ));
    assert_eq!(
        next.expect(200)["data"].as_array().expect("results").len(),
        2
    );
    service
        .get(&format!("{first}/results?cursor=MTp4"))
        .problem(422, "invalid_cursor");

    // What is there is continued, without what it has.
    let body = json!({"captioner": "wd14", "mode": "append", "tagger": {"separator": ";"}});
    wait(&service, &ask(&service, &dataset, &body), "succeeded");
    let found = captions(&service, &dataset);
    assert_eq!(found["wide"], format!("a wave, Solo;{}", tags("wide", ";")));

    // What is there is replaced, of one image alone.
    let images = service.get(&format!("{dataset}/images")).expect(200);
    let images = images["data"].as_array().expect("images");
    let wide = images
        .iter()
        .find(|image| image["file_name"] == "wide.png")
        .expect("there");
    let body = json!({"captioner": "deepdanbooru", "mode": "overwrite", "image_ids": [wide["id"]], "suffix": " (wide)",
        "tagger": {"rating": "first", "general_threshold": 0.9}});
    let job = wait(&service, &ask(&service, &dataset, &body), "succeeded");
    assert_eq!(job["images"], 1);
    let now = captions(&service, &dataset);
    let caption = now["wide"].as_str().expect("a caption");
    assert!(
        caption.starts_with("rating:") && caption.ends_with(" (wide)"),
        "{caption}"
    );
    assert_eq!(now["small"], found["small"]);

    // What it was like, and what is left of it.
    let events = service.get(&format!("{first}/events?wait=0")).expect(200);
    let kinds: Vec<&str> = events["data"]
        .as_array()
        .expect("events")
        .iter()
        .map(|event| event["event"].as_str().expect("a kind"))
        .collect();
    assert!(
        kinds.contains(&"progress") && kinds.contains(&"phase"),
        "{kinds:?}"
    );
    assert_eq!(events["next_after"], Value::Null);
    let all = service
        .get(&format!("{dataset}/captioning-jobs"))
        .expect(200);
    assert_eq!(all["data"].as_array().expect("jobs").len(), 4);
    assert_eq!(
        service.get("/v1/runs").expect(200)["data"],
        json!([]),
        "a job is no run"
    );
    let id = job["id"].as_str().expect("an id");
    service
        .get(&format!("/v1/runs/{id}"))
        .problem(404, "run_not_found");
    service
        .post(&format!("{first}/cancel"), &json!({}))
        .problem(409, "illegal_transition");
    service.delete(&first).expect(204);
    service.get(&first).problem(404, "captioning_job_not_found");
    service.delete(&dataset).expect(204);
}

#[test]
fn a_job_waits_for_its_turn_and_can_be_cancelled() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-sd15");
    let service = Service::start_with(|config| {
        config.max_concurrent_runs = 1;
        config.device = "cpu".to_owned();
        config.webhook_allowed_networks = vec!["127.0.0.0/8".parse().expect("a network")];
        install(&config.models_dir, "wd14", "wd-vit");
        std::fs::copy(
            tiny.join("tiny-sd15-ldm.safetensors"),
            config.models_dir.join("tiny.safetensors"),
        )
        .expect("copied");
    });
    let dataset = pictures(&service);
    let run = service.post("/v1/runs", &json!({
        "name": "a", "dataset_id": dataset.rsplit('/').next(), "base_model": "tiny", "max_train_steps": 1_000_000,
        "network": {"rank": 2}, "resolution": {"width_px": 64, "height_px": 64}, "buckets": {"enabled": false},
    }));
    let run = format!(
        "/v1/runs/{}",
        run.expect(201)["id"].as_str().expect("an id")
    );
    wait(&service, &run, "running");
    let body = json!({"captioner": "wd14"});
    let one = ask(&service, &dataset, &body);
    let two = ask(&service, &dataset, &body);
    for _ in 0..2 {
        let cancelled = service.post(&format!("{two}/cancel"), &json!({}));
        assert_eq!(cancelled.expect(200)["state"], "cancelled");
    }
    std::thread::sleep(Duration::from_millis(700)); // longer than the supervisor's turn
    assert_eq!(service.get(&one).expect(200)["state"], "queued");
    service.delete(&one).problem(409, "still_needed");
    service
        .post(&format!("{run}/cancel"), &json!({}))
        .expect(200);
    assert_eq!(wait(&service, &one, "succeeded")["captioned"], 3);
}

/// The blob of a picture by its digest.
fn blob(data: &Path, sha256: &str) -> PathBuf {
    let mut waiting = vec![data.join("blobs")];
    while let Some(folder) = waiting.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.to_string_lossy().replace('/', "").ends_with(sha256) {
                return path;
            }
        }
    }
    panic!("no blob {sha256}");
}

#[test]
fn a_broken_picture_is_reported_and_a_broken_model_ends_the_job() {
    let (service, models, data) = start();
    let dataset = pictures(&service);
    let images = service.get(&format!("{dataset}/images")).expect(200);
    let broken = &images["data"][1];
    let path = blob(&data, broken["sha256"].as_str().expect("a digest"));
    std::fs::remove_file(&path).expect("removed");
    std::fs::write(&path, b"\x89PNG\r\n\x1a\n").expect("written");
    let job = ask(
        &service,
        &dataset,
        &json!({"captioner": "wd14", "mode": "overwrite"}),
    );
    let done = wait(&service, &job, "succeeded");
    assert_eq!(
        (&done["captioned"], &done["failed"]),
        (&json!(3), &json!(1))
    );
    let failed = service
        .get(&format!("{job}/results?outcome=failed"))
        .expect(200);
    assert_eq!(failed["data"][0]["image_id"], broken["id"]);
    let events = service.get(&format!("{job}/events?wait=0")).expect(200);
    let told = events["data"]
        .as_array()
        .expect("events")
        .iter()
        .find(|event| event["event"] == "image_failed")
        .expect("told");
    assert_eq!(told["data"]["image_id"], broken["id"]);

    let only = json!({"captioner": "wd14", "mode": "overwrite", "image_ids": [broken["id"]]});
    let job = wait(&service, &ask(&service, &dataset, &only), "failed");
    assert_eq!(job["error"]["code"], "captioning_failed");

    let network = models.join("captioners/wd14/wd-vit/model.onnx");
    let whole = std::fs::read(&network).expect("a network");
    std::fs::write(&network, &whole[..whole.len() / 2]).expect("written");
    let job = ask(
        &service,
        &dataset,
        &json!({"captioner": "wd14", "mode": "overwrite"}),
    );
    let job = wait(&service, &job, "failed");
    assert_eq!(job["error"]["code"], "model_unusable");
    let words = job["error"]["message"].as_str().expect("words");
    assert!(words.contains("model.onnx"), "{words}");
    let picture = png(9);
    service
        .upload(
            &format!("{dataset}/images"),
            &[],
            &[("x.png", picture.as_slice())],
        )
        .expect(201);
}

/// A tiny BLIP says what transformers says.
#[test]
fn blip_captions_as_a_job() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-blip");
    let service = Service::start_with(|config| {
        config.device = "cpu".to_owned();
        let to = config.models_dir.join("captioners/blip/tiny");
        std::fs::create_dir_all(&to).expect("a folder");
        for file in [
            "config.json",
            "model.safetensors",
            "vocab.txt",
            "preprocessor_config.json",
        ] {
            std::fs::copy(tiny.join(file), to.join(file)).expect("copied");
        }
    });
    let dataset = service.dataset("pictures");
    for name in ["0.png", "1.png", "2.png", "3.png"] {
        let bytes = std::fs::read(tiny.join(name)).expect("a picture");
        let files = [(name, bytes.as_slice())];
        service
            .upload(&format!("{dataset}/images"), &[], &files)
            .expect(201);
    }
    let body = json!({"captioner": "blip", "mode": "overwrite",
        "blip": {"beams": 1, "min_length": 8, "max_length": 16, "repetition_penalty": 1.3, "prompt": "a photo of"}});
    let job = wait(&service, &ask(&service, &dataset, &body), "succeeded");
    assert_eq!(
        (&job["captioned"], &job["model"], &job["tagger"]),
        (&json!(4), &json!("tiny"), &Value::Null)
    );
    let goldens = std::fs::read_to_string(tiny.join("goldens.json")).expect("goldens");
    let goldens: Value = serde_json::from_str(&goldens).expect("JSON");
    let found = captions(&service, &dataset);
    for (name, expected) in ["0", "1", "2", "3"]
        .into_iter()
        .zip(goldens["captions"][1]["texts"].as_array().expect("texts"))
    {
        assert_eq!(found[name], *expected, "{name}");
    }
}

#[test]
fn webhooks_hear_of_a_job() {
    let (service, ..) = start();
    let unheard = json!({"url": "http://127.0.0.1:9/hook", "events": ["captioning_job.queued", "captioning_job.succeeded"]});
    let hook = service.post("/v1/webhooks", &unheard);
    hook.expect(201);
    let dataset = pictures(&service);
    let job = ask(
        &service,
        &dataset,
        &json!({"captioner": "wd14", "model": "wd-vit"}),
    );
    wait(&service, &job, "succeeded");
    let deliveries = format!("{}/deliveries", hook.header("location"));
    let told = service.get(&deliveries).expect(200);
    let mut types: Vec<&Value> = (told["data"].as_array().expect("a list").iter())
        .inspect(|delivery| assert_eq!(delivery["run_id"], Value::Null))
        .map(|delivery| &delivery["event_type"])
        .collect();
    types.sort_by_key(|word| word.as_str());
    assert_eq!(types, ["captioning_job.queued", "captioning_job.succeeded"]);
}
