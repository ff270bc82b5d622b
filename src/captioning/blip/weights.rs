//! The weight files of a folder: one, or several with an index.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::diffusion::config::read_json;
use crate::diffusion::{LoadError, Weights};

/// The one file.
pub const FILE: &str = "model.safetensors";
/// What names several.
const INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// Whether the weights are in several files.
pub fn is_split(folder: &Path) -> bool {
    !folder.join(FILE).is_file() && folder.join(INDEX).is_file()
}

/// Maps the files.
///
/// # Errors
/// When one cannot be read, or the index names a file outside of the folder.
pub fn open(folder: &Path) -> Result<Weights, LoadError> {
    if !is_split(folder) {
        return Weights::open(&[folder.join(FILE)]);
    }
    let path = folder.join(INDEX);
    let index: Index = read_json(&path)?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    let files: Vec<PathBuf> = names
        .iter()
        .map(|name| {
            if name.ends_with(".safetensors") && !name.contains(['/', '\\', ':']) {
                Ok(folder.join(name))
            } else {
                Err(LoadError::config(
                    &path,
                    format!("`{name}` is not the name of a safetensors file beside it"),
                ))
            }
        })
        .collect::<Result<_, _>>()?;
    Weights::open(&files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::captioning::blip::testing;

    #[test]
    fn an_index_names_the_files_beside_it_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("model-00001-of-00001.safetensors");
        std::fs::copy(testing::folder().join(FILE), &copy).unwrap();
        let index = |name: &str| {
            let text = format!(r#"{{"metadata": {{}}, "weight_map": {{"a": "{name}"}}}}"#);
            std::fs::write(folder.path().join(INDEX), text).unwrap();
            open(folder.path())
        };
        let weights = index("model-00001-of-00001.safetensors").unwrap();
        assert!(weights.stores("vision_model.embeddings.class_embedding"));
        assert!(is_split(folder.path()));
        for name in ["../a.safetensors", "config.json"] {
            assert!(index(name).unwrap_err().to_string().contains(name));
        }
    }
}
