//! The second half of an upload: checked images become blobs and rows, captions find images that were there before.

use std::collections::HashMap;
use std::path::PathBuf;

use tempfile::TempDir;
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::error::{DatasetError, InvalidField};
use super::layout::Place;
use super::limits::Limits;
use super::manifest;
use super::prepare::{
    self, Checks, DEFAULT_SUBSET, Prepared, PreparedCaption, PreparedImage, StagedFile,
    SubsetChoice, Target,
};
use super::report::{FileReport, Outcome, Remark};
use super::rules::SubsetWords;
use super::service::missing;
use super::trial::Trial;
use crate::store::datasets::{AddedImage, ImageName, NewImage, SubsetHints};
use crate::store::{Store, StoreError, StoredBlob};

/// Images stored by one transaction: few enough that little is lost with it, many enough that its flush is cheap.
const BATCH: usize = 32;

/// Checks what the upload says about its subset.
pub fn check_choice(choice: &SubsetChoice) -> Result<(), DatasetError> {
    let words = SubsetWords {
        name: choice.name.as_deref().map(|name| ("subset", name)),
        repeats: choice.repeats,
        instance_prompt: choice.instance_prompt.as_deref(),
        class_prompt: choice.class_prompt.as_deref(),
    };
    words.check().map_err(DatasetError::InvalidSubset)
}

/// Takes files in, batch by batch; a later failure leaves the earlier batches in the dataset.
pub async fn ingest(
    store: Store,
    limits: Limits,
    trial: Option<Trial>,
    dataset_id: Uuid,
    files: Vec<StagedFile>,
    choice: SubsetChoice,
    scratch: TempDir,
) -> Result<Vec<FileReport>, DatasetError> {
    let (found, prepared, scratch) = spawn_blocking(move || {
        let found = manifest::find(&files);
        let checks = Checks {
            limits: &limits,
            trial: trial.as_ref(),
        };
        let prepared = prepare::prepare(files, &choice, scratch.path(), checks);
        prepared.map(|prepared| (found, prepared, scratch))
    })
    .await??;
    let Prepared {
        images,
        orphans,
        files,
    } = prepared;
    let mut ingest = Ingest {
        store,
        dataset_id,
        files,
        subsets: HashMap::new(),
    };
    let mut images = images.into_iter();
    loop {
        let batch: Vec<PreparedImage> = images.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            break;
        }
        ingest.take_images(batch).await?;
    }
    if !orphans.is_empty() {
        ingest.take_captions(orphans).await?;
    }
    if let Some(found) = found {
        manifest::apply(&ingest.store, &limits, dataset_id, found, &mut ingest.files).await?;
    }
    spawn_blocking(move || drop(scratch)).await?; // removing thousands of files takes a while
    Ok(ingest.files)
}

struct Ingest {
    store: Store,
    dataset_id: Uuid,
    files: Vec<FileReport>,
    /// The subsets of this upload; a folder's name may be none that a subset can have.
    subsets: HashMap<Target, Result<Uuid, Remark>>,
}

/// An image on its way from the checks to its row.
struct Placed {
    image: PreparedImage,
    subset_id: Uuid,
    mask_sha256: Option<String>,
}

