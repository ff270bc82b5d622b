//! Sizes of the models: read from diffusers' `config.json`, or inferred from the shapes of a single file's tensors.
//!
//! What shapes cannot tell (attention heads, norm groups, epsilons, activation) comes from [`Hints`]: the values that
//! the family was published with.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::LoadError;
use super::layers::Activation;
use super::ldm::UNetLayout;
use super::weights::WeightsAt;

/// Configuration files are a few kilobytes; anything larger is not one.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// How many attention heads a block of the UNet has.
#[derive(Clone, Copy, Debug)]
pub enum HeadRule {
    /// The same number everywhere.
    Count(usize),
    /// As many as this width goes into the block's channels.
    Width(usize),
}

impl HeadRule {
    fn of(self, channels: &[usize]) -> PerBlock {
        match self {
            Self::Count(count) => PerBlock::All(count),
            Self::Width(width) => {
                let heads = channels.iter().map(|channels| (channels / width).max(1));
                PerBlock::Each(heads.collect())
            }
        }
    }
}

/// What tensor shapes cannot tell.
#[derive(Clone, Debug)]
pub struct Hints {
    /// Attention heads of the UNet.
    pub unet_heads: HeadRule,
    /// Groups of all group norms.
    pub norm_groups: usize,
    /// Width of an attention head of the text encoder.
    pub text_head_width: usize,
    /// Activation of the text encoder's MLP.
    pub text_activation: &'static str,
    /// Latents are multiplied by this before the UNet sees them.
    pub vae_scaling_factor: f64,
    /// Sinusoids for each of the six sizes that SDXL is told.
    pub size_embedding_width: usize,
}

impl Hints {
    /// Stable Diffusion 1.x.
    pub const SD1: Self = Self {
        unet_heads: HeadRule::Count(8),
        norm_groups: 32,
        text_head_width: 64,
        text_activation: "quick_gelu",
        vae_scaling_factor: 0.18215,
        size_embedding_width: 256,
    };

    /// Stable Diffusion 2.x.
    pub const SD2: Self = Self {
        unet_heads: HeadRule::Width(64),
        text_activation: "gelu",
        ..Self::SD1
    };

    /// Stable Diffusion XL with its first text encoder.
    pub const SDXL: Self = Self {
        unet_heads: HeadRule::Width(64),
        vae_scaling_factor: 0.13025,
        ..Self::SD1
    };

    /// The second text encoder of Stable Diffusion XL.
    pub const SDXL_SECOND: Self = Self {
        text_activation: "gelu",
        ..Self::SDXL
    };
}

/// A value for all blocks, or one for each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum PerBlock {
    /// The same everywhere.
    All(usize),
    /// In the order of the down blocks.
    Each(Vec<usize>),
}

impl PerBlock {
    fn expand(&self, blocks: usize) -> Option<Vec<usize>> {
        match self {
            Self::All(value) => Some(vec![*value; blocks]),
            Self::Each(values) if values.len() == blocks => Some(values.clone()),
            Self::Each(_) => None,
        }
    }
}

/// `UNet2DConditionModel`'s configuration, as far as Stable Diffusion uses it.
#[derive(Clone, Debug, Deserialize)]
pub struct UNetConfig {
    /// Channels of the latent.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Channels of each down block.
    pub block_out_channels: Vec<usize>,
    /// Kind of each down block.
    pub down_block_types: Vec<String>,
    /// Kind of each up block.
    pub up_block_types: Vec<String>,
    /// Residual blocks of each down block; up blocks have one more.
    pub layers_per_block: usize,
    /// Width of the text states.
    pub cross_attention_dim: usize,
    /// Number of attention heads. diffusers kept the misleading name for compatibility.
    attention_head_dim: PerBlock,
    num_attention_heads: Option<PerBlock>,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// Epsilon of the group norms in residual blocks.
    #[serde(default = "unet_norm_eps")]
    pub norm_eps: f64,
    /// Whether the projections around a transformer are linear layers instead of 1x1 convolutions.
    #[serde(default)]
    pub use_linear_projection: bool,
    /// Whether cosines come first in the timestep embedding.
    #[serde(default = "yes")]
    pub flip_sin_to_cos: bool,
    /// Shift of the timestep embedding's frequencies.
    #[serde(default)]
    pub freq_shift: f64,
    /// `text_time` in SDXL, whose UNet is told pooled text and sizes.
    addition_embed_type: Option<String>,
    addition_time_embed_dim: Option<usize>,
    /// What unCLIP models and upscalers have.
    class_embed_type: Option<String>,
}

