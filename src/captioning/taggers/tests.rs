//! Tiny networks of every family against onnxruntime, and files that are broken on purpose.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::*;
use crate::captioning::picture;

#[derive(Deserialize)]
struct Golden {
    probabilities: Vec<f32>,
    pixels: Vec<f32>,
    tags: Option<Vec<String>>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/taggers")
}

fn goldens() -> BTreeMap<String, BTreeMap<String, Golden>> {
    let text = std::fs::read_to_string(fixtures().join("goldens.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn furthest(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

/// The probabilities are those of onnxruntime, and the tags those of sd-scripts, for each family and picture.
#[test]
fn every_family_gives_what_onnxruntime_gives() {
    let goldens = goldens();
    assert_eq!(goldens.len(), 10);
    for (name, pictures) in goldens {
        let kind = match name.as_str() {
            "deepdanbooru" => TaggerKind::DeepDanbooru,
            _ => TaggerKind::Wd14,
        };
        let tagger = Tagger::load(&fixtures().join(&name), kind).unwrap();
        let (mut worst, mut worst_pixel) = (0.0_f32, 0.0_f32);
        for (file, golden) in pictures {
            let path = fixtures().join("pictures").join(format!("{file}.png"));
            let picture = picture::decode(&path).unwrap();
            let prepared = tagger.prepare(&picture).unwrap();
            let every = (prepared.len() / 97).max(1);
            let sampled: Vec<f32> = prepared.iter().step_by(every).copied().collect();
            let pixel = furthest(&sampled, &golden.pixels);
            let found = furthest(
                &tagger.probabilities(&picture).unwrap(),
                &golden.probabilities,
            );
            worst = worst.max(found);
            worst_pixel = worst_pixel.max(pixel);
            assert!(
                found < 1e-4,
                "{name}, {file}: probabilities differ by {found}, pixels by {pixel}"
            );
            if let Some(expected) = golden.tags {
                let settings = TaggerSettings {
                    order: Order::List,
                    character_threshold: 0.5,
                    ..TaggerSettings::default()
                };
                // sd-scripts takes the underscores of short tags only as they are.
                assert_eq!(
                    settings.choose(&tagger.tag(&picture).unwrap()),
                    expected,
                    "{name}, {file}"
                );
            }
        }
        println!("{name}: probabilities within {worst:e}, pixels within {worst_pixel:e}");
    }
}

fn copy(from: &str, to: &Path) {
    for entry in std::fs::read_dir(fixtures().join(from)).unwrap().flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn missing_files_are_named_with_where_they_go() {
    let folder = tempfile::tempdir().unwrap();
    let message = |kind: TaggerKind| Tagger::load(folder.path(), kind).unwrap_err().to_string();
    let wd = message(TaggerKind::Wd14);
    for part in [
        "model.onnx",
        "selected_tags.csv",
        "SmilingWolf",
        folder.path().to_str().unwrap(),
    ] {
        assert!(wd.contains(part), "{wd}");
    }
    std::fs::write(folder.path().join("tags.txt"), "solo\n").unwrap();
    std::fs::write(folder.path().join("model-resnet_custom_v3.h5"), "").unwrap();
    let keras = message(TaggerKind::DeepDanbooru);
    let command = "tf2onnx.convert --keras model-resnet_custom_v3.h5 --output model.onnx";
    assert!(keras.contains(command), "{keras}");
}

#[test]
fn a_network_under_another_name_will_do() {
    let folder = tempfile::tempdir().unwrap();
    copy("deepdanbooru", folder.path());
    let (from, to) = (
        folder.path().join("model.onnx"),
        folder.path().join("resnet.onnx"),
    );
    std::fs::rename(from, to).unwrap();
    assert!(Tagger::load(folder.path(), TaggerKind::DeepDanbooru).is_ok());
}

#[test]
fn a_list_of_another_network_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    copy("wd-convnext", folder.path());
    std::fs::write(
        folder.path().join("selected_tags.csv"),
        "tag_id,name,category,count\n1,a,0,1\n",
    )
    .unwrap();
    let error = Tagger::load(folder.path(), TaggerKind::Wd14)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("28 probabilities") && error.contains("1 tags"),
        "{error}"
    );
}

/// Cut off, overwritten in places, and with weights elsewhere: an error each time, never a panic or another file.
#[test]
fn broken_networks_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    copy("wd-convnext", folder.path());
    let path = folder.path().join("model.onnx");
    let whole = std::fs::read(&path).unwrap();
    let load = || Tagger::load(folder.path(), TaggerKind::Wd14);
    for length in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(load().is_err(), "{length} bytes");
    }
    let mut random = 1_u64;
    for _ in 0..40 {
        let mut broken = whole.clone();
        for _ in 0..20 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (random >> 33) as usize % broken.len();
            broken[at] = (random >> 20) as u8;
        }
        std::fs::write(&path, broken).unwrap();
        let _ = load(); // some weights differ, or it is refused: either is right
    }
    let outside = folder.path().parent().unwrap().join("outside.bin");
    std::fs::remove_file(&path).unwrap();
    copy("wd-vit-external", folder.path());
    let data = folder.path().join("model.onnx.data");
    assert!(load().is_ok());
    std::fs::rename(&data, &outside).unwrap();
    assert!(load().is_err(), "without its weights");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&outside, &data).unwrap();
        let error = load().unwrap_err().to_string();
        assert!(error.contains("outside"), "{error}");
        std::fs::remove_file(&data).unwrap();
    }
    std::fs::remove_file(outside).unwrap();
}
