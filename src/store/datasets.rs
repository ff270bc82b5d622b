//! Rows of datasets and their subsets; those of images are in `datasets/images.rs`.

mod captions;
mod correction;
mod images;
mod masks;
mod tags;
#[cfg(test)]
mod tests;
mod training;

use std::collections::HashMap;

use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, ConnectionTrait, DbBackend, EntityTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::rows::{dataset, image, run, subset};
use super::{Store, StoreError, now_ms, time_of};

pub use captions::{CaptionChange, CaptionEdit, ChangeKind, Undone};
pub use correction::Correction;
pub(super) use images::change_captions;
pub use images::{AddedImage, Image, ImageName, ImageUpdate, NewImage};
pub use tags::{ImageFilter, tags_of};
pub use training::{SubsetAugment, SubsetCaptions, SubsetTraining};

/// A named set of subsets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    pub id: Uuid,
    pub name: String,
    /// What is done to the colours of images that say nothing themselves.
    pub color_correction: Option<Correction>,
    /// Counts every change of the dataset, its subsets and its images.
    pub revision: i64,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
}

/// How much a dataset holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatasetCounts {
    pub subsets: u64,
    /// All images, those for regularization included.
    pub images: u64,
    pub reg_images: u64,
    pub captioned_images: u64,
}

/// A concept, or the regularization of one.
#[derive(Clone, Debug, PartialEq)]
pub struct Subset {
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub name: String,
    /// How often an epoch shows each image.
    pub repeats: u32,
    pub is_reg: bool,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    pub training: SubsetTraining,
    pub revision: i64,
    pub created_at: OffsetDateTime,
}

/// How much a subset holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubsetCounts {
    pub images: u64,
    pub captioned_images: u64,
}

/// Everything about a subset that can be changed.
#[derive(Clone, Debug, PartialEq)]
pub struct SubsetSettings {
    pub name: String,
    pub repeats: u32,
    pub is_reg: bool,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    pub training: SubsetTraining,
}

/// What an upload says about a subset. `None` leaves the value of an existing subset alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SubsetHints {
    pub repeats: Option<u32>,
    pub is_reg: Option<bool>,
    pub instance_prompt: Option<String>,
    pub class_prompt: Option<String>,
    pub training: Option<SubsetTraining>,
}

