//! What a dataset may be: uploads become subsets of checked images with captions. Knows files and rows, not HTTP.

pub mod archive;
pub mod caption_batch;
pub mod caption_edits;
pub mod captions;
pub mod dataset_toml;
pub mod error;
pub mod export;
#[cfg(test)]
mod fuzz;
mod group;
mod ingest;
pub mod layout;
pub mod limits;
mod manifest;
pub mod masks;
pub mod parts;
pub mod pictures;
pub mod prepare;
pub mod report;
pub mod rules;
pub mod service;
mod subjects;
mod tables;
mod target;
pub mod trial;

pub use caption_batch::{BatchImage, BatchResult, CaptionBatch, TagCounts};
pub use caption_edits::Operation;
pub use error::{DatasetError, InvalidField};
pub use export::{ExportImage, ExportSource, ExportSubset};
pub use limits::Limits;
pub use prepare::{StagedFile, SubsetChoice};
pub use report::{FileKind, FileReport, Outcome, Remark, Summary};
pub use service::DatasetService;
pub use trial::Trial;

pub use crate::pictures::BackgroundError;
