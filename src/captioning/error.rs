//! What can go wrong while a captioner is read or used.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::diffusion::LoadError;

/// A captioner that cannot be read, or captions that were not made.
#[derive(Debug, thiserror::Error)]
pub enum CaptionError {
    /// The model's files are not where they are looked for.
    #[error(transparent)]
    Missing(#[from] MissingModel),
    /// A file of the model is broken, or does not fit the others.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A file of a tagger is broken, too large, or does not fit the others.
    #[error("{}: {reason}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// A picture cannot be read.
    #[error("the picture cannot be used: {0}")]
    Picture(String),
    /// A setting is out of its range, or the prefix leaves no room for a caption.
    #[error("`{setting}` {reason}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// What was found and what was expected.
        reason: String,
    },
    /// The caller has said to stop.
    #[error("cancelled")]
    Cancelled,
}

impl CaptionError {
    pub(super) fn model(path: &Path, reason: impl Into<String>) -> Self {
        Self::Model {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// A model of which files are missing; its message says what to put where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingModel {
    /// Where the files are looked for.
    pub folder: PathBuf,
    /// All files that belong there.
    pub expected: Vec<String>,
    /// Those that are not there.
    pub missing: Vec<String>,
    /// Where they can be had.
    pub source: String,
}

impl std::error::Error for MissingModel {}

impl fmt::Display for MissingModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let folder = self.folder.display();
        write!(
            f,
            "{folder} has no {}; expected are the files {} in this folder, from {}",
            self.missing.join(", "),
            self.expected.join(", "),
            self.source
        )
    }
}

impl MissingModel {
    /// Looks for plain files; none is missing when the result is `None`.
    pub fn look(
        folder: &std::path::Path,
        expected: &[&str],
        source: impl Into<String>,
    ) -> Option<Self> {
        let missing: Vec<String> = expected
            .iter()
            .filter(|name| !folder.join(name).is_file())
            .map(|name| (*name).to_owned())
            .collect();
        (!missing.is_empty()).then(|| Self {
            folder: folder.to_owned(),
            expected: expected.iter().map(|name| (*name).to_owned()).collect(),
            missing,
            source: source.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_model_says_which_files_belong_where() {
        let folder = tempfile::tempdir().unwrap();
        let look = || MissingModel::look(folder.path(), &["a.json", "b.txt"], "example.org");
        std::fs::write(folder.path().join("a.json"), "{}").unwrap();
        let message = look().expect("one is missing").to_string();
        let path = folder.path().display();
        assert_eq!(
            message,
            format!(
                "{path} has no b.txt; expected are the files a.json, b.txt in this folder, from example.org"
            )
        );
        std::fs::write(folder.path().join("b.txt"), "").unwrap();
        assert_eq!(look(), None);
    }
}
