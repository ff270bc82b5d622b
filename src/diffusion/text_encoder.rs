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
    text_projection: Option<Linear>, // of the pooled state, in SDXL's second encoder
    precision: Precision,
}

/// What of an encoder's work conditions the UNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Which hidden state, counted from the end; 1 is the last. Layers behind it do not run, unless `pooled`.
    clip_skip: usize,
    /// Whether the final norm is applied to it.
    final_norm: bool,
    /// Whether the projected state of the end token is read as well.
    pooled: bool,
}

impl Reading {
    /// SDXL's first encoder: the state before the last, as it is.
    pub const PENULTIMATE: Self = Self {
        clip_skip: 2,
        final_norm: false,
        pooled: false,
    };
    /// SDXL's second encoder: that, and the pooled text.
    pub const POOLED: Self = Self {
        clip_skip: 2,
        final_norm: false,
        pooled: true,
    };

    /// Stable Diffusion 1 and 2: the state `clip_skip` from the end, after the final norm.
    pub fn normed(clip_skip: usize) -> Self {
        Self {
            clip_skip,
            final_norm: true,
            pooled: false,
        }
    }
}

/// Captions, encoded by one encoder.
#[derive(Debug)]
pub struct Encoded {
    /// `[captions, 75 n + 2, d]`
    pub states: Tensor<3>,
    /// `[captions, d_pooled]`, where it was asked for.
    pub pooled: Option<Tensor<2>>,
}