fn unet_norm_eps() -> f64 {
    1e-5
}

fn yes() -> bool {
    true
}

const TEXT_TIME: &str = "text_time";
const CROSS_DOWN: &str = "CrossAttnDownBlock2D";
const PLAIN_DOWN: &str = "DownBlock2D";
const CROSS_UP: &str = "CrossAttnUpBlock2D";
const PLAIN_UP: &str = "UpBlock2D";

impl UNetConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// When the file is unreadable or describes something that is not built here.
    pub fn from_json(path: &Path) -> Result<Self, LoadError> {
        let config: Self = read_json(path)?;
        config
            .check()
            .map_err(|reason| LoadError::config(path, reason))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let blocks = self.block_out_channels.len();
        if blocks == 0 || blocks > 16 {
            return Err(format!(
                "`block_out_channels` has {blocks} entries, expected 1 to 16"
            ));
        }
        for (name, types, known) in [
            (
                "down_block_types",
                &self.down_block_types,
                [CROSS_DOWN, PLAIN_DOWN],
            ),
            ("up_block_types", &self.up_block_types, [CROSS_UP, PLAIN_UP]),
        ] {
            if types.len() != blocks {
                return Err(format!(
                    "`{name}` has {} entries, `block_out_channels` {blocks}",
                    types.len()
                ));
            }
            if let Some(other) = types.iter().find(|kind| !known.contains(&kind.as_str())) {
                return Err(format!("`{name}` has `{other}`, expected one of {known:?}"));
            }
        }
        if self.heads_of_blocks().is_none() {
            return Err(format!(
                "`attention_head_dim` must be a number or {blocks} numbers"
            ));
        }
        if !(1..=64).contains(&self.layers_per_block) {
            return Err(format!(
                "`layers_per_block` is {}, expected 1 to 64",
                self.layers_per_block
            ));
        }
        self.check_additions()
    }

    fn check_additions(&self) -> Result<(), String> {
        if let Some(kind) = &self.class_embed_type {
            return Err(format!(
                "`class_embed_type` is `{kind}` (an unCLIP model or an upscaler?), expected a text-to-image model"
            ));
        }
        match (&self.addition_embed_type, self.addition_time_embed_dim) {
            (None, _) => Ok(()),
            (Some(kind), Some(width)) if kind == TEXT_TIME && (2..=4096).contains(&width) => Ok(()),
            (Some(kind), width) => Err(format!(
                "`addition_embed_type` is `{kind}` with `addition_time_embed_dim` {width:?}, expected `{TEXT_TIME}` \
                 with a width from 2 to 4096"
            )),
        }
    }

    /// Sinusoids for each of the sizes that the UNet is told; `None` where it is told none.
    pub fn size_embedding_width(&self) -> Option<usize> {
        self.addition_embed_type.as_ref()?;
        self.addition_time_embed_dim
    }

    fn heads_of_blocks(&self) -> Option<Vec<usize>> {
        self.num_attention_heads
            .as_ref()
            .unwrap_or(&self.attention_head_dim)
            .expand(self.block_out_channels.len())
            .filter(|heads| heads.iter().all(|count| *count > 0))
    }

    /// Attention heads of each down block.
    pub fn heads(&self) -> Vec<usize> {
        self.heads_of_blocks().unwrap_or_default()
    }

    /// Whether down block `index` attends to the text.
    pub fn down_attends(&self, index: usize) -> bool {
        self.down_block_types[index] == CROSS_DOWN
    }

    /// Whether up block `index` attends to the text.
    pub fn up_attends(&self, index: usize) -> bool {
        self.up_block_types[index] == CROSS_UP
    }

    /// How its blocks follow each other.
    pub fn layout(&self) -> UNetLayout {
        let blocks = self.up_block_types.len();
        UNetLayout {
            layers_per_block: self.layers_per_block,
            up_attends: (0..blocks).map(|index| self.up_attends(index)).collect(),
        }
    }

    /// Infers the sizes from the tensors of a UNet seen under diffusers names.
    ///
    /// # Errors
    /// When the tensors that tell a size are missing.
    pub fn infer(weights: &WeightsAt<'_>, hints: &Hints) -> Result<Self, LoadError> {
        let conv_in = weights.shape("conv_in.weight")?;
        let blocks =
            count(|index| weights.has(&format!("down_blocks.{index}.resnets.0.conv1.weight")));
        let layers_per_block =
            count(|index| weights.has(&format!("down_blocks.0.resnets.{index}.conv1.weight")));
        let mut block_out_channels = Vec::with_capacity(blocks);
        for index in 0..blocks {
            let shape = weights.shape(&format!("down_blocks.{index}.resnets.0.conv1.weight"))?;
            block_out_channels.push(first(&shape));
        }
        let attends = |side: &str, index: usize| {
            weights.has(&format!("{side}_blocks.{index}.attentions.0.norm.weight"))
        };
        let kinds = |side: &str, cross: &str, plain: &str| -> Vec<String> {
            (0..blocks)
                .map(|index| if attends(side, index) { cross } else { plain }.to_owned())
                .collect()
        };
        let added = weights.has("add_embedding.linear_1.weight");
        let mid = "mid_block.attentions.0";
        let context = weights.shape(&format!("{mid}.transformer_blocks.0.attn2.to_k.weight"))?;
        let projection = weights.shape(&format!("{mid}.proj_in.weight"))?;
        let config = Self {
            in_channels: conv_in.get(1).copied().unwrap_or(0),
            out_channels: first(&weights.shape("conv_out.weight")?),
            down_block_types: kinds("down", CROSS_DOWN, PLAIN_DOWN),
            up_block_types: kinds("up", CROSS_UP, PLAIN_UP),
            attention_head_dim: hints.unet_heads.of(&block_out_channels),
            block_out_channels,
            layers_per_block,
            cross_attention_dim: context.get(1).copied().unwrap_or(0),
            num_attention_heads: None,
            norm_num_groups: hints.norm_groups,
            norm_eps: unet_norm_eps(),
            use_linear_projection: projection.len() == 2,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            addition_embed_type: added.then(|| TEXT_TIME.to_owned()),
            addition_time_embed_dim: added.then_some(hints.size_embedding_width),
            class_embed_type: None,
        };
        config
            .check()
            .map_err(|reason| LoadError::config(Path::new(weights.path()), reason))?;
        Ok(config)
    }
}