impl Store {
    /// Makes an empty dataset.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn create_dataset(&self, name: &str) -> Result<Dataset, StoreError> {
        let now = now_ms();
        let row = dataset::ActiveModel {
            id: Set(Uuid::now_v7()),
            name: Set(name.to_owned()),
            color_correction: Set(None),
            revision: Set(1),
            created_at_ms: Set(now),
            updated_at_ms: Set(now),
        };
        Ok(row.insert(&self.db).await?.into())
    }

    /// Replaces a dataset's name and colour correction; with an expected revision only at that revision.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`]; or when the database fails.
    pub async fn update_dataset(
        &self,
        id: Uuid,
        name: &str,
        color_correction: Option<Correction>,
        expected: Option<i64>,
    ) -> Result<Dataset, StoreError> {
        let write = self.begin().await?;
        let row = dataset::Entity::find_by_id(id).one(&write).await?;
        let row = row.ok_or(StoreError::NotFound)?;
        check_revision(expected, row.revision)?;
        let word = color_correction.map(Correction::to_row);
        if row.name == name && row.color_correction == word {
            return Ok(row.into());
        }
        let row = dataset::ActiveModel {
            name: Set(name.to_owned()),
            color_correction: Set(word),
            revision: Set(row.revision + 1),
            updated_at_ms: Set(now_ms()),
            ..row.into()
        };
        let row = row.update(&write).await?;
        write.commit().await?;
        Ok(row.into())
    }

    /// # Errors
    /// [`StoreError::NotFound`], or when the database fails.
    pub async fn dataset(&self, id: Uuid) -> Result<Dataset, StoreError> {
        let row = dataset::Entity::find_by_id(id).one(&self.db).await?;
        row.map(Dataset::from).ok_or(StoreError::NotFound)
    }

    /// Datasets after `after`, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list_datasets(
        &self,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Dataset>, StoreError> {
        let mut query = dataset::Entity::find();
        if let Some(after) = after {
            query = query.filter(dataset::Column::Id.gt(after));
        }
        let rows = query
            .order_by_asc(dataset::Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().map(Dataset::from).collect())
    }

    /// What each of these datasets holds; one that is empty or missing has zeros or no entry.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_datasets(
        &self,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, DatasetCounts>, StoreError> {
        let subsets = subset::Entity::find()
            .filter(subset::Column::DatasetId.is_in(ids.iter().copied()))
            .all(&self.db)
            .await?;
        let filled = self.count_subsets(ids).await?;
        let mut counts: HashMap<Uuid, DatasetCounts> = HashMap::new();
        for subset in subsets {
            let of_subset = filled.get(&subset.id).copied().unwrap_or_default();
            let counts = counts.entry(subset.dataset_id).or_default();
            counts.subsets += 1;
            counts.images += of_subset.images;
            counts.captioned_images += of_subset.captioned_images;
            if subset.is_reg {
                counts.reg_images += of_subset.images;
            }
        }
        Ok(counts)
    }

    /// What the subsets of these datasets hold, by the subset's id; an empty subset has no entry.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_subsets(
        &self,
        dataset_ids: &[Uuid],
    ) -> Result<HashMap<Uuid, SubsetCounts>, StoreError> {
        let rows: Vec<(Uuid, i64, i64)> = image::Entity::find()
            .select_only()
            .column(image::Column::SubsetId)
            .column_as(image::Column::Id.count(), "images")
            .column_as(image::Column::Caption.count(), "captioned_images")
            .filter(image::Column::DatasetId.is_in(dataset_ids.iter().copied()))
            .group_by(image::Column::SubsetId)
            .into_tuple()
            .all(&self.db)
            .await?;
        let counts = rows.into_iter().map(|(subset, images, captioned)| {
            let counts = SubsetCounts {
                images: images as u64, // COUNT is never negative
                captioned_images: captioned as u64,
            };
            (subset, counts)
        });
        Ok(counts.collect())
    }

    /// Deletes a dataset with its subsets and images; with an expected revision only at that revision.
    ///
    /// The files stay until a sweep: other rows may name the same content.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`]; [`StoreError::InUse`] when a run refers to it; or when the
    /// database fails.
    pub async fn delete_dataset(
        &self,
        id: Uuid,
        expected_revision: Option<i64>,
    ) -> Result<(), StoreError> {
        let write = self.begin().await?;
        let row = dataset::Entity::find_by_id(id).one(&write).await?;
        check_revision(expected_revision, row.ok_or(StoreError::NotFound)?.revision)?;
        // Captioning jobs go with their dataset; one that has not ended keeps it.
        run::Entity::delete_many()
            .filter(run::Column::DatasetId.eq(id))
            .filter(run::Column::Captioner.is_not_null())
            .filter(run::Column::FinishedAtMs.is_not_null())
            .exec(&write)
            .await?;
        // SQLite reports a restricting key as a failed trigger, so it is asked beforehand; the write lock is ours.
        let used = run::Entity::find()
            .select_only()
            .column(run::Column::Id)
            .filter(run::Column::DatasetId.eq(id))
            .limit(1)
            .into_tuple::<Uuid>()
            .one(&write)
            .await?;
        if used.is_some() {
            return Err(StoreError::InUse);
        }
        let deleted = dataset::Entity::delete_many()
            .filter(dataset::Column::Id.eq(id))
            .exec(&write)
            .await?;
        write.commit().await?;
        match deleted.rows_affected {
            0 => Err(StoreError::NotFound),
            _ => Ok(()),
        }
    }

    /// All subsets of a dataset, oldest first. There are few: each is a folder.
    ///
    /// # Errors
    /// When the database fails. A missing dataset has no subsets.
    pub async fn list_subsets(&self, dataset_id: Uuid) -> Result<Vec<Subset>, StoreError> {
        let rows = subset::Entity::find()
            .filter(subset::Column::DatasetId.eq(dataset_id))
            .order_by_asc(subset::Column::Id)
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().map(Subset::from).collect())
    }

    /// # Errors
    /// [`StoreError::NotFound`], or when the database fails.
    pub async fn subset(&self, id: Uuid) -> Result<Subset, StoreError> {
        let row = subset::Entity::find_by_id(id).one(&self.db).await?;
        row.map(Subset::from).ok_or(StoreError::NotFound)
    }

    /// The dataset's subset of this name, made or changed as the hints say.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such dataset, or when the database fails.
    pub async fn ensure_subset(
        &self,
        dataset_id: Uuid,
        name: &str,
        hints: &SubsetHints,
    ) -> Result<Subset, StoreError> {
        let write = self.begin().await?;
        // Whoever else makes it at the same time waits here, or is waited for.
        lock(&write, dataset_id).await?;
        let present = subset::Entity::find()
            .filter(subset::Column::DatasetId.eq(dataset_id))
            .filter(subset::Column::Name.eq(name))
            .one(&write)
            .await?;
        let row = match present {
            None => {
                touch(&write, dataset_id).await?;
                new_subset(dataset_id, name, hints).insert(&write).await?
            }
            Some(row) => {
                let settings = hints.over(&row);
                if settings == SubsetSettings::of(&row) {
                    return Ok(row.into());
                }
                touch(&write, dataset_id).await?;
                settings.onto(row).update(&write).await?
            }
        };
        write.commit().await?;
        Ok(row.into())
    }

    /// Replaces a subset's settings if it is still at the expected revision.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`]; [`StoreError::Exists`] when another subset of the dataset
    /// has the name; or when the database fails.
    pub async fn update_subset(
        &self,
        id: Uuid,
        settings: &SubsetSettings,
        expected: i64,
    ) -> Result<Subset, StoreError> {
        let write = self.begin().await?;
        let row = subset::Entity::find_by_id(id).one(&write).await?;
        let row = row.ok_or(StoreError::NotFound)?;
        check_revision(Some(expected), row.revision)?;
        if *settings == SubsetSettings::of(&row) {
            return Ok(row.into());
        }
        touch(&write, row.dataset_id).await?;
        let row = settings.onto(row).update(&write).await?;
        write.commit().await?;
        Ok(row.into())
    }
}

