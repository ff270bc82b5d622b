//! Which layers of a model get an adapter, and what the adapter is called: sd-scripts' rules.
//!
//! The rules see only paths and shapes, never weights, so that they can be checked for models of any size.

use crate::diffusion::ldm::UNetLayout;
use crate::diffusion::{Family, Part, StableDiffusion};
use crate::networks::settings::NetworkSettings;

/// Kind and size of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerShape {
    /// `y = x W^T + b`
    Linear {
        /// Features in.
        d_in: usize,
        /// Features out.
        d_out: usize,
    },
    /// A 2-D convolution.
    Conv {
        /// Channels in.
        c_in: usize,
        /// Channels out.
        c_out: usize,
        /// Height and width of the kernel.
        kernel: [usize; 2],
    },
}

impl LayerShape {
    /// Shape of the `lora_down` weight: `[rank, in]` or `[rank, in, kh, kw]`.
    pub fn down_shape(&self, rank: usize) -> Vec<usize> {
        match *self {
            Self::Linear { d_in, .. } => vec![rank, d_in],
            Self::Conv { c_in, kernel, .. } => vec![rank, c_in, kernel[0], kernel[1]],
        }
    }

    /// Shape of the `lora_up` weight: `[out, rank]` or `[out, rank, 1, 1]`.
    pub fn up_shape(&self, rank: usize) -> Vec<usize> {
        match *self {
            Self::Linear { d_out, .. } => vec![d_out, rank],
            Self::Conv { c_out, .. } => vec![c_out, rank, 1, 1],
        }
    }

    fn is_wide_conv(&self) -> bool {
        matches!(self, Self::Conv { kernel, .. } if *kernel != [1, 1])
    }
}

/// One layer that gets an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// Half of the model.
    pub part: Part,
    /// The layer's path in diffusers or transformers.
    pub path: String,
    /// The adapter's name in a LoRA file, without the `.lora_down.weight` ending.
    pub name: String,
    /// Kind and size of the layer.
    pub shape: LayerShape,
    /// Rank of its adapter.
    pub rank: usize,
    /// Numerator of its strength; never 0.
    pub alpha: f64,
}

/// How the adapters of a model are named and shaped in files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Naming {
    /// Generation of the model.
    pub family: Family,
    /// Where the UNet's blocks are in the LDM layout.
    pub unet_layout: UNetLayout,
}

impl Naming {
    /// That of a model.
    pub fn of(model: &StableDiffusion) -> Self {
        Self {
            family: model.family,
            unet_layout: model.unet_layout.clone(),
        }
    }

    /// The name of a layer's adapter: `lora_unet_` or `lora_te_` and the path with `_` for `.`. For SDXL `lora_te1_`,
    /// `lora_te2_`, and the UNet's paths are those of the LDM layout.
    pub fn lora_name(&self, part: Part, path: &str) -> String {
        let sdxl = self.family == Family::Sdxl;
        let prefix = match part {
            Part::UNet => "lora_unet",
            Part::TextEncoder if sdxl => "lora_te1",
            Part::TextEncoder => "lora_te",
            Part::TextEncoder2 => "lora_te2",
        };
        let ldm = match part {
            Part::UNet if sdxl => self.unet_layout.ldm_path(path),
            _ => None,
        };
        let path = ldm.as_deref().unwrap_or(path);
        format!("{prefix}_{}", path.replace('.', "_"))
    }

    /// The shape that a layer's adapter has in files: those of Stable Diffusion 2's linear projections around
    /// transformers are written as 1×1 convolutions, as sd-scripts loads them.
    pub fn shape_in_files(&self, part: Part, path: &str, shape: LayerShape) -> LayerShape {
        let projection = path.ends_with(".proj_in") || path.ends_with(".proj_out");
        match shape {
            LayerShape::Linear { d_in, d_out }
                if self.family == Family::Sd2 && part == Part::UNet && projection =>
            {
                LayerShape::Conv {
                    c_in: d_in,
                    c_out: d_out,
                    kernel: [1, 1],
                }
            }
            shape => shape,
        }
    }
}

/// Decides whether a layer gets an adapter, and of which rank.
///
/// Linear layers and 1×1 convolutions of `Transformer2DModel` and the linear layers of `CLIPAttention` and
/// `CLIPMLP` always do. With `conv_rank` the layers of `ResnetBlock2D`, `Downsample2D` and `Upsample2D` do too:
/// their 3×3 convolutions with `conv_rank`, the others (`time_emb_proj`, `conv_shortcut`) with `rank`.
pub fn target(
    naming: &Naming,
    part: Part,
    path: &str,
    shape: LayerShape,
    settings: &NetworkSettings,
) -> Option<Target> {
    let (rank, alpha) = rank_and_alpha(part, path, shape, settings)?;
    Some(Target {
        part,
        path: path.to_owned(),
        name: naming.lora_name(part, path),
        shape: naming.shape_in_files(part, path, shape),
        rank,
        alpha,
    })
}

