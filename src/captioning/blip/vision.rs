//! The encoder of pictures (`BlipVisionModel`): a pre-norm vision transformer.

use burn::tensor::{Device, Tensor, TensorData};

use super::config::VisionConfig;
use crate::diffusion::LoadError;
use crate::diffusion::WeightsAt;
use crate::diffusion::attention::{attention, merge_heads};
use crate::diffusion::layers::{Activation, LayerNorm, Linear};

/// Dosovitskiy et al. 2021, arXiv:2010.11929.
#[derive(Debug)]
pub struct VisionModel {
    /// The patches' convolution as the product that it is: `[d, 3 · patch · patch]`
    patch_embedding: Linear,
    class_embedding: Tensor<3>,    // [1, 1, d]
    position_embedding: Tensor<3>, // [1, 1 + patches, d]
    layers: Vec<EncoderLayer>,
    post_layernorm: LayerNorm,
    patch: usize,
    /// Patches along a side.
    side: usize,
    image: usize,
}

#[derive(Debug)]
struct EncoderLayer {
    layer_norm1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl VisionModel {
    /// Reads the encoder; `weights` is the view of `vision_model`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape than `config` says.
    pub fn load(weights: &WeightsAt<'_>, config: &VisionConfig) -> Result<Self, LoadError> {
        let (d, patch, side) = (config.hidden_size, config.patch_size, config.patches());
        let embeddings = weights.at("embeddings");
        let patches = embeddings.at("patch_embedding");
        let kernel: Tensor<4> = patches.tensor("weight", [d, 3, patch, patch])?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| {
                EncoderLayer::load(&weights.at("encoder.layers").at(index.to_string()), config)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            patch_embedding: Linear::new(
                kernel.reshape([d, 3 * patch * patch]),
                Some(patches.tensor_f32("bias", [d])?),
            ),
            class_embedding: embeddings.tensor_f32("class_embedding", [1, 1, d])?,
            position_embedding: embeddings
                .tensor_f32("position_embedding", [1, side * side + 1, d])?,
            layers,
            post_layernorm: LayerNorm::load(
                &weights.at("post_layernorm"),
                d,
                config.layer_norm_eps,
            )?,
            patch,
            side,
            image: config.image_size,
        })
    }

    /// States of one picture, after the final norm.
    ///
    /// # Shapes
    /// - `pixels`: `[3, image, image]`
    /// - output: `[1, 1 + patches, d]`
    pub fn forward(&self, pixels: &[f32]) -> Tensor<3> {
        let device = self.class_embedding.device();
        let patches = self.patch_embedding.forward(self.patches(pixels, &device));
        let embedded = Tensor::cat(vec![self.class_embedding.clone(), patches], 1);
        let mut hidden = embedded + self.position_embedding.clone();
        for layer in &self.layers {
            hidden = layer.forward(hidden);
        }
        self.post_layernorm.forward(hidden)
    }

    /// `[1, patches, 3 · patch · patch]`: each patch in the order of the convolution's weights.
    fn patches(&self, pixels: &[f32], device: &Device) -> Tensor<3> {
        let (patch, side, image) = (self.patch, self.side, self.image);
        let length = 3 * patch * patch;
        let mut values = Vec::with_capacity(side * side * length);
        for place in 0..side * side {
            let (top, left) = (place / side * patch, place % side * patch);
            for channel in 0..3 {
                for row in 0..patch {
                    let begin = (channel * image + top + row) * image + left;
                    values.extend_from_slice(&pixels[begin..begin + patch]);
                }
            }
        }
        Tensor::from_data(TensorData::new(values, [1, side * side, length]), device)
    }
}

impl EncoderLayer {
    fn load(weights: &WeightsAt<'_>, config: &VisionConfig) -> Result<Self, LoadError> {
        let (d, wide, eps) = (
            config.hidden_size,
            config.intermediate_size,
            config.layer_norm_eps,
        );
        let attention = weights.at("self_attn");
        let mlp = weights.at("mlp");
        Ok(Self {
            layer_norm1: LayerNorm::load(&weights.at("layer_norm1"), d, eps)?,
            qkv: Linear::load_sized(&attention.at("qkv"), d, 3 * d)?,
            projection: Linear::load_sized(&attention.at("projection"), d, d)?,
            layer_norm2: LayerNorm::load(&weights.at("layer_norm2"), d, eps)?,
            fc1: Linear::load_sized(&mlp.at("fc1"), d, wide)?,
            fc2: Linear::load_sized(&mlp.at("fc2"), wide, d)?,
            heads: config.num_attention_heads,
            activation: config.hidden_act.into(),
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = x.clone() + self.attend(self.layer_norm1.forward(x));
        let hidden = self.fc1.forward(self.layer_norm2.forward(x.clone()));
        x + self.fc2.forward(self.activation.forward(hidden))
    }

    fn attend(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, tokens, d] = x.dims();
        let heads = self.heads;
        let qkv = self
            .qkv
            .forward(x) // [batch, tokens, 3 d]
            .reshape([batch, tokens, 3 * heads, d / heads])
            .swap_dims(1, 2); // [batch, 3 heads, tokens, d_head]
        let [q, k, v] = [0, 1, 2].map(|part| qkv.clone().narrow(1, part * heads, heads));
        let y = attention([q, k, v], false, self.qkv.precision());
        self.projection.forward(merge_heads(y))
    }
}
