//! The format of torch before 1.6: five pickles after another (a magic number, a version, the machine, the value, the
//! names of its storages), then the storages, each with its length before it.

use std::collections::HashMap;
use std::ops::Range;

use super::machine::Machine;
use super::value::{Value, element_bytes};
use super::{Checkpoint, MAX_PICKLE_BYTES, PickleError, checkpoint};

/// The pickle of the number 0x1950a86a20f9469cfc6c, as protocol 2 writes it.
const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

/// Whether a file begins with the magic number.
pub fn is_legacy(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Finds the tensors of such a file.
///
/// # Errors
/// As of [`super::read`].
pub fn read(bytes: &[u8]) -> Result<Checkpoint, PickleError> {
    let mut at = MAGIC.len();
    for _ in ["version", "machine"] {
        let mut machine = Machine::new(window(bytes, at));
        machine.run()?;
        at += machine.position();
    }
    let mut machine = Machine::new(window(bytes, at));
    let root = machine.run()?;
    at += machine.position();
    let mut names = Machine::new(window(bytes, at));
    let list = names.run()?;
    at += names.position();
    let Value::List(keys) = names.value(list) else {
        return Err(PickleError::broken("the names of its storages are no list"));
    };
    let sizes = machine.storage_sizes();
    let mut places: HashMap<&str, Range<usize>> = HashMap::new();
    for key in keys {
        let place = names.text(*key).and_then(|key| {
            let place = storage(bytes, at, *sizes.get(key)?)?;
            Some((key, place))
        });
        let Some((key, place)) = place else {
            return Err(PickleError::broken(
                "its storages are not what its pickle says (truncated?)",
            ));
        };
        at = place.end;
        places.insert(key, place);
    }
    checkpoint(&machine, root, |key| {
        let missing = || PickleError::broken("a storage that is not in the file");
        places.get(key).cloned().ok_or_else(missing)
    })
}

/// A pickle does not tell its length before it was read.
fn window(bytes: &[u8], at: usize) -> &[u8] {
    let rest = bytes.get(at..).unwrap_or_default();
    &rest[..rest.len().min(MAX_PICKLE_BYTES)]
}

/// The place of a storage of elements of a size, whose number stands before it.
fn storage(bytes: &[u8], at: usize, element_bytes: usize) -> Option<Range<usize>> {
    let count = u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?);
    let length = usize::try_from(count).ok()?.checked_mul(element_bytes)?;
    let start = at + 8;
    let end = start.checked_add(length)?;
    (end <= bytes.len()).then_some(start..end)
}

impl Machine<'_> {
    /// Bytes of an element of each storage that the value speaks of.
    fn storage_sizes(&self) -> HashMap<&str, usize> {
        let storages = self.values().filter_map(|value| match value {
            Value::Storage(storage) => Some((storage.key, storage.dtype.map_or(1, element_bytes))),
            _ => None,
        });
        storages.collect()
    }
}
