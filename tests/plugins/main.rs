//! Plugins across the real C boundary: what is refused and why, one test per misuse, and the numbers of those that ship.

use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{DType, Device, Tensor, TensorData};
use lorasmith::plugin_host::{PluginFolders, PluginHost, PluginInfo, PluginStatus};
use lorasmith::training::{Optimizer, OptimizerError, ParamUpdate};
use serde_json::{Value, json};

/// The fixture compiled with these definitions.
fn compile(folder: &Path, name: &str, definitions: &[&str]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = folder.join(format!("lib{name}.so"));
    let output = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror"])
        .args(
            definitions
                .iter()
                .map(|definition| format!("-D{definition}")),
        )
        .arg("-I")
        .arg(root.join("plugins/abi/include"))
        .arg(root.join("tests/plugins/fixtures/plugin.c"))
        .arg("-o")
        .arg(&library)
        .output()
        .expect("a C compiler");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    library
}

fn discover(folder: &Path) -> PluginHost {
    PluginHost::discover(&PluginFolders {
        folders: vec![folder.to_owned()],
        allowed_sha256: None,
    })
}

fn entry(host: &PluginHost, path: &Path) -> PluginInfo {
    let found = host.plugins().iter().find(|plugin| plugin.path == path);
    found
        .unwrap_or_else(|| panic!("{} is not listed", path.display()))
        .clone()
}

/// The reason for which the fixture is refused.
fn refusal(definitions: &[&str]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = compile(folder.path(), "wrong", definitions);
    let info = entry(&discover(folder.path()), &path);
    assert_eq!(info.status, PluginStatus::Refused);
    info.reason.expect("a reason")
}

/// What the fixture's step answers.
fn step_error(definition: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let id = definition.to_lowercase();
    let definitions = [
        definition.to_owned(),
        format!("OPTIMIZER_ID=\"{id}\""),
        format!("PLUGIN_ID=\"{id}\""),
    ];
    let definitions: Vec<&str> = definitions.iter().map(String::as_str).collect();
    compile(folder.path(), &id, &definitions);
    let host = discover(folder.path());
    let mut optimizer = host.create_optimizer(&id, &json!({})).expect("made");
    let mut value = tensor(&[1.0, 2.0]);
    let before: Vec<f32> = read(&value);
    let error = step(optimizer.as_mut(), 0, &mut value, &[0.5, 0.5], 0.1).expect_err("refused");
    assert_eq!(read(&value), before, "a failed step changes nothing");
    error.to_string()
}

fn tensor(values: &[f32]) -> Tensor<4> {
    let data = TensorData::new(values.to_vec(), [1, 1, 1, values.len()]);
    Tensor::from_data(data, (&Device::flex(), DType::F32))
}

fn read(tensor: &Tensor<4>) -> Vec<f32> {
    tensor.clone().try_into_vec_as::<f32>().expect("numbers")
}

fn step(
    optimizer: &mut dyn Optimizer,
    number: u64,
    value: &mut Tensor<4>,
    grad: &[f32],
    lr: f64,
) -> Result<(), OptimizerError> {
    let shape = [grad.len()];
    let mut params = [ParamUpdate {
        id: 0,
        name: "w",
        shape: &shape,
        value,
        grad: tensor(grad),
        lr,
        weight_decay: true,
    }];
    optimizer.step(number, &mut params)
}

#[test]
fn another_abi_version_is_refused() {
    let reason = refusal(&["MAJOR=2"]);
    assert!(
        reason.contains("ABI 2.0") && reason.contains("1.0"),
        "{reason}"
    );
    let reason = refusal(&["NULL_ENTRY"]);
    assert!(reason.contains("ABI"), "{reason}");
}

#[test]
fn a_library_without_the_symbol_is_refused() {
    let reason = refusal(&["NO_ENTRY"]);
    assert!(reason.contains("lorasmith_plugin_entry"), "{reason}");
}

#[test]
fn a_struct_that_is_too_small_is_refused() {
    let reason = refusal(&["SIZE=8"]);
    assert!(
        reason.contains("struct_size") && reason.contains('8'),
        "{reason}"
    );
}

#[test]
fn a_schema_that_is_none_is_refused() {
    let reason = refusal(&["SCHEMA=\"{nonsense\""]);
    assert!(reason.contains("JSON"), "{reason}");
    let reason = refusal(&["SCHEMA=\"{\\\"type\\\": \\\"nonsense\\\"}\""]);
    assert!(reason.contains("schema"), "{reason}");
}

#[test]
fn an_id_with_odd_characters_is_refused() {
    let reason = refusal(&["OPTIMIZER_ID=\"../x\""]);
    assert!(reason.contains("../x"), "{reason}");
}

