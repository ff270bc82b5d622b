//! The report before training: what speaks against training on a dataset as it is. It warns; nothing is refused for it.
//!
//! Each finding names its images and says what to do. Thresholds are constants beside the check that uses them.

mod captions;
mod duplicates;
mod exposure;
pub mod html;
mod sets;
mod sizes;

use std::collections::{BTreeMap, HashMap, HashSet};

use uuid::Uuid;

use super::measures::Measured;
use crate::dataloader::{Augment, BucketSettings, CaptionSettings, EpochPlan, TrainingImage};
use crate::store::datasets::{Dataset, Image, Subset};

/// Images that a finding names; it counts all of them.
const NAMED_IMAGES: usize = 500;
/// Findings of one kind.
pub(super) const FINDINGS_OF_A_KIND: usize = 100;

/// The run that is planned, as far as it matters here.
#[derive(Clone, Debug, PartialEq)]
pub struct ReportSettings {
    pub buckets: BucketSettings,
    pub batch_size: usize,
    /// Tokens of a caption, without begin and end.
    pub max_token_length: usize,
    /// What is to be learned, if somebody says so.
    pub kind: Option<Subject>,
}

/// What a LoRA is to learn; the number of images that it takes depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A person, a mascot, a thing.
    Character,
    /// A way of drawing.
    Style,
}

/// All that a report is made of.
pub struct ReportInput {
    pub dataset: Dataset,
    pub rows: Vec<(Image, Subset)>,
    /// By the digest of the content.
    pub measured: HashMap<String, Measured>,
    pub settings: ReportSettings,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub dataset_id: Uuid,
    pub dataset: String,
    /// Whether every picture was measured.
    pub complete: bool,
    pub images: u64,
    pub reg_images: u64,
    pub measured_images: u64,
    pub settings: ReportSettings,
    /// The gravest first.
    pub findings: Vec<Finding>,
    pub buckets: Vec<BucketUse>,
    /// The most frequent first.
    pub tags: Vec<TagUse>,
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The result will most likely suffer.
    Serious,
    /// Worth a look before hours are spent.
    Warning,
    /// Good to know.
    Info,
}

macro_rules! finding_codes {
    ($($name:ident = $word:literal;)*) => {
        /// What kind of thing was found.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum FindingCode { $(#[doc = $word] $name,)* }

        impl FindingCode {
            /// The word on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }
        }
    };
}

finding_codes! {
    NoImages = "no_images";
    Unreadable = "unreadable";
    ExactDuplicates = "exact_duplicates";
    NearDuplicates = "near_duplicates";
    Blurred = "blurred";
    BelowResolution = "below_resolution";
    Underexposed = "underexposed";
    Overexposed = "overexposed";
    CropLoss = "crop_loss";
    LonelyBucket = "lonely_bucket";
    CaptionMissing = "caption_missing";
    CaptionTooLong = "caption_too_long";
    InstancePromptMissing = "instance_prompt_missing";
    InstancePromptInRegularization = "instance_prompt_in_regularization";
    TagBakedIn = "tag_baked_in";
    TagsInseparable = "tags_inseparable";
    TooFewImages = "too_few_images";
    ManyImages = "many_images";
}

/// Something that speaks against training as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    pub code: FindingCode,
    pub severity: Severity,
    /// What was found.
    pub message: String,
    /// What to do.
    pub advice: String,
    /// All of them, also those that are not named.
    pub image_count: u64,
    pub images: Vec<FindingImage>,
}

/// An image that a finding is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FindingImage {
    pub image_id: Uuid,
    pub file_name: String,
    pub subset: String,
    /// The number, or the words, that the finding goes by.
    pub detail: Option<String>,
    pub sha256: String,
}

/// A size that pictures are trained at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketUse {
    pub width_px: u32,
    pub height_px: u32,
    pub images: u64,
    /// Repeats counted.
    pub images_per_epoch: u64,
    pub lonely: bool,
}

/// A tag and how many images have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagUse {
    pub tag: String,
    pub images: u64,
}

/// One row with what is known of it.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    image: &'a Image,
    subset: &'a Subset,
    measured: Option<&'a Measured>,
}