/// `AutoencoderKL`'s configuration.
#[derive(Clone, Debug, Deserialize)]
pub struct VaeConfig {
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Channels of each level; all but the last halve the picture.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// Latents are multiplied by this before the UNet sees them.
    #[serde(default = "sd1_scaling")]
    pub scaling_factor: f64,
}

fn sd1_scaling() -> f64 {
    Hints::SD1.vae_scaling_factor
}

impl VaeConfig {
    /// Pixels of a picture's side for each element of its latent's: 8 for Stable Diffusion.
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// When the file is unreadable or a size is senseless.
    pub fn from_json(path: &Path) -> Result<Self, LoadError> {
        let config: Self = read_json(path)?;
        config
            .check()
            .map_err(|reason| LoadError::config(path, reason))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let levels = self.block_out_channels.len();
        if !(1..=8).contains(&levels) {
            return Err(format!(
                "`block_out_channels` has {levels} entries, expected 1 to 8"
            ));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return Err(format!(
                "`scaling_factor` is {}, expected a number above 0",
                self.scaling_factor
            ));
        }
        Ok(())
    }

    /// Infers the sizes from the tensors of a VAE seen under diffusers names.
    ///
    /// # Errors
    /// When the tensors that tell a size are missing.
    pub fn infer(weights: &WeightsAt<'_>, hints: &Hints) -> Result<Self, LoadError> {
        let resnet = |level: usize, index: usize| {
            format!("encoder.down_blocks.{level}.resnets.{index}.conv1.weight")
        };
        let levels = count(|level| weights.has(&resnet(level, 0)));
        let mut block_out_channels = Vec::with_capacity(levels);
        for level in 0..levels {
            block_out_channels.push(first(&weights.shape(&resnet(level, 0))?));
        }
        let latent = weights.shape("post_quant_conv.weight")?;
        let config = Self {
            latent_channels: first(&latent),
            block_out_channels,
            layers_per_block: count(|index| weights.has(&resnet(0, index))),
            norm_num_groups: hints.norm_groups,
            scaling_factor: hints.vae_scaling_factor,
        };
        config
            .check()
            .map_err(|reason| LoadError::config(Path::new(weights.path()), reason))?;
        Ok(config)
    }
}

