//! The LoRA file: a safetensors file in sd-scripts' layout, written byte for byte reproducibly and read with suspicion.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::networks::NetworkError;
use crate::networks::settings::SavePrecision;

/// Largest LoRA file that is read. A rank-1024 file of SD1.5 is below it.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// The part of a file that the old hash of AUTOMATIC1111's web UI covers.
const LEGACY_WINDOW: std::ops::Range<usize> = 0x10_0000..0x11_0000;

/// A tensor in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its elements in row-major order.
    pub values: Vec<f32>,
}

/// What is in a LoRA file.
#[derive(Debug, Clone, Default)]
pub struct LoraFile {
    /// Tensors by key, such as `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`.
    pub tensors: BTreeMap<String, HostTensor>,
    /// The `__metadata__` entries of the header.
    pub metadata: BTreeMap<String, String>,
}

/// A LoRA file that is safely on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedLora {
    /// SHA-256 of the whole file, in lower-case hex.
    pub sha256: String,
    /// Size of the file.
    pub size_bytes: u64,
}

impl LoraFile {
    /// Reads a file; half-precision numbers are widened.
    pub fn read(path: &Path) -> Result<Self, NetworkError> {
        Self::read_values(path, |_| true)
    }

    /// The same with the values of single numbers alone: what adapters a file has, not what is in them.
    pub fn outline(path: &Path) -> Result<Self, NetworkError> {
        Self::read_values(path, |shape| shape.iter().product::<usize>() == 1)
    }

    fn read_values(path: &Path, wanted: impl Fn(&[usize]) -> bool) -> Result<Self, NetworkError> {
        let io = |source| NetworkError::Io {
            path: path.to_owned(),
            source,
        };
        let size = fs::metadata(path).map_err(io)?.len();
        if size > MAX_FILE_BYTES {
            return Err(NetworkError::TooLarge {
                path: path.to_owned(),
                size_bytes: size,
                max_bytes: MAX_FILE_BYTES,
            });
        }
        let bytes = fs::read(path).map_err(io)?;
        Self::parse(&bytes, wanted).map_err(|message| NetworkError::Format {
            path: path.to_owned(),
            message,
        })
    }

