//! Which image has which mask.

use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait as _, ConnectionTrait, EntityTrait as _};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::images::named;
use super::{Image, check_revision, touch};
use crate::store::rows::image;
use crate::store::{Store, StoreError, now_ms};

impl Store {
    /// Gives an image the mask whose content is stored already, or takes its mask away; with an expected revision only
    /// at that revision.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`]; or when the database fails.
    pub async fn set_mask(
        &self,
        image_id: Uuid,
        mask_sha256: Option<String>,
        expected_revision: Option<i64>,
    ) -> Result<Image, StoreError> {
        let write = self.begin().await?;
        let row = image::Entity::find_by_id(image_id).one(&write).await?;
        let row = row.ok_or(StoreError::NotFound)?;
        check_revision(expected_revision, row.revision)?;
        if row.mask_sha256 == mask_sha256 {
            return named(&write, row).await;
        }
        if let Some(before) = row.mask_sha256.clone() {
            let blobs = self.blobs().clone();
            spawn_blocking(move || blobs.touch(&before)).await??; // a run may be about to name it
        }
        touch(&write, row.dataset_id).await?;
        let row = write_mask(&write, row, mask_sha256).await?;
        let image = named(&write, row).await?;
        write.commit().await?;
        Ok(image)
    }
}

/// The same in a transaction that has told the dataset already.
pub(super) async fn write_mask<C: ConnectionTrait>(
    write: &C,
    row: image::Model,
    mask_sha256: Option<String>,
) -> Result<image::Model, StoreError> {
    let row = image::ActiveModel {
        mask_sha256: Set(mask_sha256),
        revision: Set(row.revision + 1),
        updated_at_ms: Set(now_ms()),
        ..row.into()
    };
    Ok(row.update(write).await?)
}
