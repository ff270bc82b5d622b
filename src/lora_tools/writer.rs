//! Safetensors files that are written tensor by tensor, so that none has to be in memory as a whole.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use super::error::ToolError;
use crate::networks::SavePrecision;

/// The part of a file that the old hash of AUTOMATIC1111's web UI covers.
const LEGACY_WINDOW: (usize, usize) = (0x10_0000, 0x11_0000);
/// Bytes gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// A tensor that will be written.
#[derive(Clone, Debug)]
pub struct Planned {
    pub key: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub size_bytes: usize,
}

impl Planned {
    /// A tensor of floats.
    pub fn new(key: String, precision: SavePrecision, shape: Vec<usize>) -> Self {
        let (dtype, size) = match precision {
            SavePrecision::Fp32 => (Dtype::F32, 4),
            SavePrecision::Fp16 => (Dtype::F16, 2),
            SavePrecision::Bf16 => (Dtype::BF16, 2),
        };
        let size_bytes = size * shape.iter().product::<usize>();
        Self {
            key,
            dtype,
            shape,
            size_bytes,
        }
    }
}

/// A file being written: what was planned, in that order.
pub struct Writer {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    metadata: BTreeMap<String, String>,
    plan: Vec<Planned>,
    pushed: usize,
    hashes: Option<Hashes>,
}

/// sd-scripts' two hashes of a file: of its tensors, and of a window of it as it would be with `ss_*` entries alone.
pub struct Hashes {
    model: Sha256,
    legacy: Sha256,
    /// Where the next byte would be in that file.
    at: usize,
}

impl Hashes {
    /// Of a file with these tensors and entries.
    pub fn new(plan: &[Planned], metadata: &BTreeMap<String, String>) -> Self {
        let mut hashes = Self {
            model: Sha256::new(),
            legacy: Sha256::new(),
            at: 0,
        };
        let short = header(plan, metadata, |key| key.starts_with("ss_"));
        hashes.window(&short);
        hashes
    }

    /// The next bytes of tensors.
    pub fn update(&mut self, bytes: &[u8]) {
        self.model.update(bytes);
        self.window(bytes);
    }

    fn window(&mut self, bytes: &[u8]) {
        let from = LEGACY_WINDOW.0.saturating_sub(self.at).min(bytes.len());
        let to = LEGACY_WINDOW.1.saturating_sub(self.at).min(bytes.len());
        self.legacy.update(&bytes[from..to]);
        self.at += bytes.len();
    }

