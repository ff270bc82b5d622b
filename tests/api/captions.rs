//! Many captions at once, their history and tags; settings of subsets; datasets exported, pinned and compared.

use std::io::{Cursor, Read as _};

use serde_json::{Value, json};

use crate::runs::{settings, short, start, wait};
use crate::support::{Service, png, zip};

/// A subject, its regularization, and settings of their training.
fn lumo(service: &Service) -> String {
    let dataset = service.dataset("lumo");
    let pictures: Vec<Vec<u8>> = (1..=5).map(png).collect();
    let archive = zip(&[
        ("10_lumo/a.png", &pictures[0]),
        ("10_lumo/a.txt", b"red_robot, Lumo, smiling"),
        ("10_lumo/b.png", &pictures[1]),
        ("10_lumo/b.txt", b"smiling, smiling, blue"),
        ("10_lumo/c.png", &pictures[2]),
        ("reg/1_robot/d.png", &pictures[3]),
        ("reg/1_robot/d.txt", b"a robot, smiling"),
        ("reg/1_robot/e.png", &pictures[4]),
    ]);
    let uploaded = service.upload(&format!("{dataset}/images"), &[], &[("l.zip", &archive)]);
    uploaded.expect(201);
    dataset
}

fn captions(service: &Service, dataset: &str) -> Vec<Value> {
    let images = service.get(&format!("{dataset}/images")).expect(200);
    let images = images["data"].as_array().expect("a list").clone();
    images
        .into_iter()
        .map(|image| image["caption"].clone())
        .collect()
}

fn batch(service: &Service, dataset: &str, body: &Value) -> Value {
    service
        .post(&format!("{dataset}/captions:batch"), body)
        .expect(200)
}

