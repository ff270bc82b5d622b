//! Rows of images. Many are written at once, so that a large upload does not wait for the disk once per image.

use std::collections::HashMap;

use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, ConnectionTrait, EntityTrait as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::captions::{Author, ChangeKind, write_caption};
use super::masks::write_mask;
use super::{Correction, ImageFilter, Subset, check_revision, row_count, row_int, touch};
use crate::store::rows::{image, subset};
use crate::store::{Store, StoreError, now_ms, time_of};

/// Images that are looked through for words at once.
const LOOKED_THROUGH_AT_ONCE: u64 = 500;

/// What a person says of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageUpdate {
    /// `None` removes the caption.
    pub caption: Option<String>,
    /// What is done to its colours.
    pub color_correction: Option<Correction>,
}

/// An image and its caption. The content is the blob of `sha256`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub subset_id: Uuid,
    pub subset_name: String,
    pub file_name: String,
    pub sha256: String,
    pub media_type: String,
    pub size_bytes: u64,
    /// As a viewer shows it: after the EXIF orientation.
    pub width_px: u32,
    pub height_px: u32,
    /// `None` is no caption, which is not the same as an empty one.
    pub caption: Option<String>,
    /// Whether any pixel is not wholly opaque.
    pub has_alpha: bool,
    /// What it is laid on where it is transparent: `#rrggbb`. `None` takes the colours that lie under it.
    pub background: Option<String>,
    /// What is done to its colours; `None` leaves it to the dataset.
    pub color_correction: Option<Correction>,
    /// Its mask, the blob of this digest.
    pub mask_sha256: Option<String>,
    pub revision: i64,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
}

/// An image whose content is stored already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    pub subset_id: Uuid,
    pub file_name: String,
    pub sha256: String,
    pub media_type: String,
    pub size_bytes: u64,
    pub width_px: u32,
    pub height_px: u32,
    pub caption: Option<String>,
    pub has_alpha: bool,
    pub background: Option<String>,
    /// The digest of its mask, whose content is stored, too.
    pub mask_sha256: Option<String>,
}

/// What became of a [`NewImage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddedImage {
    New(Uuid),
    /// The subset has this content already; only a caption, a background and a mask that came with it were taken over.
    Present(Uuid),
}

/// Enough of an image to find it by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    pub id: Uuid,
    pub subset_id: Uuid,
    pub file_name: String,
}

impl Store {
    /// Adds images to a dataset, all or none, in one transaction.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such dataset, or when the database fails.
    pub async fn add_images(
        &self,
        dataset_id: Uuid,
        images: Vec<NewImage>,
    ) -> Result<Vec<AddedImage>, StoreError> {
        let write = self.begin().await?;
        let author = Author {
            kind: ChangeKind::Upload,
            revision: touch(&write, dataset_id).await?,
            api_key_id: None,
        };
        let mut added = Vec::with_capacity(images.len());
        for new in images {
            let present = image::Entity::find()
                .filter(image::Column::SubsetId.eq(new.subset_id))
                .filter(image::Column::Sha256.eq(&new.sha256))
                .one(&write)
                .await?;
            added.push(match present {
                Some(row) => {
                    let id = row.id;
                    let row = match new.caption {
                        Some(caption) => write_caption(&write, row, Some(caption), &author).await?,
                        None => row,
                    };
                    let row = match new.background {
                        Some(background) if row.background.as_ref() != Some(&background) => {
                            write_background(&write, row, Some(background)).await?
                        }
                        _ => row,
                    };
                    if new.mask_sha256.is_some() && new.mask_sha256 != row.mask_sha256 {
                        write_mask(&write, row, new.mask_sha256).await?;
                    }
                    AddedImage::Present(id)
                }
                None => AddedImage::New(new.row(dataset_id).insert(&write).await?.id),
            });
        }
        write.commit().await?;
        Ok(added)
    }

