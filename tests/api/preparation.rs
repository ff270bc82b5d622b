//! `/v1/datasets/{dataset_id}/preview` and `/report`, thumbnails, and colours that are corrected without a changed file.

use std::io::Cursor;

use image::{ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};

use crate::support::{Answer, Service, png};

/// A PNG with something to see in it, `left` pixels from the left.
fn scene(width: u32, height: u32, left: u32) -> Vec<u8> {
    let picture = RgbImage::from_fn(width, height, |x, y| {
        let inside = (left..left + 60).contains(&x);
        let value = if inside {
            (x * 37 + y * 91) % 200
        } else {
            120 + x % 7
        };
        Rgb([value as u8, (value / 2) as u8, 70])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, ImageFormat::Png)
        .expect("an encoder");
    bytes.into_inner()
}

/// Uploads pictures to a subset with the prompt `lumo`; the ids of the images.
fn upload(service: &Service, dataset: &str, files: &[(&str, &[u8])]) -> Vec<String> {
    let fields = [("subset", "10_lumo"), ("instance_prompt", "lumo")];
    let answer = service
        .upload(&format!("{dataset}/images"), &fields, files)
        .expect(201);
    let files = answer["files"].as_array().expect("files");
    let ids = files.iter().filter_map(|file| file["image_id"].as_str());
    ids.map(str::to_owned).collect()
}

fn decoded(answer: &Answer) -> RgbImage {
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "image/jpeg");
    image::load_from_memory(&answer.bytes)
        .expect("a JPEG")
        .into_rgb8()
}

#[test]
fn a_preview_tells_bucket_size_and_crop_and_shows_them() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let picture = scene(400, 200, 330);
    let ids = upload(&service, &dataset, &[("a.png", &picture)]);
    let query = "width_px=64&height_px=64&min_px=64&max_px=64";
    let page = service
        .get(&format!("{dataset}/preview?{query}"))
        .expect(200);
    let seen = &page["data"][0];
    let expected = json!({"left_px": 32, "top_px": 0, "width_px": 64, "height_px": 64});
    assert_eq!(
        (&seen["crop"], &seen["upscaled"]),
        (&expected, &json!(false))
    );
    assert_eq!(
        (&seen["resized_width_px"], &seen["bucket_width_px"]),
        (&json!(128), &json!(64))
    );
    assert_eq!(seen["crop_loss"], 0.5);
    assert_eq!(seen["image_id"], ids[0].as_str());

    // A smart crop goes where something is to be seen, and the picture shows that place.
    let smart = service
        .get(&format!("{dataset}/preview?{query}&crop=smart"))
        .expect(200);
    let left = smart["data"][0]["crop"]["left_px"]
        .as_u64()
        .expect("a number");
    assert!(left > 45, "{smart}");
    let url = |page: &Value| {
        page["data"][0]["preview_url"]
            .as_str()
            .expect("a path")
            .to_owned()
    };
    let (centre, smart) = (service.get(&url(&page)), service.get(&url(&smart)));
    assert_eq!(decoded(&centre).dimensions(), (64, 64));
    assert_ne!(decoded(&centre), decoded(&smart));
    let again = service.send(
        "GET",
        &url(&page),
        &[("if-none-match", centre.header("etag"))],
        &[],
    );
    assert_eq!((again.status, again.bytes.len()), (304, 0));
    assert_ne!(centre.header("etag"), smart.header("etag"));

    let wrong = service.get(&format!("{dataset}/preview?width_px=100"));
    let wrong = wrong.problem(422, "invalid_query");
    assert_eq!(wrong["errors"][0]["pointer"], "/width_px");
    service
        .get(&format!("{dataset}/preview?crop=face"))
        .problem(422, "invalid_query");
    let image = format!("{dataset}/images/{}", ids[0]);
    service
        .get(&format!("{image}/preview?size_px=5000"))
        .problem(422, "invalid_query");
    let nobody = "/v1/datasets/019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11";
    service
        .get(&format!("{nobody}/preview"))
        .problem(404, "dataset_not_found");
    service
        .get(&format!("{nobody}/report"))
        .problem(404, "dataset_not_found");
}