fn rank_and_alpha(
    part: Part,
    path: &str,
    shape: LayerShape,
    settings: &NetworkSettings,
) -> Option<(usize, f64)> {
    let (rank, alpha) = match (part, block_of(part, path)?) {
        (_, Block::Attention) if shape.is_wide_conv() => settings.conv()?,
        (_, Block::Attention) => (settings.rank, settings.alpha),
        (_, Block::Convolution) => {
            let conv = settings.conv()?;
            if shape.is_wide_conv() {
                conv
            } else {
                (settings.rank, settings.alpha)
            }
        }
    };
    Some((rank, if alpha == 0.0 { rank as f64 } else { alpha }))
}

/// Trainable elements of the adapters that a model's tensors would get: `.weight`s of rank 2 and 4 are layers.
pub fn parameter_count<'a>(
    part: Part,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>,
    settings: &NetworkSettings,
) -> usize {
    let layers = tensors.into_iter().filter_map(|(name, shape)| {
        let shape = match *shape {
            [d_out, d_in] => LayerShape::Linear { d_in, d_out },
            [c_out, c_in, height, width] => LayerShape::Conv {
                c_in,
                c_out,
                kernel: [height, width],
            },
            _ => return None,
        };
        let path = name.strip_suffix(".weight")?;
        Some((shape, rank_and_alpha(part, path, shape, settings)?.0))
    });
    let count = |shape: Vec<usize>| shape.iter().product::<usize>();
    layers
        .map(|(shape, rank)| count(shape.down_shape(rank)) + count(shape.up_shape(rank)))
        .sum()
}

/// The classes that sd-scripts searches, in two groups: always, and only for convolution adapters.
enum Block {
    Attention,
    Convolution,
}

