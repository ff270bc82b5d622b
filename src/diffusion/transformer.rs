//! The transformer inside UNet blocks: pixels attend to each other and to the text.

use burn::tensor::Tensor;

use super::attention::{attention, merge_heads, split_heads};
use super::error::LoadError;
use super::layers::{Conv2d, GroupNorm, LayerMut, LayerNorm, Layers, Linear};
use super::weights::WeightsAt;
use crate::kernels::{Value, geglu};

/// Epsilon of the norm before a transformer; fixed in the reference implementation, whatever the configuration says.
const NORM_EPS: f64 = 1e-6;
/// Epsilon of the layer norms.
const LAYER_NORM_EPS: f64 = 1e-5;

/// Sizes of one transformer.
#[derive(Clone, Copy, Debug)]
pub struct TransformerSize {
    /// Channels of the picture.
    pub channels: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the text states.
    pub context: usize,
    /// Groups of the group norm.
    pub groups: usize,
}

/// Attention over pixels and text around a residual path.
///
/// Field names are the checkpoint's keys (`Transformer2DModel` in diffusers).
#[derive(Debug)]
pub struct Transformer2d {
    norm: GroupNorm,
    proj_in: Projection,
    transformer_blocks: Vec<TransformerBlock>,
    proj_out: Projection,
}

/// The projection around a transformer: a 1x1 convolution in SD 1.x, a linear layer in later models.
#[derive(Debug)]
enum Projection {
    Conv(Box<Conv2d>),
    Linear(Box<Linear>),
}

/// `x + attn1(norm1(x))`, then `x + attn2(norm2(x), text)`, then `x + ff(norm3(x))`.
#[derive(Debug)]
pub struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,  // ff.net.0.proj: values and gates
    ff_out: Linear, // ff.net.2
}

#[derive(Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear, // to_out.0
    heads: usize,
}

impl Transformer2d {
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(weights: &WeightsAt<'_>, size: TransformerSize) -> Result<Self, LoadError> {
        let blocks = weights.at("transformer_blocks");
        let transformer_blocks = (0..)
            .take_while(|index| blocks.has(&format!("{index}.norm1.weight")))
            .map(|index: usize| TransformerBlock::load(&blocks.at(index.to_string()), size))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            norm: GroupNorm::load(&weights.at("norm"), size.channels, size.groups, NORM_EPS)?,
            proj_in: Projection::load(&weights.at("proj_in"), size.channels)?,
            transformer_blocks,
            proj_out: Projection::load(&weights.at("proj_out"), size.channels)?,
        })
    }

    /// What the first block reads, or the graph alone where nothing reads it.
    ///
    /// # Shapes
    /// - `x`: `[batch, channels, height, width]`
    /// - output: `[batch, height * width, channels]`
    pub fn enter_for(&self, value: Value, x: Tensor<4>) -> Tensor<3> {
        self.proj_in.enter(value, self.norm.forward(x))
    }

    /// What the last block has made of the pixels, added to what they were, `x`; or the graph alone where nothing
    /// reads it.
    ///
    /// # Shapes
    /// - `hidden`: `[batch, height * width, channels]`
    /// - `x` and output: `[batch, channels, height, width]`
    pub fn leave_for(&self, value: Value, hidden: Tensor<3>, x: Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = x.dims();
        x + self.proj_out.leave(value, hidden, [height, width])
    }

    /// What is between entering and leaving.
    pub fn blocks(&self) -> &[TransformerBlock] {
        &self.transformer_blocks
    }

    /// Whether the layer before the blocks has an adapter.
    pub fn entry_is_adapted(&self) -> bool {
        self.proj_in.is_adapted()
    }

    /// Whether the layer behind the blocks has an adapter.
    pub fn exit_is_adapted(&self) -> bool {
        self.proj_out.is_adapted()
    }

    /// Layers below `path`, for adapters.
    pub fn collect_layers<'a>(&'a mut self, path: &str, found: &mut Layers<'a>) {
        found.push((format!("{path}.proj_in"), self.proj_in.layer_mut()));
        for (index, block) in self.transformer_blocks.iter_mut().enumerate() {
            block.collect_layers(&format!("{path}.transformer_blocks.{index}"), found);
        }
        found.push((format!("{path}.proj_out"), self.proj_out.layer_mut()));
    }
}

impl Projection {
    fn load(weights: &WeightsAt<'_>, channels: usize) -> Result<Self, LoadError> {
        if weights.shape("weight")?.len() == 2 {
            Linear::load_sized(weights, channels, channels)
                .map(|linear| Self::Linear(linear.into()))
        } else {
            Conv2d::load(weights, channels, channels, 1).map(|conv| Self::Conv(conv.into()))
        }
    }

    /// `[batch, c, height, width]` to `[batch, height * width, c]`
    fn enter(&self, value: Value, x: Tensor<4>) -> Tensor<3> {
        match self {
            Self::Conv(conv) => pixels_to_tokens(conv.forward_for(value, x)),
            Self::Linear(linear) => linear.forward_for(value, pixels_to_tokens(x)),
        }
    }

    /// `[batch, height * width, c]` to `[batch, c, height, width]`
    fn leave(&self, value: Value, x: Tensor<3>, [height, width]: [usize; 2]) -> Tensor<4> {
        match self {
            Self::Conv(conv) => conv.forward_for(value, tokens_to_pixels(x, height, width)),
            Self::Linear(linear) => tokens_to_pixels(linear.forward_for(value, x), height, width),
        }
    }

