//! The decoder of text (`BlipTextLMHeadModel`): BERT with causal attention and attention to the picture.
//!
//! Keys and values of earlier tokens and of pictures are kept. Rows are captions: `rows / pictures` neighbours look at
//! the same picture, whose keys exist once.

use burn::tensor::{FloatDType, Int, Tensor, TensorData};

use super::config::TextConfig;
use crate::diffusion::LoadError;
use crate::diffusion::WeightsAt;
use crate::diffusion::attention::{attention, merge_heads, split_heads};
use crate::diffusion::layers::{Activation, LayerNorm, Linear};

/// Devlin et al. 2019, arXiv:1810.04805, as a decoder.
#[derive(Debug)]
pub struct TextDecoder {
    word_embeddings: Tensor<2>,     // [vocabulary, d]
    position_embeddings: Tensor<2>, // [positions, d]
    norm: LayerNorm,
    layers: Vec<Layer>,
    head: Head,
}

#[derive(Debug)]
struct Layer {
    attention: Attention,
    crossattention: Attention,
    intermediate: Linear,
    output: Linear,
    norm: LayerNorm,
    activation: Activation,
}

#[derive(Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    norm: LayerNorm,
    heads: usize,
}

/// Scores of the next token.
#[derive(Debug)]
struct Head {
    dense: Linear,
    norm: LayerNorm,
    decoder: Linear,
    activation: Activation,
}

/// Keys and values: `[rows, heads, tokens, d_head]`
type Seen = [Tensor<4>; 2];

/// What is kept between tokens.
#[derive(Clone, Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
    /// Tokens that were seen.
    tokens: usize,
}

#[derive(Clone, Debug)]
struct LayerCache {
    /// Of earlier tokens, by row.
    own: Option<Seen>,
    /// Of pictures.
    picture: Seen,
}

impl TextDecoder {
    /// Reads the decoder; `weights` is the view of `text_decoder`, `d_picture` the length of a picture's states.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape than `config` says.
    pub fn load(
        weights: &WeightsAt<'_>,
        config: &TextConfig,
        d_picture: usize,
    ) -> Result<Self, LoadError> {
        let d = config.hidden_size;
        let embeddings = weights.at("bert.embeddings");
        let word_embeddings: Tensor<2> = embeddings
            .at("word_embeddings")
            .tensor("weight", [config.vocab_size, d])?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| {
                let layer = weights.at("bert.encoder.layer").at(index.to_string());
                Layer::load(&layer, config, d_picture)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            head: Head::load(&weights.at("cls.predictions"), config, &word_embeddings)?,
            word_embeddings,
            position_embeddings: embeddings
                .at("position_embeddings")
                .tensor_f32("weight", [config.max_position_embeddings, d])?,
            norm: LayerNorm::load(&embeddings.at("LayerNorm"), d, config.layer_norm_eps)?,
            layers,
        })
    }

    /// Reads the pictures; nothing was said about them yet.
    ///
    /// # Shapes
    /// - `states`: `[pictures, tokens, d_picture]`
    pub fn look(&self, states: &Tensor<3>) -> Cache {
        let layers = self.layers.iter().map(|layer| LayerCache {
            own: None,
            picture: layer.crossattention.keys_and_values(states.clone()),
        });
        Cache {
            layers: layers.collect(),
            tokens: 0,
        }
    }

    /// States of tokens behind those that the cache has seen: several at once only where it has seen none.
    ///
    /// # Shapes
    /// - `ids`: rows of one length
    /// - output: `[rows, tokens, d]`
    pub fn forward(&self, ids: &[Vec<u32>], cache: &mut Cache) -> Tensor<3> {
        let tokens = ids.first().map_or(0, Vec::len);
        debug_assert!(cache.tokens == 0 || tokens == 1);
        let mut hidden = self.norm.forward(self.embed(ids, tokens, cache.tokens));
        for (layer, seen) in self.layers.iter().zip(&mut cache.layers) {
            hidden = layer.forward(hidden, seen);
        }
        cache.tokens += tokens;
        hidden
    }

    /// Scores of each token of the vocabulary to come next.
    ///
    /// # Shapes
    /// - `states`: `[rows, tokens, d]`
    /// - output: `[rows, tokens, vocabulary]`
    pub fn scores(&self, states: Tensor<3>) -> Tensor<3> {
        let head = &self.head;
        let hidden = head.activation.forward(head.dense.forward(states));
        head.decoder.forward(head.norm.forward(hidden))
    }

    fn embed(&self, ids: &[Vec<u32>], tokens: usize, first: usize) -> Tensor<3> {
        let index = indices(
            ids.iter().flatten().map(|id| *id as usize),
            &self.word_embeddings,
        );
        let [_, d] = self.word_embeddings.dims();
        let words = self.word_embeddings.clone().select(0, index); // [rows * tokens, d]
        let words = words.cast(FloatDType::F32);
        let places = self.position_embeddings.clone().narrow(0, first, tokens);
        words.reshape([ids.len(), tokens, d]) + places.unsqueeze()
    }
}

fn indices<const D: usize>(of: impl Iterator<Item = usize>, like: &Tensor<D>) -> Tensor<1, Int> {
    let of: Vec<i32> = of
        .map(|index| i32::try_from(index).unwrap_or(i32::MAX))
        .collect();
    let count = of.len();
    Tensor::from_data(TensorData::new(of, [count]), &like.device())
}

