//! What can go wrong with a dataset, without HTTP.

use uuid::Uuid;

use super::captions::CaptionError;
use super::masks::MaskError;
use crate::store::StoreError;

/// A failed call of [`super::DatasetService`].
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("there is no dataset {0}")]
    DatasetNotFound(Uuid),
    #[error("the dataset has no subset {0}")]
    SubsetNotFound(Uuid),
    #[error("the dataset has no image {0}")]
    ImageNotFound(Uuid),
    #[error("a run was trained on the dataset")]
    InUse,
    #[error("the resource is at revision {found}, not {expected}")]
    Changed { expected: i64, found: i64 },
    #[error("{}", describe(.0))]
    InvalidDataset(Vec<InvalidField>),
    #[error("{}", describe(.0))]
    InvalidSubset(Vec<InvalidField>),
    #[error("the dataset has another subset named `{0}`")]
    SubsetExists(String),
    #[error(
        "the caption of a regularization image would name the subject: found the instance prompt `{0}`, expected a \
         caption without it. Regularization images show what the model knew before; describe the class instead"
    )]
    InstancePrompt(String),
    #[error("the dataset has no changes of captions at revision {0} that could be undone")]
    NothingToUndo(i64),
    #[error(transparent)]
    Caption(#[from] CaptionError),
    #[error(transparent)]
    Mask(#[from] MaskError),
    #[error("the dataset has no upload {0}")]
    UploadNotFound(Uuid),
    #[error("{}", describe(.0))]
    InvalidUpload(Vec<InvalidField>),
    #[error("there are {0} uploads with parts already: complete or delete some")]
    TooManyUploads(u64),
    #[error("the upload is being completed, or has been")]
    UploadNotOpen,
    #[error("{0}")]
    UploadIncomplete(String),
    #[error("found the SHA-256 {found}, expected {expected}")]
    ChecksumMismatch { found: String, expected: String },
    #[error("the upload holds no files")]
    NothingUploaded,
    #[error("reading or writing a file: {0}")]
    Io(#[from] std::io::Error),
    #[error("a background task has failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A value that cannot be used: which, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidField {
    pub field: &'static str,
    pub code: &'static str,
    pub message: String,
}

fn describe(fields: &[InvalidField]) -> String {
    let each = fields
        .iter()
        .map(|field| format!("`{}`: {}", field.field, field.message));
    each.collect::<Vec<_>>().join("; ")
}
