//! Tools on LoRA files, also on those of other programs: looking into them, merging, resizing, renaming, and checking
//! one before it is handed out. They work on files: no model is loaded, and no device is needed.

pub mod base;
pub mod change;
pub mod check;
pub mod convert;
mod error;
pub mod file;
pub mod inspect;
mod matrix;
pub mod merge;
pub mod names;
mod notes;
pub mod resize;
#[cfg(test)]
mod tests;
mod writer;

pub use base::{BaseMerge, merge_into_base};
pub use check::{Checked, Layers, check_file};
pub use convert::{Convention, Conversion, convert};
pub use error::ToolError;
pub use file::{AdapterFile, Kind};
pub use inspect::{Inspection, inspect};
pub use merge::{Ingredient, Merge, Method, merge};
pub use resize::{ResizeReport, Resizing, Rule, resize};

use crate::networks::SavePrecision;

/// Hears how far a tool is; called from one thread.
pub trait Progress {
    /// How many pieces there are; told once, first.
    fn total(&mut self, pieces: usize);
    /// That so many more of them are done.
    fn done(&mut self, pieces: usize);
}

/// Nobody listens.
impl Progress for () {
    fn total(&mut self, _: usize) {}
    fn done(&mut self, _: usize) {}
}

/// What a tool has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Size of the file or of all files.
    pub size_bytes: u64,
    /// Number format of its tensors.
    pub precision: Option<SavePrecision>,
    /// Adapters in it, or layers that were changed.
    pub modules: usize,
}

/// Modules that are worked on at the same time: enough for all cores, few enough to hold in memory.
fn batch() -> usize {
    2 * rayon::current_num_threads()
}
