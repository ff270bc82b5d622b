//! What an upload may hold: formats, archives in archives, tables of captions, sd-scripts' settings; many at once; and
//! uploads that break off.

use std::time::{Duration, Instant};

use image::{Rgba, RgbaImage};
use serde_json::{Value, json};

use crate::support::{Service, png, zip};

fn file<'a>(upload: &'a Value, name: &str) -> &'a Value {
    let mut files = upload["files"].as_array().expect("a list").iter();
    files
        .find(|file| file["name"] == name)
        .unwrap_or_else(|| panic!("{name}: {upload}"))
}

fn codes(file: &Value) -> Vec<&str> {
    let remarks = file["remarks"].as_array().expect("a list").iter();
    remarks
        .map(|remark| remark["code"].as_str().expect("a word"))
        .collect()
}

/// Subset, file name and caption of every image, in that order.
fn listed(service: &Service, dataset: &str) -> Vec<(String, String, Value)> {
    let page = service
        .get(&format!("{dataset}/images?limit=200"))
        .expect(200);
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let rows = page["data"].as_array().expect("a list").iter();
    let mut rows: Vec<_> = rows
        .map(|image| {
            (
                text(&image["subset"]),
                text(&image["file_name"]),
                image["caption"].clone(),
            )
        })
        .collect();
    rows.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    rows
}

fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        // By hand, as the library writes no `..`.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).expect("written");
    }
    builder.into_inner().expect("finished")
}

#[test]
fn avif_is_tried_in_a_process_of_its_own() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let whole = include_bytes!("../fixtures/avif/alpha.avif").as_slice();
    let turned = include_bytes!("../fixtures/avif/turned-6.avif").as_slice();
    let files = [
        ("a.avif", whole),
        ("turned.avif", turned),
        ("cut.avif", &whole[..whole.len() / 2]),
    ];
    let upload = service
        .upload(
            &format!("{dataset}/images"),
            &[("background", "#ffffff")],
            &files,
        )
        .expect(201);
    assert_eq!(upload["summary"]["images"], 2, "{upload}");
    assert_eq!(codes(file(&upload, "a.avif")), ["transparent"]);
    assert_eq!(file(&upload, "cut.avif")["outcome"], "refused");
    let page = service.get(&format!("{dataset}/images")).expect(200);
    let image = |name: &str| {
        let mut images = page["data"].as_array().expect("a list").iter();
        images
            .find(|image| image["file_name"] == name)
            .expect("listed")
            .clone()
    };
    let (a, turned) = (image("a.avif"), image("turned.avif"));
    assert_eq!(
        (&a["media_type"], &a["has_alpha"]),
        (&json!("image/avif"), &json!(true))
    );
    assert_eq!(a["background"], "#ffffff");
    assert_eq!(
        (&turned["width_px"], &turned["height_px"]),
        (&json!(29), &json!(41))
    );
    assert_eq!(
        (&turned["has_alpha"], &turned["background"]),
        (&json!(false), &Value::Null)
    );
}

#[test]
fn what_was_done_to_a_picture_is_remarked() {
    let service = Service::start();
    let images = format!("{}/images", service.dataset("a"));
    let mut glass = std::io::Cursor::new(Vec::new());
    RgbaImage::from_pixel(8, 8, Rgba([1, 2, 3, 4]))
        .write_to(&mut glass, image::ImageFormat::Png)
        .expect("an encoder");
    let mut polyglot = png(1);
    polyglot.extend(zip(&[("x.png", &png(2))]));
    let files = [
        ("glass.png", glass.get_ref().as_slice()),
        ("polyglot.png", &polyglot),
    ];
    let upload = service.upload(&images, &[], &files).expect(201);
    assert_eq!(codes(file(&upload, "glass.png")), ["transparent"]);
    assert_eq!(codes(file(&upload, "polyglot.png")), ["trailing_bytes"]);
    assert_eq!(upload["summary"]["images"], 2);
    let wrong = service.upload(&images, &[("background", "white")], &files);
    let problem = wrong.problem(422, "invalid_subset");
    assert_eq!(problem["errors"][0]["pointer"], "/background");
}

