//! A LoRA file as it lies on disk, whoever wrote it: its tensors by adapter. Nothing is read but the header until
//! somebody asks for a tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::error::ToolError;
use super::names::{Convention, convention_of};
use crate::diffusion::Weights;
use crate::networks::SavePrecision;

/// Largest file that is worked on; a rank-256 file of SDXL in f32 has 3.5 GB.
pub const MAX_FILE_BYTES: u64 = 4 << 30;

/// What a tensor is to its adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    Alpha,
    Down,
    Up,
    /// The core of a convolution that LyCORIS has decomposed (Tucker).
    Mid,
    DoraScale,
    HadaW1A,
    HadaW1B,
    HadaT1,
    HadaW2A,
    HadaW2B,
    HadaT2,
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
    Ia3OnInput,
    Ia3Weight,
    /// What is added to the weight as it is.
    Diff,
    DiffBias,
    /// A factor of LyCORIS on everything.
    Scalar,
}

/// How keys end, in the order in which they are tried.
const ENDINGS: [(&str, Slot); 36] = [
    (".alpha", Slot::Alpha),
    // sd-scripts
    (".lora_down.weight", Slot::Down),
    (".lora_up.weight", Slot::Up),
    (".lora_mid.weight", Slot::Mid),
    // PEFT, and what diffusers wrote before it used PEFT
    (".lora_A.weight", Slot::Down),
    (".lora_B.weight", Slot::Up),
    (".lora_A.default.weight", Slot::Down),
    (".lora_B.default.weight", Slot::Up),
    (".lora_magnitude_vector.default.weight", Slot::DoraScale),
    (".lora_magnitude_vector.weight", Slot::DoraScale),
    (".lora_magnitude_vector", Slot::DoraScale),
    (".lora_linear_layer.down.weight", Slot::Down),
    (".lora_linear_layer.up.weight", Slot::Up),
    (".lora.down.weight", Slot::Down),
    (".lora.up.weight", Slot::Up),
    ("_lora.down.weight", Slot::Down),
    ("_lora.up.weight", Slot::Up),
    // LyCORIS
    (".dora_scale", Slot::DoraScale),
    (".hada_w1_a", Slot::HadaW1A),
    (".hada_w1_b", Slot::HadaW1B),
    (".hada_t1", Slot::HadaT1),
    (".hada_w2_a", Slot::HadaW2A),
    (".hada_w2_b", Slot::HadaW2B),
    (".hada_t2", Slot::HadaT2),
    (".lokr_w1", Slot::LokrW1),
    (".lokr_w1_a", Slot::LokrW1A),
    (".lokr_w1_b", Slot::LokrW1B),
    (".lokr_w2", Slot::LokrW2),
    (".lokr_w2_a", Slot::LokrW2A),
    (".lokr_w2_b", Slot::LokrW2B),
    (".lokr_t2", Slot::LokrT2),
    (".on_input", Slot::Ia3OnInput),
    (".diff_b", Slot::DiffBias),
    (".diff", Slot::Diff),
    (".scalar", Slot::Scalar),
    (".weight", Slot::Ia3Weight),
];

/// The kind of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Low rank, of a matrix or a 1×1 convolution.
    Lora,
    /// Low rank, of a larger convolution.
    Locon,
    /// Hadamard product of two low ranks.
    Loha,
    /// Kronecker product.
    Lokr,
    /// One factor for each channel.
    Ia3,
    /// The difference itself.
    Full,
}

impl Kind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Locon => "locon",
            Self::Loha => "loha",
            Self::Lokr => "lokr",
            Self::Ia3 => "ia3",
            Self::Full => "full",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A key as (adapter's name, slot); none for what is no part of an adapter.
pub fn split_key(key: &str) -> Option<(String, Slot)> {
    let bare = key.strip_prefix("base_model.model.").unwrap_or(key);
    ENDINGS.iter().find_map(|(ending, slot)| {
        let name = bare.strip_suffix(ending)?;
        if ending.starts_with('_') {
            // `….attn1.processor.to_q_lora.down.weight`
            let (before, projection) = name.rsplit_once(".processor.")?;
            let nested = if projection == "to_out" { ".0" } else { "" };
            return Some((format!("{before}.{projection}{nested}"), *slot));
        }
        (!name.is_empty()).then(|| (name.to_owned(), *slot))
    })
}

/// The tensors of one adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, as the file has it.
    pub name: String,
    /// Slot to stored key.
    pub keys: BTreeMap<Slot, String>,
}

