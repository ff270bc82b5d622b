//! A resume point as a safetensors file. Its name holds the step and the SHA-256 of the whole file, so that a torn or
//! damaged one is known as such.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use super::{Owner, Part, PartTensor, ResumeError, ResumePoint};
use crate::training::optimizer::StateDtype;

/// Raised when the meaning of the description changes.
const FORMAT: u32 = 1;
/// The entry of the safetensors header that holds the description.
const ENTRY: &str = "lorasmith_resume";

/// What the header says besides the tensors.
#[derive(Serialize, Deserialize)]
struct Description {
    format: u32,
    step: u64,
    belongs_to: Owner,
    parts: BTreeMap<String, Value>,
}

/// The name of a resume point's file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PointName {
    /// Optimizer steps done.
    pub step: u64,
    /// SHA-256 of the file.
    pub sha256: String,
}

impl PointName {
    /// Reads a file name; `None` when it is another file.
    pub fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("step-")?.strip_suffix(".safetensors")?;
        let (step, sha256) = rest.split_once('-')?;
        let is_digest = sha256.len() == 64 && sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_digest.then_some(())?;
        Some(Self {
            step: step.parse().ok()?,
            sha256: sha256.to_owned(),
        })
    }

    fn file_name(&self) -> String {
        format!("step-{:010}-{}.safetensors", self.step, self.sha256)
    }

    /// The file within a folder.
    pub fn path(&self, folder: &Path) -> PathBuf {
        folder.join(self.file_name())
    }
}

/// Writes a point into a folder: under a temporary name, flushed to disk, renamed.
pub fn write(point: &ResumePoint, folder: &Path) -> Result<PointName, ResumeError> {
    let io = |source| ResumeError::Io {
        path: folder.to_owned(),
        source,
    };
    let mut file = NamedTempFile::new_in(folder).map_err(io)?;
    let mut digest = Sha256::new();
    let mut put = |bytes: &[u8]| {
        digest.update(bytes);
        file.write_all(bytes)
    };
    put(&header(point)).map_err(io)?;
    for (_, tensor) in tensors(point) {
        put(&tensor.data).map_err(io)?;
    }
    let name = PointName {
        step: point.step,
        sha256: hex::encode(digest.finalize()),
    };
    file.as_file().sync_all().map_err(io)?;
    file.persist(name.path(folder))
        .map_err(|error| io(error.error))?;
    sync(folder).map_err(io)?;
    Ok(name)
}

/// Reads the point of a name.
pub fn read(name: &PointName, folder: &Path) -> Result<ResumePoint, ResumeError> {
    let path = name.path(folder);
    let bytes = std::fs::read(&path).map_err(|source| ResumeError::Io {
        path: path.clone(),
        source,
    })?;
    let damaged = |message| ResumeError::Damaged {
        path: path.clone(),
        message,
    };
    let found = hex::encode(Sha256::digest(&bytes));
    if found != name.sha256 {
        let message = format!("damaged: its SHA-256 is {found}, not that of its name");
        return Err(damaged(message));
    }
    parse(&bytes).map_err(damaged)
}

fn parse(bytes: &[u8]) -> Result<ResumePoint, String> {
    let text = |error: safetensors::SafeTensorError| error.to_string();
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(text)?;
    let entry = header.metadata().as_ref().and_then(|map| map.get(ENTRY));
    let entry = entry.ok_or_else(|| format!("there is no entry `{ENTRY}`"))?;
    let description: Description =
        serde_json::from_str(entry).map_err(|error| error.to_string())?;
    if description.format != FORMAT {
        let found = description.format;
        return Err(format!("its format is {found}, expected {FORMAT}"));
    }
    let mut parts: BTreeMap<String, Part> = description
        .parts
        .into_iter()
        .map(|(name, values)| {
            let tensors = Vec::new();
            (name, Part { values, tensors })
        })
        .collect();
    for (key, view) in SafeTensors::deserialize(bytes).map_err(text)?.iter() {
        let (part, name) = key.split_once('/').unwrap_or((key, ""));
        let dtype = match view.dtype() {
            Dtype::F32 => StateDtype::F32,
            Dtype::I64 => StateDtype::I64,
            Dtype::U8 => StateDtype::U8,
            other => return Err(format!("{key} is {other:?}")),
        };
        let part = parts
            .get_mut(part)
            .ok_or_else(|| format!("{key} belongs to no part"))?;
        part.tensors.push(PartTensor {
            name: name.to_owned(),
            shape: view.shape().to_vec(),
            dtype,
            data: view.data().to_vec(),
        });
    }
    Ok(ResumePoint {
        step: description.step,
        owner: description.belongs_to,
        parts,
    })
}

/// All tensors under their keys, those of the widest elements first so that all are aligned.
fn tensors(point: &ResumePoint) -> Vec<(String, &PartTensor)> {
    let mut all: Vec<(String, &PartTensor)> = point
        .parts
        .iter()
        .flat_map(|(part, kept)| {
            let key = move |tensor: &PartTensor| format!("{part}/{}", tensor.name);
            kept.tensors.iter().map(move |tensor| (key(tensor), tensor))
        })
        .collect();
    all.sort_by_key(|(_, tensor)| match tensor.dtype {
        StateDtype::I64 => 0,
        StateDtype::F32 => 1,
        StateDtype::U8 => 2,
    });
    all
}

/// Length and JSON header, padded with spaces to a multiple of 8.
fn header(point: &ResumePoint) -> Vec<u8> {
    let values = point
        .parts
        .iter()
        .map(|(name, part)| (name.clone(), part.values.clone()));
    let description = json!(Description {
        format: FORMAT,
        step: point.step,
        belongs_to: point.owner.clone(),
        parts: values.collect(),
    });
    let mut entries = serde_json::Map::new();
    entries.insert(
        "__metadata__".to_owned(),
        json!({ ENTRY: description.to_string() }),
    );
    let mut offset = 0;
    for (key, tensor) in tensors(point) {
        let end = offset + tensor.data.len();
        let dtype = match tensor.dtype {
            StateDtype::I64 => "I64",
            StateDtype::F32 => "F32",
            StateDtype::U8 => "U8",
        };
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        entries.insert(key, entry);
        offset = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

/// Makes a rename durable. Windows cannot open folders and needs no such call.
pub fn sync(folder: &Path) -> io::Result<()> {
    if cfg!(unix) {
        std::fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}