    /// A dataset's images after `after` that a filter means, oldest first.
    ///
    /// # Errors
    /// When the database fails. A missing dataset has no images.
    pub async fn list_images(
        &self,
        dataset_id: Uuid,
        filter: &ImageFilter,
        mut after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<Image>, StoreError> {
        let at_once = match filter.has_words() {
            true => limit.max(LOOKED_THROUGH_AT_ONCE),
            false => limit,
        };
        let mut found = Vec::new();
        loop {
            let rows = self.image_rows(dataset_id, filter, after, at_once).await?;
            after = rows.last().map(|row| row.id);
            let is_end = (rows.len() as u64) < at_once;
            let subsets = self.subsets_by_id(dataset_id).await?;
            let named = rows.into_iter().filter_map(|row| {
                let name = subsets.get(&row.subset_id)?.name.clone();
                Some(Image::of(row, name))
            });
            found.extend(named.filter(|image| filter.matches(image)));
            if is_end || found.len() as u64 >= limit {
                found.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
                return Ok(found);
            }
        }
    }

    /// Rows that a filter means, as far as a database can tell.
    async fn image_rows(
        &self,
        dataset_id: Uuid,
        filter: &ImageFilter,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<image::Model>, StoreError> {
        let mut query = image::Entity::find().filter(image::Column::DatasetId.eq(dataset_id));
        if let Some(subset_id) = filter.subset_id {
            query = query.filter(image::Column::SubsetId.eq(subset_id));
        }
        query = match filter.captioned {
            Some(true) => query.filter(image::Column::Caption.is_not_null()),
            Some(false) => query.filter(image::Column::Caption.is_null()),
            None => query,
        };
        if let Some(after) = after {
            query = query.filter(image::Column::Id.gt(after));
        }
        let query = query.order_by_asc(image::Column::Id).limit(limit);
        Ok(query.all(&self.db).await?)
    }

    /// Every image of a dataset with its subset, oldest first: what a run trains on.
    ///
    /// # Errors
    /// When the database fails. A missing dataset has no images.
    pub async fn all_images(&self, dataset_id: Uuid) -> Result<Vec<(Image, Subset)>, StoreError> {
        let rows = image::Entity::find()
            .filter(image::Column::DatasetId.eq(dataset_id))
            .order_by_asc(image::Column::Id)
            .all(&self.db)
            .await?;
        let subsets = self.subsets_by_id(dataset_id).await?;
        let paired = rows.into_iter().filter_map(|row| {
            let subset = subsets.get(&row.subset_id)?.clone();
            Some((Image::of(row, subset.name.clone()), subset))
        });
        Ok(paired.collect())
    }

    /// Read after the images: a subset only goes when its dataset goes, and the images with it.
    async fn subsets_by_id(&self, dataset_id: Uuid) -> Result<HashMap<Uuid, Subset>, StoreError> {
        let subsets = self.list_subsets(dataset_id).await?;
        Ok(subsets
            .into_iter()
            .map(|subset| (subset.id, subset))
            .collect())
    }

    /// The file names of a dataset's images.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn image_names(&self, dataset_id: Uuid) -> Result<Vec<ImageName>, StoreError> {
        let rows: Vec<(Uuid, Uuid, String)> = image::Entity::find()
            .select_only()
            .columns([
                image::Column::Id,
                image::Column::SubsetId,
                image::Column::FileName,
            ])
            .filter(image::Column::DatasetId.eq(dataset_id))
            .order_by_asc(image::Column::Id)
            .into_tuple()
            .all(&self.db)
            .await?;
        let names = rows
            .into_iter()
            .map(|(id, subset_id, file_name)| ImageName {
                id,
                subset_id,
                file_name,
            });
        Ok(names.collect())
    }

    /// # Errors
    /// [`StoreError::NotFound`], or when the database fails.
    pub async fn image(&self, id: Uuid) -> Result<Image, StoreError> {
        let row = image::Entity::find_by_id(id).one(&self.db).await?;
        named(&self.db, row.ok_or(StoreError::NotFound)?).await
    }

    /// Replaces what a person says of an image, in one transaction; with an expected revision only at that revision.
    /// What says the same is no change: the revision stays.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`]; or when the database fails.
    pub async fn update_image(
        &self,
        image_id: Uuid,
        update: ImageUpdate,
        expected_revision: Option<i64>,
        api_key_id: Option<Uuid>,
    ) -> Result<Image, StoreError> {
        let write = self.begin().await?;
        let row = image::Entity::find_by_id(image_id).one(&write).await?;
        let row = row.ok_or(StoreError::NotFound)?;
        check_revision(expected_revision, row.revision)?;
        let correction = update.color_correction.map(Correction::to_row);
        if row.caption == update.caption && row.color_correction == correction {
            return named(&write, row).await; // the dataset has not changed either
        }
        let author = Author {
            kind: ChangeKind::Edit,
            revision: touch(&write, row.dataset_id).await?,
            api_key_id,
        };
        let revision = row.revision + 1;
        let row = write_caption(&write, row, update.caption, &author).await?;
        let row = image::ActiveModel {
            color_correction: Set(correction),
            revision: Set(revision),
            updated_at_ms: Set(now_ms()),
            ..row.into()
        };
        let image = named(&write, row.update(&write).await?).await?;
        write.commit().await?;
        Ok(image)
    }

    /// Sets the captions of many images of one dataset in one transaction. Images that are gone are left out.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such dataset, or when the database fails.
    pub async fn set_captions(
        &self,
        dataset_id: Uuid,
        captions: Vec<(Uuid, String)>,
    ) -> Result<(), StoreError> {
        let write = self.begin().await?;
        let author = Author {
            kind: ChangeKind::Upload,
            revision: touch(&write, dataset_id).await?,
            api_key_id: None,
        };
        for (image_id, caption) in captions {
            if let Some(row) = image::Entity::find_by_id(image_id).one(&write).await? {
                write_caption(&write, row, Some(caption), &author).await?;
            }
        }
        Ok(write.commit().await?)
    }

    /// Gives images of a dataset the names and captions that they had elsewhere, in one transaction.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such dataset, or when the database fails.
    pub async fn restore_images(
        &self,
        dataset_id: Uuid,
        images: Vec<(Uuid, String, Option<String>)>,
    ) -> Result<(), StoreError> {
        let write = self.begin().await?;
        let author = Author {
            kind: ChangeKind::Upload,
            revision: touch(&write, dataset_id).await?,
            api_key_id: None,
        };
        for (image_id, file_name, caption) in images {
            let row = image::Entity::find_by_id(image_id).one(&write).await?;
            let Some(row) = row.filter(|row| row.dataset_id == dataset_id) else {
                continue;
            };
            let row = write_caption(&write, row, caption, &author).await?;
            if row.file_name != file_name {
                let row = image::ActiveModel {
                    file_name: Set(file_name),
                    ..row.into()
                };
                row.update(&write).await?;
            }
        }
        Ok(write.commit().await?)
    }

    /// Deletes an image; with an expected revision only at that revision.
    ///
    /// Its file stays for now: another subset may name the same content, and so may a run, even one that is just
    /// being made from what the dataset held.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`]; or when the database fails.
    pub async fn delete_image(
        &self,
        id: Uuid,
        expected_revision: Option<i64>,
    ) -> Result<(), StoreError> {
        let write = self.begin().await?;
        let row = image::Entity::find_by_id(id).one(&write).await?;
        let row = row.ok_or(StoreError::NotFound)?;
        check_revision(expected_revision, row.revision)?;
        touch(&write, row.dataset_id).await?;
        let blobs = self.blobs.clone();
        spawn_blocking(move || {
            row.mask_sha256.map_or(Ok(()), |mask| blobs.touch(&mask))?;
            blobs.touch(&row.sha256)
        })
        .await??;
        image::Entity::delete_many()
            .filter(image::Column::Id.eq(id))
            .exec(&write)
            .await?;
        Ok(write.commit().await?)
    }
}

pub(super) async fn named<C: ConnectionTrait>(
    db: &C,
    row: image::Model,
) -> Result<Image, StoreError> {
    let subset = subset::Entity::find_by_id(row.subset_id).one(db).await?;
    let subset = subset.ok_or(StoreError::NotFound)?; // deleted between the two queries, and the image with it
    Ok(Image::of(row, subset.name))
}

/// Asks `decide` about each image by its place in `ids`, with the caption that it has at that moment or `None` when the
/// image is gone, and writes the captions that it gives: the one way by which jobs change captions.
pub(in crate::store) async fn change_captions<C: ConnectionTrait>(
    write: &C,
    dataset_id: Uuid,
    ids: &[Uuid],
    mut decide: impl FnMut(usize, Option<Option<&str>>) -> Option<String>,
) -> Result<(), StoreError> {
    let mut author = None;
    for (index, id) in ids.iter().enumerate() {
        let row = image::Entity::find_by_id(*id)
            .filter(image::Column::DatasetId.eq(dataset_id))
            .lock_exclusive();
        let row = row.one(write).await?;
        let caption = decide(index, row.as_ref().map(|row| row.caption.as_deref()));
        if let (Some(row), Some(caption)) = (row, caption)
            && row.caption.as_deref() != Some(&caption)
        {
            let author = match &mut author {
                Some(author) => author,
                none => none.insert(Author {
                    kind: ChangeKind::Captioner,
                    revision: touch(write, dataset_id).await?,
                    api_key_id: None,
                }),
            };
            write_caption(write, row, Some(caption), author).await?;
        }
    }
    Ok(())
}

async fn write_background<C: ConnectionTrait>(
    write: &C,
    row: image::Model,
    background: Option<String>,
) -> Result<image::Model, StoreError> {
    let revision = row.revision + 1;
    let row = image::ActiveModel {
        background: Set(background),
        revision: Set(revision),
        updated_at_ms: Set(now_ms()),
        ..row.into()
    };
    Ok(row.update(write).await?)
}

impl NewImage {
    fn row(self, dataset_id: Uuid) -> image::ActiveModel {
        let now = now_ms();
        image::ActiveModel {
            id: Set(Uuid::now_v7()),
            dataset_id: Set(dataset_id),
            subset_id: Set(self.subset_id),
            file_name: Set(self.file_name),
            sha256: Set(self.sha256),
            media_type: Set(self.media_type),
            size_bytes: Set(i64::try_from(self.size_bytes).unwrap_or(i64::MAX)),
            width_px: Set(row_int(self.width_px)),
            height_px: Set(row_int(self.height_px)),
            caption: Set(self.caption),
            has_alpha: Set(self.has_alpha),
            background: Set(self.background),
            color_correction: Set(None),
            mask_sha256: Set(self.mask_sha256),
            revision: Set(1),
            created_at_ms: Set(now),
            updated_at_ms: Set(now),
        }
    }
}

impl Image {
    fn of(row: image::Model, subset_name: String) -> Self {
        Self {
            id: row.id,
            dataset_id: row.dataset_id,
            subset_id: row.subset_id,
            subset_name,
            file_name: row.file_name,
            sha256: row.sha256,
            media_type: row.media_type,
            size_bytes: u64::try_from(row.size_bytes).unwrap_or_default(),
            width_px: row_count(row.width_px),
            height_px: row_count(row.height_px),
            caption: row.caption,
            has_alpha: row.has_alpha,
            background: row.background,
            color_correction: Correction::of_row(row.color_correction.as_deref()),
            mask_sha256: row.mask_sha256,
            revision: row.revision,
            created_at: time_of(row.created_at_ms),
            updated_at: time_of(row.updated_at_ms),
        }
    }
}
