//! How captions are decoded: the parameters of transformers' `generate` that matter for captions.

use crate::captioning::CaptionError;

/// The most beams.
pub const MAX_BEAMS: usize = 16;
/// The longest caption, in tokens.
pub const MAX_TOKENS: usize = 512;
/// The longest prefix, in characters.
pub const MAX_PREFIX_CHARS: usize = 1_000;

/// What a caption is to be like.
#[derive(Clone, Debug, PartialEq)]
pub struct BlipSettings {
    /// How tokens are chosen.
    pub decoding: Decoding,
    /// The caption does not end before it has so many tokens, those of the prefix and the begin token included.
    pub min_length: usize,
    /// It ends at so many tokens.
    pub max_length: usize,
    /// Scores of tokens that are there already are divided (or, where negative, multiplied) by it; 1 does nothing.
    pub repetition_penalty: f32,
    /// What the caption begins with, such as `a photo of`; empty for none.
    pub prefix: String,
    /// Whether the prefix is part of what is given back.
    pub keep_prefix: bool,
}

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Decoding {
    /// The most probable caption that a beam search finds; one beam is greedy decoding.
    Beam {
        /// Captions that are followed at once.
        beams: usize,
        /// The exponent of the length that scores are divided by: above 0 prefers long captions.
        length_penalty: f32,
        /// When the search ends.
        early_stopping: EarlyStopping,
    },
    /// Tokens are drawn from the most probable ones. The same seed draws the same caption for the same picture.
    Nucleus {
        /// The least probability that the tokens together have.
        top_p: f32,
        /// At most so many tokens; `None` does not limit them.
        top_k: Option<usize>,
        /// Below 1 makes probable tokens more probable.
        temperature: f32,
        /// Of the random numbers.
        seed: u64,
    },
}

/// When a beam search ends (`early_stopping` of transformers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// As soon as there are as many captions as beams.
    WhenFull,
    /// When it is improbable that a better caption is found.
    #[default]
    Heuristic,
    /// When no better caption can be found.
    Never,
}

impl Default for BlipSettings {
    fn default() -> Self {
        Self {
            decoding: Decoding::Beam {
                beams: 3,
                length_penalty: 1.0,
                early_stopping: EarlyStopping::default(),
            },
            min_length: 5,
            max_length: 75,
            repetition_penalty: 1.0,
            prefix: String::new(),
            keep_prefix: true,
        }
    }
}

impl BlipSettings {
    /// Whether every setting is in its range.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), CaptionError> {
        let lengths = 2..=MAX_TOKENS;
        within("max_length", &self.max_length, &lengths)?;
        within("min_length", &self.min_length, &(0..=self.max_length))?;
        within(
            "repetition_penalty",
            &self.repetition_penalty,
            &(0.1..=10.0),
        )?;
        let letters = self.prefix.chars().count();
        within("prefix", &letters, &(0..=MAX_PREFIX_CHARS))?;
        match &self.decoding {
            Decoding::Beam {
                beams,
                length_penalty,
                ..
            } => {
                within("beams", beams, &(1..=MAX_BEAMS))?;
                within("length_penalty", length_penalty, &(-10.0..=10.0))
            }
            Decoding::Nucleus {
                top_p,
                top_k,
                temperature,
                ..
            } => {
                within("top_p", top_p, &(0.0..=1.0))?;
                within("top_k", &top_k.unwrap_or(1), &(1..=usize::MAX))?;
                within("temperature", temperature, &(0.01..=100.0))
            }
        }
    }
}

fn within<T: PartialOrd + std::fmt::Display>(
    setting: &'static str,
    found: &T,
    range: &std::ops::RangeInclusive<T>,
) -> Result<(), CaptionError> {
    if range.contains(found) {
        return Ok(());
    }
    Err(CaptionError::Setting {
        setting,
        reason: format!("is {found}, expected {} to {}", range.start(), range.end()),
    })
}
