//! Tensors of one model component, read from memory-mapped files under their *diffusers* names.
//!
//! Nothing here knows an architecture: a model's `load` function asks for names and shapes, this file checks and
//! uploads them. A single-file checkpoint is seen under diffusers names through a key map (see `ldm`).

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::Dtype;
use sha2::{Digest as _, Sha256};

use super::error::LoadError;
use super::files::{Entry, Files};
use super::formats;
use crate::kernels::Precision;

/// Bytes of a tensor that are hashed before their memory is given back.
const HASHED_AT_ONCE_BYTES: usize = 4 << 20;

/// How a model is brought into memory.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where the weights go.
    pub device: Device,
    /// The number format they are held in; `None` keeps what is stored, where the device can.
    pub weight_dtype: Option<DType>,
    /// What the UNet and the text encoder multiply in; the VAE stays with f32.
    pub precision: Precision,
    /// A diffusers folder beside a single file: attention heads, norm groups, prediction type and tokenizer of a
    /// model that differs from the family's published values.
    pub config_dir: Option<PathBuf>,
    /// A VAE in place of the model's own: a file, or a folder.
    pub vae: Option<PathBuf>,
    /// Only names and shapes are looked at: every tensor is a zero seen again and again, which takes no memory.
    pub only_shapes: bool,
}

impl LoadOptions {
    /// Weights as stored, sizes from the model itself.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            weight_dtype: None,
            precision: Precision::Fp32,
            config_dir: None,
            vae: None,
            only_shapes: false,
        }
    }
}

/// Where the tensor of a diffusers name is found in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySource {
    /// The name it is stored under.
    pub key: String,
    /// What of the stored tensor it is.
    pub view: StoredView,
}

/// What of a stored tensor is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredView {
    /// All of it.
    Whole,
    /// One of equal groups of rows: OpenCLIP keeps queries, keys and values in one matrix.
    Rows {
        /// Which, from 0.
        index: usize,
        /// How many there are.
        of: usize,
    },
    /// The transposed matrix: OpenCLIP's projection is multiplied from the other side.
    Transposed,
}

impl KeySource {
    /// The whole tensor of this stored name.
    pub fn whole(key: String) -> Self {
        Self {
            key,
            view: StoredView::Whole,
        }
    }
}

/// A set of memory-mapped files seen under diffusers names. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Weights {
    files: Arc<Files>,
    keys: Option<Arc<HashMap<String, KeySource>>>,
    options: Arc<LoadOptions>,
}

impl Weights {
    /// Map the files and read their headers. Tensors go to the CPU as stored until [`Self::with_options`] says else.
    pub fn open(files: &[PathBuf]) -> Result<Self, LoadError> {
        Ok(Self {
            files: Arc::new(Files::open(files)?),
            keys: None,
            options: Arc::new(LoadOptions::new(&Device::flex())),
        })
    }

    /// Put tensors on this device, in this number format.
    #[must_use]
    pub fn with_options(mut self, options: &LoadOptions) -> Self {
        self.options = Arc::new(options.clone());
        self
    }

    /// See the files under other names: `map` is keyed by the diffusers name. Names that are not in it are absent.
    #[must_use]
    pub fn with_key_map(mut self, map: HashMap<String, KeySource>) -> Self {
        self.keys = Some(Arc::new(map));
        self
    }

    /// What layers multiply in.
    pub fn precision(&self) -> Precision {
        self.options.precision
    }

