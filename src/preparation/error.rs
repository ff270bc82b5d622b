//! What can go wrong with previews and reports, without HTTP.

use uuid::Uuid;

use crate::dataloader::DataError;
use crate::store::StoreError;

/// A failed call of [`super::PreparationService`].
#[derive(Debug, thiserror::Error)]
pub enum PreparationError {
    #[error("there is no dataset {0}")]
    DatasetNotFound(Uuid),
    #[error("the dataset has no image {0}")]
    ImageNotFound(Uuid),
    /// A setting of sizes: its field, and what was found and expected.
    #[error("`{0}` {1}")]
    Settings(&'static str, String),
    #[error("the picture cannot be shown: {0}")]
    Picture(#[from] DataError),
    #[error("the picture cannot be shown: {0}")]
    Encode(String),
    #[error("a background task has failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Store(#[from] StoreError),
}
