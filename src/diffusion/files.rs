//! Weight files as they lie on disk: which tensors they hold, and where. What kind a file is tells its content, not its
//! name.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::error::LoadError;
use super::formats;
use super::mapping::MappedFile;
use super::pickle::{self, PickleError};
use super::weights::StoredView;

/// The largest header that is parsed, in bytes. A full SDXL checkpoint has 0.4 MB of header.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// The most tensors a component may have. SDXL has 2 641.
const MAX_TENSORS: usize = 65_536;
/// The highest rank of a stored tensor; convolutions have 4.
const MAX_RANK: usize = 8;
/// The longest name of a tensor, in bytes.
const MAX_KEY_BYTES: usize = 512;
/// Tensors of a checkpoint may share their bytes; together they may claim no more than this many times the file.
const MAX_SHARING: u64 = 2;
/// What a weight of 8 bits is multiplied by, beside it under one of these names.
const SCALES: [&str; 2] = ["scale_weight", "weight_scale"];

/// One tensor's place in a file.
#[derive(Clone, Debug)]
pub struct Entry {
    pub file: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub start: usize,
    pub end: usize,
    /// Elements along each stored axis and the steps between them, where they do not follow each other.
    pub axes: Option<Vec<(usize, usize)>>,
    /// What its numbers are multiplied by.
    pub scale: Option<f32>,
}

impl Entry {
    /// A part of this tensor; `None` where it has no such part.
    pub fn seen_as(&self, view: StoredView) -> Option<Self> {
        let mut seen = self.clone();
        match (view, &mut seen.shape[..]) {
            (StoredView::Whole, _) => {}
            (StoredView::Rows { index, of }, [rows, ..]) if of > 0 && rows.is_multiple_of(of) => {
                *rows /= of;
                match seen.axes.as_deref_mut() {
                    None => {
                        let size_bytes = (self.end - self.start) / of;
                        seen.start += index * size_bytes;
                        seen.end = seen.start + size_bytes;
                    }
                    Some(axes) => {
                        let (count, step) = &mut axes[0];
                        *count /= of;
                        seen.start += index * *count * *step * pickle::element_bytes(self.dtype);
                    }
                }
            }
            (StoredView::Transposed, [rows, columns]) => std::mem::swap(rows, columns),
            _ => return None,
        }
        Some(seen)
    }

    /// Its bytes, one element after the other.
    pub fn bytes<'a>(&self, map: &'a MappedFile) -> Cow<'a, [u8]> {
        let bytes = &map[self.start..self.end];
        match &self.axes {
            None => Cow::Borrowed(bytes),
            Some(axes) => Cow::Owned(formats::gather(
                bytes,
                axes,
                pickle::element_bytes(self.dtype),
            )),
        }
    }

    /// What its elements take as they are stored.
    fn stored_bytes(&self) -> usize {
        match &self.axes {
            None => self.end - self.start,
            Some(_) => self.shape.iter().product::<usize>() * pickle::element_bytes(self.dtype),
        }
    }

    /// What it takes in memory.
    pub fn held_bytes(&self) -> usize {
        formats::held_bytes(self.dtype, self.scale.is_some(), self.stored_bytes())
    }
}

/// Memory-mapped files and all their tensors.
#[derive(Debug, Default)]
pub struct Files {
    pub mapped: Vec<(PathBuf, MappedFile)>,
    pub entries: HashMap<String, Entry>,
    pub metadata: HashMap<String, String>,
}

impl Files {
    /// Maps files and reads what they hold.
    ///
    /// # Errors
    /// When one cannot be read, is broken or exceeds a limit, and when two hold the same tensor.
    pub fn open(paths: &[PathBuf]) -> Result<Self, LoadError> {
        let mut all = Self::default();
        for path in paths {
            let map = MappedFile::open(path).map_err(|source| LoadError::io(path, source))?;
            let tensors = if pickle::is_torch(&map) {
                all.read_torch(path, &map)?
            } else {
                all.read_safetensors(path, &map)?
            };
            all.add(path, map, tensors)?;
        }
        all.find_scales()?;
        Ok(all)
    }

    fn add(
        &mut self,
        path: &Path,
        map: MappedFile,
        tensors: Vec<(String, Entry)>,
    ) -> Result<(), LoadError> {
        let broken = |reason: String| LoadError::Header {
            path: path.to_owned(),
            reason,
        };
        if self.entries.len() + tensors.len() > MAX_TENSORS {
            return Err(broken(format!("more than {MAX_TENSORS} tensors")));
        }
        for (key, entry) in tensors {
            if key.len() > MAX_KEY_BYTES {
                let start: String = key.chars().take(40).collect();
                return Err(broken(format!(
                    "the name `{start}...` is longer than {MAX_KEY_BYTES} bytes"
                )));
            }
            if entry.shape.len() > MAX_RANK {
                return Err(broken(format!(
                    "tensor `{key}` has {} dimensions, at most {MAX_RANK} are expected",
                    entry.shape.len()
                )));
            }
            if let Some(old) = self.entries.get(&key) {
                return Err(LoadError::DuplicateKey {
                    key,
                    first: self.mapped[old.file].0.clone(),
                    second: path.to_owned(),
                });
            }
            self.entries.insert(key, entry);
        }
        self.mapped.push((path.to_owned(), map));
        Ok(())
    }