impl Cache {
    /// Goes on with these rows, in this order.
    pub fn select_rows(&mut self, rows: &[usize]) {
        let Some([first, _]) = self.layers.first().and_then(|layer| layer.own.as_ref()) else {
            return;
        };
        if rows.iter().copied().eq(0..first.dims()[0]) {
            return;
        }
        let index = indices(rows.iter().copied(), first);
        for layer in &mut self.layers {
            let own = layer.own.take();
            layer.own = own.map(|seen| seen.map(|tensor| tensor.select(0, index.clone())));
        }
    }

    /// Goes on with these pictures, in this order.
    pub fn select_pictures(&mut self, pictures: &[usize]) {
        let Some(layer) = self.layers.first() else {
            return;
        };
        if pictures.iter().copied().eq(0..layer.picture[0].dims()[0]) {
            return;
        }
        let index = indices(pictures.iter().copied(), &layer.picture[0]);
        for layer in &mut self.layers {
            let seen = layer.picture.clone();
            layer.picture = seen.map(|tensor| tensor.select(0, index.clone()));
        }
    }
}

impl Layer {
    fn load(
        weights: &WeightsAt<'_>,
        config: &TextConfig,
        d_picture: usize,
    ) -> Result<Self, LoadError> {
        let (d, wide) = (config.hidden_size, config.intermediate_size);
        let output = weights.at("output");
        Ok(Self {
            attention: Attention::load(&weights.at("attention"), config, d)?,
            crossattention: Attention::load(&weights.at("crossattention"), config, d_picture)?,
            intermediate: Linear::load_sized(&weights.at("intermediate.dense"), d, wide)?,
            output: Linear::load_sized(&output.at("dense"), wide, d)?,
            norm: LayerNorm::load(&output.at("LayerNorm"), d, config.layer_norm_eps)?,
            activation: config.hidden_act.into(),
        })
    }

    fn forward(&self, x: Tensor<3>, cache: &mut LayerCache) -> Tensor<3> {
        let x = self.attention.to_text(x, &mut cache.own);
        let x = self.crossattention.to_pictures(x, &cache.picture);
        let hidden = self
            .activation
            .forward(self.intermediate.forward(x.clone()));
        self.norm.forward(self.output.forward(hidden) + x)
    }
}

impl Attention {
    fn load(
        weights: &WeightsAt<'_>,
        config: &TextConfig,
        d_seen: usize,
    ) -> Result<Self, LoadError> {
        let d = config.hidden_size;
        let (inner, output) = (weights.at("self"), weights.at("output"));
        Ok(Self {
            query: Linear::load_sized(&inner.at("query"), d, d)?,
            key: Linear::load_sized(&inner.at("key"), d_seen, d)?,
            value: Linear::load_sized(&inner.at("value"), d_seen, d)?,
            dense: Linear::load_sized(&output.at("dense"), d, d)?,
            norm: LayerNorm::load(&output.at("LayerNorm"), d, config.layer_norm_eps)?,
            heads: config.num_attention_heads,
        })
    }

    fn keys_and_values(&self, states: Tensor<3>) -> Seen {
        let keys = self.key.forward(states.clone());
        [keys, self.value.forward(states)].map(|tensor| split_heads(tensor, self.heads))
    }

    /// Over the tokens so far, which the new ones join.
    fn to_text(&self, x: Tensor<3>, seen: &mut Option<Seen>) -> Tensor<3> {
        let new = self.keys_and_values(x.clone());
        // A single new token may look at all; several are the first.
        let (all, causal) = match seen.take() {
            None => (new, true),
            Some([keys, values]) => {
                let [new_keys, new_values] = new;
                let keys = Tensor::cat(vec![keys, new_keys], 2);
                let values = Tensor::cat(vec![values, new_values], 2);
                ([keys, values], false)
            }
        };
        *seen = Some(all.clone());
        let [keys, values] = all;
        let q = split_heads(self.query.forward(x.clone()), self.heads);
        let y = attention([q, keys, values], causal, self.query.precision());
        self.join(merge_heads(y), x)
    }

    /// Over the states of pictures. Rows that look at the same picture do so as queries of one row.
    fn to_pictures(&self, x: Tensor<3>, [keys, values]: &Seen) -> Tensor<3> {
        let [rows, tokens, d] = x.dims();
        let pictures = keys.dims()[0];
        let together = [pictures, rows / pictures.max(1) * tokens, d];
        let q = split_heads(self.query.forward(x.clone()).reshape(together), self.heads);
        let seen = [q, keys.clone(), values.clone()];
        let y = attention(seen, false, self.query.precision());
        self.join(merge_heads(y).reshape([rows, tokens, d]), x)
    }

    fn join(&self, y: Tensor<3>, x: Tensor<3>) -> Tensor<3> {
        self.norm.forward(self.dense.forward(y) + x)
    }
}

impl Head {
    /// The last layer has the words' embeddings as weights unless it has its own; its bias has two names.
    fn load(
        weights: &WeightsAt<'_>,
        config: &TextConfig,
        words: &Tensor<2>,
    ) -> Result<Self, LoadError> {
        let d = config.hidden_size;
        let decoder = weights.at("decoder");
        let bias = if weights.has("bias") {
            weights.tensor_f32("bias", [config.vocab_size])?
        } else {
            decoder.tensor_f32("bias", [config.vocab_size])?
        };
        let weight = if decoder.has("weight") {
            decoder.tensor("weight", [config.vocab_size, d])?
        } else {
            words.clone()
        };
        let transform = weights.at("transform");
        Ok(Self {
            dense: Linear::load_sized(&transform.at("dense"), d, d)?,
            norm: LayerNorm::load(&transform.at("LayerNorm"), d, config.layer_norm_eps)?,
            decoder: Linear::new(weight, Some(bias)),
            activation: config.hidden_act.into(),
        })
    }
}
