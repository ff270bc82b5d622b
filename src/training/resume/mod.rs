//! Resume points: all that a run needs to go on exactly where it was, in one file.
//!
//! Random numbers and the order of the pictures are functions of the seed and of counters, and the learning rate is
//! one of the step, so none of them has a state of its own. Whatever has one implements [`Resumable`] and is listed
//! where the loop, or the [`Trainer`](crate::training::Trainer), lists its parts.

mod file;
mod folder;
mod parts;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use crate::training::TrainError;
use crate::training::optimizer::StateDtype;

pub use folder::ResumeFolder;

/// Something whose state outlives the process.
pub trait Resumable {
    /// The state as it is.
    fn keep(&mut self) -> Result<Part, TrainError>;
    /// Takes over a state that [`keep`](Self::keep) has given.
    fn take_up(&mut self, part: Part) -> Result<(), TrainError>;
}

/// The parts of a run under their names, in any order.
pub type Parts<'a> = Vec<(&'static str, &'a mut dyn Resumable)>;

/// The state of one part.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Part {
    /// Small values. Floats that have to be exact belong into a tensor: JSON may round them.
    pub values: Value,
    /// Tensors.
    pub tensors: Vec<PartTensor>,
}

/// A tensor of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartTensor {
    /// Its name, unique within its part.
    pub name: String,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Type of its elements.
    pub dtype: StateDtype,
    /// Its elements in row-major order, little-endian.
    pub data: Vec<u8>,
}

impl Part {
    /// The tensor of a name.
    ///
    /// # Errors
    /// When there is none.
    pub fn tensor(&self, name: &str) -> Result<&PartTensor, TrainError> {
        let found = self.tensors.iter().find(|tensor| tensor.name == name);
        found.ok_or_else(|| ResumeError::Parts(format!("there is no tensor `{name}`")).into())
    }

    /// A whole number among the values.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn count(&self, name: &str) -> Result<u64, TrainError> {
        let found = self.values[name].as_u64();
        found.ok_or_else(|| {
            let found = &self.values[name];
            ResumeError::Parts(format!("{name} is {found}, expected a whole number")).into()
        })
    }
}

/// What a resume point belongs to: by name, whatever must be the same for the run that goes on with it.
pub type Owner = BTreeMap<String, String>;

/// Everything at one moment of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct ResumePoint {
    /// Optimizer steps done.
    pub step: u64,
    /// What it belongs to.
    pub owner: Owner,
    /// The parts by name.
    pub parts: BTreeMap<String, Part>,
}

impl ResumePoint {
    /// Asks every part for its state.
    pub fn of(step: u64, owner: &Owner, parts: Parts<'_>) -> Result<Self, TrainError> {
        let kept = parts
            .into_iter()
            .map(|(name, part)| Ok((name.to_owned(), part.keep()?)));
        Ok(Self {
            step,
            owner: owner.clone(),
            parts: kept.collect::<Result<_, TrainError>>()?,
        })
    }

    /// Gives every part its state back.
    ///
    /// # Errors
    /// [`ResumeError::Parts`] when the parts are not those that were kept, [`ResumeError::Foreign`] when the point
    /// belongs to something else.
    pub fn restore(mut self, owner: &Owner, parts: Parts<'_>) -> Result<(), TrainError> {
        self.belongs_to(owner)?;
        for (name, part) in parts {
            let Some(kept) = self.parts.remove(name) else {
                let message = format!("`{name}` was not kept");
                return Err(ResumeError::Parts(message).into());
            };
            part.take_up(kept)?;
        }
        if let Some(name) = self.parts.keys().next() {
            let message = format!("`{name}` was kept, and this program does not know it");
            return Err(ResumeError::Parts(message).into());
        }
        Ok(())
    }

    fn belongs_to(&self, owner: &Owner) -> Result<(), ResumeError> {
        let names = self.owner.keys().chain(owner.keys());
        for name in names {
            let (found, expected) = (self.owner.get(name), owner.get(name));
            if found != expected {
                let text = |value: Option<&String>| value.cloned().unwrap_or_default();
                return Err(ResumeError::Foreign {
                    what: name.clone(),
                    found: text(found),
                    expected: text(expected),
                });
            }
        }
        Ok(())
    }
}

/// Why a resume point cannot be written, read or used.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// A file or folder.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is torn or was changed.
    #[error("{}: {message}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// It was kept for something else.
    #[error(
        "the run cannot go on where it was kept: {what} was `{found}` then and is `{expected}` now; put the former \
         back, or start a new run"
    )]
    Foreign {
        /// What differs.
        what: String,
        /// What it was when the point was kept.
        found: String,
        /// What it is now.
        expected: String,
    },
    /// The parts are not those of this program.
    #[error("the resume point was written by another version of the program: {0}")]
    Parts(String),
}
