//! What a run was made with, as an export has it: `runs` and `datasets` do not know each other.

use std::path::PathBuf;

use toml::Value;

use crate::datasets::export::caption_options;
use crate::datasets::{ExportImage, ExportSource, ExportSubset};
use crate::runs::settings::{Augment, BucketSettings, CaptionSettings};
use crate::runs::{PinnedDataset, RunSpec, SnapshotImage, SnapshotSubset};
use crate::store::Store;
use crate::store::datasets::SubsetCaptions;
use crate::store::runs::Run;

/// The export of a run's dataset, with the run's own settings for sd-scripts.
pub fn source(store: &Store, run: &Run, pinned: PinnedDataset, spec: &RunSpec) -> ExportSource {
    let settings = &spec.settings;
    let mut datasets = sizes(&spec.buckets);
    datasets.push(("batch_size", number(settings.batch_size as u64)));
    let mut general = caption_options(&differing(&settings.captions));
    general.extend(augment_options(settings.augment));
    ExportSource {
        dataset: pinned.name.unwrap_or_else(|| run.name.clone()),
        subsets: pinned.subsets.into_iter().map(subset).collect(),
        images: pinned
            .images
            .into_iter()
            .map(|image| {
                let content = store.blobs().path(&image.sha256);
                let mask = image.mask_sha256.as_deref();
                let mask = mask.map(|sha256| store.blobs().path(sha256));
                exported(image, content, mask)
            })
            .collect(),
        general,
        datasets,
    }
}

fn subset(subset: SnapshotSubset) -> ExportSubset {
    ExportSubset {
        name: subset.name,
        repeats: subset.repeats,
        is_reg: subset.is_reg,
        instance_prompt: subset.instance_prompt,
        class_prompt: subset.class_prompt,
        training: subset.training,
    }
}

fn exported(image: SnapshotImage, content: PathBuf, mask: Option<PathBuf>) -> ExportImage {
    ExportImage {
        content,
        // Runs that have kept no names have pictures of any format; sd-scripts looks at the ending.
        file_name: image
            .file_name
            .unwrap_or_else(|| format!("{}.png", &image.sha256)),
        sha256: image.sha256,
        subset: image.subset,
        caption: (!image.captioned_by_prompt).then_some(image.caption),
        mask,
    }
}

fn sizes(buckets: &BucketSettings) -> Vec<(&'static str, Value)> {
    let side = |px: u32| number(px.into());
    let resolution = vec![side(buckets.width_px), side(buckets.height_px)];
    vec![
        ("resolution", Value::Array(resolution)),
        ("enable_bucket", buckets.enabled.into()),
        ("min_bucket_reso", side(buckets.min_px)),
        ("max_bucket_reso", side(buckets.max_px)),
        ("bucket_reso_steps", side(buckets.step_px)),
        ("bucket_no_upscale", buckets.no_upscale.into()),
    ]
}

fn augment_options(augment: Augment) -> impl Iterator<Item = (&'static str, Value)> {
    let options = [
        ("flip_aug", augment.flip),
        ("color_aug", augment.color),
        ("random_crop", augment.random_crop),
    ];
    let on = options.into_iter().filter(|(_, on)| *on);
    on.map(|(key, on)| (key, on.into()))
}

/// Only what is not off.
fn differing(run: &CaptionSettings) -> SubsetCaptions {
    fn unlike<T: PartialEq + Clone>(value: &T, off: &T) -> Option<T> {
        (value != off).then(|| value.clone())
    }
    let off = CaptionSettings::default();
    SubsetCaptions {
        shuffle_captions: unlike(&run.shuffle_captions, &off.shuffle_captions),
        caption_separator: unlike(&run.caption_separator, &off.caption_separator),
        keep_tokens: unlike(&run.keep_tokens, &off.keep_tokens),
        keep_tokens_separator: unlike(&run.keep_tokens_separator, &off.keep_tokens_separator),
        secondary_separator: unlike(&run.secondary_separator, &off.secondary_separator),
        caption_dropout_rate: unlike(&run.caption_dropout_rate, &off.caption_dropout_rate),
        caption_dropout_every_n_epochs: unlike(
            &run.caption_dropout_every_n_epochs,
            &off.caption_dropout_every_n_epochs,
        ),
        caption_tag_dropout_rate: unlike(
            &run.caption_tag_dropout_rate,
            &off.caption_tag_dropout_rate,
        ),
        caption_prefix: unlike(&run.caption_prefix, &off.caption_prefix),
        caption_suffix: unlike(&run.caption_suffix, &off.caption_suffix),
        enable_wildcards: unlike(&run.enable_wildcards, &off.enable_wildcards),
        token_warmup_min: unlike(&run.token_warmup_min, &off.token_warmup_min),
        token_warmup_step: unlike(&run.token_warmup_step, &off.token_warmup_step),
    }
}

/// Sizes and counts are far below 2^63.
fn number(value: u64) -> Value {
    Value::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}
