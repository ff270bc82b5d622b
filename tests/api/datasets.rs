//! `/v1/datasets` and `/v1/datasets/{dataset_id}/subsets`.

use serde_json::json;

use crate::support::{Service, png};

const NOBODY: &str = "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11";

#[test]
fn datasets_are_made_listed_and_deleted() {
    let service = Service::start();
    let made = service.post("/v1/datasets", &json!({"name": "lumo"}));
    let dataset = made.expect(201);
    let path = made.header("location").to_owned();
    assert_eq!(
        path,
        format!("/v1/datasets/{}", dataset["id"].as_str().expect("an id"))
    );
    assert_eq!(
        (&dataset["name"], &dataset["images"]),
        (&json!("lumo"), &json!(0))
    );
    let created = dataset["created_at"].as_str().expect("a time");
    assert!(created.ends_with('Z') && created.contains('T'), "{created}");
    let got = service.get(&path);
    assert_eq!((got.expect(200), got.header("etag")), (dataset, "\"1\""));

    for name in ["b", "c"] {
        service.dataset(name);
    }
    let first = service.get("/v1/datasets?limit=2").expect(200);
    let cursor = first["next_cursor"].as_str().expect("a next page");
    let rest = service
        .get(&format!("/v1/datasets?limit=2&cursor={cursor}"))
        .expect(200);
    let names = |page: &serde_json::Value| -> Vec<String> {
        let data = page["data"].as_array().expect("a list").iter();
        data.map(|dataset| dataset["name"].as_str().expect("a name").to_owned())
            .collect()
    };
    assert_eq!(
        (names(&first), names(&rest)),
        (vec!["lumo".into(), "b".into()], vec!["c".into()])
    );
    assert!(rest["next_cursor"].is_null());

    assert_eq!(service.delete(&path).status, 204);
    service.get(&path).problem(404, "dataset_not_found");
    service.delete(&path).problem(404, "dataset_not_found");
}

#[test]
fn what_has_changed_meanwhile_is_not_deleted() {
    let service = Service::start();
    let path = service.dataset("lumo");
    let images = format!("{path}/images");
    let upload = service.upload(&images, &[], &[("a.png", &png(1))]);
    let id = upload.expect(201)["files"][0]["image_id"].clone();
    let image = format!("{images}/{}", id.as_str().expect("an id"));
    service
        .delete_if_match(&path, "\"1\"")
        .problem(412, "precondition_failed");
    let seen = service.get(&image).header("etag").to_owned();
    let caption = service.patch(&image, None, &json!({"caption": "lumo"}));
    assert_ne!(caption.header("etag"), seen);
    service
        .delete_if_match(&image, &seen)
        .problem(412, "precondition_failed");
    for path in [&image, &path] {
        let current = service.get(path).header("etag").to_owned();
        assert_eq!(service.delete_if_match(path, &current).status, 204);
        service.delete_if_match(path, "*").expect(404);
    }
}

#[test]
fn wrong_values_are_named() {
    let service = Service::start();
    let post = |body| service.post("/v1/datasets", &body);
    let field = |problem: &serde_json::Value| {
        let error = &problem["errors"][0];
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        (text(&error["pointer"]), text(&error["code"]))
    };
    let unknown = post(json!({"name": "a", "nmae": "b"})).problem(422, "invalid_body");
    assert_eq!(field(&unknown), ("/nmae".into(), "unknown_field".into()));
    assert_eq!(unknown["instance"], "/v1/datasets");
    let missing = post(json!({})).problem(422, "invalid_body");
    assert_eq!(field(&missing), ("/name".into(), "missing_field".into()));
    let number = post(json!({"name": 3})).problem(422, "invalid_body");
    assert_eq!(field(&number), ("/name".into(), "wrong_type".into()));
    let empty = post(json!({"name": ""})).problem(422, "invalid_dataset");
    assert_eq!(field(&empty), ("/name".into(), "out_of_range".into()));
    let headers = [("content-type", "application/json")];
    service
        .send("POST", "/v1/datasets", &headers, b"{")
        .problem(400, "malformed_json");
    let headers = [("content-type", "text/plain")];
    service
        .send("POST", "/v1/datasets", &headers, b"{}")
        .problem(415, "unsupported_media_type");
    service
        .get("/v1/datasets?limit=0")
        .problem(422, "invalid_query");
    service
        .get("/v1/datasets?limti=1")
        .problem(422, "invalid_query");
    service
        .get("/v1/datasets?cursor=x")
        .problem(422, "invalid_cursor");
}

