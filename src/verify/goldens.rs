//! The `goldens/` folder: safetensors files of any number format, and the captions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

/// Golden files are small; anything larger is none.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// A golden file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct GoldenError {
    path: PathBuf,
    message: String,
}

/// The folder.
pub struct Goldens {
    folder: PathBuf,
    device: Device,
}

/// The tensors of one file, as f64.
pub struct GoldenFile {
    path: PathBuf,
    device: Device,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

#[derive(Deserialize)]
struct Captions {
    captions: Vec<String>,
}

impl Goldens {
    /// The folder must exist; its files are read when they are asked for.
    pub fn open(folder: &Path, device: &Device) -> Result<Self, GoldenError> {
        if !folder.is_dir() {
            return Err(GoldenError {
                path: folder.to_owned(),
                message: "expected a folder of golden tensors".to_owned(),
            });
        }
        Ok(Self {
            folder: folder.to_owned(),
            device: device.clone(),
        })
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Names of the training trajectories: `train_<tag>_log.safetensors`.
    pub fn training_tags(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        let mut tags: Vec<String> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                let tag = name
                    .strip_prefix("train_")?
                    .strip_suffix("_log.safetensors")?;
                Some(tag.to_owned())
            })
            .collect();
        tags.sort();
        tags
    }

    /// The captions that were tokenized.
    pub fn captions(&self) -> Result<Vec<String>, GoldenError> {
        let path = self.path("captions.json");
        let failed = |message: String| GoldenError {
            path: path.clone(),
            message,
        };
        let text = std::fs::read(&path).map_err(|error| failed(error.to_string()))?;
        let captions: Captions =
            serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
        Ok(captions.captions)
    }

    /// One file, if it is there.
    pub fn file(&self, name: &str) -> Result<Option<GoldenFile>, GoldenError> {
        let path = self.path(&format!("{name}.safetensors"));
        if !path.is_file() {
            return Ok(None);
        }
        let failed = |message: String| GoldenError {
            path: path.clone(),
            message,
        };
        let size = std::fs::metadata(&path)
            .map_err(|error| failed(error.to_string()))?
            .len();
        if size > MAX_FILE_BYTES {
            return Err(failed(format!(
                "{size} bytes, expected at most {MAX_FILE_BYTES}"
            )));
        }
        let bytes = std::fs::read(&path).map_err(|error| failed(error.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| failed(error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (key, view) in file.iter() {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => numbers(data, |bytes| f64::from(f32::from_le_bytes(bytes))),
                Dtype::F64 => numbers(data, f64::from_le_bytes),
                Dtype::I32 => numbers(data, |bytes| f64::from(i32::from_le_bytes(bytes))),
                Dtype::I64 => numbers(data, |bytes| i64::from_le_bytes(bytes) as f64),
                other => {
                    return Err(failed(format!(
                        "`{key}` is {other:?}, expected F32, F64, I32, I64"
                    )));
                }
            };
            tensors.insert(key.to_owned(), (view.shape().to_vec(), values));
        }
        Ok(Some(GoldenFile {
            path,
            device: self.device.clone(),
            tensors,
        }))
    }
}

fn numbers<const N: usize>(data: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    data.as_chunks::<N>()
        .0
        .iter()
        .map(|&bytes| number(bytes))
        .collect()
}

impl GoldenFile {
    /// Whether it has a tensor.
    pub fn has(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn get(&self, key: &str) -> Result<&(Vec<usize>, Vec<f64>), GoldenError> {
        self.tensors
            .get(key)
            .ok_or_else(|| self.error(format!("`{key}` is missing")))
    }

    fn error(&self, message: String) -> GoldenError {
        GoldenError {
            path: self.path.clone(),
            message,
        }
    }

    /// The elements of a tensor.
    pub fn values(&self, key: &str) -> Result<&[f64], GoldenError> {
        Ok(&self.get(key)?.1)
    }

    /// A tensor on the device, as f32.
    pub fn tensor<const D: usize>(&self, key: &str) -> Result<Tensor<D>, GoldenError> {
        let (shape, values) = self.get(key)?;
        if shape.len() != D {
            return Err(self.error(format!(
                "`{key}` has shape {shape:?}, expected {D} dimensions"
            )));
        }
        let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        let data = TensorData::new(values, shape.clone());
        Ok(Tensor::from_data(data, (&self.device, DType::F32)))
    }

    /// Whole numbers, such as token ids, as rows of the last axis.
    pub fn rows(&self, key: &str) -> Result<Vec<Vec<u32>>, GoldenError> {
        let (shape, values) = self.get(key)?;
        let length = shape.last().copied().unwrap_or(1).max(1);
        let rows = values.chunks(length);
        Ok(rows
            .map(|row| row.iter().map(|&id| id as u32).collect())
            .collect())
    }

    /// Numbers of timesteps.
    pub fn timesteps(&self, key: &str) -> Result<Vec<usize>, GoldenError> {
        Ok(self
            .values(key)?
            .iter()
            .map(|&value| value as usize)
            .collect())
    }
}
