//! Captions of a few pictures at once: the loop over tokens.

use burn::tensor::{DType, Tensor};
use image::RgbImage;

use super::beam::{BeamRules, BeamSearch};
use super::chain::{Chain, ChainRules, Nucleus, generator};
use super::decoder::TextDecoder;
use super::settings::{BlipSettings, Decoding};
use crate::captioning::CaptionError;

/// The token ids of a caption, prompt and end included, and its score where a beam search has found it.
#[derive(Clone, Debug, PartialEq)]
pub struct Caption {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Sum of log-probabilities over the penalty of its length.
    pub score: Option<f32>,
}

/// What is being said of one picture.
#[derive(Debug)]
enum Search {
    Beam(BeamSearch),
    Chain(Chain),
}

/// A picture that is not done.
struct Open {
    /// Its place among the pictures.
    picture: usize,
    search: Search,
}

/// Says something of each picture.
///
/// # Shapes
/// - `states`: `[pictures, tokens, d_picture]`
pub fn generate(
    decoder: &TextDecoder,
    states: &Tensor<3>,
    pictures: &[RgbImage],
    prompt: &[u32],
    (settings, end): (&BlipSettings, u32),
    keep_going: &mut dyn FnMut() -> bool,
) -> Result<Vec<Caption>, CaptionError> {
    let mut captions = vec![None; pictures.len()];
    let mut open: Vec<Open> = (pictures.iter().enumerate())
        .map(|(picture, pixels)| Open {
            picture,
            search: Search::new(settings, prompt, end, pixels),
        })
        .collect();
    let rows = open.first().map_or(1, |open| open.search.rows());
    let mut cache = decoder.look(states);
    // All beams begin with the prompt: it is read once for each picture.
    let mut new: Vec<Vec<u32>> = vec![prompt.to_vec(); pictures.len()];
    let mut first = true;
    while !open.is_empty() {
        if !keep_going() {
            return Err(CaptionError::Cancelled);
        }
        let logits = last_logits(decoder, decoder.forward(&new, &mut cache));
        let mut kept = Vec::new(); // places of pictures
        let mut order = Vec::new(); // the row that each goes on from
        new.clear();
        let mut still = Vec::new();
        for (place, mut open) in open.into_iter().enumerate() {
            let own = if first { 1 } else { rows };
            let of_beams: Vec<&[f32]> = (0..rows)
                .map(|beam| logits[place * own + beam.min(own - 1)].as_slice())
                .collect();
            if let Some(caption) = open.search.advance(&of_beams) {
                captions[open.picture] = Some(caption);
                continue;
            }
            for (parent, id) in open.search.running() {
                order.push(place * own + parent.min(own - 1));
                new.push(vec![id]);
            }
            kept.push(place);
            still.push(open);
        }
        open = still;
        if !open.is_empty() {
            cache.select_rows(&order);
            cache.select_pictures(&kept);
        }
        first = false;
    }
    Ok(captions.into_iter().flatten().collect())
}

/// The logits behind the last token of each row.
fn last_logits(decoder: &TextDecoder, states: Tensor<3>) -> Vec<Vec<f32>> {
    let tokens = states.dims()[1];
    let logits = decoder.scores(states.narrow(1, tokens - 1, 1)); // [rows, 1, vocabulary]
    let vocabulary = logits.dims()[2];
    let values: Vec<f32> = logits
        .into_data()
        .convert_dtype(DType::F32)
        .try_into_vec()
        .expect("numbers");
    values.chunks(vocabulary).map(<[f32]>::to_vec).collect()
}

impl Search {
    fn new(settings: &BlipSettings, prompt: &[u32], end: u32, pixels: &RgbImage) -> Self {
        let (min_length, max_length) = (settings.min_length, settings.max_length);
        let repetition_penalty = settings.repetition_penalty;
        let chain = |nucleus| {
            let rules = ChainRules {
                min_length,
                max_length,
                repetition_penalty,
                end,
            };
            Self::Chain(Chain::new(prompt, rules, nucleus))
        };
        match settings.decoding {
            Decoding::Beam { beams: 0 | 1, .. } => chain(None),
            Decoding::Beam {
                beams,
                length_penalty,
                early_stopping,
            } => Self::Beam(BeamSearch::new(
                prompt,
                BeamRules {
                    beams,
                    length_penalty,
                    early_stopping,
                    min_length,
                    max_length,
                    repetition_penalty,
                    end,
                },
            )),
            Decoding::Nucleus {
                top_p,
                top_k,
                temperature,
                seed,
            } => chain(Some(Nucleus {
                top_p,
                top_k,
                temperature,
                random: generator(seed, pixels.dimensions(), pixels.as_raw()),
            })),
        }
    }

    /// Captions that are followed at once.
    fn rows(&self) -> usize {
        match self {
            Self::Beam(search) => search.running().count(),
            Self::Chain(_) => 1,
        }
    }

    /// Goes on by one token; the caption when it is done.
    fn advance(&mut self, logits: &[&[f32]]) -> Option<Caption> {
        match self {
            Self::Beam(search) => {
                search.advance(logits);
                let (ids, score) = search.best();
                search.is_done().then(|| Caption {
                    ids: ids.to_vec(),
                    score: Some(score),
                })
            }
            Self::Chain(chain) => chain.advance(logits[0]).then(|| Caption {
                ids: chain.ids().to_vec(),
                score: None,
            }),
        }
    }

    fn running(&self) -> Vec<(usize, u32)> {
        match self {
            Self::Beam(search) => search.running().collect(),
            Self::Chain(chain) => {
                vec![(0, chain.ids().last().copied().unwrap_or_default())]
            }
        }
    }
}
