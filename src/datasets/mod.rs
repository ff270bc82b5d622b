//! What a dataset may be: uploads become subsets of checked images with captions. Knows files and rows, not HTTP.

pub mod archive;
pub mod captions;
pub mod layout;
pub mod limits;
pub mod pictures;
pub mod prepare;
pub mod report;