#[test]
fn archives_may_lie_in_archives() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let images = format!("{dataset}/images");
    let inner = tar(&[
        ("a.png", &png(1)),
        ("a.txt", b"of a"),
        ("../evil.png", &png(9)),
    ]);
    let middle = zip(&[("2_dog/more.tar", &inner), ("2_dog/b.png", &png(2))]);
    let outer = tar(&[("set/middle.zip", &middle), ("set/10_lumo/c.png", &png(3))]);
    let upload = service
        .upload(&images, &[], &[("set.tar", &outer)])
        .expect(201);
    let evil = file(&upload, "set/middle.zip/2_dog/more.tar/../evil.png");
    assert_eq!(evil["problem"]["code"], "unsafe_path");
    let expected = [
        ("10_lumo".to_owned(), "c.png".to_owned(), Value::Null),
        ("2_dog".to_owned(), "a.png".to_owned(), json!("of a")),
        ("2_dog".to_owned(), "b.png".to_owned(), Value::Null),
    ];
    assert_eq!(listed(&service, &dataset), expected);

    let mut deep = png(4);
    for level in 0..6 {
        deep = zip(&[(&format!("{level}.zip"), &deep)]);
    }
    let upload = service
        .upload(&images, &[], &[("deep.zip", &deep)])
        .expect(200);
    let codes: Vec<_> = upload["files"].as_array().expect("a list").iter().collect();
    let last = codes.last().expect("a file");
    assert_eq!(last["problem"]["code"], "too_deep", "{upload}");
}

#[test]
fn tables_and_settings_say_what_files_are() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let images = format!("{dataset}/images");
    let settings = br#"
        [general]
        caption_extension = ".tags"
        flip_aug = true
        keep_tokens = 2
        alpha_mask = true
        [[datasets]]
        resolution = 512
        [[datasets.subsets]]
        image_dir = "/home/me/data/lumo"
        num_repeats = 7
        class_tokens = "lumo robot"
        [[datasets.subsets]]
        image_dir = "/home/me/data/robots"
        is_reg = true
        class_tokens = "robot"
        [[datasets.subsets]]
        image_dir = "/home/me/data/nothing"
    "#;
    let table = b"{\"file_name\": \"b.png\", \"text\": \"from the table\"}\n{\"file_name\": \"a.png\", \"text\": \"no\"}\n\
                  {\"file_name\": \"gone.png\", \"text\": \"x\"}\nnonsense\n";
    let archive = zip(&[
        ("set/config.toml", settings.as_slice()),
        ("set/lumo/a.png", &png(1)),
        ("set/lumo/a.tags", b"from the file"),
        ("set/lumo/b.png", &png(2)),
        ("set/lumo/metadata.jsonl", table),
        ("set/robots/c.png", &png(3)),
        ("set/other/d.png", &png(4)),
        ("set/other/d.tags", b"not asked for"),
    ]);
    let upload = service
        .upload(&images, &[], &[("set.zip", &archive)])
        .expect(201);
    let expected = [
        ("lumo", "a.png", json!("from the file")),
        ("lumo", "b.png", json!("from the table")),
        ("other", "d.png", Value::Null),
        ("robots", "c.png", Value::Null),
    ]
    .map(|(subset, name, caption)| (subset.to_owned(), name.to_owned(), caption));
    assert_eq!(listed(&service, &dataset), expected);
    let subsets = service.get(&format!("{dataset}/subsets")).expect(200);
    let subset = |name: &str| {
        let mut subsets = subsets["data"].as_array().expect("a list").iter();
        let subset = subsets
            .find(|subset| subset["name"] == name)
            .expect("there");
        json!([
            subset["repeats"],
            subset["is_reg"],
            subset["instance_prompt"],
            subset["class_prompt"],
            subset["augment"]["flip_aug"],
            subset["captions"]["keep_tokens"],
        ])
    };
    assert_eq!(
        subset("lumo"),
        json!([7, false, "lumo robot", null, true, 2])
    );
    assert_eq!(subset("robots"), json!([1, true, null, "robot", true, 2]));
    let config = file(&upload, "set/config.toml");
    assert_eq!(
        (&config["kind"], &config["outcome"]),
        (&json!("metadata"), &json!("accepted"))
    );
    assert_eq!(
        codes(config),
        ["setting_not_kept", "setting_of_runs", "no_folder"]
    );
    assert_eq!(
        codes(file(&upload, "set/lumo/metadata.jsonl")),
        ["rows_left_out", "no_image"]
    );
    assert_eq!(
        file(&upload, "set/other/d.tags")["problem"]["code"],
        "not_an_image"
    );
}

