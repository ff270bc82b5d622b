//! The CLIP text encoder (`CLIPTextModel` in transformers): token ids to the states that condition the UNet.

use burn::tensor::{Gradients, Int, Tensor, TensorData};

use super::attention::{attention, merge_heads, split_heads};
use super::config::TextEncoderConfig;
use super::error::LoadError;
use super::layers::{Activation, LayerMut, LayerNorm, Layers, Linear};
use super::segments::{Inputs, Keep, Kept, leaf_if};
use super::weights::WeightsAt;
use crate::kernels::{Precision, widen};

/// Tokens in a row: begin, 75 tokens, end.
pub const ROW_TOKENS: usize = 77;

/// CLIP's text transformer: pre-norm layers with causal attention.
///
/// Radford et al. 2021, arXiv:2103.00020.
#[derive(Debug)]
pub struct TextEncoder {
    token_embedding: Tensor<2>,    // [vocabulary, d]
    position_embedding: Tensor<2>, // [77, d]
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,
    precision: Precision,
}

#[derive(Debug)]
struct EncoderLayer {
    layer_norm1: LayerNorm,
    self_attn: SelfAttention,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

#[derive(Debug)]
struct SelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
}

#[derive(Debug)]
struct Mlp {
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
}

/// How rows of tokens belong to captions.
#[derive(Clone, Copy, Debug)]
struct Joint {
    captions: usize,
    per_caption: usize,
}

/// The state between two layers: `[rows, tokens, d]`
#[derive(Clone, Debug)]
struct Hidden {
    state: Tensor<3>,
    /// Whether an earlier layer needs its gradient.
    wanted: bool,
}

impl Inputs for Hidden {
    fn leaves(self) -> Self {
        Self {
            state: leaf_if(self.wanted, self.state),
            ..self
        }
    }
}

/// A forward that a backward can follow.
#[derive(Debug)]
pub struct TextTrace {
    /// From the first layer on that has an adapter.
    kept: Vec<Kept<Hidden, 3>>,
    last: Kept<Hidden, 3>,
    joint: Joint,
}

impl TextEncoder {
    /// Reads the encoder; `weights` is the root that holds `text_model`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape than `config` says.
    pub fn load(weights: &WeightsAt<'_>, config: &TextEncoderConfig) -> Result<Self, LoadError> {
        let model = weights.at("text_model");
        let d = config.hidden_size;
        let embeddings = model.at("embeddings");
        let layers = (0..config.num_hidden_layers)
            .map(|index| {
                EncoderLayer::load(&model.at("encoder.layers").at(index.to_string()), config)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            token_embedding: embeddings
                .at("token_embedding")
                .tensor("weight", [config.vocab_size, d])?,
            position_embedding: embeddings
                .at("position_embedding")
                .tensor_f32("weight", [config.max_position_embeddings, d])?,
            layers,
            final_layer_norm: LayerNorm::load(
                &model.at("final_layer_norm"),
                d,
                config.layer_norm_eps,
            )?,
            precision: weights.precision(),
        })
    }

    /// Number of transformer layers.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Length of a state.
    pub fn width(&self) -> usize {
        self.token_embedding.dims()[1]
    }

    /// Ids that have an embedding.
    pub fn vocabulary(&self) -> usize {
        self.token_embedding.dims()[0]
    }

    /// States of rows of token ids, after the final norm.
    ///
    /// `clip_skip` counts hidden states from the end: 1 takes the last, 2 the one before. Layers behind it do not run.
    ///
    /// # Shapes
    /// - `ids`: rows of at most 77 ids, all of one length
    /// - output: `[rows, tokens, d]`
    pub fn forward(&self, ids: &[Vec<u32>], clip_skip: usize) -> Tensor<3> {
        self.final_layer_norm
            .forward(self.hidden_state_raw(ids, clip_skip))
    }

    /// The hidden state that is `clip_skip` from the end, before the final norm.
    ///
    /// # Shapes
    /// As [`Self::forward`].
    pub fn hidden_state_raw(&self, ids: &[Vec<u32>], clip_skip: usize) -> Tensor<3> {
        let tokens = ids.first().map_or(0, Vec::len);
        let mut hidden = self.embed(ids, tokens);
        for layer in &self.layers[..self.layers_run(clip_skip)] {
            hidden = layer.forward(hidden);
        }
        widen(hidden)
    }

