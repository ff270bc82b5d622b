//! Checkpoints that torch has written (`.ckpt`, `.pt`, `.bin`): where their tensors lie in the file. Nothing in them is
//! ever executed: a small stack machine makes plain values of the pickle and refuses whatever it does not know.

mod allowed;
mod archive;
mod legacy;
mod machine;
#[cfg(test)]
mod tests;
mod value;

use std::collections::HashMap;
use std::ops::Range;

use safetensors::Dtype;

use machine::Machine;
pub use value::element_bytes;
use value::{Id, Value};

/// The largest pickle that is read; that of Stable Diffusion 1.5 with optimizer and averages has 0.6 MB.
const MAX_PICKLE_BYTES: usize = 16 << 20;
/// How often a dictionary of tensors may lie in another one's `state_dict`.
const MAX_NESTING: usize = 4;
/// Numbers beside the tensors that are kept: steps and epochs.
const MAX_NUMBERS: usize = 256;

/// Why a checkpoint is not read. The file is named by whoever opened it.
#[derive(Debug, thiserror::Error)]
pub enum PickleError {
    /// It is not what torch writes, or exceeds a limit.
    #[error("{0}")]
    Broken(String),
    /// It wants a program to do something.
    #[error(
        "its pickle calls `{0}`, which no checkpoint needs: nothing of it was read. Convert it to safetensors where you trust it"
    )]
    Forbidden(String),
    /// A tensor makes no sense.
    #[error("tensor `{key}` {reason}")]
    Tensor { key: String, reason: String },
}

impl PickleError {
    fn broken(reason: impl Into<String>) -> Self {
        Self::Broken(reason.into())
    }
}

/// A tensor's place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its number format.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes; of one whose elements do not follow each other, from the first to the last.
    pub bytes: Range<usize>,
    /// Elements along each axis and the steps between them, where they do not follow each other.
    pub axes: Option<Vec<(usize, usize)>>,
}

/// What a checkpoint holds.
#[derive(Debug, Default)]
pub struct Checkpoint {
    /// Its tensors by name.
    pub tensors: HashMap<String, Placed>,
    /// Whole numbers beside the tensors, such as `global_step`.
    pub numbers: HashMap<String, i64>,
}

/// Whether a file begins as torch's do: a zip archive, or the pickle of a magic number.
pub fn is_torch(bytes: &[u8]) -> bool {
    archive::is_zip(bytes) || legacy::is_legacy(bytes)
}

/// Finds the tensors of a file that [`is_torch`].
///
/// # Errors
/// When the file is broken, exceeds a limit, or wants something done that no checkpoint needs.
pub fn read(bytes: &[u8]) -> Result<Checkpoint, PickleError> {
    if legacy::is_legacy(bytes) {
        return legacy::read(bytes);
    }
    let archive = archive::Archive::read(bytes)?;
    let pickle = archive.pickle()?;
    if pickle.len() > MAX_PICKLE_BYTES {
        return Err(PickleError::Broken(format!(
            "its pickle has {} bytes, at most {MAX_PICKLE_BYTES} are read",
            pickle.len()
        )));
    }
    let mut machine = Machine::new(pickle);
    let root = machine.run()?;
    checkpoint(&machine, root, |key| archive.storage(key))
}

/// The tensors of a pickle's value. `place` knows where a storage's bytes are.
fn checkpoint<'a>(
    machine: &Machine<'a>,
    root: Id,
    place: impl Fn(&str) -> Result<Range<usize>, PickleError>,
) -> Result<Checkpoint, PickleError> {
    let mut found = Checkpoint::default();
    let mut dictionary = root;
    for _ in 0..MAX_NESTING {
        let Some(inner) = machine.item(dictionary, "state_dict") else {
            break;
        };
        if !matches!(machine.value(inner), Value::Dict(_)) {
            break;
        }
        found.numbers.extend(numbers(machine, dictionary));
        dictionary = inner;
    }
    let Value::Dict(items) = machine.value(dictionary) else {
        return Err(PickleError::broken(
            "its pickle is no dictionary of tensors (a whole module? only a `state_dict` is read)",
        ));
    };
    for (key, item) in items {
        let (Some(key), Value::Tensor(tensor)) = (machine.text(*key), machine.value(*item)) else {
            continue; // what is no tensor is not needed
        };
        let wrong = |reason: String| PickleError::Tensor {
            key: key.chars().take(100).collect(),
            reason,
        };
        let storage = place(tensor.storage.key).map_err(|error| wrong(format!("has {error}")))?;
        let placed = tensor.place(&storage).map_err(wrong)?;
        found.tensors.insert(key.to_owned(), placed);
    }
    Ok(found)
}

fn numbers<'m>(machine: &'m Machine<'_>, id: Id) -> impl Iterator<Item = (String, i64)> + 'm {
    let items: &[(Id, Id)] = match machine.value(id) {
        Value::Dict(items) => items,
        _ => &[],
    };
    let number = |(key, item): &(Id, Id)| match machine.value(*item) {
        Value::Int(number) => Some((machine.text(*key)?.to_owned(), *number)),
        _ => None,
    };
    items.iter().filter_map(number).take(MAX_NUMBERS)
}
