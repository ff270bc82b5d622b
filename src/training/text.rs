//! Captions as the UNet's conditioning: token ids while the text encoder is trained, hidden states otherwise.

use std::collections::HashMap;

use burn::tensor::Tensor;

use crate::diffusion::StableDiffusion;
use crate::training::step::Conditioning;

/// Captions that are encoded at once; more rows do not run faster on a CPU.
const ROWS_AT_ONCE: usize = 8;

/// Every distinct caption of a run, prepared once.
#[derive(Debug)]
pub enum Captions {
    /// Token ids by caption.
    Tokens(HashMap<String, Vec<Vec<u32>>>),
    /// Hidden states `[1, tokens, d]` by caption.
    States(HashMap<String, Tensor<3>>),
}

impl Captions {
    /// Tokenizes the captions, and encodes them when the text encoder stays as it is.
    pub fn prepare<'a>(
        model: &StableDiffusion,
        captions: impl IntoIterator<Item = &'a str>,
        max_token_length: usize,
        clip_skip: usize,
        text_encoder_is_trained: bool,
    ) -> Self {
        let tokens: HashMap<String, Vec<Vec<u32>>> = captions
            .into_iter()
            .map(|caption| {
                let rows = token_rows(model, caption, max_token_length);
                (caption.to_owned(), rows)
            })
            .collect();
        if text_encoder_is_trained {
            return Self::Tokens(tokens);
        }
        let mut states = HashMap::new();
        let tokens: Vec<_> = tokens.into_iter().collect();
        for group in tokens.chunks(ROWS_AT_ONCE) {
            let rows: Vec<_> = group.iter().map(|(_, rows)| rows.clone()).collect();
            let encoded = model.text_encoder.encode_chunks(&rows, clip_skip);
            for (index, (caption, _)) in group.iter().enumerate() {
                let state = encoded.clone().narrow(0, index, 1); // [1, tokens, d]
                states.insert(caption.clone(), state);
            }
        }
        Self::States(states)
    }

    /// The conditioning of a batch; every caption must be one of those prepared.
    pub fn batch(&self, captions: &[&str]) -> Conditioning {
        match self {
            Self::Tokens(tokens) => {
                Conditioning::Tokens(captions.iter().map(|&c| tokens[c].clone()).collect())
            }
            Self::States(states) => {
                let states = captions.iter().map(|&c| states[c].clone()).collect();
                Conditioning::States(Tensor::cat(states, 0))
            }
        }
    }
}

/// The rows of 77 ids of one caption; `max_token_length` does not count begin and end.
pub fn token_rows(
    model: &StableDiffusion,
    caption: &str,
    max_token_length: usize,
) -> Vec<Vec<u32>> {
    model.tokenizer.chunks(caption, max_token_length + 2)
}
