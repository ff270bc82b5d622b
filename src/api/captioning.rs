//! What becomes of captions and pixels in training: the settings of a run, and of a subset where it differs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::twins::same_fields;
use crate::runs::settings as domain;
use crate::store::datasets as rows;

/// What becomes of a caption whenever it is used, in the order of sd-scripts: prefix and suffix, dropout, wildcards, kept
/// tags, warm-up, shuffling, dropout of tags, secondary separator. An empty text or 0 switches a part off. A subset may
/// say otherwise for its images. Captions that vary are encoded anew in each step.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CaptionSettings {
    /// Whether tags change places, but for those that are kept.
    pub shuffle_captions: bool,
    /// What is between tags.
    #[schema(min_length = 1, max_length = 32)]
    pub caption_separator: String,
    /// So many tags stay first and are never dropped.
    #[schema(minimum = 0, maximum = 1000)]
    pub keep_tokens: u32,
    /// Such as `|||`: where a caption has it, the tags before its first place, and after its second, are those that are
    /// kept, whatever `keep_tokens` says.
    #[schema(max_length = 32)]
    pub keep_tokens_separator: String,
    /// Such as `;;;`: becomes `caption_separator` once tags have been shuffled, so that what it joins stays together.
    #[schema(max_length = 32)]
    pub secondary_separator: String,
    /// Share of showings without a caption.
    #[schema(minimum = 0, maximum = 1)]
    pub caption_dropout_rate: f64,
    /// Every so many epochs there are no captions.
    #[schema(minimum = 0, maximum = 10000000)]
    pub caption_dropout_every_n_epochs: u32,
    /// Share of the tags that are not kept which is left out.
    #[schema(minimum = 0, maximum = 1)]
    pub caption_tag_dropout_rate: f64,
    /// Comes before every caption, with a space.
    #[schema(max_length = 1000)]
    pub caption_prefix: String,
    /// Comes after every caption, with a space.
    #[schema(max_length = 1000)]
    pub caption_suffix: String,
    /// Whether `{a|b}` is one of the two, chosen each time, and a caption of several lines one of its lines. `{{` and
    /// `}}` are braces. Without it the first line counts.
    pub enable_wildcards: bool,
    /// So many tags are there in the first step of a warm-up.
    #[schema(minimum = 0, maximum = 1000)]
    pub token_warmup_min: u32,
    /// The optimizer step from which on all tags are there; below 1, as a share of the run's steps. 0 is no warm-up.
    #[schema(minimum = 0, maximum = 10000000)]
    pub token_warmup_step: f64,
}

/// Random changes of pictures. A subset may say otherwise for its images.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Every second showing is mirrored left to right. It harms what is not symmetric: faces, letters.
    pub flip_aug: bool,
    /// Hue or gamma of every third showing are shifted a little.
    pub color_aug: bool,
}

/// What becomes of a subset's captions; `null` is as the run has it. An empty text or 0 switches a part off.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetCaptions {
    pub shuffle_captions: Option<bool>,
    #[schema(min_length = 1, max_length = 32)]
    pub caption_separator: Option<String>,
    #[schema(minimum = 0, maximum = 1000)]
    pub keep_tokens: Option<u32>,
    #[schema(max_length = 32)]
    pub keep_tokens_separator: Option<String>,
    #[schema(max_length = 32)]
    pub secondary_separator: Option<String>,
    #[schema(minimum = 0, maximum = 1)]
    pub caption_dropout_rate: Option<f64>,
    #[schema(minimum = 0, maximum = 10000000)]
    pub caption_dropout_every_n_epochs: Option<u32>,
    #[schema(minimum = 0, maximum = 1)]
    pub caption_tag_dropout_rate: Option<f64>,
    #[schema(max_length = 1000)]
    pub caption_prefix: Option<String>,
    #[schema(max_length = 1000)]
    pub caption_suffix: Option<String>,
    pub enable_wildcards: Option<bool>,
    #[schema(minimum = 0, maximum = 1000)]
    pub token_warmup_min: Option<u32>,
    #[schema(minimum = 0, maximum = 10000000)]
    pub token_warmup_step: Option<f64>,
}

/// Random changes of a subset's pictures; `null` is as the run has it.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetAugment {
    pub flip_aug: Option<bool>,
    pub color_aug: Option<bool>,
    /// Whether what does not fit into the bucket is cut off at a random place, as with `crop: random` of a run.
    pub random_crop: Option<bool>,
}

/// What a subset says of its training, as runs keep it: only what differs from the run's settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetTraining {
    pub augment: SubsetAugment,
    pub captions: SubsetCaptions,
}

impl Default for CaptionSettings {
    fn default() -> Self {
        domain::CaptionSettings::default().into()
    }
}

impl Default for Augment {
    fn default() -> Self {
        domain::Augment::default().into()
    }
}

same_fields!(CaptionSettings, domain::CaptionSettings:
    shuffle_captions, caption_separator, keep_tokens, keep_tokens_separator, secondary_separator,
    caption_dropout_rate, caption_dropout_every_n_epochs, caption_tag_dropout_rate, caption_prefix, caption_suffix,
    enable_wildcards, token_warmup_min, token_warmup_step);
same_fields!(SubsetCaptions, rows::SubsetCaptions:
    shuffle_captions, caption_separator, keep_tokens, keep_tokens_separator, secondary_separator,
    caption_dropout_rate, caption_dropout_every_n_epochs, caption_tag_dropout_rate, caption_prefix, caption_suffix,
    enable_wildcards, token_warmup_min, token_warmup_step);
same_fields!(SubsetAugment, rows::SubsetAugment: flip_aug, color_aug, random_crop);

impl Augment {
    /// `crop` of the run says the rest.
    pub fn with(self, random_crop: bool) -> domain::Augment {
        domain::Augment {
            flip: self.flip_aug,
            color: self.color_aug,
            random_crop,
        }
    }
}

impl From<domain::Augment> for Augment {
    fn from(domain: domain::Augment) -> Self {
        Self {
            flip_aug: domain.flip,
            color_aug: domain.color,
        }
    }
}

impl From<rows::SubsetTraining> for SubsetTraining {
    fn from(row: rows::SubsetTraining) -> Self {
        Self {
            augment: row.augment.into(),
            captions: row.captions.into(),
        }
    }
}
