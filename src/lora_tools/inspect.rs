//! What is in a LoRA file, whoever wrote it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::change::{self, kind_of};
use super::error::ToolError;
use super::file::{AdapterFile, Kind, Module, Slot};
use super::names::{self, Convention};
use super::notes;
use super::writer::{Hashes, Planned};
use crate::diffusion::Family;
use crate::diffusion::ldm::UNetLayout;

/// Bytes that are hashed at once.
const CHUNK_BYTES: usize = 1 << 20;

/// What a LoRA file is.
#[derive(Debug, Serialize)]
pub struct Inspection {
    pub size_bytes: u64,
    /// SHA-256 of the whole file.
    pub sha256: String,
    /// The kinds of its adapters, `dora` among them; `mixed` files have several.
    pub kinds: Vec<String>,
    /// How its adapters are called.
    pub convention: Option<Convention>,
    /// Generation of the base model.
    pub family: Option<Family>,
    /// Whose description it has: `sd-scripts`, `modelspec`, `lorasmith`, `peft`, `other`.
    pub described_by: Vec<&'static str>,
    /// Number of adapters.
    pub module_count: usize,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// Number formats, and how many tensors have them.
    pub dtypes: BTreeMap<String, usize>,
    /// Ranks and alphas, and how many adapters have them.
    pub ranks: Vec<RankCount>,
    /// By block of the UNet and layer of the text encoders.
    pub blocks: Vec<BlockReport>,
    pub norms: Norms,
    pub modules: Vec<ModuleReport>,
    /// What sd-scripts' hashes in the description say, and what they are.
    pub hashes: HashReport,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// The description.
    pub metadata: BTreeMap<String, String>,
}

/// How many adapters have a rank and an alpha.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankCount {
    pub kind: Kind,
    pub rank: Option<usize>,
    pub alpha: Option<f32>,
    pub modules: usize,
}

/// The adapters of one block.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BlockReport {
    pub block: String,
    pub modules: usize,
    pub ranks: Vec<usize>,
    pub alphas: Vec<f32>,
    pub norms: Norms,
}

/// Frobenius norms of what adapters add to their weights at strength 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Norms {
    pub mean: Option<f64>,
    pub max: Option<f64>,
}

/// One adapter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleReport {
    pub name: String,
    /// The layer, as diffusers calls it.
    pub layer: Option<String>,
    pub block: String,
    pub kind: Kind,
    /// Whether it has DoRA's magnitudes.
    pub dora: bool,
    pub rank: Option<usize>,
    pub alpha: Option<f32>,
    /// Outputs, and inputs by kernel; 0 where it hangs on the base.
    pub shape: [usize; 2],
    pub kernel: Option<[usize; 2]>,
    /// None where it hangs on the base.
    pub norm: Option<f64>,
}

/// sd-scripts' hashes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HashReport {
    pub sshs_model_hash: String,
    pub sshs_legacy_hash: String,
    /// Whether the description tells the same; none where it tells nothing.
    pub model_hash_matches: Option<bool>,
    pub legacy_hash_matches: Option<bool>,
}

impl Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Looks into a file. Adapters that cannot be read are told as problems, so that a broken file can be looked into.
///
/// # Errors
/// When it is no safetensors file.
pub fn inspect(path: &Path) -> Result<Inspection, ToolError> {
    let file = AdapterFile::open(path)?;
    let family = notes::family_of_file(&file);
    let layout = notes::layout_of(family);
    let metadata = file.metadata();
    let (sha256, hashes) = hashes(&file, &metadata)?;

    let looked: Vec<Result<ModuleReport, ToolError>> = file
        .modules
        .par_iter()
        .map(|module| look(&file, module, &layout))
        .collect();
    let mut modules = Vec::with_capacity(looked.len());
    let mut problems = Vec::new();
    for one in looked {
        match one {
            Ok(report) => modules.push(report),
            Err(error) => problems.push(error.to_string()),
        }
    }
    if file.modules.is_empty() {
        problems.push("there are no adapters in it".to_owned());
    }
    let strange = file.unknown.iter().take(20);
    problems.extend(strange.map(|key| format!("`{key}` is no part of an adapter that is known")));
    if hashes.model_hash_matches == Some(false) {
        problems.push("the tensors are not those that `sshs_model_hash` was made of".to_owned());
    }

    let mut dtypes = BTreeMap::new();
    let mut parameters = 0;
    for (_, shape, dtype) in file.stored() {
        *dtypes.entry(format!("{dtype:?}")).or_default() += 1;
        parameters += shape.iter().product::<usize>() as u64;
    }
    Ok(Inspection {
        size_bytes: file.size_bytes(),
        sha256,
        kinds: kinds(&file),
        convention: file.convention,
        family,
        described_by: described_by(&metadata),
        module_count: file.modules.len(),
        parameters,
        dtypes,
        ranks: ranks(&modules),
        blocks: blocks(&modules),
        norms: norms(modules.iter()),
        modules,
        hashes,
        problems,
        metadata,
    })
}

fn look(
    file: &AdapterFile,
    module: &Module,
    layout: &UNetLayout,
) -> Result<ModuleReport, ToolError> {
    let change = change::read(file, module)?;
    let place = names::place_of(&module.name, layout);
    Ok(ModuleReport {
        name: module.name.clone(),
        block: place
            .as_ref()
            .map_or_else(|| "other".to_owned(), names::block_of),
        layer: place.map(|place| format!("{}.{}", place.part.as_str(), place.path)),
        kind: change.kind,
        dora: change.magnitudes.is_some(),
        rank: change.rank,
        alpha: change.alpha,
        shape: [change.shape.out, change.shape.columns],
        kernel: change.shape.kernel,
        norm: change.norm(),
    })
}

