//! `/v1/datasets/{dataset_id}/images/{image_id}` and its content.

use serde_json::json;

use crate::support::{Service, png};

/// A dataset with one image; the image's path.
fn with_image(service: &Service) -> String {
    let dataset = service.dataset("a");
    let files: [(&str, &[u8]); 2] = [("a.png", &png(1)), ("a.txt", b"a red one")];
    let upload = service
        .upload(&format!("{dataset}/images"), &[], &files)
        .expect(201);
    format!(
        "{dataset}/images/{}",
        upload["files"][0]["image_id"].as_str().expect("an id")
    )
}

#[test]
fn an_image_tells_what_it_is() {
    let service = Service::start();
    let path = with_image(&service);
    let answer = service.get(&path);
    let image = answer.expect(200);
    for (field, expected) in [
        ("file_name", json!("a.png")),
        ("subset", json!("default")),
        ("caption", json!("a red one")),
        ("media_type", json!("image/png")),
        ("size_bytes", json!(png(1).len())),
        ("width_px", json!(16)),
        ("height_px", json!(12)),
    ] {
        assert_eq!(image[field], expected, "{field}");
    }
    assert_eq!(answer.header("etag"), "\"1\"");
    let elsewhere = path.replace(
        path.split('/').nth(3).expect("a dataset"),
        &service.dataset("b")[13..],
    );
    service.get(&elsewhere).problem(404, "image_not_found");
}

#[test]
fn a_caption_is_patched_at_its_revision() {
    let service = Service::start();
    let path = with_image(&service);
    let etag = service.get(&path).header("etag").to_owned();
    let patched = service.patch(
        &path,
        Some(&etag),
        &json!({"caption": "ein rotes Bild, größer"}),
    );
    assert_eq!(patched.expect(200)["caption"], "ein rotes Bild, größer");
    assert_ne!(patched.header("etag"), etag);
    let late = service.patch(&path, Some(&etag), &json!({"caption": "late"}));
    late.problem(412, "precondition_failed");
    let removed = service
        .patch(&path, None, &json!({"caption": null}))
        .expect(200);
    assert!(removed["caption"].is_null());
    let unknown = service
        .patch(&path, None, &json!({"captoin": "x"}))
        .problem(422, "invalid_body");
    assert_eq!(unknown["errors"][0]["pointer"], "/captoin");
    let lines = service
        .patch(&path, None, &json!({"caption": "a\rb"}))
        .problem(422, "invalid_caption");
    assert_eq!(lines["errors"][0]["pointer"], "/caption");
    let long = service.patch(&path, None, &json!({"caption": "x".repeat(270_000)}));
    long.problem(422, "invalid_caption");
}

#[test]
fn content_comes_whole_in_part_or_not_at_all() {
    let service = Service::start();
    let path = format!("{}/content", with_image(&service));
    let content = png(1);
    let get = |headers: &[(&str, &str)]| service.send("GET", &path, headers, &[]);
    let whole = get(&[]);
    assert_eq!((whole.status, &whole.bytes), (200, &content));
    assert_eq!(whole.header("content-type"), "image/png");
    assert!(whole.header("content-disposition").starts_with("inline"));
    assert!(whole.header("repr-digest").starts_with("sha-256=:"));
    let part = get(&[("range", "bytes=1-3")]);
    assert_eq!((part.status, part.bytes.as_slice()), (206, &b"PNG"[..]));
    assert_eq!(
        part.header("content-range"),
        format!("bytes 1-3/{}", content.len())
    );
    get(&[("range", "bytes=100000-")]).problem(416, "range_not_satisfiable");
    let unchanged = get(&[("if-none-match", whole.header("etag"))]);
    assert_eq!((unchanged.status, unchanged.bytes.len()), (304, 0));
    let head = service.send("HEAD", &path, &[], &[]);
    assert_eq!((head.status, head.bytes.len()), (200, 0));
    assert_eq!(head.header("content-length"), content.len().to_string());
    assert_eq!(head.header("etag"), whole.header("etag"));
}

#[test]
fn a_deleted_image_is_gone_and_can_come_again() {
    let service = Service::start();
    let path = with_image(&service);
    let images = path.rsplit_once('/').expect("a path").0;
    assert_eq!(service.delete(&path).status, 204);
    service.get(&path).problem(404, "image_not_found");
    service.delete(&path).problem(404, "image_not_found");
    let again = service
        .upload(images, &[], &[("a.png", &png(1))])
        .expect(201);
    assert_eq!(again["files"][0]["outcome"], "accepted");
    assert_eq!(
        service.delete(images.trim_end_matches("/images")).status,
        204
    );
    service.get(images).problem(404, "dataset_not_found");
}
