//! Which layers of a model get an adapter, and what the adapter is called: sd-scripts' rules, and LyCORIS' presets.
//!
//! The rules see only paths and shapes, never weights, so that they can be checked for models of any size.

use crate::diffusion::ldm::UNetLayout;
use crate::diffusion::{Family, Footprint, Part, StableDiffusion, StoredTensor};
use crate::networks::NetworkError;
use crate::networks::blocks::{Blocks, block_index};
use crate::networks::filter::LayerFilter;
use crate::networks::form::{Form, TensorSpec};
use crate::networks::settings::{NetworkSettings, Preset, TrainParts};

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

    /// Features or channels in.
    pub fn d_in(&self) -> usize {
        match *self {
            Self::Linear { d_in, .. } => d_in,
            Self::Conv { c_in, .. } => c_in,
        }
    }

    /// Features or channels out.
    pub fn d_out(&self) -> usize {
        match *self {
            Self::Linear { d_out, .. } => d_out,
            Self::Conv { c_out, .. } => c_out,
        }
    }

    /// Height and width of the kernel.
    pub fn kernel(&self) -> [usize; 2] {
        match *self {
            Self::Linear { .. } => [1, 1],
            Self::Conv { kernel, .. } => kernel,
        }
    }

    /// Shape of the weight.
    pub fn dims(&self) -> Vec<usize> {
        match *self {
            Self::Linear { d_in, d_out } => vec![d_out, d_in],
            Self::Conv {
                c_in,
                c_out,
                kernel,
            } => vec![c_out, c_in, kernel[0], kernel[1]],
        }
    }

    /// A convolution with a kernel beyond 1×1.
    pub fn is_wide_conv(&self) -> bool {
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
    /// What its adapter is.
    pub form: Form,
    /// Whether the length of each row of its weight is trained by itself.
    pub dora: bool,
    /// Rank of its adapter.
    pub rank: usize,
    /// Numerator of its strength; never 0.
    pub alpha: f64,
    /// Factor of its learning rate.
    pub lr_weight: f64,
}

impl Target {
    /// The tensors of its adapter.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.form.tensors(self.shape, self.rank, self.dora)
    }

    /// Trainable elements of its adapter.
    pub fn parameter_count(&self) -> usize {
        let tensors = self.tensors();
        let counts = tensors
            .iter()
            .map(|tensor| tensor.shape.iter().product::<usize>());
        counts.sum()
    }

    /// Elements of the layer's weight, where the adapter makes such a matrix; 0 where it does not.
    pub fn rebuilt_elements(&self) -> usize {
        let made = match self.form {
            Form::LowRank { .. } | Form::Scale { .. } => false,
            Form::Hadamard { .. } => true,
            Form::Kronecker(_) => self.dora,
        };
        let elements = self.shape.dims().iter().product();
        if made { elements } else { 0 }
    }

    /// How many such matrices of f32 the graph keeps, in elements: those of convolutions, and three where lengths of rows
    /// are trained. For the lengths of a LoRA a convolution's weight is put in another order, in half precision.
    pub fn kept_elements(&self) -> usize {
        let conv = matches!(self.shape, LayerShape::Conv { .. });
        let elements: usize = self.shape.dims().iter().product();
        match self.form {
            Form::LowRank { .. } if self.dora && self.shape.is_wide_conv() => elements / 2,
            Form::LowRank { .. } | Form::Scale { .. } => 0,
            Form::Hadamard { .. } => elements * (usize::from(conv) + 3 * usize::from(self.dora)),
            Form::Kronecker(_) => elements * 3 * usize::from(self.dora),
        }
    }
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

    /// That of a model that is not loaded.
    pub fn of_footprint(model: &Footprint) -> Self {
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

/// The rules of one network on one model.
#[derive(Debug, Clone)]
pub struct Rules<'a> {
    naming: &'a Naming,
    settings: &'a NetworkSettings,
    blocks: Blocks,
    filter: LayerFilter,
}

impl<'a> Rules<'a> {
    /// # Errors
    /// When the settings make no sense, or not for this generation of models.
    pub fn new(naming: &'a Naming, settings: &'a NetworkSettings) -> Result<Self, NetworkError> {
        if let Some((field, message)) = settings.problems().into_iter().next() {
            return Err(NetworkError::Settings { field, message });
        }
        Ok(Self {
            naming,
            settings,
            blocks: Blocks::new(naming.family, settings)?,
            filter: LayerFilter::new(settings)?,
        })
    }

