//! Settings of captioners as they go over the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::twins::same_variants;
use crate::captioning::{self, taggers};
use crate::runs;

/// What makes captions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Captioner {
    /// Sentences by BLIP.
    Blip,
    /// Tags by a WD tagger.
    Wd14,
    /// Tags by DeepDanbooru.
    DeepDanbooru,
}

same_variants!(Captioner, captioning::Captioner: Blip, Wd14, DeepDanbooru);

/// What happens with captions that are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CaptionMode {
    /// They stay, and only images without one, or with an empty one, get one.
    #[default]
    OnlyEmpty,
    /// They are replaced.
    Overwrite,
    /// They are continued; tags that are there are not written again.
    Append,
}

same_variants!(CaptionMode, captioning::CaptionMode: OnlyEmpty, Overwrite, Append);

/// In which order tags are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TagOrder {
    /// The surest first.
    #[default]
    Confidence,
    /// As the model's list has them.
    List,
}

same_variants!(TagOrder, taggers::Order: Confidence, List);

/// Where the most probable rating is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RatingPlace {
    /// Nowhere.
    #[default]
    None,
    /// Before all tags.
    First,
    /// After all tags.
    Last,
}

same_variants!(RatingPlace, taggers::RatingPlace: None, First, Last);

/// Which tags become a caption, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TaggerOptions {
    /// The least probability of a general tag.
    #[schema(minimum = 0.05, maximum = 1)]
    pub general_threshold: f64,
    /// The least probability of a character.
    #[schema(minimum = 0.05, maximum = 1)]
    pub character_threshold: f64,
    /// Where the most probable rating goes.
    pub rating: RatingPlace,
    /// Whether underscores stay; otherwise they become spaces but for tags of at most three letters and those that look
    /// like faces (`0_0`, `^_^`).
    pub keep_underscores: bool,
    /// Tags that are never written, with spaces or underscores; capitals do not count.
    #[schema(max_items = 10000)]
    pub exclude: Vec<String>,
    /// In which order.
    pub order: TagOrder,
    /// Whether characters come before all other tags.
    pub characters_first: bool,
    /// The most tags, besides the rating.
    #[schema(minimum = 1, maximum = 200)]
    pub max_tags: u32,
    /// What is between two tags.
    #[schema(min_length = 1, max_length = 10)]
    pub separator: String,
}

impl Default for TaggerOptions {
    fn default() -> Self {
        taggers::TaggerSettings::default().into()
    }
}

impl From<taggers::TaggerSettings> for TaggerOptions {
    fn from(own: taggers::TaggerSettings) -> Self {
        Self {
            general_threshold: own.general_threshold,
            character_threshold: own.character_threshold,
            rating: own.rating.into(),
            keep_underscores: own.keep_underscores,
            exclude: own.exclude,
            order: own.order.into(),
            characters_first: own.characters_first,
            max_tags: u32::try_from(own.max_tags).unwrap_or(u32::MAX),
            separator: own.separator,
        }
    }
}

impl From<TaggerOptions> for taggers::TaggerSettings {
    fn from(wire: TaggerOptions) -> Self {
        Self {
            general_threshold: wire.general_threshold,
            character_threshold: wire.character_threshold,
            rating: wire.rating.into(),
            keep_underscores: wire.keep_underscores,
            exclude: wire.exclude,
            order: wire.order.into(),
            characters_first: wire.characters_first,
            max_tags: wire.max_tags as usize,
            separator: wire.separator,
        }
    }
}

/// How BLIP chooses tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// The most probable caption that a search finds.
    #[default]
    Beam,
    /// Drawn from the most probable tokens.
    Nucleus,
}

same_variants!(Sampling, runs::Sampling: Beam, Nucleus);

/// How BLIP describes pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BlipOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Captions that a beam search follows at once.
    #[schema(minimum = 1, maximum = 16)]
    pub beams: u32,
    /// Of a beam search: above 0 prefers long captions.
    #[schema(minimum = -10, maximum = 10)]
    pub length_penalty: f64,
    /// Of nucleus sampling: the least probability that the tokens together have.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: f64,
    /// Of nucleus sampling: at most so many tokens; `null` for any number.
    #[schema(minimum = 1)]
    pub top_k: Option<u32>,
    /// Of nucleus sampling: below 1 makes probable tokens more probable.
    #[schema(minimum = 0.01, maximum = 100)]
    pub temperature: f64,
    /// Of nucleus sampling: the same seed draws the same caption for the same picture.
    pub seed: u64,
    /// The least tokens of a caption, those of the prompt included.
    #[schema(minimum = 0, maximum = 512)]
    pub min_length: u32,
    /// The most tokens of a caption, those of the prompt included.
    #[schema(minimum = 2, maximum = 512)]
    pub max_length: u32,
    /// Above 1 for fewer repetitions.
    #[schema(minimum = 0.1, maximum = 10)]
    pub repetition_penalty: f64,
    /// What captions begin with, as the model knows it: `a photo of`.
    #[schema(max_length = 1000)]
    pub prompt: String,
    /// Whether the prompt is part of the caption.
    pub keep_prompt: bool,
}

impl Default for BlipOptions {
    fn default() -> Self {
        runs::BlipChoice::default().into()
    }
}

/// As short as the number was written.
fn wide(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| value.into())
}

impl From<runs::BlipChoice> for BlipOptions {
    fn from(own: runs::BlipChoice) -> Self {
        let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        Self {
            sampling: own.sampling.into(),
            beams: count(own.beams),
            length_penalty: wide(own.length_penalty),
            top_p: wide(own.top_p),
            top_k: own.top_k.map(count),
            temperature: wide(own.temperature),
            seed: own.seed,
            min_length: count(own.min_length),
            max_length: count(own.max_length),
            repetition_penalty: wide(own.repetition_penalty),
            prompt: own.prompt,
            keep_prompt: own.keep_prompt,
        }
    }
}

impl From<BlipOptions> for runs::BlipChoice {
    fn from(wire: BlipOptions) -> Self {
        Self {
            sampling: wire.sampling.into(),
            beams: wire.beams as usize,
            length_penalty: wire.length_penalty as f32,
            top_p: wire.top_p as f32,
            top_k: wire.top_k.map(|count| count as usize),
            temperature: wire.temperature as f32,
            seed: wire.seed,
            min_length: wire.min_length as usize,
            max_length: wire.max_length as usize,
            repetition_penalty: wire.repetition_penalty as f32,
            prompt: wire.prompt,
            keep_prompt: wire.keep_prompt,
        }
    }
}