    /// The tensors below `prefix`; the empty prefix is the whole.
    pub fn at(&self, prefix: &str) -> WeightsAt<'_> {
        WeightsAt {
            weights: self,
            path: prefix.to_owned(),
        }
    }

    /// The device that tensors are put on.
    pub fn device(&self) -> &Device {
        &self.options.device
    }

    /// The number format that tensors are held in; `None` is the stored one.
    pub fn dtype(&self) -> Option<DType> {
        self.options.weight_dtype
    }

    /// The `__metadata__` of the files (of the last one, where two have the same entry); of a checkpoint of torch the
    /// whole numbers beside its tensors.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.files.metadata
    }

    /// Names, shapes and stored number formats of everything in the files, as they are named there.
    pub fn stored(&self) -> impl Iterator<Item = (&str, &[usize], Dtype)> {
        self.files
            .entries
            .iter()
            .map(|(key, entry)| (key.as_str(), entry.shape.as_slice(), entry.dtype))
    }

    /// Whether the files hold a tensor of this stored name.
    pub fn stores(&self, key: &str) -> bool {
        self.files.entries.contains_key(key)
    }

    /// The stored shape of a stored name.
    pub fn stored_shape(&self, key: &str) -> Option<&[usize]> {
        self.files
            .entries
            .get(key)
            .map(|entry| entry.shape.as_slice())
    }

    /// The size of the files, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.files
            .mapped
            .iter()
            .map(|(_, map)| map.len() as u64)
            .sum()
    }

    /// The file, or the first of several; for messages.
    pub fn path(&self) -> &Path {
        self.files
            .mapped
            .first()
            .map_or(Path::new(""), |(path, _)| path.as_path())
    }

    /// Names, shapes and sizes in bytes of what is seen under diffusers names, in the order of the names. Sizes are those
    /// in memory: what is stored in 8 bits is widened.
    pub fn seen(&self) -> impl Iterator<Item = (&str, Vec<usize>, usize)> {
        let entries = self.entries_seen().into_iter();
        entries.map(|(name, entry)| {
            let size_bytes = entry.held_bytes();
            (name, entry.shape, size_bytes)
        })
    }

    /// SHA-256, in hex, over names, number formats, shapes and stored bytes of what is seen under diffusers names.
    pub fn digest(&self) -> String {
        let mut digest = Sha256::new();
        for (name, entry) in self.entries_seen() {
            digest.update(format!("{name} {:?} {:?}\n", entry.dtype, entry.shape));
            if let Some(scale) = entry.scale {
                digest.update(scale.to_le_bytes());
            }
            let map = &self.files.mapped[entry.file].1;
            if entry.axes.is_some() {
                digest.update(entry.bytes(map));
                map.release(entry.start..entry.end);
                continue;
            }
            for start in (entry.start..entry.end).step_by(HASHED_AT_ONCE_BYTES) {
                let end = entry.end.min(start + HASHED_AT_ONCE_BYTES);
                digest.update(&map[start..end]);
                map.release(start..end);
            }
        }
        hex::encode(digest.finalize())
    }

    fn entries_seen(&self) -> Vec<(&str, Entry)> {
        let stored = &self.files.entries;
        let mut seen: Vec<(&str, Entry)> = match &self.keys {
            None => stored
                .iter()
                .map(|(k, e)| (k.as_str(), e.clone()))
                .collect(),
            Some(map) => map
                .iter()
                .filter_map(|(name, source)| {
                    let entry = stored.get(&source.key)?.seen_as(source.view)?;
                    Some((name.as_str(), entry))
                })
                .collect(),
        };
        seen.sort_unstable_by_key(|(name, _)| *name);
        seen
    }

    /// Any tensor by its stored name, widened to `f32`, with its shape. For data files, not for models.
    pub fn read_f32(&self, key: &str) -> Result<(Vec<f32>, Vec<usize>), LoadError> {
        let entry = self.entry(key, key)?;
        let data = self
            .decode(key, entry, &entry.shape)?
            .convert_dtype(DType::F32);
        let values = data
            .try_into_vec::<f32>()
            .map_err(|error| LoadError::Header {
                path: self.file_of(entry).to_owned(),
                reason: format!("tensor `{key}` cannot be read: {error}"),
            })?;
        Ok((values, entry.shape.clone()))
    }

    /// The stored bytes (little endian) of a stored name, with number format and shape. For data files.
    pub fn read_bytes(&self, key: &str) -> Result<(&[u8], Dtype, &[usize]), LoadError> {
        let entry = self.entry(key, key)?;
        if entry.axes.is_some() {
            return Err(LoadError::Header {
                path: self.file_of(entry).to_owned(),
                reason: format!("the elements of tensor `{key}` do not follow each other"),
            });
        }
        let bytes = &self.files.mapped[entry.file].1[entry.start..entry.end];
        Ok((bytes, entry.dtype, &entry.shape))
    }

    /// Gives back the memory of a stored name that was read as bytes; it can be read again, from the file.
    pub fn release(&self, key: &str) {
        if let Some(entry) = self.files.entries.get(key) {
            self.files.mapped[entry.file]
                .1
                .release(entry.start..entry.end);
        }
    }

    fn source<'a>(&'a self, name: &'a str) -> Option<(&'a str, StoredView)> {
        match &self.keys {
            None => Some((name, StoredView::Whole)),
            Some(map) => map
                .get(name)
                .map(|source| (source.key.as_str(), source.view)),
        }
    }

    fn entry(&self, name: &str, source: &str) -> Result<&Entry, LoadError> {
        self.files
            .entries
            .get(source)
            .ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> LoadError {
        LoadError::MissingKey {
            path: self.path().to_owned(),
            key: name.to_owned(),
        }
    }

    /// The tensor's place, and whether its rows are stored as columns.
    fn lookup(&self, name: &str) -> Result<(Entry, bool), LoadError> {
        let (source, view) = self.source(name).ok_or_else(|| self.missing(name))?;
        let stored = self.entry(name, source)?;
        let seen = stored.seen_as(view).ok_or_else(|| LoadError::Shape {
            path: self.file_of(stored).to_owned(),
            key: source.to_owned(),
            found: stored.shape.clone(),
            expected: match view {
                StoredView::Rows { of, .. } => vec![of],
                StoredView::Whole | StoredView::Transposed => Vec::new(),
            },
        })?;
        Ok((seen, view == StoredView::Transposed))
    }

    fn file_of(&self, entry: &Entry) -> &Path {
        &self.files.mapped[entry.file].0
    }

    /// Copy a tensor out of the mapping. The copy is typed, because the data section of a file is not aligned.
    /// `shape` has as many elements as the stored one.
    fn decode(&self, name: &str, entry: &Entry, shape: &[usize]) -> Result<TensorData, LoadError> {
        let map = &self.files.mapped[entry.file].1;
        let data = formats::tensor(&entry.bytes(map), entry.dtype, entry.scale, shape);
        let data = data.ok_or_else(|| LoadError::Dtype {
            path: self.file_of(entry).to_owned(),
            key: name.to_owned(),
            found: format!("{:?}", entry.dtype),
        })?;
        map.release(entry.start..entry.end);
        Ok(data)
    }
}

