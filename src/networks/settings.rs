//! What a network looks like: the kind of its adapters, their sizes and strengths, where they are, and what is left out
//! of them in training.

mod check;

use serde::{Deserialize, Serialize};

pub use self::check::{MAX_PATTERN_CHARS, MAX_PATTERNS, NetworkProblem};

/// Largest rank that is accepted; well above any useful one and small enough to keep a wrong number harmless.
pub const MAX_RANK: usize = 1024;

/// What an adapter adds to its layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// A product of two narrow matrices, as sd-scripts' `networks.lora`; on 3×3 convolutions too where `conv_rank` is
    /// given.
    #[default]
    Lora,
    /// The same, with convolutions: their rank and alpha are those of the linear layers where nothing else is given.
    Locon,
    /// The element-wise product of two such products (Hyeon-Woo et al. 2022, arXiv:2108.06098).
    Loha,
    /// The Kronecker product of a small matrix and a product of two (Edalati et al. 2022, arXiv:2212.10650).
    Lokr,
    /// One factor for each output, or input, of a layer (Liu et al. 2022, arXiv:2205.05638).
    Ia3,
}

impl NetworkKind {
    /// LyCORIS' word for it.
    pub fn algo(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Locon => "locon",
            Self::Loha => "loha",
            Self::Lokr => "lokr",
            Self::Ia3 => "ia3",
        }
    }
}

/// Which layers get adapters: LyCORIS' presets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Attention blocks, residual blocks, up- and downsampling; in Stable Diffusion 1 and 2 also `conv_in`, `conv_out`
    /// and the time embedding.
    Full,
    /// The same without 3×3 convolutions.
    FullLin,
    /// Attention blocks of the UNet, and the text encoders.
    AttnMlp,
    /// Queries, keys, values and outputs of attention alone.
    AttnOnly,
    /// As `full`, without the text encoders.
    UnetOnly,
    /// Attention blocks of the UNet alone.
    UnetTransformerOnly,
    /// Residual blocks, up- and downsampling, `conv_in` and `conv_out`.
    UnetConvblockOnly,
    /// Keys, values and the last layer of each feed-forward part.
    Ia3,
}

impl Preset {
    /// LyCORIS' word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::FullLin => "full-lin",
            Self::AttnMlp => "attn-mlp",
            Self::AttnOnly => "attn-only",
            Self::UnetOnly => "unet-only",
            Self::UnetTransformerOnly => "unet-transformer-only",
            Self::UnetConvblockOnly => "unet-convblock-only",
            Self::Ia3 => "ia3",
        }
    }

    /// Whether 3×3 convolutions are among the layers.
    pub fn has_convolutions(self) -> bool {
        matches!(self, Self::Full | Self::UnetOnly | Self::UnetConvblockOnly)
    }
}

/// Sizes, strengths and places of the adapters.
///
/// The strength of an adapter is `alpha / rank`, as in sd-scripts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSettings {
    /// What the adapters are.
    #[serde(skip_serializing_if = "is_default")]
    pub kind: NetworkKind,
    /// Rank of the adapters of linear layers and 1×1 convolutions, 1 to 1024; not of `ia3`.
    pub rank: usize,
    /// Numerator of their strength; 0 means "equal to the rank".
    pub alpha: f64,
    /// Rank of the adapters of 3×3 convolutions; see [`Self::conv`] for what is without.
    pub conv_rank: Option<usize>,
    /// Numerator of their strength.
    pub conv_alpha: Option<f64>,
    /// Which layers get adapters; see [`Self::preset`] for what is without.
    #[serde(skip_serializing_if = "is_default")]
    pub preset: Option<Preset>,
    /// Whether each adapted weight has its length trained by itself (DoRA; Liu et al. 2024, arXiv:2402.09353).
    #[serde(skip_serializing_if = "is_default")]
    pub dora: bool,
    /// Whether adapters of 3×3 convolutions have a small core for the kernel, and matrices for the channels.
    #[serde(skip_serializing_if = "is_default")]
    pub tucker: bool,
    /// Of `lokr`: the size that one side of the small matrix is to have; as large as the other's without.
    #[serde(skip_serializing_if = "is_default")]
    pub factor: Option<usize>,
    /// Of `lokr`: whether the small matrix is a product of two as well, where that makes it smaller.
    #[serde(skip_serializing_if = "is_default")]
    pub decompose_both: bool,
    /// Of `lokr`: whether neither is.
    #[serde(skip_serializing_if = "is_default")]
    pub full_matrix: bool,
    /// What is left out in training.
    #[serde(skip_serializing_if = "is_default")]
    pub dropout: DropoutSettings,
    /// Largest norm of what an adapter adds to its weight; longer ones are scaled down after each step.
    #[serde(skip_serializing_if = "is_default")]
    pub scale_weight_norms: Option<f64>,
    /// Sizes and learning rates by the UNet's blocks.
    #[serde(skip_serializing_if = "is_default")]
    pub blocks: BlockSettings,
    /// Learning rates of `lora_up` relative to `lora_down` (LoRA+; Hayou et al. 2024, arXiv:2402.12354).
    #[serde(skip_serializing_if = "is_default")]
    pub lora_plus: LoraPlus,
    /// Patterns of which a layer has to match one.
    #[serde(skip_serializing_if = "is_default")]
    pub include: Vec<String>,
    /// Patterns of which a layer may match none.
    #[serde(skip_serializing_if = "is_default")]
    pub exclude: Vec<String>,
    /// The adapters to begin with.
    #[serde(skip_serializing_if = "is_default")]
    pub init_from: Option<InitFrom>,
}