    /// States of long captions: each caption's chunks are encoded on their own and joined as sd-scripts does, the
    /// begin of the first, the 75 inner tokens of each, the end of the last.
    ///
    /// # Shapes
    /// - `chunks`: per caption the same number `n` of rows of 77 ids
    /// - output: `[captions, 75 n + 2, d]`
    pub fn encode_chunks(&self, chunks: &[Vec<Vec<u32>>], clip_skip: usize) -> Tensor<3> {
        let (ids, joint) = rows_of(chunks);
        let hidden = self.hidden_state_raw(&ids, clip_skip);
        self.join(hidden, joint)
    }

    /// The same, untracked, with what [`Self::backward`] needs; see
    /// [`UNet::forward_kept`](super::unet::UNet::forward_kept).
    pub fn encode_chunks_kept(
        &self,
        chunks: &[Vec<Vec<u32>>],
        clip_skip: usize,
        keep: Keep,
    ) -> (Tensor<3>, TextTrace) {
        let (ids, joint) = rows_of(chunks);
        let layers = &self.layers[..self.layers_run(clip_skip)];
        let first = layers
            .iter()
            .position(EncoderLayer::is_adapted)
            .unwrap_or(layers.len());
        let mut hidden = self.embed(&ids, ids.first().map_or(0, Vec::len));
        let mut kept = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            if index < first {
                hidden = layer.forward(hidden);
                continue;
            }
            let inputs = Hidden {
                state: hidden,
                wanted: index > first,
            };
            let (output, part) = Kept::run(keep, inputs, |inputs| layer.forward(inputs.state));
            kept.push(part);
            hidden = output;
        }
        let inputs = Hidden {
            state: hidden,
            wanted: true,
        };
        let (output, last) = Kept::run(keep, inputs, |inputs| self.join(inputs.state, joint));
        let trace = TextTrace { kept, last, joint };
        (widen(output), trace)
    }

    /// Walks back from the gradient of the states; `collect` gets the gradients of one layer after the other.
    ///
    /// # Shapes
    /// - `gradient`: `[captions, 75 n + 2, d]`
    pub fn backward(
        &self,
        trace: TextTrace,
        clip_skip: usize,
        gradient: Tensor<3>,
        collect: &mut dyn FnMut(&mut Gradients),
    ) {
        let layers = &self.layers[..self.layers_run(clip_skip)];
        let first = layers.len() - trace.kept.len();
        let gradient = self.precision.enter(gradient);
        let (mut gradients, leaves) = trace
            .last
            .backward(gradient, |inputs| self.join(inputs.state, trace.joint));
        let mut gradient = leaves.state.grad_remove(&mut gradients);
        for (layer, part) in layers[first..].iter().zip(trace.kept).rev() {
            let Some(of_output) = gradient else { return };
            let (mut gradients, leaves) =
                part.backward(of_output, |inputs| layer.forward(inputs.state));
            gradient = leaves.state.grad_remove(&mut gradients);
            collect(&mut gradients);
        }
    }

    /// The final norm, and the chunks of each caption side by side.
    fn join(&self, hidden: Tensor<3>, joint: Joint) -> Tensor<3> {
        let states = self.final_layer_norm.forward(hidden); // [captions * n, 77, d]
        let Joint {
            captions,
            per_caption,
        } = joint;
        if per_caption <= 1 {
            return states;
        }
        let [_, tokens, d] = states.dims();
        let states = states.reshape([captions, per_caption, tokens, d]);
        let chunk = |index: usize, start: usize, length: usize| {
            states
                .clone()
                .narrow(1, index, 1)
                .narrow(2, start, length)
                .reshape([captions, length, d])
        };
        let inner = tokens - 2;
        let mut parts = vec![chunk(0, 0, 1)];
        parts.extend((0..per_caption).map(|index| chunk(index, 1, inner)));
        parts.push(chunk(per_caption - 1, tokens - 1, 1));
        Tensor::cat(parts, 1)
    }

    fn layers_run(&self, clip_skip: usize) -> usize {
        self.depth().saturating_sub(clip_skip.saturating_sub(1))
    }

    /// Every linear layer with its path, for adapters.
    pub fn layers_mut(&mut self) -> Layers<'_> {
        let mut found = Vec::new();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let path = format!("text_model.encoder.layers.{index}");
            let attention = &mut layer.self_attn;
            for (name, linear) in [
                ("self_attn.k_proj", &mut attention.k_proj),
                ("self_attn.v_proj", &mut attention.v_proj),
                ("self_attn.q_proj", &mut attention.q_proj),
                ("self_attn.out_proj", &mut attention.out_proj),
                ("mlp.fc1", &mut layer.mlp.fc1),
                ("mlp.fc2", &mut layer.mlp.fc2),
            ] {
                found.push((format!("{path}.{name}"), LayerMut::Linear(linear)));
            }
        }
        found
    }

    fn embed(&self, ids: &[Vec<u32>], tokens: usize) -> Tensor<3> {
        let device = self.position_embedding.device();
        let flat: Vec<i32> = ids
            .iter()
            .flatten()
            .map(|id| i32::try_from(*id).unwrap_or(i32::MAX))
            .collect();
        let count = flat.len();
        let index = Tensor::<1, Int>::from_data(TensorData::new(flat, [count]), &device);
        let rows = self.token_embedding.clone().select(0, index); // [rows * tokens, d]
        let rows = rows.cast(burn::tensor::FloatDType::F32);
        let positions = self.position_embedding.clone().narrow(0, 0, tokens);
        let embedded = rows.reshape([ids.len(), tokens, self.width()]) + positions.unsqueeze();
        self.precision.enter(embedded)
    }
}