#[test]
fn the_second_of_two_equal_ids_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = compile(folder.path(), "a", &["PLUGIN_ID=\"a\""]);
    let second = compile(folder.path(), "b", &["PLUGIN_ID=\"b\""]);
    let host = discover(folder.path());
    assert_eq!(entry(&host, &first).status, PluginStatus::Loaded);
    let reason = entry(&host, &second).reason.expect("refused");
    assert!(
        reason.contains("duplicate optimizer id `fixture`"),
        "{reason}"
    );
}

#[test]
fn what_is_no_library_is_refused_and_stops_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("libtext.so");
    std::fs::write(&path, "no library").expect("written");
    let host = discover(folder.path());
    assert!(
        entry(&host, &path)
            .reason
            .expect("refused")
            .contains("cannot be loaded")
    );
    assert!(
        host.optimizers().iter().any(|known| known.id == "adamw"),
        "the own plugins are there"
    );
}

#[cfg(unix)]
#[test]
fn a_folder_that_anybody_may_write_to_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().expect("a folder");
    compile(folder.path(), "fine", &[]);
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777))
        .expect("changed");
    let host = discover(folder.path());
    assert!(
        entry(&host, folder.path())
            .reason
            .expect("refused")
            .contains("anybody")
    );
    assert!(!host.optimizers().iter().any(|known| known.id == "fixture"));
}

#[test]
fn only_listed_digests_are_loaded() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = compile(folder.path(), "fine", &[]);
    let digest = entry(&discover(folder.path()), &path)
        .sha256
        .expect("a digest");
    for (allowed, status) in [
        (digest, PluginStatus::Loaded),
        ("00".repeat(32), PluginStatus::Refused),
    ] {
        let host = PluginHost::discover(&PluginFolders {
            folders: vec![folder.path().to_owned()],
            allowed_sha256: Some(vec![allowed]),
        });
        assert_eq!(entry(&host, &path).status, status);
    }
}

#[test]
fn errors_of_a_step_reach_the_run() {
    assert!(step_error("FAILS").contains("out of ideas"));
    assert!(step_error("DEAD_HANDLE").contains("dead tensor handle"));
    assert!(step_error("BAD_AXIS").contains("axis"));
}

#[test]
fn an_optimizer_in_c_descends() {
    let folder = tempfile::tempdir().expect("a folder");
    compile(
        folder.path(),
        "sgd",
        &["OPTIMIZER_ID=\"sgd-c\"", "PLUGIN_ID=\"sgd-c\""],
    );
    let host = discover(folder.path());
    let mut optimizer = host.create_optimizer("sgd-c", &json!({})).expect("made");
    let mut value = tensor(&[1.0, -2.0]);
    step(optimizer.as_mut(), 0, &mut value, &[0.5, 1.0], 0.25).expect("a step");
    assert_eq!(read(&value), [0.875, -2.25]);
}

fn gradient(step: u64) -> Vec<f32> {
    (0..3)
        .map(|i| ((step * 7 + i * 3) as f32).sin() * 0.3)
        .collect()
}

#[test]
fn a_restored_optimizer_goes_on_to_the_bit() {
    let host = discover(Path::new("/nowhere"));
    let make = || {
        host.create_optimizer("adamw", &json!({"weight_decay": 0.1}))
            .expect("made")
    };
    let start = tensor(&[0.5, -1.25, 2.0]);
    let (mut whole, mut value) = (make(), start.clone());
    for number in 0..10 {
        step(whole.as_mut(), number, &mut value, &gradient(number), 0.02).expect("a step");
    }
    let (mut first, mut again) = (make(), start);
    for number in 0..5 {
        step(first.as_mut(), number, &mut again, &gradient(number), 0.02).expect("a step");
    }
    let state = first.state().expect("a state");
    assert!(
        state
            .iter()
            .any(|state| state.name == "exp_avg_sq" && state.param == "w")
    );
    let mut second = make();
    second.restore(state).expect("restored");
    for number in 5..10 {
        step(second.as_mut(), number, &mut again, &gradient(number), 0.02).expect("a step");
    }
    assert_eq!(read(&again), read(&value));
    assert_eq!(
        second.state().expect("a state"),
        whole.state().expect("a state")
    );
}

#[test]
fn wrong_settings_name_their_place() {
    let host = discover(Path::new("/nowhere"));
    let wrong = |settings: Value| {
        let errors = host
            .check_optimizer_settings("adamw", &settings)
            .expect_err("wrong");
        (errors[0].pointer.clone(), errors[0].message.clone())
    };
    let (pointer, message) = wrong(json!({"weight_dekay": 0.1}));
    assert_eq!(pointer.as_deref(), Some("/weight_dekay"));
    assert!(message.contains("did you mean `weight_decay`"), "{message}");
    assert_eq!(
        wrong(json!({"betas": [0.9, 1.0]})).0.as_deref(),
        Some("/betas/1")
    );
    let unknown = host
        .check_optimizer_settings("adamv", &json!({}))
        .expect_err("unknown");
    assert_eq!(unknown[0].pointer, None);
    assert!(
        unknown[0].message.contains("adamw"),
        "{}",
        unknown[0].message
    );
}