#[test]
fn captions_are_changed_tried_out_and_undone() {
    let service = Service::start();
    let dataset = lumo(&service);
    let before = captions(&service, &dataset);
    let mut body = json!({
        "operations": [
            {"op": "underscores_to_spaces"}, {"op": "dedupe_tags"}, {"op": "instance_prompt_first"}
        ],
        "dry_run": true
    });
    let tried = batch(&service, &dataset, &body);
    assert_eq!(
        (&tried["changed"], &tried["skipped"]),
        (&json!(3), &json!(2)),
        "{tried}"
    );
    assert_eq!(
        (&tried["revision"], captions(&service, &dataset)),
        (&Value::Null, before.clone())
    );
    assert_eq!(tried["images"][0]["after"], "lumo, red robot, smiling");
    assert_eq!(tried["images"][3]["skipped"]["code"], "regularization");

    body["dry_run"] = json!(false);
    let done = batch(&service, &dataset, &body);
    assert_eq!(done["images"], tried["images"]);
    let expected = [
        json!("lumo, red robot, smiling"),
        json!("lumo, smiling, blue"),
        json!("lumo"),
        json!("a robot, smiling"),
        Value::Null,
    ];
    assert_eq!(captions(&service, &dataset), expected);
    // Once more changes nothing.
    let again = batch(&service, &dataset, &body);
    assert_eq!(
        (&again["changed"], &again["revision"]),
        (&json!(0), &Value::Null)
    );

    // One is changed since, and stays when the batch is undone.
    let images = service.get(&format!("{dataset}/images")).expect(200);
    let image = |index: usize| {
        let id = images["data"][index]["id"].as_str().expect("an id");
        format!("{dataset}/images/{id}")
    };
    service
        .patch(&image(1), None, &json!({"caption": "mine"}))
        .expect(200);
    let undo = json!({"revision": done["revision"]});
    let undone = service
        .post(&format!("{dataset}/captions:undo"), &undo)
        .expect(200);
    assert_eq!(undone["changed_since"], json!([images["data"][1]["id"]]));
    let now = captions(&service, &dataset);
    assert_eq!(
        (&now[0], &now[1], &now[2]),
        (&before[0], &json!("mine"), &before[2])
    );

    let history = service.get(&format!("{}/captions", image(0))).expect(200);
    let kinds: Vec<&Value> = history["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|c| &c["kind"])
        .collect();
    assert_eq!(kinds, ["batch", "undo"]);
    assert_eq!(history["data"][0]["before"], before[0]);
    assert_eq!(history["data"][0]["undone"], true);
    let nothing = json!({"revision": 99_999});
    service
        .post(&format!("{dataset}/captions:undo"), &nothing)
        .problem(409, "nothing_to_undo");
}

#[test]
fn regularization_does_without_the_subject() {
    let service = Service::start();
    let dataset = lumo(&service);
    let body = json!({"operations": [{"op": "prepend", "text": "LUMO"}]});
    let done = batch(&service, &dataset, &body);
    assert_eq!((&done["changed"], &done["skipped"]), (&json!(3), &json!(2)));
    let code = &done["images"][4]["skipped"]["code"];
    assert_eq!(code, "instance_prompt_in_regularization");
    let images = service.get(&format!("{dataset}/images")).expect(200);
    let path = format!(
        "{dataset}/images/{}",
        images["data"][3]["id"].as_str().expect("an id")
    );
    let refused = service.patch(&path, None, &json!({"caption": "a lumo robot"}));
    let problem = refused.problem(422, "instance_prompt_in_regularization");
    assert_eq!(problem["errors"][0]["pointer"], "/caption");
    service
        .patch(&path, None, &json!({"caption": "a robot"}))
        .expect(200);
}

#[test]
fn wrong_operations_are_named() {
    let service = Service::start();
    let dataset = lumo(&service);
    let path = format!("{dataset}/captions:batch");
    for (operation, pointer) in [
        (json!({"op": "prepend"}), "/operations/0/text"),
        (json!({"op": "clean", "tag": "x"}), "/operations/0/tag"),
        (
            json!({"op": "replace_regex", "find": "("}),
            "/operations/0/find",
        ),
        (
            json!({"op": "limit_tags", "count": 99_999}),
            "/operations/0/count",
        ),
    ] {
        let body = json!({"operations": [operation]});
        let problem = service
            .post(&path, &body)
            .problem(422, "invalid_operations");
        assert_eq!(problem["errors"][0]["pointer"], pointer);
    }
    service
        .post(&path, &json!({"operations": []}))
        .problem(422, "invalid_operations");
    let body = json!({"operations": [{"op": "clean"}]});
    let headers = [("if-match", "\"1\"")];
    service
        .post_with(&path, &headers, &body)
        .problem(412, "precondition_failed");
}

#[test]
fn tags_are_counted_and_images_found_by_them() {
    let service = Service::start();
    let dataset = lumo(&service);
    let tags = service.get(&format!("{dataset}/tags")).expect(200);
    let first = &tags["tags"][0];
    assert_eq!(
        (&first["tag"], &first["captions"]),
        (&json!("smiling"), &json!(3))
    );
    assert_eq!(first["subsets"].as_array().map(Vec::len), Some(2));
    let with = service
        .get(&format!("{dataset}/tags?with=lumo"))
        .expect(200);
    assert_eq!(
        (&with["captions"], &with["distinct"]),
        (&json!(1), &json!(3))
    );
    let found = |query: &str| {
        let page = service
            .get(&format!("{dataset}/images?{query}"))
            .expect(200);
        page["data"].as_array().expect("a list").len()
    };
    assert_eq!(found("tag=SMILING"), 3);
    assert_eq!(found("text=robot"), 2);
    assert_eq!(found("captioned=false"), 2);
    assert_eq!(found("tag=smiling&text=blue"), 1);
    let page = service
        .get(&format!("{dataset}/images?tag=smiling&limit=2"))
        .expect(200);
    let cursor = page["next_cursor"].as_str().expect("a next page");
    assert_eq!(found(&format!("tag=smiling&limit=2&cursor={cursor}")), 1);
}

#[test]
fn an_export_comes_back_as_it_was() {
    let service = Service::start();
    let dataset = lumo(&service);
    let subsets = service.get(&format!("{dataset}/subsets")).expect(200);
    let subset = |index: usize| {
        let id = subsets["data"][index]["id"].as_str().expect("an id");
        format!("{dataset}/subsets/{id}")
    };
    let patch = json!({
        "name": "the subject", "captions": {"shuffle_captions": true, "keep_tokens": 2}, "augment": {"flip_aug": false}
    });
    let patched = service.patch(&subset(0), None, &patch).expect(200);
    assert_eq!(patched["captions"]["keep_tokens"], 2);
    let wrong = json!({"captions": {"caption_dropout_rate": 2}});
    let wrong = service
        .patch(&subset(0), None, &wrong)
        .problem(422, "invalid_subset");
    assert_eq!(
        wrong["errors"][0]["pointer"],
        "/captions/caption_dropout_rate"
    );
    let pictures = [png(6), png(7)];
    let files = [
        ("con.png", pictures[0].as_slice()),
        ("a?b.png", &pictures[1]),
    ];
    let fields = [
        ("subset", "odd: names"),
        ("instance_prompt", "what? is: it"),
    ];
    let uploaded = service.upload(&format!("{dataset}/images"), &fields, &files);
    uploaded.expect(201);

    let archive = service.get(&format!("{dataset}/export"));
    assert_eq!(
        (archive.status, archive.header("content-type")),
        (200, "application/zip")
    );
    let mut names = Vec::new();
    let mut zip = zip::ZipArchive::new(Cursor::new(&archive.bytes)).expect("an archive");
    for index in 0..zip.len() {
        let entry = zip.by_index(index).expect("an entry");
        names.push(entry.name().expect("UTF-8").into_owned());
    }
    for name in [
        "lorasmith.json",
        "lorasmith.toml",
        "10_lumo/a.png",
        "10_lumo/a.txt",
        "10_lumo/c.png",
        "reg/1_robot/d.txt",
        "1_what_ is_ it/_con.png",
        "1_what_ is_ it/_con.txt",
        "1_what_ is_ it/a_b.png",
    ] {
        assert!(
            names.iter().any(|found| found == name),
            "{name} of {names:?}"
        );
    }
    let mut text = String::new();
    let mut entry = zip.by_name("lorasmith.toml").expect("an entry");
    entry.read_to_string(&mut text).expect("text");
    for line in [
        "image_dir = \"10_lumo\"",
        "num_repeats = 10",
        "keep_tokens = 2",
        "is_reg = true",
    ] {
        assert!(text.contains(line), "{line} of {text}");
    }

    let copy = service.dataset("copy");
    let upload = service.upload(&format!("{copy}/images"), &[], &[("x.zip", &archive.bytes)]);
    let upload = upload.expect(201);
    assert_eq!(upload["summary"]["refused"], 0, "{upload}");
    let of = |dataset: &str, what: &str, fields: &[&str]| -> Vec<Vec<Value>> {
        let page = service.get(&format!("{dataset}/{what}")).expect(200);
        let rows = page["data"].as_array().expect("a list").clone();
        let row = |row: Value| fields.iter().map(|field| row[*field].clone()).collect();
        rows.into_iter().map(row).collect()
    };
    let fields = ["subset", "file_name", "caption", "sha256"];
    assert_eq!(
        of(&copy, "images", &fields),
        of(&dataset, "images", &fields)
    );
    let fields = [
        "name",
        "repeats",
        "is_reg",
        "instance_prompt",
        "class_prompt",
        "captions",
        "augment",
    ];
    assert_eq!(
        of(&copy, "subsets", &fields),
        of(&dataset, "subsets", &fields)
    );
    // And once more: the same bytes but for times.
    let again = service.get(&format!("{copy}/export"));
    assert_eq!(
        again.bytes.len(),
        archive.bytes.len() + "copy".len() - "lumo".len()
    );
}

#[test]
fn a_run_keeps_the_dataset_that_it_was_made_with() {
    let service = Service::start_with(settings);
    let dataset = lumo(&service);
    let subsets = service.get(&format!("{dataset}/subsets")).expect(200);
    let subset = format!(
        "{dataset}/subsets/{}",
        subsets["data"][0]["id"].as_str().expect("an id")
    );
    let patch = json!({"captions": {"shuffle_captions": true, "caption_tag_dropout_rate": 0.5}});
    service.patch(&subset, None, &patch).expect(200);
    let more = json!({
        "text_encoder_lr": 0, "max_train_steps": 3, "captions": {"caption_prefix": "photo of", "enable_wildcards": true}
    });
    let plan = service
        .post("/v1/runs:plan", &short(&dataset, &more))
        .expect(200);
    let planned = &plan["subsets"];
    assert_eq!(
        (
            &planned[0]["images_per_epoch"],
            &planned[1]["images_per_epoch"]
        ),
        (&json!(30), &json!(30)),
        "{plan}"
    );
    let formula = plan["formula"].as_str().expect("words");
    assert!(
        formula.contains("10_lumo: 3 × 10 = 30, 1_robot_reg: 2 × 1 balanced to 30"),
        "{formula}"
    );

    let run = start(&service, &dataset, &more);
    wait(&service, &run, "succeeded");
    let pinned = service.get(&format!("{run}/dataset")).expect(200);
    assert_eq!(pinned["images"][2]["caption"], "lumo");
    assert_eq!(pinned["images"][2]["captioned_by_prompt"], true);
    assert_eq!(pinned["subsets"][0]["captions"]["shuffle_captions"], true);
    let diff = |with: &str| {
        service
            .get(&format!("{run}/dataset/diff?with={with}"))
            .expect(200)
    };
    assert_eq!(diff("current")["identical"], true);

    let images = service.get(&format!("{dataset}/images")).expect(200);
    let image = |index: usize| {
        let id = images["data"][index]["id"].as_str().expect("an id");
        format!("{dataset}/images/{id}")
    };
    service
        .patch(&image(0), None, &json!({"caption": "other"}))
        .expect(200);
    service
        .patch(&subset, None, &json!({"repeats": 5}))
        .expect(200);
    assert_eq!(service.delete(&image(1)).status, 204);
    let changed = diff("current");
    assert_eq!(
        (&changed["images_removed"], &changed["captions_changed"]),
        (&json!(1), &json!(1))
    );
    let repeats = json!([{"what": "10_lumo/repeats", "before": "10", "after": "5"}]);
    assert_eq!(changed["subsets"], repeats);
    // What was pinned is as it was, the deleted image too.
    assert_eq!(service.get(&format!("{run}/dataset")).expect(200), pinned);
    let archive = service.get(&format!("{run}/dataset/export"));
    let zip = zip::ZipArchive::new(Cursor::new(&archive.bytes)).expect("an archive");
    assert!(
        zip.file_names()
            .any(|name| name.is_ok_and(|name| name == "10_lumo/b.png"))
    );

    let again = start(&service, &dataset, &json!({"max_train_steps": 1}));
    let other = diff(again.rsplit('/').next().expect("an id"));
    let settings = other["settings"].as_array().expect("a list");
    assert!(
        settings
            .iter()
            .any(|found| found["what"] == "captions/caption_prefix"),
        "{other}"
    );
    service
        .get(&format!("{run}/dataset/diff?with=nobody"))
        .problem(422, "invalid_query");
    wait(&service, &again, "succeeded");
}