/// Keeps the row of a dataset to this transaction. SQLite has one writer anyway.
async fn lock<C: ConnectionTrait>(write: &C, dataset_id: Uuid) -> Result<(), StoreError> {
    let row = dataset::Entity::find_by_id(dataset_id);
    let row = match write.get_database_backend() {
        DbBackend::Sqlite => row.one(write).await?,
        _ => row.lock_exclusive().one(write).await?,
    };
    row.map(|_| ()).ok_or(StoreError::NotFound)
}

/// Counts a change of a dataset, and tells its revision.
async fn touch<C: ConnectionTrait>(write: &C, dataset_id: Uuid) -> Result<i64, StoreError> {
    lock(write, dataset_id).await?; // so that no change is counted once for two
    let row = dataset::Entity::find_by_id(dataset_id).one(write).await?;
    let row = row.ok_or(StoreError::NotFound)?;
    let revision = row.revision + 1;
    let mut row = dataset::ActiveModel::from(row);
    row.revision = Set(revision);
    row.updated_at_ms = Set(now_ms());
    row.update(write).await?;
    Ok(revision)
}

fn check_revision(expected: Option<i64>, found: i64) -> Result<(), StoreError> {
    match expected {
        Some(expected) if expected != found => Err(StoreError::Conflict { expected, found }),
        _ => Ok(()),
    }
}

fn new_subset(dataset_id: Uuid, name: &str, hints: &SubsetHints) -> subset::ActiveModel {
    subset::ActiveModel {
        id: Set(Uuid::now_v7()),
        dataset_id: Set(dataset_id),
        name: Set(name.to_owned()),
        repeats: Set(row_int(hints.repeats.unwrap_or(1))),
        is_reg: Set(hints.is_reg.unwrap_or(false)),
        instance_prompt: Set(hints.instance_prompt.clone()),
        class_prompt: Set(hints.class_prompt.clone()),
        revision: Set(1),
        created_at_ms: Set(now_ms()),
        training: Set(hints.training.as_ref().and_then(SubsetTraining::to_row)),
    }
}

impl SubsetHints {
    fn over(&self, row: &subset::Model) -> SubsetSettings {
        let present = SubsetSettings::of(row);
        SubsetSettings {
            name: present.name,
            repeats: self.repeats.unwrap_or(present.repeats),
            is_reg: self.is_reg.unwrap_or(present.is_reg),
            instance_prompt: self.instance_prompt.clone().or(present.instance_prompt),
            class_prompt: self.class_prompt.clone().or(present.class_prompt),
            training: self.training.clone().unwrap_or(present.training),
        }
    }
}

impl SubsetSettings {
    fn of(row: &subset::Model) -> Self {
        Self {
            name: row.name.clone(),
            repeats: row_count(row.repeats),
            is_reg: row.is_reg,
            instance_prompt: row.instance_prompt.clone(),
            class_prompt: row.class_prompt.clone(),
            training: SubsetTraining::of_row(row.training.as_deref()),
        }
    }

    fn onto(&self, row: subset::Model) -> subset::ActiveModel {
        let revision = row.revision + 1;
        subset::ActiveModel {
            name: Set(self.name.clone()),
            repeats: Set(row_int(self.repeats)),
            is_reg: Set(self.is_reg),
            instance_prompt: Set(self.instance_prompt.clone()),
            class_prompt: Set(self.class_prompt.clone()),
            training: Set(self.training.to_row()),
            revision: Set(revision),
            ..row.into()
        }
    }
}

/// Counts and sizes in pixels are far below `i32::MAX`; the rules of a dataset see to that.
fn row_int(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn row_count(column: i32) -> u32 {
    u32::try_from(column).unwrap_or_default()
}

impl From<dataset::Model> for Dataset {
    fn from(row: dataset::Model) -> Self {
        Self {
            id: row.id,
            name: row.name,
            color_correction: Correction::of_row(row.color_correction.as_deref()),
            revision: row.revision,
            created_at: time_of(row.created_at_ms),
            updated_at: time_of(row.updated_at_ms),
        }
    }
}

impl From<subset::Model> for Subset {
    fn from(row: subset::Model) -> Self {
        Self {
            id: row.id,
            dataset_id: row.dataset_id,
            name: row.name,
            repeats: row_count(row.repeats),
            is_reg: row.is_reg,
            instance_prompt: row.instance_prompt,
            class_prompt: row.class_prompt,
            training: SubsetTraining::of_row(row.training.as_deref()),
            revision: row.revision,
            created_at: time_of(row.created_at_ms),
        }
    }
}