/// A view of [`Weights`] below one module path; what the models' `load` functions get.
#[derive(Clone, Debug)]
pub struct WeightsAt<'a> {
    weights: &'a Weights,
    path: String,
}

impl WeightsAt<'_> {
    /// The view below `segment`.
    #[must_use]
    pub fn at(&self, segment: impl AsRef<str>) -> Self {
        Self {
            weights: self.weights,
            path: self.key(segment.as_ref()).into_owned(),
        }
    }

    /// The module path of this view, without a dot at the end.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The device that tensors are put on.
    pub fn device(&self) -> &Device {
        self.weights.device()
    }

    /// What layers multiply in.
    pub fn precision(&self) -> Precision {
        self.weights.precision()
    }

    /// Whether only names and shapes are looked at.
    pub fn only_shapes(&self) -> bool {
        self.weights.options.only_shapes
    }

    /// Whether the tensor is there.
    pub fn has(&self, name: &str) -> bool {
        let key = self.key(name);
        self.weights
            .source(&key)
            .is_some_and(|(source, _)| self.weights.stores(source))
    }

    /// The stored shape.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>, LoadError> {
        Ok(self.weights.lookup(&self.key(name))?.0.shape)
    }

    /// The tensor in its stored number format (or the one that was asked for), shape checked.
    ///
    /// Ones at the end of the stored shape are no difference: single files hold the VAE's attention weights as
    /// 1x1 convolutions `[c, c, 1, 1]`, diffusers as `[c, c]`.
    pub fn tensor<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, LoadError> {
        if let Some(nothing) = self.nothing(name, shape)? {
            return Ok(nothing);
        }
        let data = self.data(name, shape)?;
        let options = &self.weights.options;
        let wanted = options.weight_dtype.unwrap_or(data.dtype());
        Ok(self.upload(data, wanted))
    }

    /// The tensor widened to `f32`; for what is added or normalised with, where 16 bits would be felt.
    pub fn tensor_f32<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, LoadError> {
        if let Some(nothing) = self.nothing(name, shape)? {
            return Ok(nothing);
        }
        let data = self.data(name, shape)?;
        Ok(self.upload(data, DType::F32))
    }

    /// Where only shapes are looked at, a tensor without content.
    fn nothing<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Option<Tensor<D>>, LoadError> {
        if !self.weights.options.only_shapes {
            return Ok(None);
        }
        let key = self.key(name);
        let (entry, _) = self.weights.lookup(&key)?;
        self.check_shape(&key, &entry, &shape)?;
        let device = self.weights.device();
        let zero = Tensor::<D>::zeros([1; D], (device, DType::F32));
        Ok(Some(zero.expand(shape)))
    }

    fn check_shape(&self, key: &str, entry: &Entry, shape: &[usize]) -> Result<(), LoadError> {
        if trim_ones(&entry.shape) == trim_ones(shape) {
            return Ok(());
        }
        Err(LoadError::Shape {
            path: self.weights.file_of(entry).to_owned(),
            key: key.to_owned(),
            found: entry.shape.clone(),
            expected: shape.to_vec(),
        })
    }

    fn data<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<TensorData, LoadError> {
        let key = self.key(name);
        let (entry, transposed) = self.weights.lookup(&key)?;
        self.check_shape(&key, &entry, &shape)?;
        if !transposed {
            return self.weights.decode(&key, &entry, &shape);
        }
        let stored: Vec<usize> = shape.iter().rev().copied().collect(); // a matrix
        let data = self.weights.decode(&key, &entry, &stored)?;
        let dtype = match data.dtype() {
            DType::F64 => DType::F32,
            kept => kept,
        };
        let data = data.convert_dtype(dtype);
        let matrix = Tensor::<2>::from_data(data, (&Device::flex(), dtype));
        Ok(matrix.transpose().into_data())
    }

    fn upload<const D: usize>(&self, data: TensorData, wanted: DType) -> Tensor<D> {
        let device = self.weights.device();
        // 64-bit weights carry nothing that training uses; a format the device lacks (bf16 in WGSL) is widened.
        let dtype = if wanted == DType::F64 || !device.supports_dtype(wanted) {
            DType::F32
        } else {
            wanted
        };
        Tensor::from_data(data.convert_dtype(dtype), (device, dtype))
    }

    fn key<'a>(&self, name: &'a str) -> Cow<'a, str> {
        if self.path.is_empty() {
            Cow::Borrowed(name)
        } else {
            Cow::Owned(format!("{}.{name}", self.path))
        }
    }
}