/// Gradients of [`Encoded`].
#[derive(Debug)]
pub struct EncodedGradients {
    /// `[captions, 75 n + 2, d]`
    pub states: Option<Tensor<3>>,
    /// `[captions, d_pooled]`
    pub pooled: Option<Tensor<2>>,
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
    states: Kept<Hidden, 3>,
    /// With the places of the end tokens.
    pooled: Option<(Kept<Hidden, 2>, Vec<usize>)>,
    joint: Joint,
    how: Reading,
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
            text_projection: None,
            precision: weights.precision(),
        })
    }

    /// The same with the projection of the pooled state.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_pooled(
        weights: &WeightsAt<'_>,
        config: &TextEncoderConfig,
    ) -> Result<Self, LoadError> {
        let encoder = Self::load(weights, config)?;
        let weights = weights.at("text_projection");
        let d_out = weights.shape("weight")?.first().copied().unwrap_or(0);
        Ok(Self {
            text_projection: Some(Linear::load_sized(&weights, config.hidden_size, d_out)?),
            ..encoder
        })
    }

    /// Length of the pooled state.
    pub fn pooled_width(&self) -> Option<usize> {
        self.text_projection.as_ref().map(Linear::d_out)
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

    /// Encodes captions, whose chunks are encoded on their own and joined as sd-scripts does: the begin of the first,
    /// the 75 inner tokens of each, the end of the last. The pooled text is that of the first chunk.
    ///
    /// `chunks` has per caption the same number of rows of 77 ids.
    pub fn encode(&self, chunks: &[Vec<Vec<u32>>], how: Reading) -> Encoded {
        let (ids, joint) = rows_of(chunks);
        let taken = self.layers_run(how.clip_skip);
        let mut hidden = self.embed(&ids, ids.first().map_or(0, Vec::len));
        for layer in &self.layers[..taken] {
            hidden = layer.forward(hidden);
        }
        let states = widen(self.join(widen(hidden.clone()), joint, how));
        let pooled = how.pooled.then(|| {
            for layer in &self.layers[taken..] {
                hidden = layer.forward(hidden.clone());
            }
            let ends = ends(&ids, joint);
            widen(self.pool(hidden.clone(), &ends))
        });
        Encoded { states, pooled }
    }

    /// States of long captions, `clip_skip` from the end and after the final norm; see [`Self::encode`].
    ///
    /// # Shapes
    /// - `chunks`: per caption the same number `n` of rows of 77 ids
    /// - output: `[captions, 75 n + 2, d]`
    pub fn encode_chunks(&self, chunks: &[Vec<Vec<u32>>], clip_skip: usize) -> Tensor<3> {
        self.encode(chunks, Reading::normed(clip_skip)).states
    }

    /// The same as [`Self::encode`], untracked, with what [`Self::backward`] needs; see
    /// [`UNet::forward_kept`](super::unet::UNet::forward_kept).
    pub fn encode_kept(
        &self,
        chunks: &[Vec<Vec<u32>>],
        how: Reading,
        keep: Keep,
    ) -> (Encoded, TextTrace) {
        let (ids, joint) = rows_of(chunks);
        let taken = self.layers_run(how.clip_skip);
        let layers = self.layers_for(how);
        let first = layers
            .iter()
            .position(EncoderLayer::is_adapted)
            .unwrap_or(layers.len());
        let mut hidden = self.embed(&ids, ids.first().map_or(0, Vec::len));
        let mut before = (taken == 0).then(|| hidden.clone());
        let mut kept = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            if index < first {
                hidden = layer.forward(hidden);
            } else {
                let inputs = Hidden {
                    state: hidden,
                    wanted: index > first,
                };
                let (output, part) = Kept::run(keep, inputs, |inputs| layer.forward(inputs.state));
                kept.push(part);
                hidden = output;
            }
            if index + 1 == taken {
                before = Some(hidden.clone());
            }
        }
        let read = |state: &Tensor<3>| Hidden {
            state: state.clone(),
            wanted: true,
        };
        let before = before.as_ref().unwrap_or(&hidden);
        let (joined, states) = Kept::run(keep, read(before), |inputs| {
            self.join(inputs.state, joint, how)
        });
        let (pooled, pooled_part) = how
            .pooled
            .then(|| {
                let ends = ends(&ids, joint);
                let (pooled, part) =
                    Kept::run(keep, read(&hidden), |inputs| self.pool(inputs.state, &ends));
                (widen(pooled), (part, ends))
            })
            .unzip();
        let trace = TextTrace {
            kept,
            states,
            pooled: pooled_part,
            joint,
            how,
        };
        let states = widen(joined);
        (Encoded { states, pooled }, trace)
    }

    /// Walks back from the gradients of what was read; `collect` gets the gradients of one layer after the other.
    pub fn backward(
        &self,
        trace: TextTrace,
        gradients: EncodedGradients,
        collect: &mut dyn FnMut(&mut Gradients),
    ) {
        let (joint, how) = (trace.joint, trace.how);
        let taken = self.layers_run(how.clip_skip);
        let layers = self.layers_for(how);
        let first = layers.len() - trace.kept.len();
        let mut of_states = gradients.states.and_then(|gradient| {
            let gradient = self.precision.enter(gradient);
            let part = trace.states;
            let (mut gradients, leaves) =
                part.backward(gradient, |inputs| self.join(inputs.state, joint, how));
            leaves.state.grad_remove(&mut gradients)
        });
        let pooled = trace.pooled.zip(gradients.pooled);
        let mut gradient = pooled.and_then(|((part, ends), gradient)| {
            let gradient = self.precision.enter(gradient);
            let (mut gradients, leaves) =
                part.backward(gradient, |inputs| self.pool(inputs.state, &ends));
            leaves.state.grad_remove(&mut gradients)
        });
        let parts = layers[first..].iter().zip(trace.kept);
        for (index, (layer, part)) in (first..layers.len()).zip(parts).rev() {
            if index + 1 == taken {
                gradient = match (gradient, of_states.take()) {
                    (Some(a), Some(b)) => Some(a + b),
                    (a, b) => a.or(b),
                };
            }
            let Some(of_output) = gradient.take() else {
                continue;
            };
            let (mut gradients, leaves) =
                part.backward(of_output, |inputs| layer.forward(inputs.state));
            gradient = leaves.state.grad_remove(&mut gradients);
            collect(&mut gradients);
        }
    }

    /// The layers that have to run.
    fn layers_for(&self, how: Reading) -> &[EncoderLayer] {
        let count = if how.pooled {
            self.depth()
        } else {
            self.layers_run(how.clip_skip)
        };
        &self.layers[..count]
    }

    /// `text_projection(final_layer_norm(state of the end token))`.
    ///
    /// # Shapes
    /// - `hidden`: `[rows, 77, d]`
    /// - output: `[captions, d_pooled]`
    fn pool(&self, hidden: Tensor<3>, ends: &[usize]) -> Tensor<2> {
        let [rows, tokens, d] = hidden.dims();
        let index: Vec<i32> = ends.iter().map(|end| *end as i32).collect();
        let index = TensorData::new(index, [ends.len()]);
        let index = Tensor::<1, Int>::from_data(index, &hidden.device());
        let hidden = hidden.reshape([rows * tokens, d]).select(0, index); // [captions, d]
        let normed = self.final_layer_norm.forward(hidden.unsqueeze());
        let normed = normed.reshape([ends.len(), d]);
        match &self.text_projection {
            Some(projection) => projection.forward(normed),
            None => normed,
        }
    }

    /// The final norm, where it is wanted, and the chunks of each caption side by side.
    fn join(&self, hidden: Tensor<3>, joint: Joint, how: Reading) -> Tensor<3> {
        let states = if how.final_norm {
            self.final_layer_norm.forward(hidden)
        } else {
            hidden
        }; // [captions * n, 77, d]
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

/// Where the first end token of each caption is, counted over all rows: the largest id there is.
fn ends(ids: &[Vec<u32>], joint: Joint) -> Vec<usize> {
    let first_rows = ids.iter().enumerate().step_by(joint.per_caption.max(1));
    first_rows
        .map(|(index, row)| {
            let end = row.iter().max();
            let at = row.iter().position(|id| Some(id) == end);
            index * row.len() + at.unwrap_or(0)
        })
        .collect()
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
