//! `POST /v1/datasets/{dataset_id}/images`: what is taken, what is refused, and what is said about it.

use serde_json::{Value, json};

use crate::support::{Service, png, zip};

fn file<'a>(upload: &'a Value, name: &str) -> &'a Value {
    let mut files = upload["files"].as_array().expect("a list").iter();
    files
        .find(|file| file["name"] == name)
        .unwrap_or_else(|| panic!("{name}: {upload}"))
}

/// File name, subset and caption of every image.
fn listed(service: &Service, images: &str) -> Vec<(String, String, Value)> {
    let page = service.get(&format!("{images}?limit=200")).expect(200);
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let row = |image: &Value| {
        (
            text(&image["file_name"]),
            text(&image["subset"]),
            image["caption"].clone(),
        )
    };
    let mut rows: Vec<_> = page["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(row)
        .collect();
    rows.sort_by(|a, b| (&a.1, &a.0).cmp(&(&b.1, &b.0)));
    rows
}

#[test]
fn loose_files_find_their_captions() {
    let service = Service::start();
    let images = format!("{}/images", service.dataset("a"));
    let (a, b) = (png(1), png(2));
    let files: [(&str, &[u8]); 4] = [
        ("a.txt", b"of a\n"),
        ("a.png", &a),
        ("b.png", &b),
        ("b.caption", b"caf\xe9"),
    ];
    let answer = service.upload(&images, &[("subset", "one"), ("repeats", "3")], &files);
    let upload = answer.expect(201);
    assert_eq!(answer.header("location"), images);
    assert_eq!(
        upload["summary"],
        json!({"images": 2, "captions": 2, "duplicates": 0, "refused": 0, "warnings": 1})
    );
    assert_eq!(
        file(&upload, "a.txt")["image_id"],
        file(&upload, "a.png")["image_id"]
    );
    let latin = file(&upload, "b.caption");
    assert_eq!(
        (&latin["kind"], &latin["outcome"]),
        (&json!("caption"), &json!("accepted"))
    );
    assert_eq!(latin["remarks"][0]["code"], "read_as_windows_1252");
    assert_eq!(
        listed(&service, &images),
        [
            ("a.png".into(), "one".into(), json!("of a")),
            ("b.png".into(), "one".into(), json!("café"))
        ]
    );
}

#[test]
fn a_zip_in_kohya_layout_becomes_subsets() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let images = format!("{dataset}/images");
    let (a, b, r) = (png(1), png(2), png(3));
    let archive = zip(&[
        ("set/10_lumo/a.png", &a),
        ("set/10_lumo/a.txt", b"lumo, red"),
        ("set/10_lumo/b.png", &b),
        ("set/reg/1_robot/r.png", &r),
        ("set/.DS_Store", b"x"),
    ]);
    let upload = service
        .upload(&images, &[], &[("set.zip", &archive)])
        .expect(201);
    assert_eq!(
        upload["summary"],
        json!({"images": 3, "captions": 1, "duplicates": 0, "refused": 0, "warnings": 0})
    );
    assert_eq!(file(&upload, "set.zip")["kind"], "archive");
    assert_eq!(file(&upload, "set/.DS_Store")["outcome"], "ignored");
    let subsets = service.get(&format!("{dataset}/subsets")).expect(200);
    let wanted: Vec<_> = subsets["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|s| {
            json!([
                s["name"],
                s["repeats"],
                s["is_reg"],
                s["instance_prompt"],
                s["class_prompt"],
                s["images"]
            ])
        })
        .collect();
    assert_eq!(
        wanted,
        [
            json!(["10_lumo", 10, false, "lumo", null, 2]),
            json!(["1_robot_reg", 1, true, null, "robot", 1])
        ]
    );
    let got = service.get(&dataset).expect(200);
    assert_eq!(
        (
            &got["subsets"],
            &got["images"],
            &got["reg_images"],
            &got["captioned_images"]
        ),
        (&json!(2), &json!(3), &json!(1), &json!(1))
    );
    let reg = subsets["data"][1]["id"].as_str().expect("an id");
    let page = service
        .get(&format!("{images}?subset_id={reg}"))
        .expect(200);
    assert_eq!(page["data"].as_array().map(Vec::len), Some(1));
    let first = service.get(&format!("{images}?limit=2")).expect(200);
    let cursor = first["next_cursor"].as_str().expect("a next page");
    let rest = service
        .get(&format!("{images}?limit=2&cursor={cursor}"))
        .expect(200);
    assert_eq!(
        (rest["data"].as_array().map(Vec::len), &rest["next_cursor"]),
        (Some(1), &Value::Null)
    );
    service
        .get(&format!("{images}?subset_id=x"))
        .problem(422, "invalid_query");
}

