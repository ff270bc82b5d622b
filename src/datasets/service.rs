//! What can be done with datasets: the rules between the API and the rows. Uploads are in `ingest`.

use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;
use tokio::sync::Notify;
use uuid::Uuid;

use super::captions;
use super::error::DatasetError;
use super::export::{ExportImage, ExportSource, ExportSubset};
use super::ingest;
use super::limits::Limits;
use super::prepare::{StagedFile, SubsetChoice};
use super::report::{FileReport, Summary};
use super::rules::{Checker, SubsetWords};
use super::subjects::Subjects;
use super::trial::Trial;
use crate::store::datasets::{
    Correction, Dataset, DatasetCounts, Image, ImageFilter, ImageUpdate, Subset, SubsetCounts,
    SubsetSettings,
};
use crate::store::{Store, StoreError};

/// Datasets, their subsets and images. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct DatasetService {
    pub(super) store: Store,
    pub(super) limits: Limits,
    pub(super) trial: Option<Trial>,
    /// Whoever looks at pictures that have come.
    uploaded: Arc<Notify>,
}

impl DatasetService {
    pub fn new(store: Store, limits: Limits) -> Self {
        Self {
            store,
            limits,
            trial: None,
            uploaded: Arc::default(),
        }
    }

    /// Decodes the pictures that are trusted least in processes of this program.
    #[must_use]
    pub fn trying_with(self, trial: Trial) -> Self {
        Self {
            trial: Some(trial),
            ..self
        }
    }

