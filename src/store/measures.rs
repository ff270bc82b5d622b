//! Rows of what was measured of pictures, by their content: a picture that comes again is not looked at again.

use std::collections::HashMap;

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{OnConflict, Query};
use sea_orm::{
    ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
};
use uuid::Uuid;

use super::rows::{image, picture_measure};
use super::{Store, StoreError};

/// Rows that are written in one statement.
const ROWS_AT_ONCE: usize = 200;

impl Store {
    /// The measures of this format of a dataset's pictures, as JSON by the digest of the content.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn picture_measures(
        &self,
        dataset_id: Uuid,
        format: i32,
    ) -> Result<HashMap<String, String>, StoreError> {
        let of_dataset = Query::select()
            .column(image::Column::Sha256)
            .from(image::Entity)
            .and_where(image::Column::DatasetId.eq(dataset_id))
            .take();
        let rows = picture_measure::Entity::find()
            .filter(picture_measure::Column::Format.eq(format))
            .filter(picture_measure::Column::Sha256.in_subquery(of_dataset))
            .all(&self.db)
            .await?;
        Ok(rows
            .into_iter()
            .map(|row| (row.sha256, row.measures))
            .collect())
    }

    /// Keeps measures as JSON by the digest of the content, in place of those that are there.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keep_picture_measures(
        &self,
        format: i32,
        measures: Vec<(String, String)>,
    ) -> Result<(), StoreError> {
        for part in measures.chunks(ROWS_AT_ONCE) {
            let rows = part
                .iter()
                .map(|(sha256, measures)| picture_measure::ActiveModel {
                    sha256: Set(sha256.clone()),
                    format: Set(format),
                    measures: Set(measures.clone()),
                });
            let replace = OnConflict::column(picture_measure::Column::Sha256)
                .update_columns([
                    picture_measure::Column::Format,
                    picture_measure::Column::Measures,
                ])
                .to_owned();
            picture_measure::Entity::insert_many(rows)
                .on_conflict(replace)
                .exec_without_returning(&self.db)
                .await?;
        }
        Ok(())
    }

    /// Digests of pictures that have no measures of this format, the latest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn unmeasured_pictures(
        &self,
        format: i32,
        limit: u64,
    ) -> Result<Vec<String>, StoreError> {
        let measured = Query::select()
            .column(picture_measure::Column::Sha256)
            .from(picture_measure::Entity)
            .and_where(picture_measure::Column::Format.eq(format))
            .take();
        Ok(image::Entity::find()
            .select_only()
            .column(image::Column::Sha256)
            .filter(image::Column::Sha256.not_in_subquery(measured))
            .order_by_desc(image::Column::Id)
            .limit(limit)
            .into_tuple()
            .all(&self.db)
            .await?)
    }

    /// Forgets the measures of pictures that no dataset has.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_picture_measures(&self) -> Result<u64, StoreError> {
        let present = Query::select()
            .column(image::Column::Sha256)
            .from(image::Entity)
            .take();
        let deleted = picture_measure::Entity::delete_many()
            .filter(picture_measure::Column::Sha256.not_in_subquery(present))
            .exec(&self.db)
            .await?;
        Ok(deleted.rows_affected)
    }
}