    fn parse(bytes: &[u8], wanted: impl Fn(&[usize]) -> bool) -> Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|error| format!("no safetensors: {error}"))?;
        let file =
            SafeTensors::deserialize(bytes).map_err(|error| format!("no safetensors: {error}"))?;
        let mut tensors = BTreeMap::new();
        for (key, view) in file.iter() {
            let data = if wanted(view.shape()) {
                view.data()
            } else {
                &[]
            };
            let values = match view.dtype() {
                Dtype::F32 => decode(data, |bytes: [u8; 4]| f32::from_le_bytes(bytes)),
                Dtype::F16 => decode(data, |bytes: [u8; 2]| f16::from_le_bytes(bytes).to_f32()),
                Dtype::BF16 => decode(data, |bytes: [u8; 2]| bf16::from_le_bytes(bytes).to_f32()),
                // IA³ tells by a whole number which side of a layer is scaled.
                Dtype::I64 if key.ends_with(".on_input") && view.shape().is_empty() => {
                    decode(data, |bytes: [u8; 8]| i64::from_le_bytes(bytes) as f32)
                }
                other => {
                    return Err(format!("{key} is {other:?}, expected F32, F16 or BF16"));
                }
            };
            let shape = view.shape().to_vec();
            tensors.insert(key.to_owned(), HostTensor { shape, values });
        }
        let metadata = header.metadata().iter().flatten();
        Ok(Self {
            tensors,
            metadata: metadata
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
        })
    }

    /// Writes the file: under a temporary name, flushed to disk, renamed.
    ///
    /// Adds sd-scripts' two hashes to the metadata.
    pub fn write(
        mut self,
        path: &Path,
        precision: SavePrecision,
    ) -> Result<SavedLora, NetworkError> {
        let data = self.data_section(precision);
        let (model_hash, legacy_hash) = self.hashes(precision, &data);
        self.metadata
            .insert("sshs_model_hash".to_owned(), model_hash);
        self.metadata
            .insert("sshs_legacy_hash".to_owned(), legacy_hash);
        let header = self.header(precision, |_| true);

        let io = |source| NetworkError::Io {
            path: path.to_owned(),
            source,
        };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        fs::create_dir_all(folder).map_err(io)?;
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
        let mut digest = Sha256::new();
        for part in [&header, &data] {
            file.write_all(part).map_err(io)?;
            digest.update(part);
        }
        file.as_file().sync_all().map_err(io)?;
        file.persist(path).map_err(|error| io(error.error))?;
        sync_folder(folder).map_err(io)?;
        Ok(SavedLora {
            sha256: hex::encode(digest.finalize()),
            size_bytes: (header.len() + data.len()) as u64,
        })
    }

    /// `sshs_model_hash` and `sshs_legacy_hash`, which let web UIs recognise a file whose description was edited.
    ///
    /// The first is the SHA-256 of the tensor data. The second is the start of the SHA-256 of 64 KiB at 1 MiB of
    /// the file as it would be with only the `ss_*` entries, so the length of those entries counts.
    fn hashes(&self, precision: SavePrecision, data: &[u8]) -> (String, String) {
        let model_hash = hex::encode(Sha256::digest(data));
        let header = self.header(precision, |key| key.starts_with("ss_"));
        let mut legacy = Sha256::new();
        for (part, start) in [(header.as_slice(), 0), (data, header.len())] {
            let from = LEGACY_WINDOW.start.saturating_sub(start).min(part.len());
            let to = LEGACY_WINDOW.end.saturating_sub(start).min(part.len());
            legacy.update(&part[from..to]);
        }
        let legacy_hash = hex::encode(legacy.finalize())[..8].to_owned();
        (model_hash, legacy_hash)
    }

    /// The tensors one after another in the order of their names: safetensors sorts by dtype first, but here all
    /// tensors share one.
    fn data_section(&self, precision: SavePrecision) -> Vec<u8> {
        let count: usize = self
            .tensors
            .values()
            .map(|tensor| tensor.values.len())
            .sum();
        let mut data = Vec::with_capacity(count * precision.size_bytes());
        for tensor in self.tensors.values() {
            for &value in &tensor.values {
                match precision {
                    SavePrecision::Fp32 => data.extend_from_slice(&value.to_le_bytes()),
                    SavePrecision::Fp16 => data.extend(f16::from_f32(value).to_le_bytes()),
                    SavePrecision::Bf16 => data.extend(bf16::from_f32(value).to_le_bytes()),
                }
            }
        }
        data
    }

    /// Length and JSON header, padded with spaces to a multiple of 8 as the safetensors library does.
    fn header(&self, precision: SavePrecision, keep: impl Fn(&str) -> bool) -> Vec<u8> {
        let mut entries = Vec::with_capacity(self.tensors.len() + 1);
        let metadata: BTreeMap<_, _> = self.metadata.iter().filter(|(key, _)| keep(key)).collect();
        if !metadata.is_empty() {
            entries.push(format!("\"__metadata__\":{}", json!(metadata)));
        }
        let mut offset = 0;
        for (key, tensor) in &self.tensors {
            let end = offset + tensor.values.len() * precision.size_bytes();
            entries.push(format!(
                "{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{offset},{end}]}}",
                json!(key),
                precision.dtype_name(),
                json!(tensor.shape),
            ));
            offset = end;
        }
        let mut json = format!("{{{}}}", entries.join(",")).into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);
        header
    }
}

impl SavePrecision {
    fn size_bytes(self) -> usize {
        match self {
            Self::Fp32 => 4,
            Self::Fp16 | Self::Bf16 => 2,
        }
    }

    fn dtype_name(self) -> &'static str {
        match self {
            Self::Fp32 => "F32",
            Self::Fp16 => "F16",
            Self::Bf16 => "BF16",
        }
    }
}

/// Makes a rename durable. Windows cannot open folders and needs no such call.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) {
        fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}