impl Ingest {
    async fn take_images(&mut self, batch: Vec<PreparedImage>) -> Result<(), DatasetError> {
        let mut placed = Vec::with_capacity(batch.len());
        for image in batch {
            match self.subset_of(&image.target).await? {
                Ok(subset_id) => placed.push(Placed {
                    mask_sha256: self.adopt_mask(&image).await?,
                    image,
                    subset_id,
                }),
                Err(remark) => self.refuse(&image, &remark),
            }
        }
        let files = placed.iter().map(|placed| checked(&placed.image)).collect();
        let mut rows = Vec::with_capacity(placed.len());
        let mut stored = Vec::with_capacity(placed.len());
        for (placed, blob) in placed.into_iter().zip(self.adopt(files).await?) {
            match blob {
                Ok(blob) => {
                    rows.push(row(&placed, blob));
                    stored.push(placed.image);
                }
                Err(error) => {
                    tracing::error!(%error, "an uploaded image could not be stored");
                    let message = "the service could not write the file; the log has the cause";
                    self.refuse(&placed.image, &Remark::new("not_stored", message));
                }
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let added = self.store.add_images(self.dataset_id, rows).await;
        let added = added.map_err(|error| self.gone(error))?;
        for (image, added) in stored.iter().zip(added) {
            self.accept(image, added);
        }
        Ok(())
    }

    async fn adopt(
        &self,
        files: Vec<(PathBuf, StoredBlob)>,
    ) -> Result<Vec<Result<StoredBlob, StoreError>>, DatasetError> {
        let blobs = self.store.blobs();
        let adopted = files.into_iter().map(|(path, known)| {
            let blobs = blobs.clone();
            // Each waits for the disk, which has less to do when it is asked for all of them at once.
            spawn_blocking(move || blobs.adopt_known(&path, known))
        });
        let adopted: Vec<_> = adopted.collect();
        let mut stored = Vec::with_capacity(adopted.len());
        for blob in adopted {
            stored.push(blob.await?);
        }
        Ok(stored)
    }

    /// The digest of an image's mask, if it has one. A disk that fails here fails the upload.
    async fn adopt_mask(&self, image: &PreparedImage) -> Result<Option<String>, DatasetError> {
        let Some(mask) = &image.mask else {
            return Ok(None);
        };
        let (blobs, path) = (self.store.blobs().clone(), mask.path.clone());
        let stored = spawn_blocking(move || blobs.adopt(&path)).await??;
        Ok(Some(stored.sha256))
    }

    /// The subset's id, or why there cannot be one.
    async fn subset_of(&mut self, target: &Target) -> Result<Result<Uuid, Remark>, DatasetError> {
        if let Some(known) = self.subsets.get(target) {
            return Ok(known.clone());
        }
        let subset = match check_target(target) {
            Err(wrong) => Err(describe(&wrong)),
            Ok(()) => {
                let hints = hints(target);
                let made = self
                    .store
                    .ensure_subset(self.dataset_id, &target.name, &hints);
                Ok(made.await.map_err(|error| self.gone(error))?.id)
            }
        };
        self.subsets.insert(target.clone(), subset.clone());
        Ok(subset)
    }

    /// Captions without an image in the upload belong to images of the dataset, or to none.
    async fn take_captions(&mut self, orphans: Vec<PreparedCaption>) -> Result<(), DatasetError> {
        let names = self.store.image_names(self.dataset_id).await?;
        let subsets = self.store.list_subsets(self.dataset_id).await?;
        let subsets: HashMap<String, Uuid> = subsets
            .into_iter()
            .map(|subset| (subset.name, subset.id))
            .collect();
        let by_stem = by_stem(&names);
        let mut captions = Vec::new();
        for orphan in &orphans {
            let same_stem = by_stem
                .get(orphan.stem.as_str())
                .map_or(&[][..], Vec::as_slice);
            let found = meant(same_stem, &orphan.target, subsets.get(&orphan.target.name));
            let Some(first) = found.first() else {
                self.files[orphan.report].outcome = Outcome::Refused(no_image(orphan));
                continue;
            };
            let subset = subsets.iter().find(|(_, id)| **id == first.subset_id);
            self.files[orphan.report].outcome = Outcome::Accepted {
                image_id: Some(first.id),
                subset: subset.map(|(name, _)| name.clone()),
            };
            captions.extend(found.iter().map(|image| (image.id, orphan.text.clone())));
        }
        for batch in captions.chunks(BATCH) {
            let set = self
                .store
                .set_captions(self.dataset_id, batch.to_vec())
                .await;
            set.map_err(|error| self.gone(error))?;
        }
        Ok(())
    }

    fn accept(&mut self, image: &PreparedImage, added: AddedImage) {
        let subset = image.target.name.clone();
        let (id, outcome) = match added {
            AddedImage::New(id) => {
                let (image_id, subset) = (Some(id), Some(subset.clone()));
                (id, Outcome::Accepted { image_id, subset })
            }
            AddedImage::Present(id) => {
                let (image_id, subset) = (id, subset.clone());
                (id, Outcome::Duplicate { image_id, subset })
            }
        };
        self.files[image.report].outcome = outcome;
        if let Some(mask) = &image.mask {
            self.files[mask.report].outcome = Outcome::Accepted {
                image_id: Some(id),
                subset: Some(subset.clone()),
            };
        }
        if let Some(caption) = &image.caption {
            self.files[caption.report].outcome = Outcome::Accepted {
                image_id: Some(id),
                subset: Some(subset),
            };
        }
    }

    /// An image that is left out takes its caption with it, unless another image has the caption too.
    fn refuse(&mut self, image: &PreparedImage, remark: &Remark) {
        self.files[image.report].outcome = Outcome::Refused(remark.clone());
        if let Some(mask) = &image.mask {
            self.files[mask.report].outcome = Outcome::Refused(remark.clone());
        }
        if let Some(caption) = &image.caption
            && !matches!(self.files[caption.report].outcome, Outcome::Accepted { .. })
        {
            self.files[caption.report].outcome = Outcome::Refused(remark.clone());
        }
    }

    fn gone(&self, error: StoreError) -> DatasetError {
        missing(error, DatasetError::DatasetNotFound(self.dataset_id))
    }
}

/// A file whose content was read by the check.
fn checked(image: &PreparedImage) -> (PathBuf, StoredBlob) {
    let known = StoredBlob {
        sha256: image.picture.sha256.clone(),
        size_bytes: image.picture.size_bytes,
    };
    (image.path.clone(), known)
}

fn row(placed: &Placed, blob: StoredBlob) -> NewImage {
    let image = &placed.image;
    NewImage {
        subset_id: placed.subset_id,
        file_name: image.file_name.clone(),
        sha256: blob.sha256,
        media_type: image.picture.media_type.to_owned(),
        size_bytes: blob.size_bytes,
        width_px: image.picture.width_px,
        height_px: image.picture.height_px,
        caption: image.caption_text(),
        has_alpha: image.picture.has_alpha,
        mask_sha256: placed.mask_sha256.clone(),
        background: image.background.map(|colour| colour.to_string()),
    }
}

fn hints(target: &Target) -> SubsetHints {
    SubsetHints {
        repeats: target.repeats,
        is_reg: target.is_reg,
        instance_prompt: target.instance_prompt.clone(),
        class_prompt: target.class_prompt.clone(),
        training: target.training.clone().map(|training| training.0),
    }
}

fn check_target(target: &Target) -> Result<(), Vec<InvalidField>> {
    let words = SubsetWords {
        name: Some(("subset", &target.name)),
        repeats: target.repeats,
        instance_prompt: target.instance_prompt.as_deref(),
        class_prompt: target.class_prompt.as_deref(),
    };
    words.check()
}

fn describe(wrong: &[InvalidField]) -> Remark {
    let each = wrong.iter().map(|w| format!("{}: {}", w.field, w.message));
    Remark::new("invalid_subset", each.collect::<Vec<_>>().join("; "))
}

fn no_image(orphan: &PreparedCaption) -> Remark {
    let message = format!(
        "neither the upload nor the subset `{}` has an image named `{}`",
        orphan.target.name, orphan.stem
    );
    Remark::new("no_image", message)
}

fn by_stem(names: &[ImageName]) -> HashMap<&str, Vec<&ImageName>> {
    let mut by_stem: HashMap<&str, Vec<&ImageName>> = HashMap::new();
    for name in names {
        by_stem
            .entry(Place::stem_of(&name.file_name))
            .or_default()
            .push(name);
    }
    by_stem
}

/// The images of the caption's subset. A loose caption may also mean an image of another subset, if only one has it.
fn meant<'a>(
    same_stem: &[&'a ImageName],
    target: &Target,
    subset_id: Option<&Uuid>,
) -> Vec<&'a ImageName> {
    let of_subset = |wanted: Uuid| -> Vec<&ImageName> {
        let matching = same_stem.iter().filter(|image| image.subset_id == wanted);
        matching.copied().collect()
    };
    let found = subset_id.map(|id| of_subset(*id)).unwrap_or_default();
    match same_stem.first() {
        Some(first) if found.is_empty() && target.name == DEFAULT_SUBSET => {
            let only = of_subset(first.subset_id);
            if only.len() == same_stem.len() {
                only
            } else {
                Vec::new()
            }
        }
        _ => found,
    }
}