fn block_of(part: Part, path: &str) -> Option<Block> {
    let mut segments = path.split('.');
    match part {
        Part::TextEncoder | Part::TextEncoder2 => segments
            .any(|segment| matches!(segment, "self_attn" | "mlp"))
            .then_some(Block::Attention),
        Part::UNet => segments.find_map(|segment| match segment {
            "attentions" => Some(Block::Attention),
            "resnets" | "downsamplers" | "upsamplers" => Some(Block::Convolution),
            _ => None,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn naming() -> Naming {
        Naming {
            family: Family::Sd1,
            unet_layout: UNetLayout {
                layers_per_block: 2,
                up_attends: vec![false, true, true, true],
            },
        }
    }

    const LINEAR: LayerShape = LayerShape::Linear { d_in: 8, d_out: 4 };
    const CONV3: LayerShape = LayerShape::Conv {
        c_in: 8,
        c_out: 4,
        kernel: [3, 3],
    };

    /// (path, shape) of every Linear and Conv2d of the published SD1.5 UNet and text encoder.
    fn full_size_layers() -> Vec<(Part, String, LayerShape)> {
        let mut layers = Vec::new();
        let channels = [320, 640, 1280, 1280];
        let mut linear = |part, path: String, d_in, d_out| {
            layers.push((part, path, LayerShape::Linear { d_in, d_out }));
        };
        for layer in 0..12 {
            let at = format!("text_model.encoder.layers.{layer}");
            for name in ["k_proj", "v_proj", "q_proj", "out_proj"] {
                linear(
                    Part::TextEncoder,
                    format!("{at}.self_attn.{name}"),
                    768,
                    768,
                );
            }
            linear(Part::TextEncoder, format!("{at}.mlp.fc1"), 768, 3072);
            linear(Part::TextEncoder, format!("{at}.mlp.fc2"), 3072, 768);
        }
        linear(Part::UNet, "time_embedding.linear_1".into(), 320, 1280);
        linear(Part::UNet, "time_embedding.linear_2".into(), 1280, 1280);
        let mut conv = |path: String, c_in, c_out, side| {
            layers.push((
                Part::UNet,
                path,
                LayerShape::Conv {
                    c_in,
                    c_out,
                    kernel: [side, side],
                },
            ));
        };
        conv("conv_in".into(), 4, 320, 3);
        conv("conv_out".into(), 320, 4, 3);
        let mut attentions = Vec::new();
        let mut resnets = Vec::new();
        for (block, &c) in channels.iter().enumerate() {
            for i in 0..2 {
                let c_in = if i == 1 {
                    c
                } else {
                    channels[block.saturating_sub(1)]
                };
                resnets.push((format!("down_blocks.{block}.resnets.{i}"), c_in, c));
                if block < 3 {
                    attentions.push((format!("down_blocks.{block}.attentions.{i}"), c));
                }
            }
            if block < 3 {
                conv(format!("down_blocks.{block}.downsamplers.0.conv"), c, c, 3);
            }
        }
        for i in 0..2 {
            resnets.push((format!("mid_block.resnets.{i}"), 1280, 1280));
        }
        attentions.push(("mid_block.attentions.0".into(), 1280));
        let up_in = [
            [2560, 2560, 2560],
            [2560, 2560, 1920],
            [1920, 1280, 960],
            [960, 640, 640],
        ];
        for (block, inputs) in up_in.iter().enumerate() {
            let c = channels[3 - block];
            for (i, &c_in) in inputs.iter().enumerate() {
                resnets.push((format!("up_blocks.{block}.resnets.{i}"), c_in, c));
                if block > 0 {
                    attentions.push((format!("up_blocks.{block}.attentions.{i}"), c));
                }
            }
            if block < 3 {
                conv(format!("up_blocks.{block}.upsamplers.0.conv"), c, c, 3);
            }
        }
        for (at, c_in, c) in &resnets {
            conv(format!("{at}.conv1"), *c_in, *c, 3);
            conv(format!("{at}.conv2"), *c, *c, 3);
            if c_in != c {
                conv(format!("{at}.conv_shortcut"), *c_in, *c, 1);
            }
        }
        for (at, c) in &attentions {
            conv(format!("{at}.proj_in"), *c, *c, 1);
            conv(format!("{at}.proj_out"), *c, *c, 1);
        }
        let mut linear = |path: String, d_in, d_out| {
            layers.push((Part::UNet, path, LayerShape::Linear { d_in, d_out }));
        };
        for (at, _, c) in &resnets {
            linear(format!("{at}.time_emb_proj"), 1280, *c);
        }
        for (at, c) in &attentions {
            let at = format!("{at}.transformer_blocks.0");
            for (attn, d_context) in [("attn1", *c), ("attn2", 768)] {
                linear(format!("{at}.{attn}.to_q"), *c, *c);
                linear(format!("{at}.{attn}.to_k"), d_context, *c);
                linear(format!("{at}.{attn}.to_v"), d_context, *c);
                linear(format!("{at}.{attn}.to_out.0"), *c, *c);
            }
            linear(format!("{at}.ff.net.0.proj"), *c, 8 * c);
            linear(format!("{at}.ff.net.2"), 4 * c, *c);
        }
        layers
    }

    fn keys_of(settings: &NetworkSettings) -> BTreeMap<String, String> {
        let mut keys = BTreeMap::new();
        for (part, path, shape) in full_size_layers() {
            if let Some(target) = target(&naming(), part, &path, shape, settings) {
                let rank = target.rank;
                let name = target.name;
                keys.insert(format!("{name}.alpha"), "[]".to_owned());
                let down = format!("{:?}", shape.down_shape(rank));
                keys.insert(format!("{name}.lora_down.weight"), down);
                let up = format!("{:?}", shape.up_shape(rank));
                keys.insert(format!("{name}.lora_up.weight"), up);
            }
        }
        keys
    }

    fn expected(list: &str) -> BTreeMap<String, String> {
        list.lines()
            .filter_map(|line| line.split_once('\t'))
            .map(|(key, shape)| (key.to_owned(), shape.to_owned()))
            .collect()
    }

    #[test]
    fn full_size_keys_are_those_of_sd_scripts() {
        let settings = NetworkSettings {
            rank: 16,
            alpha: 1.0,
            ..NetworkSettings::default()
        };
        let list = include_str!("../../tests/fixtures/kohya/kohya_keys_sd15.txt");
        assert_eq!(expected(list).len(), 792);
        assert_eq!(keys_of(&settings), expected(list));
    }

    #[test]
    fn full_size_keys_with_convolutions_are_those_of_sd_scripts() {
        let settings = NetworkSettings {
            rank: 16,
            alpha: 1.0,
            conv_rank: Some(8),
            conv_alpha: None,
        };
        let list = include_str!("../../tests/fixtures/kohya/kohya_keys_sd15_conv.txt");
        assert_eq!(expected(list).len(), 1050);
        assert_eq!(keys_of(&settings), expected(list));
    }

    #[test]
    fn alpha_zero_means_the_rank() {
        let settings = NetworkSettings {
            rank: 6,
            alpha: 0.0,
            ..NetworkSettings::default()
        };
        let target = target(
            &naming(),
            Part::UNet,
            "mid_block.attentions.0.proj_in",
            LINEAR,
            &settings,
        );
        assert_eq!(target.map(|target| target.alpha), Some(6.0));
    }

    #[test]
    fn layers_outside_the_searched_blocks_get_none() {
        let settings = NetworkSettings {
            conv_rank: Some(4),
            ..NetworkSettings::default()
        };
        for (part, path, shape) in [
            (Part::UNet, "conv_in", CONV3),
            (Part::UNet, "conv_out", CONV3),
            (Part::UNet, "time_embedding.linear_1", LINEAR),
            (Part::TextEncoder, "text_projection", LINEAR),
        ] {
            let found = target(&naming(), part, path, shape, &settings);
            assert_eq!(found, None, "{path}");
        }
    }
}