    /// The same, telling somebody of every upload.
    #[must_use]
    pub fn telling(self, uploaded: Arc<Notify>) -> Self {
        Self { uploaded, ..self }
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// What an upload may hold.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Makes an empty dataset.
    ///
    /// # Errors
    /// [`DatasetError::InvalidDataset`] for a name that cannot be.
    pub async fn create(&self, name: &str) -> Result<Dataset, DatasetError> {
        Checker::default()
            .name("name", name)
            .finish()
            .map_err(DatasetError::InvalidDataset)?;
        Ok(self.store.create_dataset(name).await?)
    }

    /// A dataset and how much it holds.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`].
    pub async fn get(&self, id: Uuid) -> Result<(Dataset, DatasetCounts), DatasetError> {
        let dataset = self.store.dataset(id).await;
        let dataset = dataset.map_err(|error| missing(error, DatasetError::DatasetNotFound(id)))?;
        let counts = self.store.count_datasets(&[id]).await?;
        Ok((dataset, counts.get(&id).copied().unwrap_or_default()))
    }

    /// Datasets after `after`, oldest first.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(
        &self,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<(Dataset, DatasetCounts)>, DatasetError> {
        let datasets = self.store.list_datasets(after, limit).await?;
        let ids: Vec<Uuid> = datasets.iter().map(|dataset| dataset.id).collect();
        let counts = self.store.count_datasets(&ids).await?;
        let counted = datasets.into_iter().map(|dataset| {
            let counts = counts.get(&dataset.id).copied().unwrap_or_default();
            (dataset, counts)
        });
        Ok(counted.collect())
    }

    /// Replaces a dataset's name and colour correction; with an expected revision only at that revision.
    ///
    /// # Errors
    /// [`DatasetError::InvalidDataset`], [`DatasetError::DatasetNotFound`], [`DatasetError::Changed`].
    pub async fn update(
        &self,
        id: Uuid,
        name: &str,
        color_correction: Option<Correction>,
        expected: Option<i64>,
    ) -> Result<(Dataset, DatasetCounts), DatasetError> {
        Checker::default()
            .name("name", name)
            .finish()
            .map_err(DatasetError::InvalidDataset)?;
        let updated = self
            .store
            .update_dataset(id, name, color_correction, expected);
        let updated = updated.await;
        updated.map_err(|error| missing(error, DatasetError::DatasetNotFound(id)))?;
        self.get(id).await
    }

    /// Deletes a dataset with everything in it; with an expected revision only at that revision.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`], [`DatasetError::InUse`], [`DatasetError::Changed`].
    pub async fn delete(&self, id: Uuid, expected: Option<i64>) -> Result<(), DatasetError> {
        let deleted = self.store.delete_dataset(id, expected).await;
        deleted.map_err(|error| missing(error, DatasetError::DatasetNotFound(id)))
    }

    /// All subsets of a dataset, oldest first.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`].
    pub async fn subsets(
        &self,
        dataset_id: Uuid,
    ) -> Result<Vec<(Subset, SubsetCounts)>, DatasetError> {
        self.exists(dataset_id).await?;
        let subsets = self.store.list_subsets(dataset_id).await?;
        let counts = self.store.count_subsets(&[dataset_id]).await?;
        let counted = subsets.into_iter().map(|subset| {
            let counts = counts.get(&subset.id).copied().unwrap_or_default();
            (subset, counts)
        });
        Ok(counted.collect())
    }

    /// One subset of a dataset.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`], [`DatasetError::SubsetNotFound`].
    pub async fn subset(
        &self,
        dataset_id: Uuid,
        subset_id: Uuid,
    ) -> Result<(Subset, SubsetCounts), DatasetError> {
        let subsets = self.subsets(dataset_id).await?;
        let found = subsets
            .into_iter()
            .find(|(subset, _)| subset.id == subset_id);
        found.ok_or(DatasetError::SubsetNotFound(subset_id))
    }

    /// Replaces a subset's settings if it is still at the expected revision.
    ///
    /// # Errors
    /// [`DatasetError::SubsetNotFound`], [`DatasetError::InvalidSubset`], [`DatasetError::SubsetExists`],
    /// [`DatasetError::Changed`].
    pub async fn update_subset(
        &self,
        subset_id: Uuid,
        settings: &SubsetSettings,
        expected: i64,
    ) -> Result<Subset, DatasetError> {
        let words = SubsetWords {
            name: Some(("name", &settings.name)),
            repeats: Some(settings.repeats),
            instance_prompt: settings.instance_prompt.as_deref(),
            class_prompt: settings.class_prompt.as_deref(),
        };
        words.check().map_err(DatasetError::InvalidSubset)?;
        Checker::default()
            .training(&settings.training)
            .finish()
            .map_err(DatasetError::InvalidSubset)?;
        let updated = self
            .store
            .update_subset(subset_id, settings, expected)
            .await;
        updated.map_err(|error| match error {
            StoreError::Exists => DatasetError::SubsetExists(settings.name.clone()),
            error => missing(error, DatasetError::SubsetNotFound(subset_id)),
        })
    }

    /// A dataset's images after `after` that a filter means, oldest first.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`]. An unknown subset has no images.
    pub async fn images(
        &self,
        dataset_id: Uuid,
        filter: &ImageFilter,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Image>, DatasetError> {
        self.exists(dataset_id).await?;
        let images = self.store.list_images(dataset_id, filter, after, limit);
        Ok(images.await?)
    }

    /// One image of a dataset.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`], [`DatasetError::ImageNotFound`].
    pub async fn image(&self, dataset_id: Uuid, image_id: Uuid) -> Result<Image, DatasetError> {
        self.exists(dataset_id).await?;
        let image = self.store.image(image_id).await;
        let image = image.map_err(|error| missing(error, DatasetError::ImageNotFound(image_id)))?;
        match image.dataset_id == dataset_id {
            true => Ok(image),
            false => Err(DatasetError::ImageNotFound(image_id)),
        }
    }

    /// Replaces an image's caption and what is done to its colours; with an expected revision only at that revision.
    ///
    /// # Errors
    /// [`DatasetError::Caption`], [`DatasetError::InstancePrompt`], [`DatasetError::ImageNotFound`],
    /// [`DatasetError::Changed`].
    pub async fn update_image(
        &self,
        image: &Image,
        update: ImageUpdate,
        expected: Option<i64>,
        api_key_id: Option<Uuid>,
    ) -> Result<Image, DatasetError> {
        if let Some(caption) = &update.caption {
            captions::check(caption, self.limits.caption_bytes)?;
            let subsets = self.store.list_subsets(image.dataset_id).await?;
            let before = image.caption.as_deref().unwrap_or_default();
            if let Some(prompt) =
                Subjects::of(&subsets).newly_named(image.subset_id, before, caption)
            {
                return Err(DatasetError::InstancePrompt(prompt.to_owned()));
            }
        }
        let updated = self
            .store
            .update_image(image.id, update, expected, api_key_id);
        let updated = updated.await;
        updated.map_err(|error| missing(error, DatasetError::ImageNotFound(image.id)))
    }

    /// Deletes an image; with an expected revision only at that revision.
    ///
    /// # Errors
    /// [`DatasetError::ImageNotFound`], [`DatasetError::Changed`].
    pub async fn delete_image(
        &self,
        image_id: Uuid,
        expected: Option<i64>,
    ) -> Result<(), DatasetError> {
        let deleted = self.store.delete_image(image_id, expected).await;
        deleted.map_err(|error| missing(error, DatasetError::ImageNotFound(image_id)))
    }

    /// A dataset as it is now, to be exported.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`].
    pub async fn export(&self, dataset_id: Uuid) -> Result<ExportSource, DatasetError> {
        let (dataset, _) = self.get(dataset_id).await?;
        let images = self.store.all_images(dataset_id).await?;
        let subsets = self.store.list_subsets(dataset_id).await?;
        let subset = |subset: Subset| ExportSubset {
            name: subset.name,
            repeats: subset.repeats,
            is_reg: subset.is_reg,
            instance_prompt: subset.instance_prompt,
            class_prompt: subset.class_prompt,
            training: subset.training,
        };
        let image = |(image, _): (Image, Subset)| ExportImage {
            content: self.content_path(&image),
            sha256: image.sha256,
            file_name: image.file_name,
            subset: image.subset_name,
            caption: image.caption,
            mask: image.mask_sha256.map(|sha256| self.mask_path(&sha256)),
        };
        Ok(ExportSource {
            dataset: dataset.name,
            subsets: subsets.into_iter().map(subset).collect(),
            images: images.into_iter().map(image).collect(),
            general: Vec::new(),
            datasets: Vec::new(),
        })
    }

    /// Where an image's content is.
    pub fn content_path(&self, image: &Image) -> PathBuf {
        self.store.blobs().path(&image.sha256)
    }

    /// A folder for one upload; gone when dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch(&self) -> Result<TempDir, DatasetError> {
        Ok(self.store.blobs().scratch()?)
    }

    /// Takes uploaded files into a dataset: each is reported, and what is wrong with one keeps none of the others out.
    ///
    /// The work goes on when the caller no longer waits: a client that hangs up after its last byte loses nothing.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`], [`DatasetError::NothingUploaded`], [`DatasetError::InvalidSubset`], or when
    /// the disk or the database fails; what was taken in before stays.
    pub async fn ingest(
        &self,
        dataset_id: Uuid,
        files: Vec<StagedFile>,
        choice: SubsetChoice,
        scratch: TempDir,
    ) -> Result<(Vec<FileReport>, Summary), DatasetError> {
        if files.is_empty() {
            return Err(DatasetError::NothingUploaded);
        }
        ingest::check_choice(&choice)?;
        self.exists(dataset_id).await?;
        let (store, limits, trial) = (self.store.clone(), self.limits, self.trial.clone());
        let work = ingest::ingest(store, limits, trial, dataset_id, files, choice, scratch);
        let uploaded = self.uploaded.clone();
        let work = async move {
            let reports = work.await;
            uploaded.notify_one();
            reports
        };
        let reports = tokio::spawn(work).await??;
        let summary = Summary::of(&reports);
        Ok((reports, summary))
    }

    /// # Errors
    /// [`DatasetError::DatasetNotFound`].
    pub async fn exists(&self, dataset_id: Uuid) -> Result<(), DatasetError> {
        let dataset = self.store.dataset(dataset_id).await;
        let dataset =
            dataset.map_err(|error| missing(error, DatasetError::DatasetNotFound(dataset_id)));
        dataset.map(|_| ())
    }
}

/// What a row's absence, its use or its change means here.
pub(super) fn missing(error: StoreError, not_found: DatasetError) -> DatasetError {
    match error {
        StoreError::NotFound => not_found,
        StoreError::InUse => DatasetError::InUse,
        StoreError::Conflict { expected, found } => DatasetError::Changed { expected, found },
        error => DatasetError::Store(error),
    }
}