impl Entry<'_> {
    /// What the text encoder is told: kohya's rule gives an image without a caption its subset's words, and of several
    /// lines the first counts.
    fn caption(&self) -> &str {
        let prompt = match self.subset.is_reg {
            true => &self.subset.class_prompt,
            false => &self.subset.instance_prompt,
        };
        let caption = self.image.caption.as_ref().or(prompt.as_ref());
        let lines = caption.map(String::as_str).unwrap_or_default();
        lines.lines().next().unwrap_or_default()
    }

    fn named(&self, detail: Option<String>) -> FindingImage {
        FindingImage {
            image_id: self.image.id,
            file_name: self.image.file_name.clone(),
            subset: self.subset.name.clone(),
            detail,
            sha256: self.image.sha256.clone(),
        }
    }
}

impl Finding {
    pub(super) fn new(
        code: FindingCode,
        severity: Severity,
        message: impl Into<String>,
        advice: impl Into<String>,
        mut images: Vec<FindingImage>,
    ) -> Self {
        let image_count = images.len() as u64;
        images.truncate(NAMED_IMAGES);
        Self {
            code,
            severity,
            message: message.into(),
            advice: advice.into(),
            image_count,
            images,
        }
    }
}

/// Looks at everything.
pub fn build(input: &ReportInput) -> Report {
    let entries: Vec<Entry<'_>> = input
        .rows
        .iter()
        .map(|(image, subset)| Entry {
            image,
            subset,
            measured: input.measured.get(&image.sha256),
        })
        .collect();
    let settings = &input.settings;
    let buckets = bucket_uses(&entries, settings);
    let mut findings = Vec::new();
    findings.extend(sets::check(&entries, settings));
    findings.extend(duplicates::check(&entries));
    findings.extend(exposure::check(&entries));
    findings.extend(sizes::check(&entries, settings, &buckets));
    findings.extend(captions::check(&entries, settings));
    findings.sort_by_key(|finding| finding.severity); // stable: kinds stay together
    let measured = entries.iter().filter(|entry| entry.measured.is_some());
    let measured_images = measured.count() as u64;
    Report {
        dataset_id: input.dataset.id,
        dataset: input.dataset.name.clone(),
        complete: measured_images == entries.len() as u64,
        images: entries.len() as u64,
        reg_images: entries.iter().filter(|entry| entry.subset.is_reg).count() as u64,
        measured_images,
        settings: settings.clone(),
        findings,
        buckets: buckets.into_values().collect(),
        tags: captions::frequent_tags(&entries),
    }
}

/// The buckets of a run, as its own plan of an epoch has them.
fn bucket_uses(
    entries: &[Entry<'_>],
    settings: &ReportSettings,
) -> BTreeMap<(u32, u32), BucketUse> {
    let images: Vec<TrainingImage> = entries
        .iter()
        .map(|entry| TrainingImage {
            id: String::new(),
            path: std::path::PathBuf::new(),
            sha256: String::new(),
            width_px: entry.image.width_px,
            height_px: entry.image.height_px,
            caption: String::new(),
            repeats: entry.subset.repeats,
            regularization: entry.subset.is_reg,
            captioning: CaptionSettings::default(),
            mask: None,
            background: None,
            augment: Augment::default(),
            correction: None,
        })
        .collect();
    let Ok(plan) = EpochPlan::new(&images, &settings.buckets, settings.batch_size, 0) else {
        return BTreeMap::new(); // nothing to train on
    };
    let use_of = |(size, shown): (&(u32, u32), &Vec<usize>)| {
        let images = shown.iter().collect::<HashSet<_>>().len() as u64;
        let few = shown.len() < settings.batch_size || images == 1;
        let bucket = BucketUse {
            width_px: size.0,
            height_px: size.1,
            images,
            images_per_epoch: shown.len() as u64,
            lonely: few && plan.buckets().len() > 1,
        };
        (*size, bucket)
    };
    plan.buckets().iter().map(use_of).collect()
}

/// `1 image` or `3 images`.
pub(super) fn count(number: usize) -> String {
    match number {
        1 => "1 image".to_owned(),
        _ => format!("{number} images"),
    }
}

#[cfg(test)]
mod tests;
