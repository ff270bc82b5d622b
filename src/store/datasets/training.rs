//! How the images of a subset are trained on, where that differs from the run's settings. Kept as JSON without what is
//! not given.

use serde::{Deserialize, Serialize};

/// What a subset says of its training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetTraining {
    /// Of pixels.
    #[serde(skip_serializing_if = "is_default")]
    pub augment: SubsetAugment,
    /// Of captions.
    #[serde(skip_serializing_if = "is_default")]
    pub captions: SubsetCaptions,
}

/// Changes of pixels; `None` is as the run has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetAugment {
    /// Mirrored every second time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flip_aug: Option<bool>,
    /// Hue or gamma shifted every third time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub color_aug: Option<bool>,
    /// Cropped at a random place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub random_crop: Option<bool>,
}

/// What becomes of captions; `None` is as the run has it. An empty text or 0 switches a part off.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubsetCaptions {
    /// Whether tags change places.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shuffle_captions: Option<bool>,
    /// What is between tags.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_separator: Option<String>,
    /// So many tags stay first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_tokens: Option<u32>,
    /// What ends the tags that stay, in a caption.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_tokens_separator: Option<String>,
    /// What joins tags that move together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secondary_separator: Option<String>,
    /// Share of showings without a caption.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_dropout_rate: Option<f64>,
    /// Every so many epochs there are no captions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_dropout_every_n_epochs: Option<u32>,
    /// Share of tags that are left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_tag_dropout_rate: Option<f64>,
    /// Before every caption.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_prefix: Option<String>,
    /// After every caption.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_suffix: Option<String>,
    /// Whether `{a|b}` and lines are chosen from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_wildcards: Option<bool>,
    /// Tags in the first step of a warm-up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_warmup_min: Option<u32>,
    /// The step from which on all tags are there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_warmup_step: Option<f64>,
}

impl SubsetTraining {
    /// Whether nothing differs from the run's settings.
    pub fn is_default(&self) -> bool {
        is_default(self)
    }

    /// The column's text; `None` when nothing is given.
    pub(super) fn to_row(&self) -> Option<String> {
        // Structs of numbers and strings always have a JSON.
        (!self.is_default()).then(|| serde_json::to_string(self).unwrap_or_default())
    }

    /// What a column says. One that a newer program wrote, with fields that are unknown here, says nothing.
    pub(super) fn of_row(text: Option<&str>) -> Self {
        let read = |text| {
            serde_json::from_str(text)
                .inspect_err(
                    |error| tracing::warn!(%error, text, "a subset's settings are unreadable"),
                )
                .ok()
        };
        text.and_then(read).unwrap_or_default()
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