    /// `sshs_model_hash` and `sshs_legacy_hash`.
    pub fn finish(self) -> [(&'static str, String); 2] {
        let legacy = hex::encode(self.legacy.finalize());
        [
            ("sshs_model_hash", hex::encode(self.model.finalize())),
            ("sshs_legacy_hash", legacy[..8].to_owned()),
        ]
    }
}

impl Writer {
    /// Begins a file under a temporary name beside its own. A LoRA file gets sd-scripts' hashes.
    pub fn begin(
        path: &Path,
        plan: Vec<Planned>,
        mut metadata: BTreeMap<String, String>,
        is_lora: bool,
    ) -> Result<Self, ToolError> {
        let io = |error| ToolError::io(path, error);
        let folder = folder_of(path);
        fs::create_dir_all(folder).map_err(io)?;
        let file = NamedTempFile::new_in(folder).map_err(io)?;
        let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
        let hashes = is_lora.then(|| Hashes::new(&plan, &metadata));
        if is_lora {
            // Of the same length as those that come when the tensors are known.
            metadata.insert("sshs_model_hash".to_owned(), "0".repeat(64));
            metadata.insert("sshs_legacy_hash".to_owned(), "0".repeat(8));
        }
        file.write_all(&header(&plan, &metadata, |_| true))
            .map_err(io)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            metadata,
            plan,
            pushed: 0,
            hashes,
        })
    }

    /// Writes the next tensor of the plan.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), ToolError> {
        let expected = self.plan.get(self.pushed).map(|planned| planned.size_bytes);
        if expected != Some(bytes.len()) {
            let key = self
                .plan
                .get(self.pushed)
                .map_or("", |planned| &planned.key);
            let found = format!("{} bytes", bytes.len());
            return Err(ToolError::tensor(
                &self.path,
                key,
                found,
                format!("{expected:?}"),
            ));
        }
        self.pushed += 1;
        if let Some(hashes) = &mut self.hashes {
            hashes.update(bytes);
        }
        self.file
            .write_all(bytes)
            .map_err(|error| ToolError::io(&self.path, error))
    }

    /// Ends the file: hashes, flushed to disk, renamed. Returns its size.
    pub fn finish(mut self) -> Result<u64, ToolError> {
        let path = self.path.clone();
        let io = |error| ToolError::io(&path, error);
        if let Some(planned) = self.plan.get(self.pushed) {
            return Err(ToolError::tensor(
                &path,
                &planned.key,
                "nothing",
                "its values",
            ));
        }
        if let Some(hashes) = self.hashes.take() {
            for (key, value) in hashes.finish() {
                self.metadata.insert(key.to_owned(), value);
            }
            self.file.seek(SeekFrom::Start(0)).map_err(io)?;
            let header = header(&self.plan, &self.metadata, |_| true);
            self.file.write_all(&header).map_err(io)?;
        }
        let file = self
            .file
            .into_inner()
            .map_err(|error| io(error.into_error()))?;
        file.as_file().sync_all().map_err(io)?;
        let size_bytes = file.as_file().metadata().map_err(io)?.len();
        file.persist(&path).map_err(|error| io(error.error))?;
        if cfg!(unix) {
            let folder = fs::File::open(folder_of(&path)).map_err(io)?;
            folder.sync_all().map_err(io)?;
        }
        Ok(size_bytes)
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Length and JSON header, padded with spaces to a multiple of 8 as the safetensors library does.
fn header(
    plan: &[Planned],
    metadata: &BTreeMap<String, String>,
    keep: impl Fn(&str) -> bool,
) -> Vec<u8> {
    let mut entries = Vec::with_capacity(plan.len() + 1);
    let metadata: BTreeMap<_, _> = metadata.iter().filter(|(key, _)| keep(key)).collect();
    if !metadata.is_empty() {
        entries.push(format!("\"__metadata__\":{}", json!(metadata)));
    }
    let mut offset = 0;
    for planned in plan {
        let end = offset + planned.size_bytes;
        entries.push(format!(
            "{}:{{\"dtype\":{},\"shape\":{},\"data_offsets\":[{offset},{end}]}}",
            json!(planned.key),
            json!(planned.dtype),
            json!(planned.shape),
        ));
        offset = end;
    }
    let mut json = format!("{{{}}}", entries.join(",")).into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

/// Numbers as a file holds them; `None` when one is not finite, or too large for the format.
pub fn encode(values: &[f32], precision: SavePrecision) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(values.len() * 4);
    for &value in values {
        let stored = match precision {
            SavePrecision::Fp32 => {
                bytes.extend_from_slice(&value.to_le_bytes());
                value
            }
            SavePrecision::Fp16 => {
                let value = f16::from_f32(value);
                bytes.extend_from_slice(&value.to_le_bytes());
                value.to_f32()
            }
            SavePrecision::Bf16 => {
                let value = bf16::from_f32(value);
                bytes.extend_from_slice(&value.to_le_bytes());
                value.to_f32()
            }
        };
        if !stored.is_finite() {
            return None;
        }
    }
    Some(bytes)
}

/// The number that a file will hold.
pub fn rounded(value: f32, precision: SavePrecision) -> f32 {
    match precision {
        SavePrecision::Fp32 => value,
        SavePrecision::Fp16 => f16::from_f32(value).to_f32(),
        SavePrecision::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::networks::{HostTensor, LoraFile};

    /// The same bytes as the trainer's own writer.
    #[test]
    fn a_streamed_file_is_that_of_the_trainer() {
        let folder = tempfile::tempdir().expect("a folder");
        let values: Vec<f32> = (0..300_000_u32).map(|i| (i % 977) as f32 / 977.0).collect();
        let mut file = LoraFile::default();
        for (key, shape) in [
            ("a.alpha", vec![]),
            ("a.lora_down.weight", vec![3, 100_000]),
        ] {
            let count = shape.iter().product();
            let values = values[..count].to_vec();
            file.tensors
                .insert(key.to_owned(), HostTensor { shape, values });
        }
        for (key, value) in [("ss_steps", "4"), ("modelspec.title", "ü \"x\"")] {
            file.metadata.insert(key.to_owned(), value.to_owned());
        }
        let precision = SavePrecision::Fp32;
        let plan = file
            .tensors
            .iter()
            .map(|(key, tensor)| Planned::new(key.clone(), precision, tensor.shape.clone()));
        let path = folder.path().join("b.safetensors");
        let mut writer =
            Writer::begin(&path, plan.collect(), file.metadata.clone(), true).expect("begun");
        for tensor in file.tensors.values() {
            writer
                .push(&encode(&tensor.values, precision).expect("finite"))
                .expect("written");
        }
        let size = writer.finish().expect("written");
        let expected = folder.path().join("a.safetensors");
        let saved = file.write(&expected, precision).expect("written");
        assert_eq!(size, saved.size_bytes);
        assert_eq!(
            fs::read(path).expect("there"),
            fs::read(expected).expect("there")
        );
    }

    #[test]
    fn what_a_format_cannot_hold_is_told() {
        assert!(encode(&[1e5], SavePrecision::Fp16).is_none());
        assert!(encode(&[1e5], SavePrecision::Bf16).is_some());
        assert!(encode(&[f32::NAN], SavePrecision::Fp32).is_none());
    }
}