    fn is_adapted(&self) -> bool {
        match self {
            Self::Conv(conv) => conv.is_adapted(),
            Self::Linear(linear) => linear.is_adapted(),
        }
    }

    fn layer_mut(&mut self) -> LayerMut<'_> {
        match self {
            Self::Conv(conv) => LayerMut::Conv(conv),
            Self::Linear(linear) => LayerMut::Linear(linear),
        }
    }
}

fn pixels_to_tokens(x: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = x.dims();
    x.reshape([batch, channels, height * width]).swap_dims(1, 2)
}

fn tokens_to_pixels(x: Tensor<3>, height: usize, width: usize) -> Tensor<4> {
    let [batch, _, channels] = x.dims();
    x.swap_dims(1, 2).reshape([batch, channels, height, width])
}

impl TransformerBlock {
    fn load(weights: &WeightsAt<'_>, size: TransformerSize) -> Result<Self, LoadError> {
        let d = size.channels;
        let norm = |name: &str| LayerNorm::load(&weights.at(name), d, LAYER_NORM_EPS);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: Attention::load(&weights.at("attn1"), d, d, size.heads)?,
            norm2: norm("norm2")?,
            attn2: Attention::load(&weights.at("attn2"), d, size.context, size.heads)?,
            norm3: norm("norm3")?,
            ff_in: Linear::load_sized(&weights.at("ff.net.0.proj"), d, 8 * d)?,
            ff_out: Linear::load_sized(&weights.at("ff.net.2"), 4 * d, d)?,
        })
    }

    /// The result, or the graph alone where nothing reads it.
    ///
    /// # Shapes
    /// - `x` and output: `[batch, pixels, channels]`
    /// - `context`: `[batch, tokens, d_context]`
    pub fn forward_for(&self, value: Value, x: Tensor<3>, context: &Tensor<3>) -> Tensor<3> {
        let normed = self.norm1.forward(x.clone());
        let x = x + self.attn1.forward(normed.clone(), normed);
        let normed = self.norm2.forward(x.clone());
        let x = x + self.attn2.forward(normed, context.clone());
        let normed = self.norm3.forward(x.clone());
        x + self.feed_forward(value, normed)
    }

    /// GEGLU (Shazeer 2020, arXiv:2002.05202): `ff_out(values * gelu(gates))`
    fn feed_forward(&self, value: Value, x: Tensor<3>) -> Tensor<3> {
        let hidden = geglu(self.ff_in.forward(x));
        self.ff_out.forward_for(value, hidden)
    }

    /// Whether a layer of it has an adapter.
    pub fn is_adapted(&self) -> bool {
        self.attn1.is_adapted()
            || self.attn2.is_adapted()
            || self.ff_in.is_adapted()
            || self.ff_out.is_adapted()
    }

    fn collect_layers<'a>(&'a mut self, path: &str, found: &mut Layers<'a>) {
        self.attn1.collect_layers(&format!("{path}.attn1"), found);
        self.attn2.collect_layers(&format!("{path}.attn2"), found);
        found.push((
            format!("{path}.ff.net.0.proj"),
            LayerMut::Linear(&mut self.ff_in),
        ));
        found.push((
            format!("{path}.ff.net.2"),
            LayerMut::Linear(&mut self.ff_out),
        ));
    }
}

impl Attention {
    fn load(
        weights: &WeightsAt<'_>,
        d: usize,
        d_context: usize,
        heads: usize,
    ) -> Result<Self, LoadError> {
        if !d.is_multiple_of(heads) {
            return Err(LoadError::config(
                std::path::Path::new(weights.path()),
                format!("{heads} attention heads do not divide {d} channels"),
            ));
        }
        Ok(Self {
            to_q: Linear::load_sized(&weights.at("to_q"), d, d)?,
            to_k: Linear::load_sized(&weights.at("to_k"), d_context, d)?,
            to_v: Linear::load_sized(&weights.at("to_v"), d_context, d)?,
            to_out: Linear::load_sized(&weights.at("to_out.0"), d, d)?,
            heads,
        })
    }

    /// # Shapes
    /// - `x` and output: `[batch, queries, d]`
    /// - `context`: `[batch, keys, d_context]`
    fn forward(&self, x: Tensor<3>, context: Tensor<3>) -> Tensor<3> {
        let q = split_heads(self.to_q.forward(x), self.heads);
        let k = split_heads(self.to_k.forward(context.clone()), self.heads);
        let v = split_heads(self.to_v.forward(context), self.heads);
        let mixed = attention([q, k, v], false, self.to_q.precision());
        self.to_out.forward(merge_heads(mixed))
    }

    fn is_adapted(&self) -> bool {
        [&self.to_q, &self.to_k, &self.to_v, &self.to_out]
            .into_iter()
            .any(Linear::is_adapted)
    }

    fn collect_layers<'a>(&'a mut self, path: &str, found: &mut Layers<'a>) {
        for (name, linear) in [
            ("to_q", &mut self.to_q),
            ("to_k", &mut self.to_k),
            ("to_v", &mut self.to_v),
            ("to_out.0", &mut self.to_out),
        ] {
            found.push((format!("{path}.{name}"), LayerMut::Linear(linear)));
        }
    }
}