    fn read_safetensors(
        &mut self,
        path: &Path,
        map: &MappedFile,
    ) -> Result<Vec<(String, Entry)>, LoadError> {
        let broken = |reason: String| LoadError::Header {
            path: path.to_owned(),
            reason,
        };
        check_header_length(map).map_err(broken)?;
        let (header_bytes, header) = SafeTensors::read_metadata(map)
            .map_err(|error| broken(format!("{error} ({error:?})")))?;
        // `read_metadata` has checked that offsets are contiguous, match shape and format, and end with the file.
        let offset = header_bytes + size_of::<u64>();
        let file = self.mapped.len();
        if let Some(metadata) = header.metadata() {
            self.metadata.extend(metadata.clone());
        }
        let tensors = header.tensors().into_iter().map(|(key, info)| {
            let entry = Entry {
                file,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: offset + info.data_offsets.0,
                end: offset + info.data_offsets.1,
                axes: None,
                scale: None,
            };
            (key, entry)
        });
        Ok(tensors.collect())
    }

    fn read_torch(
        &mut self,
        path: &Path,
        map: &MappedFile,
    ) -> Result<Vec<(String, Entry)>, LoadError> {
        let failed = |error: PickleError| LoadError::Checkpoint {
            path: path.to_owned(),
            source: error,
        };
        let found = pickle::read(map).map_err(failed)?;
        let file = self.mapped.len();
        let mut claimed = 0_u64;
        let numbers = found.numbers.into_iter();
        self.metadata
            .extend(numbers.map(|(name, number)| (name, number.to_string())));
        let tensors: Vec<(String, Entry)> = found
            .tensors
            .into_iter()
            .map(|(key, placed)| {
                let entry = Entry {
                    file,
                    dtype: placed.dtype,
                    shape: placed.shape,
                    start: placed.bytes.start,
                    end: placed.bytes.end,
                    axes: placed.axes,
                    scale: None,
                };
                claimed = claimed.saturating_add(entry.stored_bytes() as u64);
                (key, entry)
            })
            .collect();
        let most = (map.len() as u64).saturating_mul(MAX_SHARING);
        if claimed > most {
            return Err(failed(PickleError::Broken(format!(
                "its tensors claim {claimed} bytes, the file has {}",
                map.len()
            ))));
        }
        Ok(tensors)
    }

    /// What weights of 8 bits are multiplied by, as ComfyUI stores them.
    fn find_scales(&mut self) -> Result<(), LoadError> {
        let mut found = Vec::new();
        for (key, entry) in &self.entries {
            let Some(stem) = key
                .strip_suffix("weight")
                .filter(|_| formats::is_fp8(entry.dtype))
            else {
                continue;
            };
            for name in SCALES {
                let Some(scale) = self.entries.get(&format!("{stem}{name}")) else {
                    continue;
                };
                let bytes = scale.bytes(&self.mapped[scale.file].1);
                let values =
                    formats::tensor(&bytes, scale.dtype, None, &scale.shape).and_then(|data| {
                        data.convert_dtype(burn::tensor::DType::F32)
                            .try_into_vec::<f32>()
                            .ok()
                    });
                match values.as_deref() {
                    Some([value]) if value.is_finite() => found.push((key.clone(), *value)),
                    _ => {
                        return Err(LoadError::Unsupported {
                            path: self.mapped[scale.file].0.clone(),
                            found: format!(
                                "`{stem}{name}` of shape {:?} as {:?}",
                                scale.shape, scale.dtype
                            ),
                            expected: "weights of 8 bits are multiplied by one number each"
                                .to_owned(),
                        });
                    }
                }
            }
        }
        for (key, scale) in found {
            if let Some(entry) = self.entries.get_mut(&key) {
                entry.scale = Some(scale);
            }
        }
        Ok(())
    }
}