fn kinds(file: &AdapterFile) -> Vec<String> {
    let mut kinds: Vec<String> = Vec::new();
    let mut add = |kind: &str| {
        if !kinds.iter().any(|known| known == kind) {
            kinds.push(kind.to_owned());
        }
    };
    for module in &file.modules {
        if let Some(kind) = kind_of(file, module) {
            add(kind.as_str());
        }
        if module.has(Slot::DoraScale) {
            add("dora");
        }
    }
    kinds.sort();
    kinds
}

fn described_by(metadata: &BTreeMap<String, String>) -> Vec<&'static str> {
    let any = |start: &str| metadata.keys().any(|key| key.starts_with(start));
    let known = [
        ("ss_", "sd-scripts"),
        ("modelspec.", "modelspec"),
        ("lorasmith_", "lorasmith"),
        ("lora_adapter_metadata", "peft"),
    ];
    let found: Vec<_> = known
        .iter()
        .filter(|(start, _)| any(start))
        .map(|(_, who)| *who)
        .collect();
    if found.is_empty() && !metadata.is_empty() {
        return vec!["other"];
    }
    found
}

fn ranks(modules: &[ModuleReport]) -> Vec<RankCount> {
    let mut counts: Vec<RankCount> = Vec::new();
    for module in modules {
        let same = counts.iter_mut().find(|count| {
            (count.kind, count.rank, count.alpha) == (module.kind, module.rank, module.alpha)
        });
        match same {
            Some(count) => count.modules += 1,
            None => counts.push(RankCount {
                kind: module.kind,
                rank: module.rank,
                alpha: module.alpha,
                modules: 1,
            }),
        }
    }
    counts.sort_by_key(|count| std::cmp::Reverse(count.modules));
    counts
}

fn blocks(modules: &[ModuleReport]) -> Vec<BlockReport> {
    let mut by_block: BTreeMap<&str, Vec<&ModuleReport>> = BTreeMap::new();
    for module in modules {
        by_block.entry(&module.block).or_default().push(module);
    }
    let reports = by_block.into_iter().map(|(block, modules)| {
        let mut ranks: Vec<usize> = modules.iter().filter_map(|module| module.rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let mut alphas: Vec<f32> = modules.iter().filter_map(|module| module.alpha).collect();
        alphas.sort_by(f32::total_cmp);
        alphas.dedup();
        BlockReport {
            block: block.to_owned(),
            modules: modules.len(),
            ranks,
            alphas,
            norms: norms(modules.into_iter()),
        }
    });
    reports.collect()
}

fn norms<'a>(modules: impl Iterator<Item = &'a ModuleReport>) -> Norms {
    let norms: Vec<f64> = modules.filter_map(|module| module.norm).collect();
    if norms.is_empty() {
        return Norms::default();
    }
    Norms {
        mean: Some(norms.iter().sum::<f64>() / norms.len() as f64),
        max: norms.into_iter().reduce(f64::max),
    }
}

/// SHA-256 of the file, and sd-scripts' hashes. The latter are of the tensors in the order in which they lie there.
fn hashes(
    file: &AdapterFile,
    metadata: &BTreeMap<String, String>,
) -> Result<(String, HashReport), ToolError> {
    let io = |error| ToolError::io(&file.path, error);
    let mut opened = File::open(&file.path).map_err(io)?;
    let mut length = [0; 8];
    opened.read_exact(&mut length).map_err(io)?;
    let mut header = vec![
        0;
        usize::try_from(u64::from_le_bytes(length))
            .unwrap_or(0)
            .min(64 << 20)
    ];
    opened.read_exact(&mut header).map_err(io)?;
    let mut hashes = Hashes::new(&planned(&header), metadata);

    let mut digest = Sha256::new();
    opened.seek(SeekFrom::Start(0)).map_err(io)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut skip = header.len() + length.len();
    loop {
        let read = opened.read(&mut buffer).map_err(io)?;
        if read == 0 {
            break;
        }
        digest.update(&buffer[..read]);
        let tensors = skip.min(read);
        hashes.update(&buffer[tensors..read]);
        skip -= tensors;
    }
    let [(_, model), (_, legacy)] = hashes.finish();
    let matches = |key: &str, found: &str| {
        metadata
            .get(key)
            .map(|told| told.eq_ignore_ascii_case(found))
    };
    let report = HashReport {
        model_hash_matches: matches("sshs_model_hash", &model),
        legacy_hash_matches: matches("sshs_legacy_hash", &legacy),
        sshs_model_hash: model,
        sshs_legacy_hash: legacy,
    };
    Ok((hex::encode(digest.finalize()), report))
}

/// The tensors of a header in the order of their data; the header has been read before, so that it is whole.
fn planned(header: &[u8]) -> Vec<Planned> {
    let Ok(metadata) = serde_json::from_slice::<safetensors::tensor::Metadata>(header) else {
        return Vec::new();
    };
    let mut tensors: Vec<(String, safetensors::tensor::TensorInfo)> = metadata
        .tensors()
        .into_iter()
        .map(|(key, info)| (key, info.clone()))
        .collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let planned = tensors.into_iter().map(|(key, info)| Planned {
        key,
        dtype: info.dtype,
        size_bytes: info.data_offsets.1 - info.data_offsets.0,
        shape: info.shape,
    });
    planned.collect()
}