impl Module {
    /// Whether it has a tensor of this slot.
    pub fn has(&self, slot: Slot) -> bool {
        self.keys.contains_key(&slot)
    }
}

/// A LoRA file.
#[derive(Debug)]
pub struct AdapterFile {
    /// Where it is.
    pub path: PathBuf,
    /// The adapters, in the order of their names.
    pub modules: Vec<Module>,
    /// Keys that are no part of an adapter.
    pub unknown: Vec<String>,
    /// How the adapters are called.
    pub convention: Option<Convention>,
    weights: Weights,
}

impl AdapterFile {
    /// Opens a file of any kind of adapters.
    ///
    /// # Errors
    /// When it is no safetensors file, too large, or has two tensors for one place.
    pub fn open(path: &Path) -> Result<Self, ToolError> {
        let size_bytes = std::fs::metadata(path)
            .map_err(|error| ToolError::io(path, error))?
            .len();
        if size_bytes > MAX_FILE_BYTES {
            return Err(ToolError::TooLarge {
                path: path.to_owned(),
                size_bytes,
                max_bytes: MAX_FILE_BYTES,
            });
        }
        let weights = Weights::open(&[path.to_owned()])?;
        let mut modules: BTreeMap<String, Module> = BTreeMap::new();
        let mut unknown = Vec::new();
        let keys: BTreeSet<&str> = weights.stored().map(|(key, ..)| key).collect();
        for key in keys {
            let Some((name, slot)) = split_key(key) else {
                unknown.push(key.to_owned());
                continue;
            };
            let module = modules.entry(name.clone()).or_insert_with(|| Module {
                name,
                keys: BTreeMap::new(),
            });
            if let Some(first) = module.keys.insert(slot, key.to_owned()) {
                let found = format!("the same as `{first}` under another name");
                return Err(ToolError::tensor(path, key, found, "each tensor once"));
            }
        }
        // A `weight` alone is anything; IA³ has its mark beside it.
        let (modules, strange): (Vec<_>, Vec<_>) = modules
            .into_values()
            .partition(|module| !module.has(Slot::Ia3Weight) || module.has(Slot::Ia3OnInput));
        unknown.extend(
            strange
                .into_iter()
                .flat_map(|module| module.keys.into_values()),
        );
        let convention = convention_of(modules.iter().map(|module| module.name.as_str()));
        Ok(Self {
            path: path.to_owned(),
            modules,
            unknown,
            convention,
            weights,
        })
    }

    /// The same, of a file in which everything is known.
    ///
    /// # Errors
    /// As [`Self::open`], and when there are no adapters or other tensors.
    pub fn open_known(path: &Path) -> Result<Self, ToolError> {
        let file = Self::open(path)?;
        if let Some(key) = file.unknown.first() {
            let expected = "only tensors of LoRA, LoCon, LoHa, LoKr, DoRA, IA³ or PEFT";
            return Err(ToolError::tensor(path, key, "this name", expected));
        }
        if file.modules.is_empty() {
            return Err(ToolError::kind(
                path,
                "found no adapters, expected a LoRA file",
            ));
        }
        Ok(file)
    }

    /// The description in the header.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let entries = self.weights.metadata().iter();
        entries
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    /// Size of the file.
    pub fn size_bytes(&self) -> u64 {
        self.weights.size_bytes()
    }

    /// Stored key, shape and number format of everything.
    pub fn stored(&self) -> impl Iterator<Item = (&str, &[usize], Dtype)> {
        self.weights.stored()
    }

    /// The shape of a tensor.
    pub fn shape(&self, module: &Module, slot: Slot) -> Option<&[usize]> {
        self.weights.stored_shape(module.keys.get(&slot)?)
    }