#[test]
fn a_thumbnail_is_small_and_kept() {
    let service = Service::start();
    let dataset = service.dataset("a");
    let ids = upload(&service, &dataset, &[("a.png", &scene(400, 200, 10))]);
    let path = format!("{dataset}/images/{}/thumbnail?size_px=80", ids[0]);
    let first = service.get(&path);
    assert_eq!(decoded(&first).dimensions(), (80, 40));
    let second = service.get(&path);
    assert_eq!(first.bytes, second.bytes);
    assert_eq!(first.header("etag"), second.header("etag"));
    service
        .get(&format!("{dataset}/images/{dataset}/thumbnail"))
        .problem(404, "not_found");
}

#[test]
fn colours_are_corrected_beforehand_applied_and_taken_back() {
    let service = Service::start();
    let dataset = service.dataset("a");
    // Reds from 0 to 199, little else: something to spread. The others are brighter: something to be matched.
    let [bright, brighter] = [220, 230].map(|value| {
        let picture = RgbImage::from_pixel(64, 64, Rgb([value; 3]));
        let mut bytes = Cursor::new(Vec::new());
        picture
            .write_to(&mut bytes, ImageFormat::Png)
            .expect("an encoder");
        bytes.into_inner()
    });
    let ids = upload(
        &service,
        &dataset,
        &[
            ("a.png", &scene(64, 64, 0)),
            ("b.png", &bright),
            ("c.png", &brighter),
        ],
    );
    // All of them are measured by then: the set's median is of what is.
    service.get(&format!("{dataset}/report")).expect(200);
    let image = format!("{dataset}/images/{}", ids[0]);
    let content = service.get(&format!("{image}/content")).bytes;
    let shown = |query: &str| {
        service.get(&format!(
            "{image}/preview?width_px=64&height_px=64&min_px=64{query}"
        ))
    };
    let plain = shown("");
    for recipe in ["auto_levels", "grey_world", "match_median"] {
        let beforehand = shown(&format!("&color_correction={recipe}"));
        assert_ne!(decoded(&plain), decoded(&beforehand), "{recipe}");
        let patched = service.patch(&image, None, &json!({"color_correction": recipe}));
        assert_eq!(patched.expect(200)["color_correction"], recipe);
        let applied = shown("");
        assert_eq!(
            applied.header("etag"),
            beforehand.header("etag"),
            "{recipe}"
        );
        let back = service.patch(&image, None, &json!({"color_correction": null}));
        assert!(back.expect(200)["color_correction"].is_null());
        assert_eq!(shown("").header("etag"), plain.header("etag"));
    }
    // The dataset speaks for those that say nothing.
    let patched = service.patch(&dataset, None, &json!({"color_correction": "grey_world"}));
    assert_eq!(patched.expect(200)["color_correction"], "grey_world");
    assert_ne!(shown("").header("etag"), plain.header("etag"));
    service
        .patch(&image, None, &json!({"color_correction": "off"}))
        .expect(200);
    assert_eq!(shown("").header("etag"), plain.header("etag"));
    let page = service.get(&format!("{dataset}/preview")).expect(200);
    assert_eq!(page["data"][0]["color_correction"], Value::Null);
    assert_eq!(page["data"][1]["color_correction"], "grey_world");
    assert_eq!(service.get(&format!("{image}/content")).bytes, content);

    let tag = service.get(&dataset).header("etag").to_owned();
    let renamed = service.patch(&dataset, Some(&tag), &json!({"name": "b"}));
    assert_eq!(renamed.expect(200)["name"], "b");
    let late = service.patch(&dataset, Some(&tag), &json!({"name": "c"}));
    late.problem(412, "precondition_failed");
    let wrong = service.patch(&dataset, None, &json!({"name": ""}));
    wrong.problem(422, "invalid_dataset");
    let unknown = service.patch(&image, None, &json!({"color_correction": "sepia"}));
    unknown.problem(422, "invalid_body");
}

