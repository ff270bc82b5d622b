//! `lorasmith verify`, run as its users run it: every golden on the CPU, and a quick part through WGSL.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn verify(arguments: &[&str]) -> (bool, Value) {
    verify_model("tiny-sd15", arguments)
}

fn verify_model(model: &str, arguments: &[&str]) -> (bool, Value) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let fixture = fixtures.join(model);
    let output = Command::new(env!("CARGO_BIN_EXE_lorasmith"))
        .args(["verify", "--json", "--fixture"])
        .arg(fixture)
        .args(arguments)
        // Trying out kernels takes a software device minutes, and changes no result.
        .env("CUBECL_AUTOTUNE_LEVEL", "minimal")
        .output()
        .expect("the program");
    let text = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr))
    });
    (output.status.success(), report)
}

fn assert_passed((success, report): &(bool, Value), at_least: usize) {
    let items = report["items"].as_array().expect("items");
    let failed: Vec<&Value> = items.iter().filter(|item| item["passed"] != true).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(items.len() >= at_least, "only {} items", items.len());
    assert!(success, "the exit status is not 0");
}

#[test]
fn every_golden_passes_on_the_cpu_in_both_layouts() {
    let outcome = verify(&["--device", "cpu"]);
    assert_passed(&outcome, 140);
    let items = outcome.1["items"].as_array().expect("items");
    for layout in ["diffusers", "single file"] {
        assert!(items.iter().filter(|item| item["layout"] == layout).count() > 60);
    }
}

#[test]
fn every_golden_of_later_generations_passes_on_the_cpu_in_both_layouts() {
    for (model, at_least) in [("tiny-sd2", 60), ("tiny-sdxl", 45)] {
        let outcome = verify_model(model, &["--device", "cpu"]);
        assert_passed(&outcome, 2 * at_least);
        let items = outcome.1["items"].as_array().expect("items");
        for layout in ["diffusers", "single file"] {
            let of_layout = items.iter().filter(|item| item["layout"] == layout);
            assert!(of_layout.count() >= at_least, "{model}, {layout}");
        }
    }
}

#[test]
fn a_quick_part_passes_on_vulkan() {
    if has_vulkan() {
        assert_passed(&verify(&["--device", "vulkan:0", "--quick"]), 20);
        let sdxl = verify_model("tiny-sdxl", &["--device", "vulkan:0", "--quick"]);
        assert_passed(&sdxl, 20);
    }
}

#[test]
fn a_quick_part_passes_in_half_precision_on_vulkan() {
    if has_vulkan() {
        let flags = ["--device", "vulkan:0", "--quick", "--precision", "fp16"];
        assert_passed(&verify(&flags), 2);
    }
}

#[test]
fn lower_precisions_pass_on_the_cpu() {
    for precision in ["fp16", "bf16"] {
        let flags = ["--device", "cpu", "--precision", precision];
        assert_passed(&verify(&flags), 20);
        assert_passed(&verify_model("tiny-sdxl", &flags), 10);
    }
}

/// A software one will do; `.ci/run` installs one.
fn has_vulkan() -> bool {
    let output = Command::new(env!("CARGO_BIN_EXE_lorasmith"))
        .args(["devices", "--json"])
        .output();
    let devices: Value =
        serde_json::from_slice(&output.expect("the program").stdout).expect("JSON");
    let devices = devices["data"].as_array().expect("devices");
    let found = devices.iter().any(|device| device["id"] == "vulkan:0");
    if !found {
        eprintln!("no Vulkan device on this machine: nothing was compared");
    }
    found
}

#[test]
fn a_folder_that_is_no_fixture_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = Command::new(env!("CARGO_BIN_EXE_lorasmith"))
        .args(["verify", "--fixture"])
        .arg(folder.path())
        .output()
        .expect("the program");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("goldens"));
}
