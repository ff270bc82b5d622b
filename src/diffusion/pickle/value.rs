//! What a pickle is made of: plain values that refer to each other by number, so that no value is ever copied and
//! cycles do no harm. Texts are views of the file.

use std::fmt;
use std::ops::Range;

use safetensors::Dtype;

use super::Placed;

/// The highest rank of a tensor; convolutions have 4.
const MAX_RANK: usize = 8;

/// A value's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(pub u32);

/// Something that is not looked at any further, or one of the few things that are.
#[derive(Debug)]
pub enum Value<'a> {
    None,
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A name of Python's: a class or a function. Having it does nothing.
    Global(Name<'a>),
    Storage(Storage<'a>),
    Tensor(Box<Tensor<'a>>),
    /// Data that nobody needs: floats, bytes, sets, numpy's numbers, settings.
    Inert,
}

/// A name of Python's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a> {
    pub module: &'a str,
    pub name: &'a str,
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |text: &str| text.chars().take(100).collect::<String>();
        write!(f, "{}.{}", short(self.module), short(self.name))
    }
}

/// Where tensors keep their numbers.
#[derive(Clone, Copy, Debug)]
pub struct Storage<'a> {
    /// Its name in the file.
    pub key: &'a str,
    /// What it is made of; `None` of bytes without a meaning.
    pub dtype: Option<Dtype>,
    /// How many of them.
    pub elements: u64,
}

/// A view of a storage.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    pub storage: Storage<'a>,
    pub dtype: Dtype,
    /// Elements of the storage before its first.
    pub offset: u64,
    pub shape: Vec<u64>,
    /// Steps between elements along each axis.
    pub strides: Vec<u64>,
}

impl Tensor<'_> {
    /// Where its bytes are, when those of its storage are at `storage`; or what is wrong with it.
    pub fn place(&self, storage: &Range<usize>) -> Result<Placed, String> {
        let (shape, strides) = (&self.shape, &self.strides);
        if shape.len() > MAX_RANK {
            let rank = shape.len();
            return Err(format!(
                "has {rank} dimensions, at most {MAX_RANK} are expected"
            ));
        }
        if shape.len() != strides.len() {
            return Err(format!(
                "has the shape {shape:?} with the strides {strides:?}"
            ));
        }
        let size = element_bytes(self.dtype);
        let stored = (storage.len() / size) as u64;
        let claimed = match self.storage.dtype {
            Some(held) if held != self.dtype => {
                return Err(format!("is {:?} in a storage of {held:?}", self.dtype));
            }
            Some(_) => self.storage.elements,
            None => self.storage.elements / size as u64,
        };
        if claimed > stored {
            return Err(format!(
                "lies in a storage that claims {claimed} elements and has {stored} (truncated?)"
            ));
        }
        let too_large = || format!("of shape {shape:?} is larger than can be");
        let count = shape
            .iter()
            .try_fold(1_u64, |product, n| product.checked_mul(*n));
        let count = count.ok_or_else(too_large)?;
        // A tensor whose elements are the same ones again and again would take more memory than the file has bytes.
        if count > claimed {
            return Err(format!(
                "of shape {shape:?} has {count} elements, its storage has {claimed}"
            ));
        }
        let last = shape
            .iter()
            .zip(strides)
            .try_fold(0_u64, |sum, (n, stride)| {
                sum.checked_add(n.saturating_sub(1).checked_mul(*stride)?)
            });
        let length = if count == 0 {
            Some(0)
        } else {
            last.and_then(|last| last.checked_add(1))
        };
        let end = length.and_then(|length| self.offset.checked_add(length));
        let end = end.filter(|end| *end <= claimed).ok_or_else(|| {
            format!(
                "of shape {shape:?}, strides {strides:?} and offset {} ends outside of its storage of {claimed} elements",
                self.offset
            )
        })?;
        // Inside of a storage that lies in memory: no number is too large for a machine word.
        let word = |value: u64| value as usize;
        let start = if count == 0 { 0 } else { word(self.offset) };
        let end = if count == 0 { 0 } else { word(end) };
        let apart = count > 0 && !is_contiguous(shape, strides);
        let axes = shape.iter().zip(strides);
        let axes = axes.map(|(count, step)| (word(*count), word(*step)));
        Ok(Placed {
            dtype: self.dtype,
            shape: shape.iter().map(|count| word(*count)).collect(),
            bytes: storage.start + start * size..storage.start + end * size,
            axes: apart.then(|| axes.collect()),
        })
    }
}

/// Bytes of an element; all formats that torch's storages have are whole bytes.
pub fn element_bytes(dtype: Dtype) -> usize {
    (dtype.bitsize() / 8).max(1)
}

/// Whether elements follow each other, the last axis first.
fn is_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(n, stride)| {
        let fits = *n == 1 || *stride == expected;
        expected *= n;
        fits
    })
}
