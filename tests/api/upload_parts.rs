//! `/v1/datasets/{dataset_id}/uploads`: uploads that come in parts.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::support::{Answer, Service, png, zip};

const BYTES: (&str, &str) = ("content-type", "application/octet-stream");

fn archive() -> Vec<u8> {
    zip(&[
        ("10_lumo/a.png", &png(1)),
        ("10_lumo/a.txt", b"red"),
        ("10_lumo/b.png", &png(2)),
    ])
}

fn begin(service: &Service, dataset: &str, body: &Value) -> String {
    let answer = service.post(&format!("{dataset}/uploads"), body);
    let made = answer.expect(201);
    let path = format!("{dataset}/uploads/{}", made["id"].as_str().expect("an id"));
    assert_eq!(answer.header("location"), path);
    assert_eq!(
        (&made["state"], &made["parts"]),
        (&json!("open"), &json!([]))
    );
    path
}

fn put(service: &Service, upload: &str, number: u32, bytes: &[u8]) -> Answer {
    service.send("PUT", &format!("{upload}/parts/{number}"), &[BYTES], bytes)
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[test]
fn parts_come_in_any_order_and_the_service_may_restart() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let whole = archive();
    let parts: Vec<&[u8]> = whole.chunks(100).collect();
    let upload = begin(
        &service,
        &dataset,
        &json!({"name": "set.zip", "size_bytes": whole.len(), "sha256": sha256(&whole), "class_prompt": "robot"}),
    );
    let count = parts.len() as u32;
    for number in (2..=count).rev() {
        let part = parts[number as usize - 1];
        let answer = put(&service, &upload, number, part).expect(200);
        assert_eq!(answer["sha256"], sha256(part));
    }
    put(&service, &upload, 2, b"something else").expect(200); // it is replaced below
    let complete = format!("{upload}/complete");
    service
        .send("POST", &complete, &[], &[])
        .problem(409, "upload_incomplete");

    let service = service.restart_with(|_| {});
    put(&service, &upload, 1, parts[0]).expect(200);
    service
        .send("POST", &complete, &[], &[])
        .problem(409, "upload_incomplete");
    put(&service, &upload, 2, parts[1]).expect(200);
    put(&service, &upload, 2, parts[1]).expect(200);
    let state = service.get(&upload).expect(200);
    assert_eq!(state["received_bytes"], json!(whole.len()));
    assert_eq!(state["parts"].as_array().map(Vec::len), Some(parts.len()));

    let answer = service.send("POST", &complete, &[], &[]).expect(200);
    assert_eq!(
        answer["summary"],
        json!({"images": 2, "captions": 1, "duplicates": 0, "refused": 0, "warnings": 0})
    );
    assert_eq!(answer["files"][0]["name"], "set.zip");
    // asked again, the same
    assert_eq!(
        service.send("POST", &complete, &[], &[]).expect(200),
        answer
    );
    let state = service.get(&upload).expect(200);
    assert_eq!(
        (&state["state"], &state["parts"]),
        (&json!("completed"), &json!([]))
    );
    assert_eq!(state["result"], answer);
    put(&service, &upload, 1, parts[0]).problem(409, "upload_not_open");
    let listed = service.get(&format!("{dataset}/uploads")).expect(200);
    assert_eq!(listed["data"][0]["id"], state["id"]);
    let subsets = service.get(&format!("{dataset}/subsets")).expect(200);
    assert_eq!(subsets["data"][0]["name"], "10_lumo");
    service.delete(&upload).expect(204);
    service.get(&upload).problem(404, "upload_not_found");
}

#[test]
fn what_is_wrong_with_an_upload_is_said() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let uploads = format!("{dataset}/uploads");
    for (body, code, pointer) in [
        (
            json!({"name": "", "size_bytes": 1}),
            "invalid_upload",
            "/name",
        ),
        (
            json!({"name": "a", "size_bytes": 0}),
            "invalid_upload",
            "/size_bytes",
        ),
        (
            json!({"name": "a", "size_bytes": 1_u64 << 60}),
            "invalid_upload",
            "/size_bytes",
        ),
        (
            json!({"name": "a", "size_bytes": 1, "sha256": "x"}),
            "invalid_upload",
            "/sha256",
        ),
        (
            json!({"name": "a", "size_bytes": 1, "subset": "a/b"}),
            "invalid_subset",
            "/subset",
        ),
        (
            json!({"name": "a", "size_bytes": 1, "background": "red"}),
            "invalid_subset",
            "/background",
        ),
        (
            json!({"name": "a", "size_bytes": 1, "nmae": 1}),
            "invalid_body",
            "/nmae",
        ),
    ] {
        let problem = service.post(&uploads, &body).problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{body}");
    }
    let upload = begin(
        &service,
        &dataset,
        &json!({"name": "a.zip", "size_bytes": 5, "sha256": sha256(b"right")}),
    );
    put(&service, &upload, 0, b"wrong").problem(422, "invalid_upload");
    put(&service, &upload, 10_001, b"wrong").problem(422, "invalid_upload");
    put(&service, &upload, 1, b"longer than announced").problem(413, "payload_too_large");
    let part = format!("{upload}/parts/1");
    let digest = |bytes: &[u8]| {
        format!(
            "sha-256=:{}:",
            BASE64_STANDARD.encode(Sha256::digest(bytes))
        )
    };
    let send =
        |digest: &str| service.send("PUT", &part, &[BYTES, ("content-digest", digest)], b"wrong");
    send(&digest(b"other")).problem(422, "checksum_mismatch");
    send("sha-256=nonsense").problem(400, "invalid_header");
    send("md5=:AAAA:").expect(200);
    send(&digest(b"wrong")).expect(200);
    let complete = format!("{upload}/complete");
    service
        .send("POST", &complete, &[], &[])
        .problem(422, "checksum_mismatch");
    // another try with the right bytes; they are no archive, which is said of the file
    put(&service, &upload, 1, b"right").expect(200);
    let answer = service.send("POST", &complete, &[], &[]).expect(200);
    assert_eq!(answer["files"][0]["problem"]["code"], "not_an_image");
    // of another dataset it is none
    let other = service.dataset("b");
    let elsewhere = upload.replace(&dataset, &other);
    service.get(&elsewhere).problem(404, "upload_not_found");
    service.delete(&elsewhere).problem(404, "upload_not_found");
    service.delete(&dataset).expect(204);
    service.get(&upload).problem(404, "dataset_not_found");
}

#[test]
fn a_part_without_a_length_is_refused() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let upload = begin(
        &service,
        &dataset,
        &json!({"name": "a.zip", "size_bytes": 5}),
    );
    let head = format!("PUT {upload}/parts/1 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n5\r\nright\r\n0\r\n\r\n");
    let answer = service.raw(chunked.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 411"), "{answer}");
    // a line that breaks leaves no part
    let cut = format!("{head}content-length: 5\r\n\r\nri");
    service.raw(cut.as_bytes());
    let state = service.get(&upload).expect(200);
    assert_eq!(state["parts"], json!([]));
}