fn rows_of(chunks: &[Vec<Vec<u32>>]) -> (Vec<Vec<u32>>, Joint) {
    let joint = Joint {
        captions: chunks.len(),
        per_caption: chunks.first().map_or(0, Vec::len),
    };
    (chunks.iter().flatten().cloned().collect(), joint)
}

impl EncoderLayer {
    fn is_adapted(&self) -> bool {
        let attention = &self.self_attn;
        [
            &attention.q_proj,
            &attention.k_proj,
            &attention.v_proj,
            &attention.out_proj,
            &self.mlp.fc1,
            &self.mlp.fc2,
        ]
        .into_iter()
        .any(Linear::is_adapted)
    }

    fn load(weights: &WeightsAt<'_>, config: &TextEncoderConfig) -> Result<Self, LoadError> {
        let d = config.hidden_size;
        let attention = weights.at("self_attn");
        let square = |name: &str| Linear::load_sized(&attention.at(name), d, d);
        Ok(Self {
            layer_norm1: LayerNorm::load(&weights.at("layer_norm1"), d, config.layer_norm_eps)?,
            self_attn: SelfAttention {
                q_proj: square("q_proj")?,
                k_proj: square("k_proj")?,
                v_proj: square("v_proj")?,
                out_proj: square("out_proj")?,
                heads: config.num_attention_heads,
            },
            layer_norm2: LayerNorm::load(&weights.at("layer_norm2"), d, config.layer_norm_eps)?,
            mlp: Mlp {
                fc1: Linear::load_sized(&weights.at("mlp.fc1"), d, config.intermediate_size)?,
                fc2: Linear::load_sized(&weights.at("mlp.fc2"), config.intermediate_size, d)?,
                activation: config.activation(),
            },
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = x.clone() + self.self_attn.forward(self.layer_norm1.forward(x));
        x.clone() + self.mlp.forward(self.layer_norm2.forward(x))
    }
}

impl SelfAttention {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let q = split_heads(self.q_proj.forward(x.clone()), self.heads);
        let k = split_heads(self.k_proj.forward(x.clone()), self.heads);
        let v = split_heads(self.v_proj.forward(x), self.heads);
        // A token sees itself and earlier ones.
        let mixed = attention([q, k, v], true, self.q_proj.precision());
        self.out_proj.forward(merge_heads(mixed))
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.fc2
            .forward(self.activation.forward(self.fc1.forward(x)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Goldens, weights};
    use super::*;

    /// Outputs are computed in f32 by the reference too; its own distance from f64 is up to 4e-6.
    const TOLERANCE: f32 = 2e-5;

    #[test]
    fn states_equal_the_reference() {
        let (weights, folder) = weights("text_encoder");
        let config = TextEncoderConfig::from_json(&folder.join("config.json")).unwrap();
        let encoder = TextEncoder::load(&weights.at(""), &config).unwrap();
        let goldens = Goldens::open("text_encoder");
        let ids = goldens.ids("input_ids");
        goldens.check("last_hidden_state", encoder.forward(&ids, 1), TOLERANCE);
        goldens.check(
            "penultimate_raw",
            encoder.hidden_state_raw(&ids, 2),
            TOLERANCE,
        );
        goldens.check("clip_skip_2", encoder.forward(&ids, 2), TOLERANCE);
    }

    #[test]
    fn sizes_are_inferred_from_shapes() {
        let (weights, folder) = weights("text_encoder");
        let stated = TextEncoderConfig::from_json(&folder.join("config.json")).unwrap();
        let hints = super::super::config::Hints {
            text_head_width: stated.hidden_size / stated.num_attention_heads,
            ..super::super::config::Hints::SD1
        };
        let inferred = TextEncoderConfig::infer(&weights.at(""), &hints).unwrap();
        assert_eq!(format!("{inferred:?}"), format!("{stated:?}"));
    }
}