/// Refuse a header before it is parsed: what parses 100 MB of JSON uses gigabytes.
fn check_header_length(bytes: &[u8]) -> Result<(), String> {
    let Some(first) = bytes.first_chunk::<8>() else {
        return Err(format!(
            "{} bytes, too short for a header length",
            bytes.len()
        ));
    };
    let length = u64::from_le_bytes(*first);
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "the header claims {length} bytes, at most {MAX_HEADER_BYTES} are read (is this a safetensors file?)"
        ));
    }
    if length > bytes.len() as u64 - 8 {
        return Err(format!(
            "the header claims {length} bytes, the file has {} (truncated?)",
            bytes.len()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::diffusion::Weights;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Weights, LoadError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.safetensors");
        std::fs::write(&path, bytes).expect("written");
        Weights::open(&[path])
    }

    fn serialized(tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
        let views = tensors.iter().map(|(key, dtype, shape, data)| {
            let view = TensorView::new(*dtype, shape.clone(), data);
            (*key, view.expect("a tensor"))
        });
        safetensors::serialize(views, None).expect("a file")
    }

    #[test]
    fn what_a_header_claims_is_looked_at_before_it_is_believed() {
        let two = |first: [usize; 2], second: [usize; 2]| {
            format!(
                r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{first:?}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{second:?}}}}}"#
            )
        };
        let claims = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
        for (what, bytes) in [
            ("overlapping", file(&two([0, 8], [4, 12]), &[0; 12])),
            ("the same", file(&two([0, 8], [0, 8]), &[0; 8])),
            ("a gap", file(&two([0, 8], [12, 20]), &[0; 20])),
            ("backwards", file(&two([8, 0], [8, 16]), &[0; 16])),
            ("the header claims 2147483648 bytes", claims(2 << 30)),
            (
                "the header claims 9223372036854775808 bytes",
                claims(1 << 63),
            ),
            (
                "the header claims 18446744073709551615 bytes",
                claims(u64::MAX),
            ),
        ] {
            let text = open(&bytes).expect_err(what).to_string();
            assert!(text.contains("a.safetensors"), "{what}: {text}");
            assert!(!what.contains("claims") || text.contains(what), "{text}");
        }
    }

    #[test]
    fn eight_bits_become_sixteen_and_are_scaled_where_a_scale_lies_beside_them() {
        let scale = 0.5_f32.to_le_bytes().to_vec();
        let bytes = serialized(&[
            ("a.weight", Dtype::F8_E4M3, vec![2], vec![0x38, 0x7e]),
            ("b.weight", Dtype::F8_E5M2, vec![2], vec![0x3c, 0x01]),
            ("c.scale_weight", Dtype::F32, vec![], scale.clone()),
            ("c.weight", Dtype::F8_E4M3, vec![2], vec![0x38, 0xb8]),
        ]);
        let weights = open(&bytes).expect("right");
        let read = |key: &str| weights.read_f32(key).expect(key).0;
        assert_eq!(read("a.weight"), [1.0, 448.0]);
        assert_eq!(read("b.weight"), [1.0, 2.0_f32.powi(-16)]);
        assert_eq!(read("c.weight"), [0.5, -0.5]);
        let a: burn::tensor::Tensor<1> = weights.at("a").tensor("weight", [2]).expect("there");
        assert_eq!(a.dtype(), burn::tensor::DType::F16);
        let held: Vec<usize> = weights.seen().map(|(.., size)| size).collect();
        assert_eq!(held, [4, 4, 4, 8]);
        // One number for each row.
        let bytes = serialized(&[
            (
                "c.scale_weight",
                Dtype::F32,
                vec![2],
                [scale.clone(), scale].concat(),
            ),
            ("c.weight", Dtype::F8_E4M3, vec![2], vec![0x38, 0xb8]),
        ]);
        let text = open(&bytes).expect_err("refused").to_string();
        assert!(text.contains("`c.scale_weight` of shape [2]"), "{text}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn damaged_headers_do_no_harm(
            changes in vec((any::<Index>(), any::<u8>()), 1..6),
            cut in proptest::option::weighted(0.2, any::<Index>()),
        ) {
            let mut bytes = serialized(&[
                ("a.weight", Dtype::F32, vec![2, 3], vec![1; 24]),
                ("b.weight", Dtype::F8_E4M3, vec![4], vec![0x38; 4]),
                ("b.scale_weight", Dtype::F32, vec![1], vec![0, 0, 128, 63]),
                ("c", Dtype::BF16, vec![0, 7], vec![]),
            ]);
            for (at, to) in changes {
                let at = at.index(bytes.len());
                bytes[at] = to;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            check(&bytes);
        }

        #[test]
        fn random_headers_do_no_harm(header in "[\\{\\}\\[\\]\":,a-z0-9_FU ]{0,200}", data in vec(any::<u8>(), 0..64)) {
            check(&file(&header, &data));
            check(header.as_bytes());
        }
    }

    /// Whatever is found lies in the file and can be read, or is an error.
    fn check(bytes: &[u8]) {
        let Ok(weights) = open(bytes) else {
            return;
        };
        let keys: Vec<String> = weights.stored().map(|(key, ..)| key.to_owned()).collect();
        for key in keys {
            let _ = weights.read_f32(&key); // integers are errors
            assert!(
                weights
                    .read_bytes(&key)
                    .is_ok_and(|(found, ..)| found.len() <= bytes.len())
            );
        }
        weights.digest();
    }
}