fn decode<const N: usize>(data: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    data.as_chunks::<N>()
        .0
        .iter()
        .map(|&bytes| value(bytes))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::tensor::TensorView;

    use super::*;

    fn sample() -> LoraFile {
        let tensor = |shape: &[usize], values: &[f32]| HostTensor {
            shape: shape.to_vec(),
            values: values.to_vec(),
        };
        LoraFile {
            tensors: BTreeMap::from([
                ("b.alpha".to_owned(), tensor(&[], &[1.5])),
                (
                    "b.lora_down.weight".to_owned(),
                    tensor(&[2, 3], &[0.0, -1.0, 0.25, 3.0, 1e-3, 7.5]),
                ),
                ("a.alpha".to_owned(), tensor(&[], &[2.0])),
            ]),
            metadata: BTreeMap::from([("ss_network_dim".to_owned(), "2".to_owned())]),
        }
    }

    /// The bytes that the safetensors library itself writes; one metadata entry, because it orders them at random.
    #[test]
    fn bytes_are_those_of_the_safetensors_library() {
        let file = sample();
        let ours = [
            file.header(SavePrecision::Fp32, |_| true),
            file.data_section(SavePrecision::Fp32),
        ]
        .concat();
        let bytes: BTreeMap<_, Vec<u8>> = file
            .tensors
            .iter()
            .map(|(key, tensor)| {
                let bytes = tensor.values.iter().flat_map(|value| value.to_le_bytes());
                (key.clone(), bytes.collect())
            })
            .collect();
        let views = file.tensors.iter().map(|(key, tensor)| {
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), &bytes[key]);
            (key.clone(), view.expect("a view"))
        });
        let metadata: HashMap<_, _> = file.metadata.clone().into_iter().collect();
        let theirs = safetensors::serialize(views, Some(metadata)).expect("serializes");
        assert_eq!(ours, theirs);
    }

    #[test]
    fn a_written_file_reads_back() {
        let folder = tempfile::tempdir().expect("a folder");
        for (precision, size) in [
            (SavePrecision::Fp32, 4),
            (SavePrecision::Fp16, 2),
            (SavePrecision::Bf16, 2),
        ] {
            let path = folder.path().join("new").join("x.safetensors");
            let saved = sample().write(&path, precision).expect("written");
            let bytes = fs::read(&path).expect("readable");
            assert_eq!(saved.size_bytes, bytes.len() as u64);
            assert_eq!(saved.sha256, hex::encode(Sha256::digest(&bytes)));
            let read = LoraFile::read(&path).expect("valid");
            let data = &bytes[bytes.len() - 8 * size..];
            assert_eq!(
                read.metadata["sshs_model_hash"],
                hex::encode(Sha256::digest(data))
            );
            assert_eq!(read.metadata["ss_network_dim"], "2");
            for (key, tensor) in sample().tensors {
                assert_eq!(read.tensors[&key].shape, tensor.shape);
                for (a, b) in read.tensors[&key].values.iter().zip(&tensor.values) {
                    assert!((a - b).abs() <= b.abs() * 4e-3, "{key}: {a} for {b}");
                }
            }
        }
    }

    /// Both hashes against the definition in words, on a file long enough to have a legacy window.
    #[test]
    fn legacy_hash_covers_the_window_of_the_file_with_only_ss_entries() {
        let mut file = sample();
        file.tensors.insert(
            "c.lora_up.weight".to_owned(),
            HostTensor {
                shape: vec![300_000],
                values: (0..300_000).map(|i| i as f32).collect(),
            },
        );
        let data = file.data_section(SavePrecision::Fp32);
        let whole = [file.header(SavePrecision::Fp32, |_| true), data.clone()].concat();
        let expected = hex::encode(Sha256::digest(&whole[0x10_0000..0x11_0000]));
        // Entries that do not begin with `ss_` must not move the window.
        file.metadata
            .insert("modelspec.title".to_owned(), "a title".to_owned());
        let (model, legacy) = file.hashes(SavePrecision::Fp32, &data);
        assert_eq!(legacy, expected[..8]);
        assert_eq!(model, hex::encode(Sha256::digest(&data)));
    }

    #[test]
    fn broken_files_are_refused_with_a_reason() {
        assert!(LoraFile::parse(b"", |_| true).is_err());
        assert!(LoraFile::parse(&[0xff; 64], |_| true).is_err());
        let header = br#"{"x":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}  "#;
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header, &[0_u8; 8]].concat();
        let message = LoraFile::parse(&bytes, |_| true).expect_err("an integer tensor");
        assert!(message.contains("I64"), "{message}");
    }
}
