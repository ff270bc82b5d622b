//! Masks of images: given, shown, exported, trained with, taken away.

use std::io::Cursor;

use image::{GrayImage, ImageFormat, Luma};
use serde_json::json;

use crate::runs::{settings, start, wait};
use crate::support::{Service, png, zip};

/// The left half counts.
fn half(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    GrayImage::from_fn(width, height, |x, _| {
        Luma([if x < width / 2 { 255 } else { 0 }])
    })
    .write_to(&mut bytes, ImageFormat::Png)
    .expect("an encoder");
    bytes.into_inner()
}

/// A dataset of one picture, and the path of that picture.
fn dataset(service: &Service) -> (String, String) {
    let path = service.dataset("a");
    let picture = png(200); // 16 × 12
    let answer = service
        .upload(&format!("{path}/images"), &[], &[("a.png", &picture)])
        .expect(201);
    let id = answer["files"][0]["image_id"].as_str().expect("an id");
    let image = format!("{path}/images/{id}");
    (path, image)
}

/// The half that does not count has a quarter of its light.
fn darkens_previews(service: &Service, image: &str) {
    let light = |query: &str| {
        let size = "width_px=64&height_px=64&min_px=64&size_px=64";
        let shown = service.get(&format!("{image}/preview?{size}{query}"));
        assert_eq!(shown.status, 200);
        let picture = image::load_from_memory(&shown.bytes)
            .expect("a JPEG")
            .into_rgb8();
        let (width, height) = picture.dimensions();
        // Away from the border between the halves, which resizing makes soft.
        [width / 4, width - width / 4].map(|x| f32::from(picture.get_pixel(x, height / 2).0[0]))
    };
    let ([left, right], [kept, dimmed]) = (light(""), light("&masked=true"));
    assert!((kept - left).abs() < 8.0, "{left} {kept}");
    assert!(
        (dimmed - right / 4.0).abs() < 8.0 && right > 40.0,
        "{right} {dimmed}"
    );
}

#[test]
fn a_mask_is_given_shown_and_taken_away() {
    let service = Service::start();
    let (_, image) = dataset(&service);
    let mask = format!("{image}/mask");
    let put = |headers: &[(&str, &str)], body: &[u8]| service.send("PUT", &mask, headers, body);
    assert!(service.get(&image).expect(200)["mask_sha256"].is_null());
    service.get(&mask).problem(404, "mask_not_found");
    for (body, reason) in [
        (half(16, 16), "aspect ratio"),
        (b"no picture".to_vec(), "not a PNG"),
    ] {
        let problem = put(&[], &body).problem(422, "invalid_mask");
        let detail = problem["detail"].as_str().expect("a reason");
        assert!(detail.contains(reason), "{detail}");
    }
    put(&[("if-match", "\"7\"")], &half(16, 12)).problem(412, "precondition_failed");

    let given = put(&[], &half(32, 24));
    let shown = given.expect(200);
    assert_eq!(service.get(&image).expect(200), shown);
    let answer = service.get(&mask);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "image/png");
    let picture = image::load_from_memory(&answer.bytes).expect("a PNG");
    assert_eq!((picture.width(), picture.height()), (32, 24));
    darkens_previews(&service, &image);
    let tag = given.header("etag").to_owned();
    assert_eq!(service.delete_if_match(&mask, &tag).status, 204);
    assert!(service.get(&image).expect(200)["mask_sha256"].is_null());
    assert_eq!(service.delete(&mask).status, 204, "it has none already");
}

#[test]
fn masks_come_and_go_in_archives() {
    let service = Service::start();
    let path = service.dataset("a");
    let (a, b, mask) = (png(1), png(2), half(16, 12));
    let archive = zip(&[
        ("10_lumo/a.png", &a),
        ("10_lumo/a.mask.png", &mask),
        ("10_lumo/a.txt", b"lumo"),
        ("10_lumo/b.png", &b),
        ("10_lumo/b.mask.png", &half(16, 16)),
    ]);
    let answer = service
        .upload(&format!("{path}/images"), &[], &[("set.zip", &archive)])
        .expect(201);
    assert_eq!(answer["summary"]["images"], 2, "{answer}");
    let files = answer["files"].as_array().expect("files");
    let of = |name: &str| files.iter().find(|file| file["name"] == name).expect(name);
    let taken = of("10_lumo/a.mask.png");
    assert_eq!(
        (&taken["kind"], &taken["outcome"]),
        (&json!("mask"), &json!("accepted"))
    );
    assert_eq!(taken["image_id"], of("10_lumo/a.png")["image_id"]);
    let refused = &of("10_lumo/b.mask.png")["problem"]["code"];
    assert_eq!(refused, "mask_of_other_shape");
    let masks = |path: &str| -> Vec<bool> {
        let images = service.get(&format!("{path}/images")).expect(200);
        let images = images["data"].as_array().expect("images").clone();
        images
            .iter()
            .map(|image| image["mask_sha256"].is_string())
            .collect()
    };
    assert_eq!(masks(&path), [true, false]);

    // Exported and taken in again it is the same.
    let exported = service.get(&format!("{path}/export"));
    assert_eq!(exported.status, 200);
    let again = service.dataset("b");
    let answer = service
        .upload(
            &format!("{again}/images"),
            &[],
            &[("set.zip", &exported.bytes)],
        )
        .expect(201);
    assert_eq!(answer["summary"]["images"], 2, "{answer}");
    assert_eq!(masks(&again), [true, false]);
}

#[test]
fn a_run_counts_only_what_a_mask_says() {
    let service = Service::start_with(settings);
    let (dataset, image) = dataset(&service);
    let loss = |masked: bool| {
        let more = json!({"loss": {"masked": masked}, "seed": 3});
        let run = start(&service, &dataset, &more);
        wait(&service, &run, "succeeded");
        let points = service.get(&format!("{run}/metrics")).expect(200);
        points["data"][0]["loss"].as_f64().expect("a loss")
    };
    let whole = loss(false);
    assert_eq!(loss(true), whole, "an opaque picture without a mask");
    service
        .send("PUT", &format!("{image}/mask"), &[], &half(16, 12))
        .expect(200);
    assert_eq!(loss(false), whole);
    let part = loss(true) / whole;
    assert!((0.3..0.7).contains(&part), "{part}");
    // The run says which mask it was.
    let more = json!({"loss": {"masked": true}, "seed": 4});
    let run = start(&service, &dataset, &more);
    wait(&service, &run, "succeeded");
    let record = service.get(&format!("{run}/provenance")).expect(200);
    let mask = service.get(&image).expect(200)["mask_sha256"].clone();
    assert!(mask.is_string());
    assert!(
        record
            .to_string()
            .contains(mask.as_str().expect("a digest"))
    );
}
