//! The rules of `src/ARCHITECTURE.md`, read off the source: who imports whom, which crate is known where, and that
//! every file says what it is.

use std::path::{Path, PathBuf};

/// Who may use whom; a file beside `main.rs` that is not listed may use everything.
const MAY_USE: [(&str, &[&str]); 27] = [
    ("damage", &[]),
    ("allocator", &[]),
    ("kernels", &[]),
    ("lettering", &[]),
    ("pictures", &[]),
    ("diffusion", &["kernels", "damage"]),
    ("captioning", &["diffusion", "kernels", "pictures"]),
    ("networks", &["diffusion", "kernels"]),
    ("lora_tools", &["diffusion", "networks"]),
    ("loras", &["lora_tools", "networks", "diffusion", "store"]),
    (
        "selfcheck",
        &["kernels", "diffusion", "networks", "plugin_host"],
    ),
    ("dataloader", &["pictures"]),
    (
        "training",
        &[
            "networks",
            "lora_tools",
            "diffusion",
            "kernels",
            "dataloader",
            "allocator",
        ],
    ),
    ("plugin_host", &["kernels", "training"]),
    ("store", &[]),
    ("datasets", &["store", "pictures", "damage"]),
    // Of `diffusion` only the tokenizer.
    ("preparation", &["store", "dataloader", "diffusion"]),
    ("access", &["store"]),
    ("webhooks", &["store"]),
    ("models", &["captioning", "diffusion"]),
    (
        "runs",
        &[
            "store",
            "training",
            "networks",
            "diffusion",
            "dataloader",
            "plugin_host",
            "models",
            "selfcheck",
            "lettering",
            "captioning",
            "preparation",
            "lora_tools",
        ],
    ),
    // Of `diffusion` only the list of devices.
    (
        "api",
        &[
            "access",
            "captioning",
            "datasets",
            "runs",
            "models",
            "plugin_host",
            "store",
            "diffusion",
            "selfcheck",
            "webhooks",
            "preparation",
            "loras",
        ],
    ),
    (
        "verify",
        &["diffusion", "networks", "training", "plugin_host"],
    ),
    (
        "bench",
        &[
            "diffusion",
            "networks",
            "training",
            "plugin_host",
            "allocator",
        ],
    ),
    ("demo", &["app", "config", "lettering"]),
    ("telemetry", &[]),
    ("config", &[]),
];

/// Where a crate, or a word, may appear.
const KNOWN_IN: [(&str, &[&str]); 12] = [
    ("tract_onnx", &["src/captioning/taggers/"]),
    ("actix_cors", &["src/api/"]),
    ("actix_web", &["src/api/"]),
    ("utoipa", &["src/api/"]),
    ("multer", &["src/api/"]),
    ("sea_orm", &["src/store/", "migrations/"]),
    ("libloading", &["src/plugin_host/"]),
    (
        "burn",
        &[
            "src/kernels/",
            "src/captioning/",
            "src/diffusion/",
            "src/networks/",
            "src/selfcheck/",
            "src/training/",
            "src/dataloader/",
            "src/plugin_host/",
            "src/verify/",
            "src/bench/",
        ],
    ),
    ("cubecl", &["src/kernels/", "src/plugin_host/lazy/"]),
    ("ash", &["src/diffusion/device_memory.rs"]),
    // SIMD, the one place that maps files, Vulkan beside wgpu, and the C boundary.
    (
        "unsafe",
        &[
            "src/allocator.rs",
            "src/kernels/cpu/",
            "src/diffusion/device_memory.rs",
            "src/diffusion/mapping.rs",
            "src/plugin_host/",
            "plugins/abi/",
            "plugins/sdk/",
        ],
    ),
    (
        "lorasmith_abi",
        &[
            "src/plugin_host/",
            "plugins/sdk/",
            "plugins/abi/",
            "tests/plugins/",
        ],
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file of the workspace: path below the root, and text.
fn sources() -> Vec<(String, String)> {
    let mut waiting: Vec<PathBuf> = ["src", "plugins", "migrations", "tests", "benches"]
        .iter()
        .map(|folder| root().join(folder))
        .collect();
    let mut found = Vec::new();
    while let Some(folder) = waiting.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            if path.is_dir() {
                if !path.ends_with("fixtures") && !path.ends_with("target") {
                    waiting.push(path);
                }
            } else if path.extension().is_some_and(|end| end == "rs") {
                let below = path.strip_prefix(root()).expect("below the root");
                let name = below.to_string_lossy().replace('\\', "/");
                found.push((name, std::fs::read_to_string(&path).expect("UTF-8")));
            }
        }
    }
    found.sort();
    assert!(found.len() > 80, "found {} files", found.len());
    found
}

/// Lines of code, with comments cut off.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
}

fn mentions(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(part) && !after.is_some_and(part)
    })
}

#[test]
fn modules_import_what_they_may() {
    let mut broken = Vec::new();
    for (file, text) in sources() {
        let Some(below) = file.strip_prefix("src/") else {
            continue;
        };
        let module = below
            .split('/')
            .next()
            .unwrap_or_default()
            .trim_end_matches(".rs");
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == module) else {
            continue;
        };
        for line in code(&text) {
            for (at, _) in line.match_indices("crate::") {
                let used = line[at + "crate::".len()..]
                    .split(|c: char| !(c.is_alphanumeric() || c == '_'))
                    .next();
                let used = used.unwrap_or_default();
                let known = MAY_USE.iter().any(|(name, _)| *name == used) || used == "app";
                if known && used != module && !allowed.contains(&used) {
                    broken.push(format!("{file}: {}", line.trim()));
                }
                if module == "api"
                    && line[at..].starts_with("crate::diffusion::")
                    && !line.contains("devices")
                {
                    broken.push(format!("{file}: {}", line.trim()));
                }
            }
        }
    }
    assert!(
        broken.is_empty(),
        "against src/ARCHITECTURE.md:\n{}",
        broken.join("\n")
    );
}

#[test]
fn crates_stay_in_their_folders() {
    let mut broken = Vec::new();
    for (file, text) in sources()
        .iter()
        .filter(|(file, _)| file.starts_with("src/") || file.starts_with("plugins/"))
    {
        for (word, places) in KNOWN_IN {
            let at_home = places.iter().any(|place| file.starts_with(place));
            // The database's connector is re-exported there; strings and attributes do not import.
            let used = |line: &&str| {
                mentions(line, word) && !line.contains('"') && !line.trim_start().starts_with("#[")
            };
            if !at_home && let Some(line) = code(text).find(|line| used(line)) {
                broken.push(format!("{file}: `{word}` in {}", line.trim()));
            }
        }
    }
    assert!(
        broken.is_empty(),
        "against src/ARCHITECTURE.md:\n{}",
        broken.join("\n")
    );
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//!") && !text.starts_with("#!"))
        .map(|(file, _)| file)
        .collect();
    assert!(silent.is_empty(), "without `//!`: {}", silent.join(", "));
}