#[test]
fn bad_files_are_named_and_the_others_kept() {
    let service = Service::start();
    let images = format!("{}/images", service.dataset("a"));
    let (good, other) = (png(1), png(2));
    let archive = zip(&[
        ("../evil.png", &other),
        ("0_none/zero.png", &other),
        ("fine.png", &other),
    ]);
    let files: [(&str, &[u8]); 6] = [
        ("good.png", &good),
        ("cut.png", &good[..good.len() - 20]),
        ("cut.txt", b"of nothing"),
        ("words.png", b"not a picture"),
        ("movie.mp4", b"\0\0\0\x18ftypmp42"),
        ("more.zip", &archive),
    ];
    let upload = service.upload(&images, &[], &files).expect(201);
    for (name, code) in [
        ("cut.png", "truncated"),
        ("cut.txt", "no_image"),
        ("words.png", "not_an_image"),
        ("movie.mp4", "not_an_image"),
        ("../evil.png", "unsafe_path"),
        ("0_none/zero.png", "invalid_subset"),
    ] {
        let refused = file(&upload, name);
        assert_eq!(
            (&refused["outcome"], &refused["problem"]["code"]),
            (&json!("refused"), &json!(code)),
            "{refused}"
        );
        assert!(
            !refused["problem"]["message"]
                .as_str()
                .expect("a sentence")
                .is_empty()
        );
    }
    assert_eq!(upload["summary"]["images"], 2);
    let names: Vec<String> = listed(&service, &images)
        .into_iter()
        .map(|row| row.0)
        .collect();
    assert_eq!(names, ["fine.png", "good.png"]);
}

#[test]
fn the_same_again_is_a_duplicate_whose_caption_counts() {
    let service = Service::start();
    let images = format!("{}/images", service.dataset("a"));
    let content = png(1);
    let first = service
        .upload(&images, &[], &[("a.png", &content)])
        .expect(201);
    let files: [(&str, &[u8]); 2] = [("copy.png", &content), ("copy.txt", b"red")];
    let second = service.upload(&images, &[], &files).expect(200);
    let duplicate = file(&second, "copy.png");
    assert_eq!(duplicate["outcome"], "duplicate");
    assert_eq!(duplicate["image_id"], file(&first, "a.png")["image_id"]);
    assert_eq!(
        second["summary"],
        json!({"images": 0, "captions": 1, "duplicates": 1, "refused": 0, "warnings": 0})
    );
    assert_eq!(
        listed(&service, &images),
        [("a.png".into(), "default".into(), json!("red"))]
    );
    // in another subset it is another image
    service
        .upload(&images, &[("subset", "two")], &[("a.png", &content)])
        .expect(201);
    assert_eq!(listed(&service, &images).len(), 2);
}

#[test]
fn a_caption_finds_an_image_that_was_there_before() {
    let service = Service::start();
    let images = format!("{}/images", service.dataset("a"));
    let archive = zip(&[
        ("10_lumo/a.png", &png(1)),
        ("10_lumo/a.txt", b"old"),
        ("2_dog/b.png", &png(2)),
    ]);
    service
        .upload(&images, &[], &[("set.zip", &archive)])
        .expect(201);
    let later: [(&str, &[u8]); 3] = [
        ("a.txt", b"new"),
        ("c.txt", b"of nothing"),
        ("2_dog/a.txt", b"wrong folder"),
    ];
    let upload = service.upload(&images, &[], &later).expect(200);
    let taken = file(&upload, "a.txt");
    assert_eq!(
        (&taken["outcome"], &taken["subset"]),
        (&json!("accepted"), &json!("10_lumo"))
    );
    assert_eq!(file(&upload, "c.txt")["problem"]["code"], "no_image");
    assert_eq!(file(&upload, "2_dog/a.txt")["problem"]["code"], "no_image");
    let captions: Vec<Value> = listed(&service, &images)
        .into_iter()
        .map(|row| row.2)
        .collect();
    assert_eq!(captions, [json!("new"), Value::Null]);
}

#[test]
fn a_form_that_cannot_be_meant_is_refused() {
    let service = Service::start();
    let images = format!("{}/images", service.dataset("a"));
    let content = png(1);
    let upload = |fields: &[(&str, &str)]| service.upload(&images, fields, &[("a.png", &content)]);
    for (field, code, pointer) in [
        (("repeats", "0"), "invalid_subset", "/repeats"),
        (("repeats", "many"), "invalid_body", "/repeats"),
        (("is_reg", "perhaps"), "invalid_body", "/is_reg"),
        (("subset", "a/b"), "invalid_subset", "/subset"),
        (("repaets", "3"), "invalid_body", "/repaets"),
    ] {
        let problem = upload(&[field]).problem(422, code);
        assert_eq!(problem["errors"][0]["pointer"], pointer);
    }
    service
        .upload(&images, &[("subset", "a")], &[])
        .problem(422, "nothing_uploaded");
    let json = [("content-type", "application/json")];
    service
        .send("POST", &images, &json, b"{}")
        .problem(415, "unsupported_media_type");
    let form = [("content-type", "multipart/form-data; boundary=XYZ")];
    let broken =
        b"--XYZ\r\ncontent-disposition: form-data; name=\"f\"; filename=\"a.png\"\r\n\r\nhalf";
    service
        .send("POST", &images, &form, broken)
        .problem(400, "malformed_multipart");
    assert!(listed(&service, &images).is_empty());
}
