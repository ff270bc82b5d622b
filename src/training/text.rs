//! Captions as the UNet's conditioning: token ids while the text encoder is trained, hidden states otherwise. A caption
//! that is not the same in each step is tokenized when it is used.

use std::collections::{BTreeMap, HashMap};

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::dataloader::{CacheKey, CacheKind, CachedTensor, TensorCache};
use crate::diffusion::{CaptionTokens, StableDiffusion, TextStates};
use crate::training::TrainError;
use crate::training::data::{computed_by, read};
use crate::training::progress::Phase;
use crate::training::settings::TrainSettings;
use crate::training::step::Conditioning;

/// Captions that are encoded at once; more rows do not run faster on a CPU.
const ROWS_AT_ONCE: usize = 8;

/// Every distinct caption of a run that is the same whenever it is used, prepared once.
#[derive(Debug)]
pub struct Captions {
    prepared: Prepared,
    max_token_length: usize,
}

#[derive(Debug)]
enum Prepared {
    /// Token ids by caption.
    Tokens(HashMap<String, CaptionTokens>),
    /// Hidden states `[1, tokens, d]` by caption.
    States(HashMap<String, TextStates>),
}

impl Captions {
    /// Tokenizes the captions; when the text encoder stays as it is, also encodes them, through a cache that outlives
    /// the run.
    pub fn prepare<'a>(
        model: &StableDiffusion,
        captions: impl IntoIterator<Item = &'a str>,
        settings: &TrainSettings,
        cache: Option<&TensorCache>,
        device: &Device,
        mut report: impl FnMut(Phase) -> Result<(), TrainError>,
    ) -> Result<Self, TrainError> {
        let tokens: BTreeMap<String, CaptionTokens> = captions
            .into_iter()
            .map(|caption| {
                let tokens = caption_tokens(model, caption, settings.max_token_length);
                (caption.to_owned(), tokens)
            })
            .collect();
        let total = tokens.len();
        let captions = |prepared| Self {
            prepared,
            max_token_length: settings.max_token_length,
        };
        if settings.text_encoder_lr != 0.0 {
            report(Phase::CachingText {
                done: total,
                total,
                cached: 0,
            })?;
            return Ok(captions(Prepared::Tokens(tokens.into_iter().collect())));
        }
        let states = States {
            model,
            clip_skip: settings.clip_skip,
            device,
            cache: cache.map(|cache| {
                let encoder = model.text_encoder_digest();
                let encoder = format!("{encoder} {}", computed_by(device));
                (cache, encoder)
            }),
        };
        let mut known: HashMap<String, TextStates> = HashMap::with_capacity(total);
        let mut missing = Vec::new();
        for (caption, tokens) in tokens {
            match states.read(&tokens) {
                Some(state) => _ = known.insert(caption, state),
                None => missing.push((caption, tokens)),
            }
        }
        let cached = known.len();
        for group in missing.chunks(ROWS_AT_ONCE) {
            report(Phase::CachingText {
                done: known.len(),
                total,
                cached,
            })?;
            let tokens: Vec<_> = group.iter().map(|(_, tokens)| tokens.clone()).collect();
            let encoded = model.text()?.encode(&tokens, settings.clip_skip);
            for (index, (caption, tokens)) in group.iter().enumerate() {
                let state = encoded.caption(index); // [1, tokens, d]
                states.keep(tokens, &state)?;
                known.insert(caption.clone(), state);
            }
        }
        report(Phase::CachingText {
            done: total,
            total,
            cached,
        })?;
        tracing::info!(cached, encoded = total - cached, "captions are encoded");
        Ok(captions(Prepared::States(known)))
    }

    /// The conditioning of a batch: states, where all of its captions have been encoded.
    pub fn batch(&self, model: &StableDiffusion, captions: &[impl AsRef<str>]) -> Conditioning {
        if let Prepared::States(states) = &self.prepared {
            let known: Option<Vec<_>> = captions
                .iter()
                .map(|caption| states.get(caption.as_ref()).cloned())
                .collect();
            if let Some(known) = known {
                return Conditioning::States(TextStates::cat(known));
            }
        }
        let tokens = captions.iter().map(|caption| {
            let caption = caption.as_ref();
            let known = match &self.prepared {
                Prepared::Tokens(tokens) => tokens.get(caption).cloned(),
                Prepared::States(_) => None,
            };
            known.unwrap_or_else(|| caption_tokens(model, caption, self.max_token_length))
        });
        Conditioning::Tokens(tokens.collect())
    }
}

/// Hidden states of frozen text encoders, in files.
struct States<'a> {
    model: &'a StableDiffusion,
    clip_skip: usize,
    device: &'a Device,
    /// With what tells the text encoder apart.
    cache: Option<(&'a TensorCache, String)>,
}

impl States<'_> {
    /// `[1, tokens, d]`, if an earlier run has left it.
    fn read(&self, tokens: &CaptionTokens) -> Option<TextStates> {
        let (cache, encoder) = self.cache.as_ref()?;
        let rows = tokens.first.iter();
        let length = rows.map(|row| row.len() - 2).sum::<usize>() + 2; // begin and end of all chunks together
        let (width, pooled_width) = self.model.text_widths();
        let states = [1, length, width];
        let pooled = pooled_width.map(|width| [1, width]);
        let mut wanted: Vec<(&str, &[usize])> = vec![("states", &states)];
        wanted.extend(pooled.as_ref().map(|shape| ("pooled", &shape[..])));
        let mut found = cache.get(&self.key(encoder, tokens), &wanted)?.into_iter();
        let data = TensorData::new(found.next()?, states);
        let states = Tensor::from_data(data, (self.device, DType::F32));
        let pooled = match pooled {
            None => None,
            Some(shape) => {
                let data = TensorData::new(found.next()?, shape);
                Some(Tensor::from_data(data, (self.device, DType::F32)))
            }
        };
        Some(TextStates { states, pooled })
    }

    fn keep(&self, tokens: &CaptionTokens, state: &TextStates) -> Result<(), TrainError> {
        let Some((cache, encoder)) = &self.cache else {
            return Ok(());
        };
        let states = read(state.states.clone())?;
        let pooled = match &state.pooled {
            None => None,
            Some(pooled) => Some((pooled.dims(), read(pooled.clone())?)),
        };
        let shape = state.states.dims();
        let mut tensors = vec![CachedTensor {
            name: "states",
            shape: &shape,
            values: &states,
        }];
        if let Some((shape, values)) = &pooled {
            tensors.push(CachedTensor {
                name: "pooled",
                shape,
                values,
            });
        }
        cache.put(&self.key(encoder, tokens), &tensors);
        Ok(())
    }

    fn key(&self, encoder: &str, tokens: &CaptionTokens) -> CacheKey {
        let (first, second) = (&tokens.first, &tokens.second);
        let ids = if second.is_empty() {
            format!("{first:?}")
        } else {
            format!("{first:?} {second:?}")
        };
        let clip_skip = self.clip_skip.to_string();
        CacheKey::new(CacheKind::Text, &[&ids, &clip_skip, encoder])
    }
}

/// The token ids of one caption; `max_token_length` does not count begin and end.
pub fn caption_tokens(
    model: &StableDiffusion,
    caption: &str,
    max_token_length: usize,
) -> CaptionTokens {
    model.tokens(caption, max_token_length + 2)
}
