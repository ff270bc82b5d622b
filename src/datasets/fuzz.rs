//! Damaged and random archives, pictures, tables and captions through the entry points of an upload: none may panic, and
//! none may unpack to more than the limits say.

use std::io::{Cursor, Write as _};
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::limits::Limits;
use super::prepare::{self, Checks, StagedFile};
use super::target::SubsetChoice;
use super::{captions, dataset_toml, tables};
use crate::damage::{damage, damaged};
use crate::pictures::{self, DecodeLimits};

fn picture(format: image::ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image::RgbImage::from_fn(23, 17, |x, y| {
        image::Rgb([(x * 9) as u8, (y * 11) as u8, 77])
    })
    .write_to(&mut bytes, format)
    .expect("an encoder");
    bytes.into_inner()
}

/// One of each format but AVIF, which is not decoded in this process before it was elsewhere.
fn pictures() -> Vec<Vec<u8>> {
    use image::ImageFormat as F;
    [F::Png, F::Jpeg, F::WebP, F::Bmp, F::Gif, F::Tiff]
        .map(picture)
        .to_vec()
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("10_a/a.png", picture(image::ImageFormat::Png)),
        ("10_a/a.txt", b"a caption".to_vec()),
        ("10_a/metadata.csv", b"file_name,text\na.png,x\n".to_vec()),
        ("10_a/b.jpg", picture(image::ImageFormat::Jpeg)),
    ]
}

fn zip(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in files {
        let options = zip::write::SimpleFileOptions::default();
        writer.start_file(*name, options).expect("started");
        writer.write_all(content).expect("written");
    }
    writer.finish().expect("finished").into_inner()
}

fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, name, content.as_slice())
            .expect("written");
    }
    builder.into_inner().expect("finished")
}

fn archives() -> Vec<Vec<u8>> {
    let mut with_inner = files();
    with_inner.push(("more.zip", zip(&files())));
    with_inner.push(("more.tar", tar(&files())));
    vec![
        zip(&files()),
        tar(&files()),
        zip(&with_inner),
        tar(&with_inner),
    ]
}

/// Far below the usual ones, so that they are met.
const LIMITS: Limits = Limits {
    request_bytes: 1 << 20,
    files: 12,
    image_bytes: 20_000,
    image_pixels: 10_000,
    caption_bytes: 1000,
    table_bytes: 10_000,
    archive_bytes: 200_000,
    unpacked_bytes: 60_000,
    archive_depth: 2,
    unpacked_ratio: 50,
};

fn bytes_below(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let sizes = entries.map(|entry| {
        let entry = entry.expect("an entry");
        let metadata = entry.metadata().expect("there");
        if metadata.is_dir() {
            bytes_below(&entry.path())
        } else {
            metadata.len()
        }
    });
    sizes.sum()
}

/// Every file of an upload is answered for, and the limits hold.
fn upload(name: &str, bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("upload-0");
    std::fs::write(&path, bytes).expect("written");
    let file = StagedFile {
        name: name.to_owned(),
        path,
    };
    let checks = Checks {
        limits: &LIMITS,
        trial: None,
    };
    let choice = SubsetChoice::default();
    let prepared = prepare::prepare(vec![file], &choice, folder.path(), checks).expect("a disk");
    assert!(!prepared.files.is_empty());
    assert!(prepared.files.len() <= LIMITS.files + 1);
    assert!(bytes_below(folder.path()) <= LIMITS.unpacked_bytes + bytes.len() as u64);
    for image in &prepared.images {
        let pixels = u64::from(image.picture.width_px) * u64::from(image.picture.height_px);
        assert!(pixels <= LIMITS.image_pixels);
    }
}

proptest! {
    // 256 cases each, or as many as PROPTEST_CASES says.
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn damaged_archives_are_answered(which in any::<Index>(), all in vec(damage(), 1..6)) {
        let archives = archives();
        upload("a.zip", &damaged(&archives[which.index(archives.len())], &all));
    }

    #[test]
    fn damaged_pictures_are_answered(which in any::<Index>(), all in vec(damage(), 1..6)) {
        let pictures = pictures();
        let bytes = damaged(&pictures[which.index(pictures.len())], &all);
        let limits = DecodeLimits { pixels: 10_000, ..DecodeLimits::default() };
        if pictures::Format::of(&bytes) != Some(pictures::Format::Avif)
            && let Ok(decoded) = pictures::decode(&bytes, &limits)
        {
            prop_assert!(decoded.rgb.width() * decoded.rgb.height() <= 10_000);
        }
    }

    #[test]
    fn random_bytes_are_answered(head in 0..8_usize, bytes in vec(any::<u8>(), 0..2000)) {
        let heads: [&[u8]; 8] = [
            b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0",
        ];
        upload("a", &[heads[head], &bytes].concat());
    }

    #[test]
    fn random_texts_are_answered(bytes in vec(any::<u8>(), 0..500), text in "\\PC{0,200}") {
        let _ = captions::read(&bytes);
        let read = captions::read(text.as_bytes()).expect("UTF-8 without controls is text");
        prop_assert!(captions::check(&read.text, 10_000).is_ok());
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        for content in [bytes.as_slice(), text.as_bytes()] {
            std::fs::write(&path, content).expect("written");
            let _ = dataset_toml::read(&path);
            for kind in [tables::TableKind::Jsonl, tables::TableKind::Csv] {
                let _ = tables::read(kind, &path, &[], &LIMITS);
            }
        }
    }
}
