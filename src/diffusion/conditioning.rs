//! What the UNet is told beside the noisy latent: the text of one or two encoders and, in SDXL, pooled text and sizes.

use burn::tensor::{Gradients, Tensor, TensorData};

use super::layers::Layers;
use super::segments::Keep;
use super::text_encoder::{Encoded, EncodedGradients, Reading, TextEncoder, TextTrace};

/// How many sizes SDXL is told.
pub const SIZES: usize = 6;

/// The sizes that SDXL is told of a picture, in pixels: original height and width, top and left of the crop, target
/// height and width.
pub type TimeIds = [f32; SIZES];

/// A caption as rows of 77 token ids, for each text encoder of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaptionTokens {
    /// For the first, or only, encoder.
    pub first: Vec<Vec<u32>>,
    /// For the second; empty where there is none.
    pub second: Vec<Vec<u32>>,
}

impl From<Vec<Vec<u32>>> for CaptionTokens {
    fn from(first: Vec<Vec<u32>>) -> Self {
        Self {
            first,
            second: Vec::new(),
        }
    }
}

/// A prompt whose words have weights.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedTokens {
    /// Its ids.
    pub tokens: CaptionTokens,
    /// The weight of each state of the first encoder.
    pub first_weights: Vec<f32>,
    /// The same of the second; empty where there is none.
    pub second_weights: Vec<f32>,
}

/// Captions, encoded.
#[derive(Clone, Debug)]
pub struct TextStates {
    /// `[captions, tokens, d]`
    pub states: Tensor<3>,
    /// `[captions, d_pooled]`, in SDXL.
    pub pooled: Option<Tensor<2>>,
}

impl From<Tensor<3>> for TextStates {
    fn from(states: Tensor<3>) -> Self {
        Self {
            states,
            pooled: None,
        }
    }
}

impl TextStates {
    /// Several captions one after the other.
    pub fn cat(parts: Vec<Self>) -> Self {
        let pooled: Option<Vec<_>> = parts.iter().map(|part| part.pooled.clone()).collect();
        let states = parts.into_iter().map(|part| part.states).collect();
        Self {
            states: Tensor::cat(states, 0),
            pooled: pooled.map(|pooled| Tensor::cat(pooled, 0)),
        }
    }

    /// One of the captions.
    #[must_use]
    pub fn caption(&self, index: usize) -> Self {
        Self {
            states: self.states.clone().narrow(0, index, 1),
            pooled: self
                .pooled
                .as_ref()
                .map(|pooled| pooled.clone().narrow(0, index, 1)),
        }
    }

    /// A single caption, several times.
    #[must_use]
    pub fn repeat(self, count: usize) -> Self {
        Self {
            states: self.states.repeat_dim(0, count),
            pooled: self.pooled.map(|pooled| pooled.repeat_dim(0, count)),
        }
    }

    /// With the sizes of the pictures, one for each caption; a UNet that is told no pooled text needs none.
    pub fn with_sizes(self, time_ids: &[TimeIds]) -> Condition {
        Condition {
            states: self.states,
            added: self.pooled.map(|pooled| Added {
                pooled,
                time_ids: time_ids.to_vec(),
            }),
        }
    }
}

/// What the UNet is told.
#[derive(Clone, Debug)]
pub struct Condition {
    /// `[batch, tokens, d_context]`
    pub states: Tensor<3>,
    /// What SDXL is told besides.
    pub added: Option<Added>,
}

/// Pooled text and sizes of the pictures.
#[derive(Clone, Debug)]
pub struct Added {
    /// `[batch, d_pooled]`
    pub pooled: Tensor<2>,
    /// One for each sample.
    pub time_ids: Vec<TimeIds>,
}

impl From<Tensor<3>> for Condition {
    fn from(states: Tensor<3>) -> Self {
        Self {
            states,
            added: None,
        }
    }
}

impl Condition {
    /// Two batches one after the other.
    pub fn cat(first: Self, second: Self) -> Self {
        let added = first.added.zip(second.added).map(|(first, second)| Added {
            pooled: Tensor::cat(vec![first.pooled, second.pooled], 0),
            time_ids: [first.time_ids, second.time_ids].concat(),
        });
        Self {
            states: Tensor::cat(vec![first.states, second.states], 0),
            added,
        }
    }
}

/// Gradients of a [`Condition`], where they were wanted.
#[derive(Debug, Default)]
pub struct ConditionGradients {
    /// `[batch, tokens, d_context]`
    pub states: Option<Tensor<3>>,
    /// `[batch, d_pooled]`
    pub pooled: Option<Tensor<2>>,
}

/// The text encoders of a model.
#[derive(Debug)]
pub struct TextEncoders {
    /// The only one, or SDXL's first.
    pub first: TextEncoder,
    /// SDXL's second.
    pub second: Option<TextEncoder>,
}

/// A forward that a backward can follow.
#[derive(Debug)]
pub struct TextTraces {
    first: TextTrace,
    second: Option<TextTrace>,
}

impl TextEncoders {
    /// Length of a state, of both encoders together.
    pub fn width(&self) -> usize {
        self.first.width() + self.second.as_ref().map_or(0, TextEncoder::width)
    }

    /// Length of the pooled text.
    pub fn pooled_width(&self) -> Option<usize> {
        self.second.as_ref()?.pooled_width()
    }

    /// SDXL takes the penultimate states of both as they are, whatever `clip_skip` says; the others the states
    /// `clip_skip` from the end, after the final norm.
    fn reading(&self, clip_skip: usize) -> Reading {
        if self.second.is_some() {
            Reading::PENULTIMATE
        } else {
            Reading::normed(clip_skip)
        }
    }