#[test]
fn a_report_names_what_speaks_against_training() {
    let service = Service::start();
    let dataset = service.dataset("a <b>set</b>");
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/demo/dataset/10_lumo/lumo_09.png"
    );
    let twin = std::fs::read(path).expect("a picture of the demo");
    let other = {
        let picture = image::load_from_memory(&twin)
            .expect("a picture")
            .into_rgb8();
        let mut bytes = Cursor::new(Vec::new());
        picture
            .write_to(&mut bytes, ImageFormat::Jpeg)
            .expect("an encoder");
        bytes.into_inner()
    };
    let files: [(&str, &[u8]); 5] = [
        ("a.png", &twin),
        ("b.jpg", &other),
        ("c.png", &png(40)),
        ("c.txt", b"a robot"),
        ("d.png", &scene(600, 60, 200)),
    ];
    upload(&service, &dataset, &files);
    let query = "width_px=256&height_px=256&min_px=64&max_px=512&batch_size=20&kind=character";
    let path = format!("{dataset}/report?{query}");
    let answer = service.get(&path);
    let report = answer.expect(200);
    assert_eq!(
        (&report["complete"], &report["images"]),
        (&json!(true), &json!(4))
    );
    let findings = report["findings"].as_array().expect("findings");
    let names = |code: &str| -> Vec<&str> {
        let found = findings.iter().find(|finding| finding["code"] == code);
        let images = found.and_then(|finding| finding["images"].as_array());
        let names = images
            .into_iter()
            .flatten()
            .filter_map(|image| image["file_name"].as_str());
        names.collect()
    };
    assert_eq!(names("near_duplicates"), ["a.png", "b.jpg"], "{report}");
    assert_eq!(names("blurred"), ["c.png"]);
    assert_eq!(names("underexposed"), ["c.png"]);
    assert_eq!(names("below_resolution"), ["c.png", "d.png"]);
    assert_eq!(names("instance_prompt_missing"), ["c.png"]);
    assert!(
        findings
            .iter()
            .any(|finding| finding["code"] == "too_few_images")
    );
    assert!(
        findings
            .iter()
            .any(|finding| finding["code"] == "lonely_bucket")
    );
    for finding in findings {
        assert!(
            finding["message"]
                .as_str()
                .is_some_and(|text| text.len() > 10)
        );
        assert!(
            finding["advice"]
                .as_str()
                .is_some_and(|text| text.len() > 10)
        );
    }
    let again = service.send(
        "GET",
        &path,
        &[("if-none-match", answer.header("etag"))],
        &[],
    );
    assert_eq!(again.status, 304);

    let page = service.get(&format!("{dataset}/report.html?{query}"));
    assert_eq!(page.status, 200);
    assert!(page.header("content-type").starts_with("text/html"));
    assert!(
        page.header("content-security-policy")
            .contains("default-src 'none'")
    );
    let text = String::from_utf8(page.bytes).expect("UTF-8");
    assert!(text.contains("data:image/jpeg;base64,") && text.contains("near duplicates"));
    assert!(text.contains("a &lt;b&gt;set&lt;/b&gt;") && !text.contains("<b>set"));
    let browser = [("accept", "text/html,application/xhtml+xml,*/*;q=0.8")];
    let same = service.send("GET", &path, &browser, &[]);
    assert_eq!(String::from_utf8(same.bytes).expect("UTF-8"), text);

    service
        .get(&format!("{dataset}/report?batch_size=0"))
        .problem(422, "invalid_query");
    service
        .get(&format!("{dataset}/report?max_token_length=100"))
        .problem(422, "invalid_query");
}

#[test]
fn an_empty_dataset_has_a_report_too() {
    let service = Service::start();
    let dataset = service.dataset("empty");
    let report = service.get(&format!("{dataset}/report")).expect(200);
    assert_eq!(report["findings"][0]["code"], "no_images");
    assert_eq!(report["buckets"], json!([]));
    assert_eq!(service.get(&format!("{dataset}/report.html")).status, 200);
}
