//! What a run is to do: checked once, when it is made; kept as JSON; read by its worker.

use serde::{Deserialize, Serialize};

use time::OffsetDateTime;

use uuid::Uuid;

use crate::dataloader::{Augment, BucketSettings, CaptionSettings, ColorCorrection};
use crate::store::datasets::{SubsetAugment, SubsetCaptions, SubsetTraining};
use crate::training::TrainSettings;

/// The folder of a run's resume points, below its own.
pub const RESUME: &str = "resume";

/// Everything that was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// Device: `auto`, `cpu`, `vulkan:0`.
    pub device: String,
    /// Id of the base model.
    pub base_model_id: String,
    /// Id of the VAE in place of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae_id: Option<String>,
    /// How it is trained.
    pub settings: TrainSettings,
    /// Sizes of the pictures.
    pub buckets: BucketSettings,
    /// When it was asked for; the LoRA files tell it.
    #[serde(with = "time::serde::timestamp", default = "epoch")]
    pub recorded_at: OffsetDateTime,
}

fn epoch() -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH
}

/// One image of the dataset as it was when the run was made: later edits do not change a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotImage {
    /// Its id.
    pub id: String,
    /// Digest of its file.
    pub sha256: String,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// What the text encoder is told of it.
    pub caption: String,
    /// Name of its subset.
    pub subset: String,
    /// How often it appears in an epoch.
    pub repeats: u32,
    /// Whether it shows the class in general.
    pub regularization: bool,
    /// What it is laid on where it is transparent: `#rrggbb`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<String>,
    /// Digest of its mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_sha256: Option<String>,
    /// What is done to its colours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color_correction: Option<ColorCorrection>,
    /// How it is trained on, where its subset differs from the run's settings.
    #[serde(default, skip_serializing_if = "SubsetTraining::is_default")]
    pub training: SubsetTraining,
    /// Its name; runs that were made before it was kept have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_name: Option<String>,
    /// Whether the caption is the subset's prompt, as the image had none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub captioned_by_prompt: bool,
}

/// The dataset as it was when a run was made, besides its images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotDataset {
    /// What its owner calls it.
    pub name: String,
    /// Its revision.
    pub revision: i64,
    /// Its subsets, oldest first; those without images, too.
    pub subsets: Vec<SnapshotSubset>,
}

/// A subset as it was when a run was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSubset {
    /// Its id; `None` of runs that have kept none.
    pub id: Option<Uuid>,
    /// Its name.
    pub name: String,
    /// How often an epoch shows each image.
    pub repeats: u32,
    /// Whether its images only keep what the model knew before.
    pub is_reg: bool,
    /// The caption of images that have none.
    pub instance_prompt: Option<String>,
    /// The caption of regularization images that have none.
    pub class_prompt: Option<String>,
    /// Where it differs from the run's settings.
    #[serde(default, skip_serializing_if = "SubsetTraining::is_default")]
    pub training: SubsetTraining,
}

/// What becomes of a subset's captions in a run with these settings.
pub fn captions_of(run: &CaptionSettings, subset: &SubsetCaptions) -> CaptionSettings {
    let text = |own: &Option<String>, run: &str| own.clone().unwrap_or_else(|| run.to_owned());
    let (s, r) = (subset, run);
    CaptionSettings {
        shuffle_captions: s.shuffle_captions.unwrap_or(r.shuffle_captions),
        caption_separator: text(&s.caption_separator, &r.caption_separator),
        keep_tokens: s.keep_tokens.unwrap_or(r.keep_tokens),
        keep_tokens_separator: text(&s.keep_tokens_separator, &r.keep_tokens_separator),
        secondary_separator: text(&s.secondary_separator, &r.secondary_separator),
        caption_dropout_rate: s.caption_dropout_rate.unwrap_or(r.caption_dropout_rate),
        caption_dropout_every_n_epochs: s
            .caption_dropout_every_n_epochs
            .unwrap_or(r.caption_dropout_every_n_epochs),
        caption_tag_dropout_rate: s
            .caption_tag_dropout_rate
            .unwrap_or(r.caption_tag_dropout_rate),
        caption_prefix: text(&s.caption_prefix, &r.caption_prefix),
        caption_suffix: text(&s.caption_suffix, &r.caption_suffix),
        enable_wildcards: s.enable_wildcards.unwrap_or(r.enable_wildcards),
        token_warmup_min: s.token_warmup_min.unwrap_or(r.token_warmup_min),
        token_warmup_step: s.token_warmup_step.unwrap_or(r.token_warmup_step),
    }
}

/// What becomes of a subset's pixels in a run with these settings.
pub fn augment_of(run: Augment, subset: SubsetAugment) -> Augment {
    Augment {
        flip: subset.flip_aug.unwrap_or(run.flip),
        color: subset.color_aug.unwrap_or(run.color),
        random_crop: subset.random_crop.unwrap_or(run.random_crop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subset_has_the_last_word() {
        let run = CaptionSettings {
            shuffle_captions: true,
            keep_tokens: 2,
            keep_tokens_separator: "|||".to_owned(),
            ..CaptionSettings::default()
        };
        let subset = SubsetCaptions {
            keep_tokens: Some(0),
            keep_tokens_separator: Some(String::new()),
            caption_prefix: Some("lumo".to_owned()),
            ..SubsetCaptions::default()
        };
        let expected = CaptionSettings {
            shuffle_captions: true,
            caption_prefix: "lumo".to_owned(),
            ..CaptionSettings::default()
        };
        assert_eq!(captions_of(&run, &subset), expected);
        let run = Augment {
            flip: true,
            ..Augment::default()
        };
        let subset = SubsetAugment {
            flip_aug: Some(false),
            color_aug: Some(true),
            random_crop: None,
        };
        let expected = Augment {
            color: true,
            ..Augment::default()
        };
        assert_eq!(augment_of(run, subset), expected);
    }
}
