//! Captions of many images at once: tried out or done, in one transaction; undone; and what tags there are.

use std::collections::{BTreeMap, HashMap, HashSet};

use uuid::Uuid;

use super::caption_edits::Operation;
use super::captions;
use super::error::DatasetError;
use super::service::{DatasetService, missing};
use super::subjects::Subjects;
use crate::store::StoreError;
use crate::store::datasets::{
    CaptionChange, CaptionEdit, Image, ImageFilter, Subset, Undone, tags_of,
};

/// How often a batch begins anew when somebody else changes the dataset meanwhile.
const TRIES: usize = 5;

/// What is to be done with captions.
#[derive(Clone, Debug)]
pub struct CaptionBatch {
    /// In this order.
    pub operations: Vec<Operation>,
    /// Which images.
    pub filter: ImageFilter,
    /// Of those only these, if given.
    pub image_ids: Option<HashSet<Uuid>>,
    /// Whether nothing is written.
    pub dry_run: bool,
}

/// What was done, or would be.
#[derive(Clone, Debug, Default)]
pub struct BatchResult {
    /// The dataset's revision that it has made; `None` where nothing was written.
    pub revision: Option<i64>,
    /// Images that were meant.
    pub matched: usize,
    /// Those whose captions change, and those that were left out, in the dataset's order.
    pub images: Vec<BatchImage>,
}

/// An image whose caption changes, or was left out.
#[derive(Clone, Debug)]
pub struct BatchImage {
    /// The image with its caption before.
    pub image: Image,
    /// The caption after; that before where it was left out.
    pub after: Option<String>,
    /// Why it was left out.
    pub skipped: Option<Skipped>,
}

/// Why a caption is not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Skipped {
    #[error("the image is for regularization: it has to do without the instance prompt")]
    Regularization,
    #[error("a regularization caption would name the subject: found the instance prompt `{0}`")]
    InstancePromptInRegularization(String),
    #[error("the subset has no instance prompt")]
    NoInstancePrompt,
    #[error("the caption cannot be kept: {0}")]
    InvalidCaption(String),
}

impl Skipped {
    /// A stable word.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Regularization => "regularization",
            Self::InstancePromptInRegularization(_) => "instance_prompt_in_regularization",
            Self::NoInstancePrompt => "no_instance_prompt",
            Self::InvalidCaption(_) => "invalid_caption",
        }
    }
}

/// A tag and how many captions have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagCount {
    /// As it was first written.
    pub tag: String,
    pub captions: u64,
    /// By subset.
    pub subsets: BTreeMap<Uuid, u64>,
}

/// The tags of captions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TagCounts {
    /// Captions that were looked at.
    pub captions: u64,
    /// Frequent ones first, then by name.
    pub tags: Vec<TagCount>,
}

impl DatasetService {
    /// Changes many captions, or tells what would change. `expected` is a revision of the dataset to insist on.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`]; [`DatasetError::Changed`] when the dataset is at another revision, or others
    /// keep changing it.
    pub async fn edit_captions(
        &self,
        dataset_id: Uuid,
        batch: CaptionBatch,
        expected: Option<i64>,
        api_key_id: Option<Uuid>,
    ) -> Result<BatchResult, DatasetError> {
        let not_found = DatasetError::DatasetNotFound;
        let mut tries = if expected.is_some() { 1 } else { TRIES };
        loop {
            let (dataset, _) = self.get(dataset_id).await?;
            let revision = expected.unwrap_or(dataset.revision);
            if revision != dataset.revision {
                let (expected, found) = (revision, dataset.revision);
                return Err(DatasetError::Changed { expected, found });
            }
            let images = self.store.all_images(dataset_id).await?;
            let subsets = self.store.list_subsets(dataset_id).await?;
            let (work, limit) = (batch.clone(), self.limits.caption_bytes);
            // Patterns over many captions.
            let done = tokio::task::spawn_blocking(move || {
                work.apply(images, &Subjects::of(&subsets), limit)
            });
            let mut result = done.await?;
            let edits = result.edits();
            if batch.dry_run || edits.is_empty() {
                return Ok(result);
            }
            tries -= 1;
            let written = self
                .store
                .edit_captions(dataset_id, revision, edits, api_key_id)
                .await;
            match written {
                Err(StoreError::Conflict { .. }) if tries > 0 => {}
                written => {
                    let revision =
                        written.map_err(|error| missing(error, not_found(dataset_id)))?;
                    result.revision = Some(revision);
                    return Ok(result);
                }
            }
        }
    }

    /// Takes back what one call has changed.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`], [`DatasetError::NothingToUndo`].
    pub async fn undo_captions(
        &self,
        dataset_id: Uuid,
        revision: i64,
        api_key_id: Option<Uuid>,
    ) -> Result<Undone, DatasetError> {
        self.exists(dataset_id).await?;
        let undone = self.store.undo_captions(dataset_id, revision, api_key_id);
        let undone = undone.await;
        undone.map_err(|error| missing(error, DatasetError::NothingToUndo(revision)))
    }

