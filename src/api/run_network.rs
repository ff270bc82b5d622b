//! The adapters of a run on the wire, and their way to the domain.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::twins::same_variants;
use crate::runs::settings::{
    self as domain, BlockSettings, DropoutSettings, LoraPlus, NetworkSettings,
};

/// What is trained: kind, size and places of the adapters. Fields are named as sd-scripts and LyCORIS name theirs; files
/// are written as those write them.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(example = json!({
    "kind": "locon", "rank": 16, "alpha": 8.0, "conv_rank": 8, "conv_alpha": 4.0, "dora": true, "rank_dropout": 0.1
}))]
pub struct Network {
    /// What the adapters are.
    pub kind: NetworkKind,
    /// Rank of linear layers and 1×1 convolutions; `ia3` has none.
    #[schema(minimum = 1, maximum = 1024)]
    pub rank: usize,
    /// Their strength is alpha / rank; 0 means "as the rank".
    #[schema(minimum = 0)]
    pub alpha: f64,
    /// Rank of 3×3 convolutions. With `lora` they have no adapters without it; with other kinds and presets that have
    /// convolutions it is `rank` when absent.
    #[schema(minimum = 1, maximum = 1024)]
    pub conv_rank: Option<usize>,
    /// Alpha of 3×3 convolutions. With `lora` it is 1 when only `conv_rank` is given, as in sd-scripts; otherwise `alpha`
    /// when absent, as in LyCORIS.
    #[schema(minimum = 0)]
    pub conv_alpha: Option<f64>,
    /// Which layers get adapters. When absent: with `lora` and `locon` those of sd-scripts (attention blocks and text
    /// encoders; with `conv_rank`, or `locon`, residual blocks with up- and downsampling, too), with `loha` and `lokr`
    /// `full`, with `ia3` `ia3`.
    pub preset: Option<NetworkPreset>,
    /// Whether the length of each row of an adapted weight is trained by itself (DoRA, `dora_wd` of LyCORIS); not of `ia3`.
    pub dora: bool,
    /// Whether adapters of 3×3 convolutions have a small core for the kernel (`use_tucker` of LyCORIS).
    pub tucker: bool,
    /// Of `lokr`: the size of one side of the small matrix, where it divides the layer's. When absent, both matrices are
    /// as near to squares as they can be.
    #[schema(minimum = 2, maximum = 1024)]
    pub factor: Option<usize>,
    /// Of `lokr`: whether the small matrix is a product of two, too, where that makes it smaller.
    pub decompose_both: bool,
    /// Of `lokr`: whether neither matrix is a product; `rank` and `alpha` then mean nothing.
    pub full_matrix: bool,
    /// Chance of each number between the matrices of `lora` and `locon` to be left out in a training step; not with `dora`.
    #[schema(minimum = 0, exclusive_maximum = 1)]
    pub dropout: f64,
    /// Chance of each rank to be left out, for each sample; with `dora` and other kinds of each output, as in LyCORIS. Not of
    /// `ia3`.
    #[schema(minimum = 0, exclusive_maximum = 1)]
    pub rank_dropout: f64,
    /// Chance of each adapter to be left out in a training step.
    #[schema(minimum = 0, exclusive_maximum = 1)]
    pub module_dropout: f64,
    /// After each step adapters are scaled down whose change of their weight is longer than this (Frobenius norm); off when
    /// absent. 1 is a usual value. Not of `ia3`.
    #[schema(exclusive_minimum = 0)]
    pub scale_weight_norms: Option<f64>,
    /// Rank in each block of the UNet, 0 for none, by sd-scripts' numbers: 25 for Stable Diffusion 1 and 2 (12 down, 1
    /// middle, 12 up; the first is unused by sd-scripts' own layers), 23 for SDXL. Text encoders have `rank`.
    #[schema(min_items = 23, max_items = 25)]
    pub block_dims: Option<Vec<usize>>,
    /// Alpha in each block; `alpha` when absent.
    #[schema(min_items = 23, max_items = 25)]
    pub block_alphas: Option<Vec<f64>>,
    /// Rank of 3×3 convolutions in each block, 0 for none.
    #[schema(min_items = 23, max_items = 25)]
    pub conv_block_dims: Option<Vec<usize>>,
    /// Alpha of 3×3 convolutions in each block.
    #[schema(min_items = 23, max_items = 25)]
    pub conv_block_alphas: Option<Vec<f64>>,
    /// Factors of `unet_lr` on the way down: up to 12 (SDXL 9) numbers with commas between them, where a missing one is 0
    /// and those behind the last are 1, or one of the curves `cosine`, `sine`, `linear`, `reverse_linear` and `zeros`, also
    /// with `+` and a number that is added. All are 1 when absent.
    #[schema(max_length = 256)]
    pub down_lr_weight: Option<String>,
    /// The same in the middle: 1 (SDXL 3) numbers.
    #[schema(max_length = 256)]
    pub mid_lr_weight: Option<String>,
    /// The same on the way up: up to 12 (SDXL 9) numbers.
    #[schema(max_length = 256)]
    pub up_lr_weight: Option<String>,
    /// Factors up to this are 0. A block whose factor is 0 has no adapters.
    #[schema(minimum = 0, maximum = 10000)]
    pub block_lr_zero_threshold: f64,
    /// Learning rate of `lora_up`, relative to that of the other matrix (LoRA+); of `lora` and `locon`. 1 when absent.
    #[schema(minimum = 0, maximum = 10000)]
    pub loraplus_lr_ratio: Option<f64>,
    /// The same in the UNet; `loraplus_lr_ratio` when absent.
    #[schema(minimum = 0, maximum = 10000)]
    pub loraplus_unet_lr_ratio: Option<f64>,
    /// The same in the text encoders; `loraplus_lr_ratio` when absent.
    #[schema(minimum = 0, maximum = 10000)]
    pub loraplus_text_encoder_lr_ratio: Option<f64>,
    /// Regular expressions, of which one has to match somewhere in an adapter's name in files
    /// (`lora_unet_mid_block_attentions_0_proj_in`) or in its layer's path (`mid_block.attentions.0.proj_in`). All layers
    /// when empty. A pattern that matches no layer is refused.
    #[schema(max_items = 64)]
    pub include: Vec<String>,
    /// Regular expressions, of which none may match.
    #[schema(max_items = 64)]
    pub exclude: Vec<String>,
    /// Adapters to begin with, instead of new ones.
    pub init_from: Option<InitFrom>,
}