/// The chance of each part to be left out in a training step, as in sd-scripts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DropoutSettings {
    /// Of each number between the two matrices of a LoRA; the others are scaled up.
    pub neuron: f64,
    /// Of each rank of a LoRA, for each sample; the others are scaled up. With the other kinds, of each output.
    pub rank: f64,
    /// Of each adapter.
    pub module: f64,
}

/// What differs between the UNet's blocks, by sd-scripts' numbers of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlockSettings {
    /// Rank in each block, 0 for none.
    pub dims: Option<Vec<usize>>,
    /// Alpha in each block.
    pub alphas: Option<Vec<f64>>,
    /// Rank of 3×3 convolutions in each block, 0 for none.
    pub conv_dims: Option<Vec<usize>>,
    /// Alpha of 3×3 convolutions in each block.
    pub conv_alphas: Option<Vec<f64>>,
    /// Factors of the learning rate on the way down: numbers with commas between them, or a curve.
    pub down_lr_weight: Option<String>,
    /// In the middle.
    pub mid_lr_weight: Option<String>,
    /// On the way up.
    pub up_lr_weight: Option<String>,
    /// Factors up to this are 0: such a block has no adapters.
    pub lr_zero_threshold: f64,
}

/// Factors of the learning rate of `lora_up`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraPlus {
    /// Everywhere.
    pub ratio: Option<f64>,
    /// In the UNet.
    pub unet_ratio: Option<f64>,
    /// In the text encoders.
    pub text_encoder_ratio: Option<f64>,
}

impl LoraPlus {
    /// That of a half of the model; 1 where none is given.
    pub fn of(&self, text: bool) -> f64 {
        let own = if text {
            self.text_encoder_ratio
        } else {
            self.unet_ratio
        };
        own.or(self.ratio).unwrap_or(1.0)
    }
}

/// A LoRA file whose adapters are trained further.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InitFrom {
    /// Id of a LoRA of this service.
    pub lora_id: Option<String>,
    /// Or the name of a file in the folder `lora` of the model folder.
    pub file: Option<String>,
    /// Whether kind, ranks and alphas are those of the file; they have to be those of the settings otherwise.
    pub dim_from_weights: bool,
    /// Digest of the file, fixed when the run was made.
    pub sha256: Option<String>,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            kind: NetworkKind::Lora,
            rank: 16,
            alpha: 16.0,
            conv_rank: None,
            conv_alpha: None,
            preset: None,
            dora: false,
            tucker: false,
            factor: None,
            decompose_both: false,
            full_matrix: false,
            dropout: DropoutSettings::default(),
            scale_weight_norms: None,
            blocks: BlockSettings::default(),
            lora_plus: LoraPlus::default(),
            include: Vec::new(),
            exclude: Vec::new(),
            init_from: None,
        }
    }
}

impl NetworkSettings {
    /// The preset that decides which layers get adapters. `None` is sd-scripts' rule: the attention blocks and the text
    /// encoders and, where [`Self::conv`] gives a rank, the residual blocks with up- and downsampling.
    pub fn preset(&self) -> Option<Preset> {
        self.preset.or(match self.kind {
            NetworkKind::Lora | NetworkKind::Locon => None,
            NetworkKind::Loha | NetworkKind::Lokr => Some(Preset::Full),
            NetworkKind::Ia3 => Some(Preset::Ia3),
        })
    }

    /// Rank and alpha of the 3×3 convolutions, if they are covered.
    ///
    /// With `lora` they are where `conv_rank` is given, with alpha 1, as in sd-scripts; everywhere else the linear layers'
    /// own rank and alpha take the place of what is not given, as in LyCORIS.
    pub fn conv(&self) -> Option<(usize, f64)> {
        let always = match self.preset() {
            Some(preset) if !preset.has_convolutions() => return None,
            Some(_) => true,
            None => self.kind == NetworkKind::Locon,
        };
        if always {
            let rank = self.conv_rank.unwrap_or(self.rank);
            return Some((rank, self.conv_alpha.unwrap_or(self.alpha)));
        }
        self.conv_rank
            .map(|rank| (rank, self.conv_alpha.unwrap_or(1.0)))
    }

    /// Whether files are those of sd-scripts' own `networks.lora`, and dropout is its.
    pub fn is_plain_lora(&self) -> bool {
        matches!(self.kind, NetworkKind::Lora | NetworkKind::Locon)
            && !self.dora
            && !self.tucker
            && self.preset.is_none()
    }
}

/// Which halves of the model get adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainParts {
    /// Adapters in the UNet.
    pub unet: bool,
    /// Adapters in the text encoder.
    pub text_encoder: bool,
}

/// Number format of a saved LoRA file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SavePrecision {
    /// As trained.
    #[default]
    Fp32,
    /// IEEE half precision: half the size, what most programs load.
    Fp16,
    /// bfloat16.
    Bf16,
}

/// Settings that are as they always were are not written down: digests of older runs stay what they are.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