#[test]
fn what_is_not_there_says_what_it_is_not() {
    let service = Service::start();
    let dataset = service.dataset("a");
    for (path, code) in [
        (format!("/v1/datasets/{NOBODY}"), "dataset_not_found"),
        (
            format!("/v1/datasets/{NOBODY}/subsets"),
            "dataset_not_found",
        ),
        (format!("/v1/datasets/{NOBODY}/images"), "dataset_not_found"),
        (format!("{dataset}/subsets/{NOBODY}"), "subset_not_found"),
        (format!("{dataset}/images/{NOBODY}"), "image_not_found"),
        (
            format!("{dataset}/images/{NOBODY}/content"),
            "image_not_found",
        ),
        ("/v1/datasets/no-uuid".to_owned(), "not_found"),
        ("/v1/nothing".to_owned(), "not_found"),
    ] {
        let problem = service.get(&path).problem(404, code);
        assert_eq!(problem["instance"], path.as_str());
    }
    let upload = service.upload(
        &format!("/v1/datasets/{NOBODY}/images"),
        &[],
        &[("a.png", &png(1))],
    );
    upload.problem(404, "dataset_not_found");
}

#[test]
fn other_methods_are_told_which_there_are() {
    let service = Service::start();
    let dataset = service.dataset("a");
    for (method, path, allowed) in [
        ("PUT", "/v1/datasets".to_owned(), "GET, POST"),
        ("PUT", dataset.clone(), "DELETE, GET, PATCH"),
        ("DELETE", format!("{dataset}/images"), "GET, POST"),
        (
            "POST",
            format!("{dataset}/images/{NOBODY}"),
            "DELETE, GET, PATCH",
        ),
        (
            "POST",
            format!("{dataset}/images/{NOBODY}/content"),
            "GET, HEAD",
        ),
    ] {
        let answer = service.send(method, &path, &[], b"{}");
        answer.problem(405, "method_not_allowed");
        assert_eq!(answer.header("allow"), allowed, "{method} {path}");
    }
}

#[test]
fn an_idempotency_key_replays_the_first_answer() {
    let service = Service::start();
    let post = |key: &str, name: &str| {
        service.post_with(
            "/v1/datasets",
            &[("idempotency-key", key)],
            &json!({"name": name}),
        )
    };
    let first = post("k1", "a");
    let again = post("k1", "a");
    assert_eq!(first.expect(201), again.expect(201));
    assert_eq!(first.header("location"), again.header("location"));
    assert_eq!(first.header("content-type"), again.header("content-type"));
    assert_eq!(
        (
            first.header("idempotency-replayed"),
            again.header("idempotency-replayed")
        ),
        ("", "true")
    );
    post("k1", "b").problem(422, "idempotency_key_reused");
    post(&"k".repeat(256), "b").problem(400, "invalid_header");
    post("k2", "").problem(422, "invalid_dataset");
    post("k2", "fixed").expect(201); // what has failed leaves its key free
    let listed = service.get("/v1/datasets").expect(200);
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_subset_is_patched_at_its_revision() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let fields = [("subset", "10_lumo"), ("class_prompt", "robot")];
    service
        .upload(&format!("{dataset}/images"), &fields, &[("a.png", &png(1))])
        .expect(201);
    let subsets = service.get(&format!("{dataset}/subsets")).expect(200);
    let subset = &subsets["data"][0];
    assert_eq!(
        (
            &subset["name"],
            &subset["repeats"],
            &subset["instance_prompt"],
            &subset["images"]
        ),
        (&json!("10_lumo"), &json!(10), &json!("lumo"), &json!(1))
    );
    let path = format!(
        "{dataset}/subsets/{}",
        subset["id"].as_str().expect("an id")
    );
    let etag = service.get(&path).header("etag").to_owned();
    let patched = service.patch(
        &path,
        Some(&etag),
        &json!({"repeats": 5, "class_prompt": null}),
    );
    let subset = patched.expect(200);
    assert_eq!(
        (
            &subset["repeats"],
            &subset["class_prompt"],
            &subset["instance_prompt"]
        ),
        (&json!(5), &json!(null), &json!("lumo"))
    );
    assert_ne!(patched.header("etag"), etag);
    service
        .patch(&path, Some(&etag), &json!({"repeats": 6}))
        .problem(412, "precondition_failed");
    let wrong = service
        .patch(&path, None, &json!({"repeats": 0}))
        .problem(422, "invalid_subset");
    assert_eq!(wrong["errors"][0]["pointer"], "/repeats");
    let wrong = service
        .patch(&path, None, &json!({"repeats": null}))
        .problem(422, "invalid_body");
    assert_eq!(wrong["errors"][0]["pointer"], "/repeats");
    service
        .patch(&path, None, &json!({"reg": true}))
        .problem(422, "invalid_body");
    service
        .upload(
            &format!("{dataset}/images"),
            &[("subset", "dog")],
            &[("b.png", &png(2))],
        )
        .expect(201);
    service
        .patch(&path, None, &json!({"name": "dog"}))
        .problem(409, "subset_exists");
}