    /// Encodes captions, all of one number of rows.
    pub fn encode(&self, captions: &[CaptionTokens], clip_skip: usize) -> TextStates {
        let first = self
            .first
            .encode(&rows(captions, |c| &c.first), self.reading(clip_skip));
        let second = self
            .second
            .as_ref()
            .map(|encoder| encoder.encode(&rows(captions, |c| &c.second), Reading::POOLED));
        joined(first, second)
    }

    /// Encodes a prompt: its states times their weights, as sd-scripts does it, which does not bring their mean back to
    /// what it was. Pooled text has no weights.
    pub fn encode_weighted(&self, prompt: &WeightedTokens, clip_skip: usize) -> TextStates {
        let encoded = self.encode(std::slice::from_ref(&prompt.tokens), clip_skip);
        let weights = [&prompt.first_weights, &prompt.second_weights];
        if weights.into_iter().flatten().all(|&weight| weight == 1.0) {
            return encoded;
        }
        let [_, tokens, width] = encoded.states.dims();
        let first = self.first.width();
        let own = |at: usize, length: usize, weights: &[f32]| {
            let states = encoded.states.clone().narrow(2, at, length);
            let data = TensorData::new(weights.to_vec(), [1, tokens, 1]);
            let weights = Tensor::<3>::from_data(data, (&states.device(), states.dtype()));
            states * weights // [1, tokens, length]
        };
        let mut parts = vec![own(0, first, &prompt.first_weights)];
        if width > first {
            parts.push(own(first, width - first, &prompt.second_weights));
        }
        TextStates {
            states: Tensor::cat(parts, 2),
            pooled: encoded.pooled,
        }
    }

    /// The same, untracked, with what [`Self::backward`] needs.
    pub fn encode_kept(
        &self,
        captions: &[CaptionTokens],
        clip_skip: usize,
        keep: Keep,
    ) -> (TextStates, TextTraces) {
        let how = self.reading(clip_skip);
        let (states, first) = self
            .first
            .encode_kept(&rows(captions, |c| &c.first), how, keep);
        let (second, trace) = self
            .second
            .as_ref()
            .map(|encoder| {
                encoder.encode_kept(&rows(captions, |c| &c.second), Reading::POOLED, keep)
            })
            .unzip();
        let traces = TextTraces {
            first,
            second: trace,
        };
        (joined(states, second), traces)
    }

    /// Walks back from the gradients of the states; `collect` gets the gradients of one layer after the other.
    pub fn backward(
        &self,
        traces: TextTraces,
        gradients: ConditionGradients,
        collect: &mut dyn FnMut(&mut Gradients),
    ) {
        let ConditionGradients { states, pooled } = gradients;
        let mut states = states;
        if let (Some(encoder), Some(trace)) = (&self.second, traces.second) {
            let (first, second) = (self.first.width(), encoder.width());
            let of_second = states.clone().map(|both| both.narrow(2, first, second));
            states = states.map(|both| both.narrow(2, 0, first));
            let gradients = EncodedGradients {
                states: of_second,
                pooled,
            };
            encoder.backward(trace, gradients, collect);
        }
        let gradients = EncodedGradients {
            states,
            pooled: None,
        };
        self.first.backward(traces.first, gradients, collect);
    }

    /// Every linear layer of the first encoder, and of the second, with its path, for adapters.
    pub fn layers_mut(&mut self) -> (Layers<'_>, Layers<'_>) {
        let second = self.second.as_mut().map(TextEncoder::layers_mut);
        (self.first.layers_mut(), second.unwrap_or_default())
    }
}

fn rows(
    captions: &[CaptionTokens],
    of: impl Fn(&CaptionTokens) -> &Vec<Vec<u32>>,
) -> Vec<Vec<Vec<u32>>> {
    captions.iter().map(|caption| of(caption).clone()).collect()
}

/// The states of both encoders side by side; the second's pooled text.
fn joined(first: Encoded, second: Option<Encoded>) -> TextStates {
    match second {
        None => first.states.into(),
        Some(second) => TextStates {
            states: Tensor::cat(vec![first.states, second.states], 2),
            pooled: second.pooled,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Device;

    use crate::diffusion::{LoadOptions, StableDiffusion};

    #[test]
    fn states_of_weighted_words_are_multiplied_and_nothing_else() {
        for name in ["tiny-sd15", "tiny-sdxl"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
            let path = path.join(name).join("diffusers");
            let model = StableDiffusion::load(&path, &LoadOptions::new(&Device::flex()));
            let model = model.expect("the fixture loads");
            let text = model.text().expect("loaded");
            let long = vec!["cat"; 74].join(" ");
            let heavy = format!("{long} (dog bird:1.5) [fish]");
            let plain = format!("{long} dog bird fish");
            let weighted = text.encode_weighted(&model.weighted_tokens(&heavy, 152), 1);
            let usual = text.encode(&[model.tokens(&plain, 152)], 1);
            let ([_, tokens, width], first) = (usual.states.dims(), text.first.width());
            assert_eq!((tokens, width), (152, text.width()));
            let values = |states: burn::tensor::Tensor<3>| -> Vec<f32> {
                states.to_data().iter::<f32>().collect()
            };
            let (found, usual_states) = (values(weighted.states), values(usual.states));
            for (index, (found, usual)) in found.iter().zip(&usual_states).enumerate() {
                let weight = match index / width {
                    75 | 76 => 1.5,
                    77 => 1.0 / 1.1,
                    _ => 1.0,
                };
                let expected = usual * weight;
                assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{index}");
            }
            assert!(name == "tiny-sdxl" || first == width);
            let pooled = |pooled: Option<burn::tensor::Tensor<2>>| {
                pooled.map(|pooled| pooled.to_data().iter::<f32>().collect::<Vec<f32>>())
            };
            assert_eq!(pooled(weighted.pooled), pooled(usual.pooled));
        }
    }
}
