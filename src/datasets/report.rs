//! What became of each file of an upload.

use uuid::Uuid;

/// One file of an upload and its fate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileReport {
    /// As the upload, or the archive in it, named the file.
    pub name: String,
    pub kind: FileKind,
    pub outcome: Outcome,
    /// What its owner should know although it was taken.
    pub remarks: Vec<Remark>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    Image,
    Caption,
    /// What of an image counts in the loss.
    Mask,
    Archive,
    /// A table of captions, or settings of subsets.
    Metadata,
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A new image, the caption of one, or an archive that was looked through.
    Accepted {
        image_id: Option<Uuid>,
        subset: Option<String>,
    },
    /// The subset has this content already.
    Duplicate { image_id: Uuid, subset: String },
    /// Left out, with the reason.
    Refused(Remark),
    /// What operating systems leave behind (`.DS_Store`, `Thumbs.db`).
    Ignored,
}

/// A stable code and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    pub code: &'static str,
    pub message: String,
}

impl Remark {
    pub fn new(code: &'static str, message: impl ToString) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }
}

impl FileReport {
    pub fn new(name: impl Into<String>, kind: FileKind, outcome: Outcome) -> Self {
        Self {
            name: name.into(),
            kind,
            outcome,
            remarks: Vec::new(),
        }
    }

    pub fn refused(
        name: impl Into<String>,
        kind: FileKind,
        code: &'static str,
        message: impl ToString,
    ) -> Self {
        Self::new(name, kind, Outcome::Refused(Remark::new(code, message)))
    }
}

/// Counts over all files of an upload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub images: usize,
    pub captions: usize,
    pub duplicates: usize,
    pub refused: usize,
    pub warnings: usize,
}

impl Summary {
    pub fn of(files: &[FileReport]) -> Self {
        let mut summary = Self::default();
        for file in files {
            match (&file.outcome, file.kind) {
                (Outcome::Accepted { .. }, FileKind::Image) => summary.images += 1,
                (Outcome::Accepted { .. }, FileKind::Caption) => summary.captions += 1,
                (Outcome::Duplicate { .. }, _) => summary.duplicates += 1,
                (Outcome::Refused(_), _) => summary.refused += 1,
                _ => {}
            }
            summary.warnings += file.remarks.len();
        }
        summary
    }
}
