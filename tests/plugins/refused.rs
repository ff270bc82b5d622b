//! Files that the host refuses: each is listed with its reason, and the other plugins work on.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use lorasmith::plugin_host::PluginStatus;
use serde_json::json;

use crate::support::{Folder, Weight, discover, info};

const SOURCE: &str = "tests/plugins/fixtures/refused.c";

/// A plugin built with `flags` is refused with a reason that has all of `words`.
fn assert_refused(flags: &[&str], words: &[&str]) {
    let folder = Folder::new();
    let path = folder.build("fixture", SOURCE, flags);
    let host = folder.discover();
    let plugin = info(&host, &path);
    assert_eq!(plugin.status, PluginStatus::Refused);
    let reason = plugin.reason.as_deref().unwrap();
    for word in words {
        assert!(reason.contains(word), "`{word}` in: {reason}");
    }
    assert_eq!(plugin.sha256.as_ref().map(String::len), Some(64));
    assert!(host.optimizers().iter().all(|known| known.id != "fixture"));
    assert!(
        host.optimizers().iter().any(|known| known.id == "adamw"),
        "the others are there"
    );
}

#[test]
fn the_fixture_without_a_fault_is_loaded() {
    let folder = Folder::new();
    let path = folder.build("fixture", SOURCE, &[]);
    let host = folder.discover();
    let plugin = info(&host, &path);
    assert_eq!(
        (plugin.status, plugin.reason.as_deref()),
        (PluginStatus::Loaded, None)
    );
    assert_eq!(plugin.abi, Some((1, 1)));
    assert_eq!(
        (&plugin.optimizers[..], &plugin.schedulers[..]),
        (&["fixture".to_owned()][..], &["fixture".to_owned()][..])
    );
}

#[test]
fn another_major_version() {
    assert_refused(&["-DMAJOR=2"], &["ABI 2.1", "1.1"]);
}

#[test]
fn a_newer_minor_version() {
    assert_refused(&["-DMINOR=9"], &["ABI 1.9", "1.1"]);
}

/// A plugin for 1.0 has a shorter `ls_optimizer`: what came later counts as null, though other bytes lie there.
#[test]
fn an_older_minor_version_is_loaded() {
    let folder = Folder::new();
    let path = folder.build("old", "tests/plugins/fixtures/abi_1_0.c", &[]);
    let host = folder.discover();
    let plugin = info(&host, &path);
    assert_eq!(
        (plugin.status, plugin.reason.as_deref()),
        (PluginStatus::Loaded, None)
    );
    assert_eq!(plugin.abi, Some((1, 0)));
    let mut optimizer = host.create_optimizer("old", &json!({})).unwrap();
    let mut weight = Weight::new(&[1.0, 2.0], &[2], 0.5);
    weight.step(&mut *optimizer, 0, &[1.0, -1.0]).unwrap();
    assert_eq!(weight.values(), [0.5, 2.5]);
    assert!(weight.eval(&mut *optimizer).unwrap().is_none());
}

/// A newer plugin that can do with this version says so: its longer structs are taken as far as they are known.
#[test]
fn a_longer_struct_is_taken() {
    let folder = Folder::new();
    let flags = ["-DOPTIMIZER_SIZE=sizeof(struct longer)"];
    let path = folder.build("longer", SOURCE, &flags);
    assert_eq!(info(&folder.discover(), &path).status, PluginStatus::Loaded);
}

#[test]
fn an_entry_that_answers_null() {
    assert_refused(&["-DNULL_ENTRY"], &["another ABI version"]);
}

#[test]
fn no_entry_symbol() {
    assert_refused(&["-DNO_SYMBOL"], &["lorasmith_plugin_entry"]);
}

#[test]
fn a_struct_that_is_too_small() {
    assert_refused(&["-DPLUGIN_SIZE=8"], &["ls_plugin", "8"]);
    assert_refused(&["-DOPTIMIZER_SIZE=24"], &["ls_optimizer", "24"]);
}

#[test]
fn a_missing_callback() {
    assert_refused(&["-DSTEP=0"], &["step"]);
}