/// A LoRA file that a run begins with. It has adapters of the run's kind, ranks and alphas on all layers that the run
/// trains, unless `dim_from_weights` lets the file decide.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(example = json!({"lora_id": "019a9c1e-7b5e-7c30-a4b2-3d1f2f6f0a11", "dim_from_weights": true}))]
pub struct InitFrom {
    /// A LoRA file of this service.
    pub lora_id: Option<Uuid>,
    /// Or the name of a `.safetensors` file in the folder `lora` of the model folder.
    #[schema(min_length = 1, max_length = 255)]
    pub file: Option<String>,
    /// Whether the file decides kind, ranks and alphas, and which layers have adapters.
    pub dim_from_weights: bool,
    /// Digest of the file. A run shows which file it was made with; given, another one is refused.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    pub sha256: Option<String>,
}

/// Kinds of adapters.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// Two narrow matrices, as sd-scripts' `networks.lora`; on convolutions too when `conv_rank` is given.
    #[default]
    Lora,
    /// The same, on convolutions in any case.
    Locon,
    /// The element-wise product of two such products.
    Loha,
    /// The Kronecker product of a small matrix and a product of two.
    Lokr,
    /// One factor for each output, or input, of a layer.
    Ia3,
}

/// LyCORIS' presets of layers.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkPreset {
    /// Attention blocks, residual blocks, up- and downsampling, text encoders; in Stable Diffusion 1 and 2 also `conv_in`,
    /// `conv_out` and the time embedding.
    Full,
    /// The same without 3×3 convolutions, up- and downsampling.
    FullLin,
    /// Attention blocks of the UNet, and text encoders.
    AttnMlp,
    /// Queries, keys, values and outputs of attention, also in text encoders.
    AttnOnly,
    /// As `full`, without text encoders.
    UnetOnly,
    /// Attention blocks of the UNet.
    UnetTransformerOnly,
    /// Residual blocks, up- and downsampling; in Stable Diffusion 1 and 2 also `conv_in` and `conv_out`.
    UnetConvblockOnly,
    /// Keys, values and the last layer of each feed-forward part, also in text encoders.
    Ia3,
}