/// A shape without the ones at its end.
fn trim_ones(shape: &[usize]) -> &[usize] {
    let kept = shape
        .iter()
        .rposition(|&n| n != 1)
        .map_or(0, |last| last + 1);
    &shape[..kept]
}

#[cfg(test)]
mod tests {
    use half::f16;
    use safetensors::tensor::TensorView;

    use super::*;

    fn write(dir: &Path, name: &str, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> PathBuf {
        let path = dir.join(name);
        let views = tensors.iter().map(|(key, dtype, shape, data)| {
            (*key, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        path
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn a_tensor_is_found_below_its_prefix_and_keeps_its_format() {
        let dir = tempfile::tempdir().unwrap();
        let halves: Vec<u8> = [1.0, -2.0, 0.5, 65504.0]
            .iter()
            .flat_map(|&v| f16::from_f32(v).to_le_bytes())
            .collect();
        let path = write(
            dir.path(),
            "a.safetensors",
            &[("block.0.weight", Dtype::F16, vec![2, 2], halves)],
        );
        let weights = Weights::open(&[path]).unwrap();
        let at = weights.at("block").at("0");
        assert_eq!(at.path(), "block.0");
        assert!(at.has("weight") && !at.has("bias"));
        let stored: Tensor<2> = at.tensor("weight", [2, 2]).unwrap();
        assert_eq!(stored.dtype(), DType::F16);
        let wide: Tensor<2> = at.tensor_f32("weight", [2, 2]).unwrap();
        assert_eq!(
            wide.into_data().try_into_vec::<f32>().unwrap(),
            [1.0, -2.0, 0.5, 65504.0]
        );
    }

    #[test]
    fn a_1x1_convolution_is_a_matrix_but_another_shape_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(
            dir.path(),
            "a.safetensors",
            &[("w", Dtype::F32, vec![2, 1, 1, 1], f32s(&[1.0, 2.0]))],
        );
        let weights = Weights::open(std::slice::from_ref(&path)).unwrap();
        let matrix: Tensor<2> = weights.at("").tensor("w", [2, 1]).unwrap();
        assert_eq!(matrix.dims(), [2, 1]);
        let wrong: Result<Tensor<2>, _> = weights.at("").tensor("w", [1, 2]);
        let message = wrong.unwrap_err().to_string();
        assert!(message.contains("a.safetensors"), "{message}");
        assert!(
            message.contains("`w` has shape [2, 1, 1, 1], expected [1, 2]"),
            "{message}"
        );
    }

    #[test]
    fn a_key_map_renames_and_hides() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(
            dir.path(),
            "a.safetensors",
            &[
                ("old", Dtype::F32, vec![1], f32s(&[3.0])),
                ("other", Dtype::F32, vec![1], f32s(&[4.0])),
            ],
        );
        let map = HashMap::from([("new".to_owned(), KeySource::whole("old".to_owned()))]);
        let weights = Weights::open(&[path]).unwrap().with_key_map(map);
        let at = weights.at("");
        assert!(at.has("new") && !at.has("old") && !at.has("other"));
        assert!(matches!(
            at.shape("other"),
            Err(LoadError::MissingKey { .. })
        ));
    }

    #[test]
    fn a_digest_sees_names_formats_shapes_and_values_of_its_view() {
        let dir = tempfile::tempdir().unwrap();
        let digest =
            |name: &str, seen: &str, dtype, shape: &[usize], values: &[f32], other: f32| {
                let tensors = [
                    (name, dtype, shape.to_vec(), f32s(values)),
                    ("other", Dtype::F32, vec![1], f32s(&[other])),
                ];
                let path = write(dir.path(), "a.safetensors", &tensors);
                let map = HashMap::from([(seen.to_owned(), KeySource::whole(name.to_owned()))]);
                Weights::open(&[path]).unwrap().with_key_map(map).digest()
            };
        let base = digest("w", "w", Dtype::F32, &[2, 1], &[1.0, 2.0], 3.0);
        // Neither the stored name nor what is not seen matters.
        let same = digest("old", "w", Dtype::F32, &[2, 1], &[1.0, 2.0], 4.0);
        assert_eq!(base, same);
        for different in [
            digest("w", "v", Dtype::F32, &[2, 1], &[1.0, 2.0], 3.0),
            digest("w", "w", Dtype::I32, &[2, 1], &[1.0, 2.0], 3.0),
            digest("w", "w", Dtype::F32, &[1, 2], &[1.0, 2.0], 3.0),
            digest("w", "w", Dtype::F32, &[2, 1], &[1.0, 2.5], 3.0),
        ] {
            assert_ne!(base, different);
        }
    }

    #[test]
    fn parts_of_a_stored_tensor_are_seen_as_tensors() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<f32> = (0_u8..6).map(f32::from).collect();
        let path = write(
            dir.path(),
            "a.safetensors",
            &[("w", Dtype::F32, vec![3, 2], f32s(&values))],
        );
        let view = |name: &str, view| {
            let key = "w".to_owned();
            (name.to_owned(), KeySource { key, view })
        };
        let map = HashMap::from([
            view("second", StoredView::Rows { index: 1, of: 3 }),
            view("halves", StoredView::Rows { index: 0, of: 2 }),
            view("turned", StoredView::Transposed),
        ]);
        let weights = Weights::open(&[path]).unwrap().with_key_map(map);
        let at = weights.at("");
        let values = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().unwrap();
        assert_eq!(values(at.tensor("second", [1, 2]).unwrap()), [2.0, 3.0]);
        assert_eq!(at.shape("turned").unwrap(), [2, 3]);
        assert_eq!(
            values(at.tensor("turned", [2, 3]).unwrap()),
            [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
        );
        // Three rows have no halves.
        assert!(matches!(at.shape("halves"), Err(LoadError::Shape { .. })));
        let seen: Vec<_> = weights
            .seen()
            .map(|(name, _, bytes)| (name, bytes))
            .collect();
        assert_eq!(seen, [("second", 8), ("turned", 24)]);
    }

    #[test]
    fn integers_are_refused_as_weights() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(
            dir.path(),
            "a.safetensors",
            &[("w", Dtype::I64, vec![1], vec![0; 8])],
        );
        let weights = Weights::open(&[path]).unwrap();
        let wrong: Result<Tensor<1>, _> = weights.at("").tensor("w", [1]);
        assert!(wrong.unwrap_err().to_string().contains("stored as I64"));
    }

    #[test]
    fn two_files_must_not_hold_the_same_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = [("w", Dtype::F32, vec![1], f32s(&[1.0]))];
        let a = write(dir.path(), "a.safetensors", &tensor);
        let b = write(dir.path(), "b.safetensors", &tensor);
        assert!(matches!(
            Weights::open(&[a, b]),
            Err(LoadError::DuplicateKey { .. })
        ));
    }

    #[test]
    fn hostile_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let header = |json: &str, data: &[u8]| {
            let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
            bytes.extend(json.as_bytes());
            bytes.extend(data);
            bytes
        };
        let huge = format!("[{}1]", "18446744073709551615,".repeat(3));
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("empty", vec![]),
            ("three bytes", vec![1, 2, 3]),
            ("huge header", u64::MAX.to_le_bytes().to_vec()),
            (
                "header longer than the file",
                1000u64.to_le_bytes().to_vec(),
            ),
            ("not JSON", header("{]", &[])),
            ("not UTF-8", {
                let mut bytes = 2u64.to_le_bytes().to_vec();
                bytes.extend([0xff, 0xfe]);
                bytes
            }),
            (
                "data ends early",
                header(
                    r#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
                    &[0; 8],
                ),
            ),
            (
                "shape and offsets disagree",
                header(
                    r#"{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}"#,
                    &[0; 16],
                ),
            ),
            (
                "overlapping tensors",
                header(
                    r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                    &[0; 4],
                ),
            ),
            (
                "shape overflows",
                header(
                    &format!(r#"{{"w":{{"dtype":"F32","shape":{huge},"data_offsets":[0,4]}}}}"#),
                    &[0; 4],
                ),
            ),
            (
                "too many dimensions",
                header(
                    r#"{"w":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#,
                    &[0; 4],
                ),
            ),
            (
                "a name of a kilobyte",
                header(
                    &format!(
                        r#"{{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#,
                        "n".repeat(1024)
                    ),
                    &[0; 4],
                ),
            ),
        ];
        for (what, bytes) in cases {
            let path = dir.path().join("hostile.safetensors");
            std::fs::write(&path, bytes).unwrap();
            let error = Weights::open(&[path]).expect_err(what);
            assert!(
                error.to_string().contains("hostile.safetensors"),
                "{what}: {error}"
            );
        }
        assert!(matches!(
            Weights::open(&[dir.path().to_owned()]),
            Err(LoadError::Io { .. })
        ));
    }
}
