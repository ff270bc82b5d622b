//! A captioning job whose worker and server are killed captions every image once.

use std::path::Path;
use std::time::{Duration, Instant};

use image::{ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};

use crate::server::{PATIENCE, Server, root, try_to_kill_worker};

/// Enough for a job that is still at it when it is killed.
const IMAGES: u32 = 500;

fn pictures(server: &Server) -> String {
    let dataset = server.post("/v1/datasets", &json!({"name": "many"}));
    let id = dataset["id"].as_str().expect("an id").to_owned();
    let mut body = Vec::new();
    for index in 0..IMAGES {
        let shade = Rgb([(index % 256) as u8, (index / 256) as u8, 99]);
        let mut picture = std::io::Cursor::new(Vec::new());
        RgbImage::from_pixel(1000, 800, shade)
            .write_to(&mut picture, ImageFormat::Png)
            .expect("an encoder");
        let head = format!(
            "--x\r\ncontent-disposition: form-data; name=\"f\"; filename=\"{index:04}.png\"\r\n\r\n"
        );
        body.extend(head.into_bytes());
        body.extend(picture.into_inner());
        body.extend(b"\r\n");
    }
    body.extend(b"--x--\r\n");
    ureq::post(format!("{}/v1/datasets/{id}/images", server.base))
        .header("content-type", "multipart/form-data; boundary=x")
        .send(&body)
        .expect("an upload");
    id
}

fn install(models: &Path) {
    let to = models.join("captioners/wd14/wd-swinv2");
    std::fs::create_dir_all(&to).expect("a folder");
    for file in ["model.onnx", "selected_tags.csv"] {
        let from = root().join("tests/fixtures/taggers/wd-swinv2").join(file);
        std::fs::copy(from, to.join(file)).expect("copied");
    }
}

fn wait(server: &Server, path: &str, done: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let found = server.get(path);
        if done(&found) {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{found}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_job_that_is_killed_captions_every_image_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let models = folder.path().join("models");
    install(&models);
    let data = folder.path().join("data");
    let server = Server::start_with(&data, &models);
    let dataset = pictures(&server);
    let jobs = format!("/v1/datasets/{dataset}/captioning-jobs");
    let body = json!({"captioner": "wd14", "mode": "append", "prefix": "many of them, ", "tagger": {"general_threshold": 0.05}});
    let job = server.post(&jobs, &body);
    let id = job["id"].as_str().expect("an id").to_owned();
    let path = format!("{jobs}/{id}");
    let far = |at: u64| {
        move |job: &Value| {
            job["state"] == "running" && job["images_done"].as_u64() >= Some(at)
                || job["state"] == "succeeded"
        }
    };
    let first = wait(&server, &path, far(60));
    assert_eq!(first["state"], "running", "too fast to be killed: {first}");
    assert!(try_to_kill_worker(&id), "there is no worker");
    let second = wait(&server, &path, |job| {
        far(180)(job) && job["attempt"].as_u64() >= Some(2)
    });
    assert_eq!(second["state"], "running", "{second}");
    assert!(second["images_done"].as_u64() >= first["images_done"].as_u64());
    server.kill(); // its worker goes on
    let server = Server::start_with(&data, &models);
    let third = wait(&server, &path, far(260));
    try_to_kill_worker(&id);
    let done = wait(&server, &path, |job| {
        job["state"] == "succeeded" || job["state"] == "failed"
    });
    println!(
        "killed at {}, {}, {}",
        first["images_done"], second["images_done"], third["images_done"]
    );
    assert_eq!(
        (&done["state"], &done["captioned"], &done["failed"]),
        (&json!("succeeded"), &json!(IMAGES), &json!(0)),
        "{done}"
    );
    let (mut seen, mut cursor) = (0, String::new());
    loop {
        let page = server.get(&format!("/v1/datasets/{dataset}/images?limit=200{cursor}"));
        for image in page["data"].as_array().expect("images") {
            // Appended twice, it would be there twice.
            let caption = image["caption"].as_str().unwrap_or_default();
            assert_eq!(caption.matches("many of them").count(), 1, "{image}");
            seen += 1;
        }
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, IMAGES);

    // One that captions can be cancelled; what is written stays.
    let body = json!({"captioner": "wd14", "mode": "overwrite", "prefix": "again, "});
    let job = server.post(&jobs, &body);
    let path = format!("{jobs}/{}", job["id"].as_str().expect("an id"));
    wait(&server, &path, far(20));
    server.post(&format!("{path}/cancel"), &json!({}));
    let cancelled = wait(&server, &path, |job| job["state"] == "cancelled");
    let written = cancelled["captioned"].as_u64().expect("a number");
    assert!((20..u64::from(IMAGES)).contains(&written), "{cancelled}");
}
