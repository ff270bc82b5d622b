//! Captions as the UNet's conditioning: token ids while the text encoder is trained, hidden states otherwise. A caption
//! that is not the same in each step is tokenized when it is used.

use std::collections::{BTreeMap, HashMap};

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::dataloader::{CacheKey, CacheKind, CachedTensor, TensorCache};
use crate::diffusion::StableDiffusion;
use crate::diffusion::tokenizer::Tokenizer;
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
    tokenizer: Tokenizer,
    max_token_length: usize,
}

#[derive(Debug)]
enum Prepared {
    /// Token ids by caption.
    Tokens(HashMap<String, Vec<Vec<u32>>>),
    /// Hidden states `[1, tokens, d]` by caption.
    States(HashMap<String, Tensor<3>>),
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
        let tokens: BTreeMap<String, Vec<Vec<u32>>> = captions
            .into_iter()
            .map(|caption| {
                let rows = token_rows(&model.tokenizer, caption, settings.max_token_length);
                (caption.to_owned(), rows)
            })
            .collect();
        let total = tokens.len();
        let captions = |prepared| Self {
            prepared,
            tokenizer: model.tokenizer.clone(),
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
        let mut known: HashMap<String, Tensor<3>> = HashMap::with_capacity(total);
        let mut missing = Vec::new();
        for (caption, rows) in tokens {
            match states.read(&rows) {
                Some(state) => _ = known.insert(caption, state),
                None => missing.push((caption, rows)),
            }
        }
        let cached = known.len();
        for group in missing.chunks(ROWS_AT_ONCE) {
            report(Phase::CachingText {
                done: known.len(),
                total,
                cached,
            })?;
            let rows: Vec<_> = group.iter().map(|(_, rows)| rows.clone()).collect();
            let encoded = model.text_encoder.encode_chunks(&rows, settings.clip_skip);
            for (index, (caption, rows)) in group.iter().enumerate() {
                let state = encoded.clone().narrow(0, index, 1); // [1, tokens, d]
                states.keep(rows, &state)?;
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
    pub fn batch(&self, captions: &[impl AsRef<str>]) -> Conditioning {
        if let Prepared::States(states) = &self.prepared {
            let known: Option<Vec<_>> = captions
                .iter()
                .map(|caption| states.get(caption.as_ref()).cloned())
                .collect();
            if let Some(known) = known {
                return Conditioning::States(Tensor::cat(known, 0));
            }
        }
        let rows = captions.iter().map(|caption| self.rows(caption.as_ref()));
        Conditioning::Tokens(rows.collect())
    }

    fn rows(&self, caption: &str) -> Vec<Vec<u32>> {
        let known = match &self.prepared {
            Prepared::Tokens(tokens) => tokens.get(caption).cloned(),
            Prepared::States(_) => None,
        };
        known.unwrap_or_else(|| token_rows(&self.tokenizer, caption, self.max_token_length))
    }
}

/// Hidden states of the frozen text encoder, in files.
struct States<'a> {
    model: &'a StableDiffusion,
    clip_skip: usize,
    device: &'a Device,
    /// With what tells the text encoder apart.
    cache: Option<(&'a TensorCache, String)>,
}

impl States<'_> {
    /// `[1, tokens, d]`, if an earlier run has left it.
    fn read(&self, rows: &[Vec<u32>]) -> Option<Tensor<3>> {
        let (cache, encoder) = self.cache.as_ref()?;
        let tokens = rows.iter().map(|row| row.len() - 2).sum::<usize>() + 2; // begin and end of all chunks together
        let shape = [1, tokens, self.model.text_encoder.width()];
        let [values] = cache
            .get(&self.key(encoder, rows), &[("states", &shape)])?
            .try_into()
            .ok()?;
        let data = TensorData::new(values, shape);
        Some(Tensor::from_data(data, (self.device, DType::F32)))
    }

    fn keep(&self, rows: &[Vec<u32>], state: &Tensor<3>) -> Result<(), TrainError> {
        let Some((cache, encoder)) = &self.cache else {
            return Ok(());
        };
        let tensor = CachedTensor {
            name: "states",
            shape: &state.dims(),
            values: &read(state.clone())?,
        };
        cache.put(&self.key(encoder, rows), &[tensor]);
        Ok(())
    }

    fn key(&self, encoder: &str, rows: &[Vec<u32>]) -> CacheKey {
        let (ids, clip_skip) = (format!("{rows:?}"), self.clip_skip.to_string());
        CacheKey::new(CacheKind::Text, &[&ids, &clip_skip, encoder])
    }
}

/// The rows of 77 ids of one caption; `max_token_length` does not count begin and end.
pub fn token_rows(tokenizer: &Tokenizer, caption: &str, max_token_length: usize) -> Vec<Vec<u32>> {
    tokenizer.chunks(caption, max_token_length + 2)
}