#[test]
fn a_schema_that_is_none() {
    assert_refused(&[r#"-DSCHEMA="{""#], &["schema", "fixture"]);
    assert_refused(&[r#"-DSCHEMA="[]""#], &["schema", "fixture"]);
    assert_refused(
        &[r#"-DSCHEMA="{\"type\": \"nonsense\"}""#],
        &["schema", "fixture"],
    );
}

#[test]
fn ids_that_are_none() {
    assert_refused(&[r#"-DID="Not An Id""#], &["Not An Id"]);
    assert_refused(&[r#"-DID="""#], &["id"]);
    assert_refused(&[r#"-DPLUGIN_ID="\xff""#], &["UTF-8"]);
}

#[test]
fn the_same_id_twice_in_one_plugin() {
    assert_refused(&["-DCOUNT=2"], &["two components", "fixture"]);
}

#[test]
fn an_absurd_count() {
    assert_refused(&["-DCOUNT=100000000000"], &["100000000000"]);
}

#[test]
fn the_same_id_in_two_files() {
    let folder = Folder::new();
    let first = folder.build("a", SOURCE, &[r#"-DPLUGIN_ID="a""#]);
    let second = folder.build("b", SOURCE, &[r#"-DPLUGIN_ID="b""#]);
    let host = folder.discover();
    assert_eq!(info(&host, &first).status, PluginStatus::Loaded);
    let refused = info(&host, &second);
    assert_eq!(refused.status, PluginStatus::Refused);
    assert!(
        refused
            .reason
            .as_deref()
            .unwrap()
            .contains("duplicate optimizer id `fixture`")
    );
}

#[test]
fn the_same_file_in_two_folders_counts_once() {
    let (one, two) = (Folder::new(), Folder::new());
    let path = one.build("a", SOURCE, &[]);
    fs::copy(&path, two.library("b")).unwrap();
    let host = discover(&[one.path(), two.path()], None);
    assert_eq!(info(&host, &path).status, PluginStatus::Loaded);
    assert!(
        host.plugins()
            .iter()
            .all(|plugin| plugin.path != two.library("b"))
    );
}

#[test]
fn a_file_that_is_no_library() {
    let folder = Folder::new();
    let path = folder.library("text");
    fs::write(&path, "not a library at all").unwrap();
    let host = folder.discover();
    let plugin = info(&host, &path);
    assert_eq!(plugin.status, PluginStatus::Refused);
    assert!(
        plugin
            .reason
            .as_deref()
            .unwrap()
            .contains("cannot be loaded")
    );
}

#[test]
fn other_files_are_not_looked_at() {
    let folder = Folder::new();
    fs::write(folder.path().join("README.md"), "text").unwrap();
    let host = folder.discover();
    assert!(
        host.plugins()
            .iter()
            .all(|plugin| !plugin.path.starts_with(folder.path()))
    );
}

#[test]
fn a_folder_that_anybody_may_write_to() {
    let folder = Folder::new();
    folder.build("fixture", SOURCE, &[]);
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
    let host = folder.discover();
    let refused = info(&host, folder.path());
    assert_eq!(refused.status, PluginStatus::Refused);
    assert!(refused.reason.as_deref().unwrap().contains("chmod o-w"));
    assert!(host.optimizers().iter().all(|known| known.id != "fixture"));
}

#[test]
fn a_file_that_anybody_may_write_to() {
    let folder = Folder::new();
    let path = folder.build("fixture", SOURCE, &[]);
    fs::set_permissions(&path, Permissions::from_mode(0o757)).unwrap();
    let host = folder.discover();
    assert!(
        info(&host, &path)
            .reason
            .as_deref()
            .unwrap()
            .contains("chmod o-w")
    );
}

#[test]
fn a_folder_that_is_not_there() {
    let folder = Folder::new();
    let missing = folder.path().join("missing");
    let host = discover(&[&missing], None);
    assert_eq!(info(&host, &missing).status, PluginStatus::Refused);
}

#[test]
fn a_digest_that_is_not_on_the_list() {
    let folder = Folder::new();
    let path = folder.build("fixture", SOURCE, &[]);
    let host = discover(&[folder.path()], Some(vec!["00".repeat(32)]));
    let refused = info(&host, &path);
    let sha256 = refused.sha256.clone().unwrap();
    assert!(refused.reason.as_deref().unwrap().contains(&sha256));
    assert!(host.optimizers().is_empty() && host.schedulers().is_empty());

    let host = discover(&[folder.path()], Some(vec![sha256.to_uppercase()]));
    assert_eq!(info(&host, &path).status, PluginStatus::Loaded);
}

#[test]
fn an_optimizer_that_will_not_be_created_says_why() {
    let folder = Folder::new();
    folder.build("fixture", SOURCE, &["-DREFUSE"]);
    let host = folder.discover();
    let error = host.create_optimizer("fixture", &json!({})).err().unwrap();
    assert!(
        error.to_string().contains("today is no good day"),
        "{error}"
    );
}

#[test]
fn a_factor_that_is_no_factor() {
    let folder = Folder::new();
    folder.build("fixture", SOURCE, &[]);
    let host = folder.discover();
    let schedule = host
        .create_scheduler("fixture", &json!({}), 1e-4, 0, 10)
        .unwrap();
    assert_eq!(schedule.factor(0).unwrap(), 1.0);
    for step in [1, 2] {
        let error = schedule.factor(step).unwrap_err().to_string();
        assert!(error.contains(&format!("step {step}")), "{error}");
    }
}

#[test]
fn names_of_sd_scripts_are_taken() {
    let host = discover(&[], None);
    for (name, id) in [
        ("AdamW8bit", "adamw8bit"),
        ("PagedAdamW8bit", "adamw8bit"),
        ("Lion8bit", "lion8bit"),
        ("AdaFactor", "adafactor"),
        ("DAdaptAdam", "dadapt-adam"),
        ("SGDNesterov", "sgd"),
        ("Prodigy", "prodigy"),
    ] {
        assert_eq!(host.optimizer_id(name), Some(id));
        host.check_optimizer_settings(name, &json!({})).unwrap();
        assert!(host.create_optimizer(name, &json!({})).is_ok());
    }
    assert_eq!(
        host.scheduler_id("Cosine-With-Restarts"),
        Some("cosine_with_restarts")
    );
    let errors = host
        .check_optimizer_settings("prodgy", &json!({}))
        .unwrap_err();
    assert!(
        errors[0].message.contains("did you mean `prodigy`?"),
        "{errors:?}"
    );
}

/// Every setting of what is shipped is described, has a default, and numbers have a range.
#[test]
fn every_setting_is_described() {
    let host = discover(&[], None);
    for component in host.optimizers().iter().chain(&host.schedulers()) {
        let schema = &component.settings_schema;
        assert_eq!(
            schema["additionalProperties"],
            json!(false),
            "{}",
            component.id
        );
        let Some(properties) = schema["properties"].as_object() else {
            continue;
        };
        for (name, property) in properties {
            let place = format!("{}.{name}: {property}", component.id);
            assert!(property["description"].is_string(), "{place}");
            assert!(property.get("default").is_some(), "{place}");
            let number = |value: &serde_json::Value| {
                let kinds = value["type"].to_string();
                kinds.contains("number") || kinds.contains("integer")
            };
            let of = if property["items"].is_object() {
                &property["items"]
            } else {
                property
            };
            assert!(!number(of) || of.get("minimum").is_some(), "{place}");
        }
    }
}

#[test]
fn wrong_settings_name_the_setting() {
    let host = discover(&[], None);
    let errors = host
        .check_optimizer_settings("adamw", &json!({ "weight_dekay": 0.1 }))
        .unwrap_err();
    assert_eq!(errors[0].pointer.as_deref(), Some("/weight_dekay"));
    assert!(
        errors[0].message.contains("did you mean `weight_decay`?"),
        "{errors:?}"
    );

    let errors = host
        .check_optimizer_settings("adamw", &json!({ "betas": [0.9, 1.0] }))
        .unwrap_err();
    assert_eq!(errors[0].pointer.as_deref(), Some("/betas/1"));

    let errors = host
        .check_scheduler_settings("cosin", &json!({}))
        .unwrap_err();
    assert_eq!(errors[0].pointer, None);
    assert!(errors[0].message.contains("cosine"), "{errors:?}");
}
