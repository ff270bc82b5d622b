//! Which files are looked at, and which of them may be loaded: code of others runs with this process's rights.

use std::fs::{self, File, Metadata};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// No plugin is larger, in bytes.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// In the program's own folder only its own plugins are looked at.
const OWN_PREFIX: &str = "lorasmith_";

/// A folder that is not searched.
pub struct RefusedFolder {
    /// The folder.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// Plugin files in the order in which they are loaded.
pub fn candidates(configured: &[PathBuf]) -> Vec<Result<PathBuf, RefusedFolder>> {
    let mut found = Vec::new();
    for folder in configured {
        search(folder, "", &mut found);
    }
    for folder in own_folders() {
        search(&folder, OWN_PREFIX, &mut found);
    }
    found
}

/// The folder of this program. A build keeps libraries that only tests need one folder below.
fn own_folders() -> Vec<PathBuf> {
    let program = std::env::current_exe().and_then(fs::canonicalize);
    let Some(folder) = program
        .ok()
        .and_then(|program| Some(program.parent()?.to_owned()))
    else {
        return Vec::new();
    };
    let folders = match folder.file_name() {
        Some(name) if name == "deps" => vec![folder],
        _ => vec![folder.join("deps"), folder],
    };
    // The folder itself first: what was installed beside the program wins.
    folders
        .into_iter()
        .rev()
        .filter(|folder| folder.is_dir())
        .collect()
}

fn search(folder: &Path, prefix: &str, found: &mut Vec<Result<PathBuf, RefusedFolder>>) {
    let refused = |reason: String| {
        Err(RefusedFolder {
            path: folder.to_owned(),
            reason,
        })
    };
    match fs::metadata(folder) {
        Ok(metadata) if is_world_writable(&metadata) => {
            found.push(refused(
                "anybody may write to this folder; take that right away (chmod o-w)".to_owned(),
            ));
            return;
        }
        Ok(metadata) if !metadata.is_dir() => {
            found.push(refused("not a folder".to_owned()));
            return;
        }
        Ok(_) => {}
        Err(error) => {
            found.push(refused(error.to_string()));
            return;
        }
    }
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            found.push(refused(error.to_string()));
            return;
        }
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_file() && is_library(path, prefix))
        .collect();
    files.sort();
    found.extend(files.into_iter().map(Ok));
}

/// `liblorasmith_adamw.so`, `liblorasmith_adamw.dylib`, `lorasmith_adamw.dll`.
fn is_library(path: &Path, prefix: &str) -> bool {
    let (before, after) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    path.file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix(before)?.strip_suffix(after))
        .is_some_and(|stem| stem.starts_with(prefix))
}

/// The digest of a file that may be loaded, or why it may not, with its digest as far as it is known.
pub fn check(path: &Path, allowed: Option<&[String]>) -> Result<String, (Option<String>, String)> {
    let early = |reason: String| (None, reason);
    let mut file = File::open(path).map_err(|error| early(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| early(error.to_string()))?;
    if is_world_writable(&metadata) {
        return Err(early(
            "anybody may write to this file; take that right away (chmod o-w)".to_owned(),
        ));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(early(format!(
            "{} bytes, expected at most {MAX_FILE_BYTES}",
            metadata.len()
        )));
    }
    let mut digest = Sha256::new();
    std::io::copy(&mut file, &mut HashWriter(&mut digest))
        .map_err(|error| early(error.to_string()))?;
    let sha256 = hex::encode(digest.finalize());
    match allowed {
        Some(allowed)
            if !allowed
                .iter()
                .any(|digest| digest.eq_ignore_ascii_case(&sha256)) =>
        {
            let reason = format!("its SHA-256 {sha256} is not in `plugin_sha256`");
            Err((Some(sha256), reason))
        }
        _ => Ok(sha256),
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(unix)]
fn is_world_writable(metadata: &Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    const OTHERS_WRITE: u32 = 0o002;
    metadata.permissions().mode() & OTHERS_WRITE != 0
}

#[cfg(not(unix))]
fn is_world_writable(_: &Metadata) -> bool {
    false
}