    /// Decides whether a layer gets an adapter, and which.
    ///
    /// By sd-scripts' rule the linear layers and 1×1 convolutions of `Transformer2DModel` and the linear layers of
    /// `CLIPAttention` and `CLIPMLP` always do. With `conv_rank` the layers of `ResnetBlock2D`, `Downsample2D` and
    /// `Upsample2D` do too: their 3×3 convolutions with `conv_rank`, the others (`time_emb_proj`, `conv_shortcut`) with
    /// `rank`. Presets are LyCORIS'.
    pub fn target(&self, part: Part, path: &str, shape: LayerShape) -> Option<Target> {
        let target = self.unfiltered(part, path, shape)?;
        self.filter.admits(&target.name, path).then_some(target)
    }

    /// The patterns that match none of the layers that would have an adapter without them.
    pub fn unused_patterns(&self, layers: &[Layer]) -> Vec<(String, String)> {
        let targets: Vec<Target> = layers
            .iter()
            .filter_map(|layer| self.unfiltered(layer.part, &layer.path, layer.shape))
            .collect();
        let names = targets.iter().map(|t| (t.name.as_str(), t.path.as_str()));
        self.filter.unused(names)
    }

    fn unfiltered(&self, part: Part, path: &str, shape: LayerShape) -> Option<Target> {
        let block = block_index(self.naming, part, path);
        let (rank, alpha) = self.size(part, path, shape, block)?;
        let lr_weight = block.map_or(1.0, |block| self.blocks.lr_weight(block));
        if rank == 0 || lr_weight == 0.0 {
            return None;
        }
        let shape = self.naming.shape_in_files(part, path, shape);
        let form = Form::new(self.settings, path, shape, rank);
        let scaled = alpha != 0.0 && !form.is_unscaled();
        Some(Target {
            part,
            path: path.to_owned(),
            name: self.naming.lora_name(part, path),
            shape,
            form,
            dora: self.settings.dora,
            rank,
            alpha: if scaled { alpha } else { rank as f64 },
            lr_weight,
        })
    }

    fn size(
        &self,
        part: Part,
        path: &str,
        shape: LayerShape,
        block: Option<usize>,
    ) -> Option<(usize, f64)> {
        let (settings, wide) = (self.settings, shape.is_wide_conv());
        let by_block = block.and_then(|block| self.blocks.size(block, wide));
        let convolutions = settings.conv().is_some() || self.blocks.has_convolutions();
        let covered = match settings.preset() {
            None => match block_of(part, path)? {
                Block::Attention { .. } | Block::Text { .. } => true,
                Block::Residual | Block::Sampler => convolutions,
                Block::Ends | Block::Time => false,
            },
            Some(preset) => preset.covers(self.naming.family, part, path),
        };
        if !covered || (wide && !convolutions) {
            return None;
        }
        by_block.or_else(|| {
            if wide {
                settings.conv()
            } else {
                Some((settings.rank, settings.alpha))
            }
        })
    }
}

impl Preset {
    /// Whether a layer is one of this preset's, but for its kernel.
    fn covers(self, family: Family, part: Part, path: &str) -> bool {
        let Some(block) = block_of(part, path) else {
            return false;
        };
        // LyCORIS looks for these by their names in diffusers, which sd-scripts' SDXL does not have.
        let named = family != Family::Sdxl;
        match self {
            Self::Full | Self::UnetOnly => match block {
                Block::Text { .. } => self == Self::Full,
                Block::Ends | Block::Time => named,
                Block::Attention { .. } | Block::Residual | Block::Sampler => true,
            },
            Self::FullLin => match block {
                Block::Time => named,
                Block::Ends | Block::Sampler => false,
                Block::Text { .. } | Block::Attention { .. } | Block::Residual => true,
            },
            Self::AttnMlp => matches!(block, Block::Text { .. } | Block::Attention { .. }),
            Self::AttnOnly => match block {
                Block::Text { attention } | Block::Attention { attention } => attention,
                _ => false,
            },
            Self::UnetTransformerOnly => matches!(block, Block::Attention { .. }),
            Self::UnetConvblockOnly => match block {
                Block::Ends => named,
                Block::Residual | Block::Sampler => true,
                _ => false,
            },
            Self::Ia3 => {
                const UNET: [&str; 3] = [".to_k", ".to_v", ".ff.net.2"];
                const TEXT: [&str; 3] = [".k_proj", ".v_proj", ".mlp.fc2"];
                let endings = if part.is_text() { TEXT } else { UNET };
                endings.iter().any(|ending| path.ends_with(ending))
            }
        }
    }
}

