//! What a dataset may be: uploads become subsets of checked images with captions. Knows files and rows, not HTTP.

pub mod archive;
pub mod captions;
pub mod dataset_toml;
pub mod error;
#[cfg(test)]
mod fuzz;
mod group;
mod ingest;
pub mod layout;
pub mod limits;
pub mod manifest;
pub mod parts;
pub mod pictures;
pub mod prepare;
pub mod report;
pub mod rules;
pub mod service;
mod target;
pub mod trial;

pub use error::{DatasetError, InvalidField};
pub use limits::Limits;
pub use prepare::{StagedFile, SubsetChoice};
pub use report::{FileKind, FileReport, Outcome, Remark, Summary};
pub use service::DatasetService;
pub use trial::Trial;

pub use crate::pictures::BackgroundError;