same_variants!(NetworkKind, domain::NetworkKind: Lora, Locon, Loha, Lokr, Ia3);
same_variants!(
    NetworkPreset, domain::Preset:
    Full, FullLin, AttnMlp, AttnOnly, UnetOnly, UnetTransformerOnly, UnetConvblockOnly, Ia3
);

impl Default for Network {
    fn default() -> Self {
        NetworkSettings::default().into()
    }
}

impl From<Network> for NetworkSettings {
    fn from(wire: Network) -> Self {
        Self {
            kind: wire.kind.into(),
            rank: wire.rank,
            alpha: wire.alpha,
            conv_rank: wire.conv_rank,
            conv_alpha: wire.conv_alpha,
            preset: wire.preset.map(Into::into),
            dora: wire.dora,
            tucker: wire.tucker,
            factor: wire.factor,
            decompose_both: wire.decompose_both,
            full_matrix: wire.full_matrix,
            dropout: DropoutSettings {
                neuron: wire.dropout,
                rank: wire.rank_dropout,
                module: wire.module_dropout,
            },
            scale_weight_norms: wire.scale_weight_norms,
            blocks: BlockSettings {
                dims: wire.block_dims,
                alphas: wire.block_alphas,
                conv_dims: wire.conv_block_dims,
                conv_alphas: wire.conv_block_alphas,
                down_lr_weight: wire.down_lr_weight,
                mid_lr_weight: wire.mid_lr_weight,
                up_lr_weight: wire.up_lr_weight,
                lr_zero_threshold: wire.block_lr_zero_threshold,
            },
            lora_plus: LoraPlus {
                ratio: wire.loraplus_lr_ratio,
                unet_ratio: wire.loraplus_unet_lr_ratio,
                text_encoder_ratio: wire.loraplus_text_encoder_lr_ratio,
            },
            include: wire.include,
            exclude: wire.exclude,
            init_from: wire.init_from.map(Into::into),
        }
    }
}

impl From<NetworkSettings> for Network {
    fn from(domain: NetworkSettings) -> Self {
        let NetworkSettings {
            kind,
            rank,
            alpha,
            conv_rank,
            conv_alpha,
            preset,
            dora,
            tucker,
            factor,
            decompose_both,
            full_matrix,
            dropout,
            scale_weight_norms,
            blocks,
            lora_plus,
            include,
            exclude,
            init_from,
        } = domain;
        Self {
            kind: kind.into(),
            rank,
            alpha,
            conv_rank,
            conv_alpha,
            preset: preset.map(Into::into),
            dora,
            tucker,
            factor,
            decompose_both,
            full_matrix,
            dropout: dropout.neuron,
            rank_dropout: dropout.rank,
            module_dropout: dropout.module,
            scale_weight_norms,
            block_dims: blocks.dims,
            block_alphas: blocks.alphas,
            conv_block_dims: blocks.conv_dims,
            conv_block_alphas: blocks.conv_alphas,
            down_lr_weight: blocks.down_lr_weight,
            mid_lr_weight: blocks.mid_lr_weight,
            up_lr_weight: blocks.up_lr_weight,
            block_lr_zero_threshold: blocks.lr_zero_threshold,
            loraplus_lr_ratio: lora_plus.ratio,
            loraplus_unet_lr_ratio: lora_plus.unet_ratio,
            loraplus_text_encoder_lr_ratio: lora_plus.text_encoder_ratio,
            include,
            exclude,
            init_from: init_from.map(Into::into),
        }
    }
}

impl From<InitFrom> for domain::InitFrom {
    fn from(wire: InitFrom) -> Self {
        Self {
            lora_id: wire.lora_id.map(|id| id.to_string()),
            file: wire.file,
            dim_from_weights: wire.dim_from_weights,
            sha256: wire.sha256,
        }
    }
}

impl From<domain::InitFrom> for InitFrom {
    fn from(domain: domain::InitFrom) -> Self {
        Self {
            lora_id: domain.lora_id.and_then(|id| id.parse().ok()),
            file: domain.file,
            dim_from_weights: domain.dim_from_weights,
            sha256: domain.sha256,
        }
    }
}