    /// The changes of an image's caption after `after`, oldest first.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`], [`DatasetError::ImageNotFound`].
    pub async fn caption_history(
        &self,
        dataset_id: Uuid,
        image_id: Uuid,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<CaptionChange>, DatasetError> {
        self.image(dataset_id, image_id).await?;
        Ok(self.store.caption_changes(image_id, after, limit).await?)
    }

    /// Counts tags in captions: of a subset, if it is given; of captions with another tag, if that is.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`].
    pub async fn count_tags(
        &self,
        dataset_id: Uuid,
        filter: &ImageFilter,
    ) -> Result<TagCounts, DatasetError> {
        self.exists(dataset_id).await?;
        let images = self.store.all_images(dataset_id).await?;
        let images = images.into_iter().map(|(image, _)| image);
        Ok(TagCounts::of(images.filter(|image| filter.matches(image))))
    }
}

impl CaptionBatch {
    fn apply(
        &self,
        images: Vec<(Image, Subset)>,
        subjects: &Subjects,
        limit_bytes: u64,
    ) -> BatchResult {
        let mut result = BatchResult::default();
        for (image, subset) in images {
            let listed = self.image_ids.as_ref();
            if !self.filter.matches(&image) || listed.is_some_and(|ids| !ids.contains(&image.id)) {
                continue;
            }
            result.matched += 1;
            let (after, skipped) = match self.caption(&image, &subset, subjects, limit_bytes) {
                Ok(after) => (after, None),
                Err(skipped) => (image.caption.clone(), Some(skipped)),
            };
            if after != image.caption || skipped.is_some() {
                result.images.push(BatchImage {
                    image,
                    after,
                    skipped,
                });
            }
        }
        result
    }

    /// The image's caption after all operations, or why it stays. One that cannot be done keeps the others out, too: a
    /// caption half done is none that anybody has asked for.
    fn caption(
        &self,
        image: &Image,
        subset: &Subset,
        subjects: &Subjects,
        limit_bytes: u64,
    ) -> Result<Option<String>, Skipped> {
        let prompt = subset.instance_prompt.as_deref();
        let prompt = prompt.filter(|prompt| !prompt.trim().is_empty());
        let mut caption = image.caption.clone();
        for operation in &self.operations {
            if matches!(operation, Operation::InstancePromptFirst) {
                if subset.is_reg {
                    return Err(Skipped::Regularization);
                }
                if prompt.is_none() {
                    return Err(Skipped::NoInstancePrompt);
                }
            }
            let Some(text) = caption
                .as_deref()
                .or(operation.makes_captions().then_some(""))
            else {
                continue;
            };
            let after = operation.apply(text, prompt);
            captions::check(&after, limit_bytes)
                .map_err(|error| Skipped::InvalidCaption(error.to_string()))?;
            caption = Some(after);
        }
        let (before, after) = (image.caption.as_deref(), caption.as_deref());
        let (before, after) = (before.unwrap_or_default(), after.unwrap_or_default());
        match subjects.newly_named(subset.id, before, after) {
            Some(prompt) => Err(Skipped::InstancePromptInRegularization(prompt.to_owned())),
            None => Ok(caption),
        }
    }
}

impl BatchResult {
    fn edits(&self) -> Vec<CaptionEdit> {
        let changed = self.images.iter().filter(|image| image.skipped.is_none());
        let edit = |image: &BatchImage| CaptionEdit {
            image_id: image.image.id,
            caption: image.after.clone(),
        };
        changed.map(edit).collect()
    }

    /// How many captions change.
    pub fn changed(&self) -> usize {
        self.images.len() - self.skipped()
    }

    /// How many images were left out.
    pub fn skipped(&self) -> usize {
        let skipped = self.images.iter().filter(|image| image.skipped.is_some());
        skipped.count()
    }
}

impl TagCounts {
    fn of(images: impl Iterator<Item = Image>) -> Self {
        let mut counts = Self::default();
        let mut by_name: HashMap<String, usize> = HashMap::new();
        for image in images {
            let Some(caption) = &image.caption else {
                continue;
            };
            counts.captions += 1;
            let mut seen = HashSet::new();
            for tag in tags_of(caption) {
                let name = tag.to_lowercase();
                if !seen.insert(name.clone()) {
                    continue;
                }
                let index = *by_name.entry(name).or_insert_with(|| {
                    counts.tags.push(TagCount {
                        tag: tag.to_owned(),
                        captions: 0,
                        subsets: BTreeMap::new(),
                    });
                    counts.tags.len() - 1
                });
                counts.tags[index].captions += 1;
                *counts.tags[index]
                    .subsets
                    .entry(image.subset_id)
                    .or_default() += 1;
            }
        }
        counts
            .tags
            .sort_by(|a, b| b.captions.cmp(&a.captions).then_with(|| a.tag.cmp(&b.tag)));
        counts
    }
}