    /// Values and shape of a tensor that must be there.
    ///
    /// # Errors
    /// When it is not, or is no float.
    pub fn need(&self, module: &Module, slot: Slot) -> Result<(Vec<f32>, Vec<usize>), ToolError> {
        self.read(module, slot)?.ok_or_else(|| {
            let ending = ENDINGS.iter().find(|(_, of)| *of == slot);
            let found = format!("no `{}`", ending.map_or("", |(ending, _)| &ending[1..]));
            ToolError::tensor(&self.path, &module.name, found, "a complete adapter")
        })
    }

    /// Values and shape of a tensor, if it is there.
    ///
    /// # Errors
    /// When it is no float.
    #[expect(clippy::type_complexity, reason = "values and shape")]
    pub fn read(
        &self,
        module: &Module,
        slot: Slot,
    ) -> Result<Option<(Vec<f32>, Vec<usize>)>, ToolError> {
        match module.keys.get(&slot) {
            Some(key) => Ok(Some(self.weights.read_f32(key)?)),
            None => Ok(None),
        }
    }

    /// A tensor of one number, also of a whole one: marks are stored as such.
    ///
    /// # Errors
    /// When it has another number of elements, or is of no known format.
    pub fn number(&self, module: &Module, slot: Slot) -> Result<Option<f32>, ToolError> {
        let Some(key) = module.keys.get(&slot) else {
            return Ok(None);
        };
        let (bytes, dtype, shape) = self.weights.read_bytes(key)?;
        let whole = match (dtype, bytes) {
            (Dtype::BOOL | Dtype::U8, [value]) => Some(f32::from(*value)),
            (Dtype::I32, bytes) => bytes
                .as_array()
                .map(|bytes| i32::from_le_bytes(*bytes) as f32),
            (Dtype::I64, bytes) => bytes
                .as_array()
                .map(|bytes| i64::from_le_bytes(*bytes) as f32),
            _ => match self.weights.read_f32(key)?.0[..] {
                [value] => Some(value),
                _ => None,
            },
        };
        let wrong = || {
            ToolError::tensor(
                &self.path,
                key,
                format!("the shape {shape:?}"),
                "one number",
            )
        };
        whole.map(Some).ok_or_else(wrong)
    }

    /// The number format that most elements have, as far as files are written in it.
    pub fn precision(&self) -> SavePrecision {
        let mut elements: BTreeMap<u8, usize> = BTreeMap::new();
        for (_, shape, dtype) in self.stored() {
            let format = match dtype {
                Dtype::F16 => 1,
                Dtype::BF16 => 2,
                _ => 0,
            };
            *elements.entry(format).or_default() += shape.iter().product::<usize>();
        }
        match elements.into_iter().max_by_key(|(_, count)| *count) {
            Some((1, _)) => SavePrecision::Fp16,
            Some((2, _)) => SavePrecision::Bf16,
            _ => SavePrecision::Fp32,
        }
    }

    /// The name that is told of it: the file's.
    pub fn title(&self) -> String {
        let stem = self.path.file_stem().unwrap_or_default();
        stem.to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_many_programs_are_told_apart() {
        let split = split_key;
        let found = |name: &str, slot| Some((name.to_owned(), slot));
        assert_eq!(
            split("lora_unet_a.alpha"),
            found("lora_unet_a", Slot::Alpha)
        );
        assert_eq!(
            split("unet.mid_block.attentions.0.proj_in.lora_A.weight"),
            found("unet.mid_block.attentions.0.proj_in", Slot::Down)
        );
        assert_eq!(
            split("base_model.model.unet.a.lora_B.default.weight"),
            found("unet.a", Slot::Up)
        );
        assert_eq!(
            split("unet.a.attn1.processor.to_out_lora.up.weight"),
            found("unet.a.attn1.to_out.0", Slot::Up)
        );
        assert_eq!(
            split("text_encoder.a.q_proj.lora_linear_layer.down.weight"),
            found("text_encoder.a.q_proj", Slot::Down)
        );
        assert_eq!(
            split("lora_te_a.lokr_w1_b"),
            found("lora_te_a", Slot::LokrW1B)
        );
        assert_eq!(
            split("lora_te_a.diff_b"),
            found("lora_te_a", Slot::DiffBias)
        );
        assert_eq!(split("emb_params"), None);
        assert_eq!(split(".weight"), None);
    }
}