#[test]
fn strange_captions_and_names_are_answered() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let utf16: Vec<u8> = "\u{feff}Größe, 猫"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let bare: Vec<u8> = "a small robot"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let tags = (0..10_000)
        .map(|n| format!("tag number {n}"))
        .collect::<Vec<_>>()
        .join(", ");
    let shades: Vec<Vec<u8>> = (1..=6).map(png).collect();
    let archive = zip(&[
        ("猫/ねこ.png", &shades[0]),
        ("猫/ねこ.txt", &utf16),
        ("猫/Same.png", &shades[1]),
        ("猫/Same.txt", b"upper"),
        ("猫/same.png", &shades[2]),
        ("猫/same.txt", b"lower"),
        ("猫/кот.png", &shades[3]),
        ("猫/кот.txt", tags.as_bytes()),
        ("猫/nul.png", &shades[4]),
        ("猫/nul.txt", b"a\0b"),
        ("猫/قط.png", &shades[5]),
        ("猫/قط.txt", &bare),
    ]);
    let upload = service
        .upload(&format!("{dataset}/images"), &[], &[("x.zip", &archive)])
        .expect(201);
    assert_eq!(upload["summary"]["images"], 6);
    assert_eq!(file(&upload, "猫/nul.txt")["problem"]["code"], "not_text");
    assert_eq!(codes(file(&upload, "猫/قط.txt")), ["read_as_utf_16"]);
    let captions: Vec<(String, Value)> = listed(&service, &dataset)
        .into_iter()
        .map(|row| (row.1, row.2))
        .collect();
    let caption = |name: &str| {
        let found = captions.iter().find(|(file_name, _)| file_name == name);
        found.expect("listed").1.clone()
    };
    assert_eq!(caption("ねこ.png"), "Größe, 猫");
    assert_eq!(
        (caption("Same.png"), caption("same.png")),
        (json!("upper"), json!("lower"))
    );
    assert_eq!(caption("кот.png"), tags.as_str());
    assert_eq!(caption("nul.png"), Value::Null);
    assert_eq!(caption("قط.png"), "a small robot");
}

/// Each client sends four pictures: one that all send, one that its neighbour sends too, and two of its own.
#[test]
fn many_uploads_at_once_lose_nothing_and_double_nothing() {
    const CLIENTS: usize = 40;
    let service = Service::start_with(|config| config.rate_limit_per_s = 0);
    let dataset = service.dataset("a");
    let images = format!("{dataset}/images");
    let picture = |number: usize| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let colour = image::Rgb([number as u8, (number >> 8) as u8, 7]);
        image::RgbImage::from_pixel(8, 8, colour)
            .write_to(&mut bytes, image::ImageFormat::Png)
            .expect("an encoder");
        bytes.into_inner()
    };
    let taken: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (service, images) = (&service, &images);
                scope.spawn(move || {
                    let numbers = [0, 1 + client / 2, 1000 + client, 2000 + client];
                    let pictures = numbers.map(picture);
                    let names = numbers.map(|number| format!("{number}.png"));
                    let files: Vec<(&str, &[u8])> = names
                        .iter()
                        .zip(&pictures)
                        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
                        .collect();
                    let answer = service.upload(images, &[("subset", "one")], &files);
                    let upload = answer.expect(201);
                    assert_eq!(upload["summary"]["refused"], 0);
                    upload["summary"]["images"].as_u64().expect("a number") as usize
                })
            })
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("an upload"))
            .sum()
    });
    let expected = 1 + CLIENTS / 2 + 2 * CLIENTS;
    assert_eq!(taken, expected);
    let found = service.get(&dataset).expect(200);
    assert_eq!(
        (&found["images"], &found["subsets"]),
        (&json!(expected), &json!(1))
    );
}

#[test]
fn an_upload_that_breaks_off_leaves_nothing() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let content = png(1);
    let mut body = format!(
        "POST {dataset}/images HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\
         content-type: multipart/form-data; boundary=XYZ\r\n\r\n"
    )
    .into_bytes();
    for name in ["a.png", "b.png"] {
        body.extend(
            format!(
                "--XYZ\r\ncontent-disposition: form-data; name=\"f\"; filename=\"{name}\"\r\n\r\n"
            )
            .bytes(),
        );
        body.extend(&content);
        body.extend(b"\r\n");
    }
    service.raw(&body);
    let begun = Instant::now();
    while std::fs::read_dir(service.data_dir().join("scratch"))
        .expect("there")
        .count()
        > 0
    {
        assert!(begun.elapsed() < Duration::from_secs(10), "files are left");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(listed(&service, &dataset).is_empty());
}