/// `CLIPTextModel`'s configuration.
#[derive(Clone, Debug, Deserialize)]
pub struct TextEncoderConfig {
    /// Ids that have an embedding.
    pub vocab_size: usize,
    /// Width of a state.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Longest row of tokens.
    #[serde(default = "clip_positions")]
    pub max_position_embeddings: usize,
    /// `quick_gelu` or `gelu`.
    #[serde(default = "clip_activation")]
    pub hidden_act: String,
    /// Epsilon of the layer norms.
    #[serde(default = "clip_norm_eps")]
    pub layer_norm_eps: f64,
}

fn clip_positions() -> usize {
    77
}

fn clip_activation() -> String {
    "quick_gelu".to_owned()
}

fn clip_norm_eps() -> f64 {
    1e-5
}

impl TextEncoderConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// When the file is unreadable or a value is not one that is built here.
    pub fn from_json(path: &Path) -> Result<Self, LoadError> {
        let config: Self = read_json(path)?;
        config
            .check()
            .map_err(|reason| LoadError::config(path, reason))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !matches!(self.hidden_act.as_str(), "quick_gelu" | "gelu") {
            return Err(format!(
                "`hidden_act` is `{}`, expected `quick_gelu` or `gelu`",
                self.hidden_act
            ));
        }
        if self.num_attention_heads == 0
            || !self.hidden_size.is_multiple_of(self.num_attention_heads)
        {
            return Err(format!(
                "`num_attention_heads` is {}, which does not divide `hidden_size` {}",
                self.num_attention_heads, self.hidden_size
            ));
        }
        Ok(())
    }

    /// The MLP's activation.
    pub fn activation(&self) -> Activation {
        if self.hidden_act == "gelu" {
            Activation::Gelu
        } else {
            Activation::QuickGelu
        }
    }

    /// Infers the sizes from the tensors of a text encoder seen under transformers' names.
    ///
    /// # Errors
    /// When the tensors that tell a size are missing.
    pub fn infer(weights: &WeightsAt<'_>, hints: &Hints) -> Result<Self, LoadError> {
        let tokens = weights.shape("text_model.embeddings.token_embedding.weight")?;
        let positions = weights.shape("text_model.embeddings.position_embedding.weight")?;
        let fc1 = weights.shape("text_model.encoder.layers.0.mlp.fc1.weight")?;
        let hidden_size = tokens.get(1).copied().unwrap_or(0);
        let config = Self {
            vocab_size: first(&tokens),
            hidden_size,
            intermediate_size: first(&fc1),
            num_hidden_layers: count(|index| {
                weights.has(&format!("text_model.encoder.layers.{index}.mlp.fc1.weight"))
            }),
            num_attention_heads: (hidden_size / hints.text_head_width).max(1),
            max_position_embeddings: first(&positions),
            hidden_act: hints.text_activation.to_owned(),
            layer_norm_eps: clip_norm_eps(),
        };
        config
            .check()
            .map_err(|reason| LoadError::config(Path::new(weights.path()), reason))?;
        Ok(config)
    }
}

/// How many of 0, 1, 2, … are there.
fn count(exists: impl Fn(usize) -> bool) -> usize {
    (0..).take_while(|index| exists(*index)).count()
}

fn first(shape: &[usize]) -> usize {
    shape.first().copied().unwrap_or(0)
}

/// Reads a small JSON file; names it in errors.
///
/// # Errors
/// When it is missing, too large, or not of the expected form.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, LoadError> {
    let size = std::fs::metadata(path)
        .map_err(|error| LoadError::io(path, error))?
        .len();
    if size > MAX_CONFIG_BYTES {
        return Err(LoadError::config(
            path,
            format!("is {size} bytes, expected at most {MAX_CONFIG_BYTES}"),
        ));
    }
    let text = std::fs::read(path).map_err(|error| LoadError::io(path, error))?;
    serde_json::from_slice(&text).map_err(|error| LoadError::config(path, error.to_string()))
}