/// A layer of a model that is not loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Half of the model.
    pub part: Part,
    /// Its path in diffusers or transformers.
    pub path: String,
    /// Kind and size.
    pub shape: LayerShape,
}

/// The layers of a model's tensors: `.weight`s of rank 2 and 4.
pub fn layers(model: &Footprint, parts: TrainParts) -> Vec<Layer> {
    let of = |part: Part, tensors: &[StoredTensor]| {
        let layers = tensors.iter().filter_map(|tensor| {
            let shape = match tensor.shape[..] {
                [d_out, d_in] => LayerShape::Linear { d_in, d_out },
                [c_out, c_in, height, width] => LayerShape::Conv {
                    c_in,
                    c_out,
                    kernel: [height, width],
                },
                _ => return None,
            };
            let path = tensor.name.strip_suffix(".weight")?.to_owned();
            Some(Layer { part, path, shape })
        });
        layers.collect::<Vec<_>>()
    };
    let mut layers = Vec::new();
    if parts.text_encoder {
        let (first, second) = model.text_encoders.split_at(model.second_text_encoder_at);
        layers.extend(of(Part::TextEncoder, first));
        layers.extend(of(Part::TextEncoder2, second));
    }
    if parts.unet {
        layers.extend(of(Part::UNet, &model.unet));
    }
    layers
}

/// The adapters that a model would get. Settings that make no sense give none: they are refused elsewhere.
pub fn planned_targets(
    model: &Footprint,
    settings: &NetworkSettings,
    parts: TrainParts,
) -> Vec<Target> {
    let naming = Naming::of_footprint(model);
    let Ok(rules) = Rules::new(&naming, settings) else {
        return Vec::new();
    };
    let layers = layers(model, parts);
    let targets = layers
        .iter()
        .filter_map(|layer| rules.target(layer.part, &layer.path, layer.shape));
    targets.collect()
}

/// Where a layer is: the classes that sd-scripts and LyCORIS search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    /// `Transformer2DModel`, and whether it is one of its attentions.
    Attention { attention: bool },
    /// `ResnetBlock2D`
    Residual,
    /// `Downsample2D` and `Upsample2D`
    Sampler,
    /// `conv_in` and `conv_out`
    Ends,
    /// The embedding of timesteps.
    Time,
    /// `CLIPAttention` and `CLIPMLP`, and whether it is the former.
    Text { attention: bool },
}

fn block_of(part: Part, path: &str) -> Option<Block> {
    if part.is_text() {
        return path.split('.').find_map(|segment| match segment {
            "self_attn" => Some(Block::Text { attention: true }),
            "mlp" => Some(Block::Text { attention: false }),
            _ => None,
        });
    }
    match path {
        "conv_in" | "conv_out" => return Some(Block::Ends),
        "time_embedding.linear_1" | "time_embedding.linear_2" => return Some(Block::Time),
        _ => {}
    }
    path.split('.').find_map(|segment| match segment {
        "attentions" => {
            let attention = path.contains(".attn1.") || path.contains(".attn2.");
            Some(Block::Attention { attention })
        }
        "resnets" => Some(Block::Residual),
        "downsamplers" | "upsamplers" => Some(Block::Sampler),
        _ => None,
    })
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
        let naming = naming();
        let rules = Rules::new(&naming, settings).expect("rules");
        for (part, path, shape) in full_size_layers() {
            if let Some(target) = rules.target(part, &path, shape) {
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
            ..NetworkSettings::default()
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
        let naming = naming();
        let rules = Rules::new(&naming, &settings).expect("rules");
        let target = rules.target(Part::UNet, "mid_block.attentions.0.proj_in", LINEAR);
        assert_eq!(target.map(|target| target.alpha), Some(6.0));
    }

    #[test]
    fn layers_outside_the_searched_blocks_get_none() {
        let settings = NetworkSettings {
            conv_rank: Some(4),
            ..NetworkSettings::default()
        };
        let naming = naming();
        let rules = Rules::new(&naming, &settings).expect("rules");
        for (part, path, shape) in [
            (Part::UNet, "conv_in", CONV3),
            (Part::UNet, "conv_out", CONV3),
            (Part::UNet, "time_embedding.linear_1", LINEAR),
            (Part::TextEncoder, "text_projection", LINEAR),
        ] {
            assert_eq!(rules.target(part, path, shape), None, "{path}");
        }
    }
}
