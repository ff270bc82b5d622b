//! Rows of uploads that come in parts. The parts are files in a folder of the upload; what they say is `datasets`'
//! business.

use std::path::PathBuf;
use std::time::Duration;

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::Expr;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, EntityTrait as _, PaginatorTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::rows::upload as row;
use super::{Store, StoreError, now_ms, time_of};

/// Where an upload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadState {
    /// Parts may come.
    Open,
    /// The parts are put together and taken in.
    Completing,
    /// There is an answer.
    Completed,
}

impl UploadState {
    fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Completing => "completing",
            Self::Completed => "completed",
        }
    }
}

/// An upload that comes in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartedUpload {
    pub id: Uuid,
    pub dataset_id: Uuid,
    pub name: String,
    pub size_bytes: u64,
    pub sha256: Option<String>,
    /// JSON.
    pub choice: String,
    pub state: UploadState,
    /// JSON.
    pub answer: Option<String>,
    pub created_at: OffsetDateTime,
    pub updated_at: OffsetDateTime,
}

/// A new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewUpload {
    pub dataset_id: Uuid,
    pub name: String,
    pub size_bytes: u64,
    pub sha256: Option<String>,
    pub choice: String,
}

impl Store {
    /// Where the parts of an upload are.
    pub fn upload_folder(&self, id: Uuid) -> PathBuf {
        self.uploads_folder().join(id.to_string())
    }

    /// Where the folders of all uploads are.
    pub fn uploads_folder(&self) -> PathBuf {
        self.data_dir.join("uploads")
    }

    /// Makes an upload.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such dataset, or when the database fails.
    pub async fn create_upload(&self, new: NewUpload) -> Result<PartedUpload, StoreError> {
        let now = now_ms();
        let row = row::ActiveModel {
            id: Set(Uuid::now_v7()),
            dataset_id: Set(new.dataset_id),
            name: Set(new.name),
            size_bytes: Set(i64::try_from(new.size_bytes).unwrap_or(i64::MAX)),
            sha256: Set(new.sha256),
            choice: Set(new.choice),
            state: Set(UploadState::Open.as_str().to_owned()),
            answer: Set(None),
            created_at_ms: Set(now),
            updated_at_ms: Set(now),
        };
        match row.insert(&self.db).await.map_err(StoreError::from) {
            Ok(row) => Ok(row.into()),
            Err(StoreError::InUse) => Err(StoreError::NotFound), // the dataset, by its key
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// [`StoreError::NotFound`], or when the database fails.
    pub async fn upload(&self, id: Uuid) -> Result<PartedUpload, StoreError> {
        let row = row::Entity::find_by_id(id).one(&self.db).await?;
        row.map(PartedUpload::from).ok_or(StoreError::NotFound)
    }

    /// The uploads of a dataset, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn uploads(&self, dataset_id: Uuid) -> Result<Vec<PartedUpload>, StoreError> {
        let rows = row::Entity::find()
            .filter(row::Column::DatasetId.eq(dataset_id))
            .order_by_asc(row::Column::Id)
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().map(PartedUpload::from).collect())
    }

    /// How many uploads have parts on disk.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_open_uploads(&self) -> Result<u64, StoreError> {
        let open = row::Entity::find()
            .filter(row::Column::State.ne(UploadState::Completed.as_str()))
            .count(&self.db)
            .await?;
        Ok(open)
    }

    /// Goes from one state to another, if it is in that one; `false` when it is not. To go where it is counts as a sign
    /// of life.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn move_upload(
        &self,
        id: Uuid,
        from: UploadState,
        to: UploadState,
        answer: Option<String>,
    ) -> Result<bool, StoreError> {
        let moved = row::Entity::update_many()
            .col_expr(row::Column::State, Expr::value(to.as_str()))
            .col_expr(row::Column::Answer, Expr::value(answer))
            .col_expr(row::Column::UpdatedAtMs, Expr::value(now_ms()))
            .filter(row::Column::Id.eq(id))
            .filter(row::Column::State.eq(from.as_str()))
            .exec(&self.db)
            .await?;
        Ok(moved.rows_affected > 0)
    }

    /// Opens again what an earlier process was completing. Only for the one server of this data folder, at its start.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn reopen_uploads(&self) -> Result<(), StoreError> {
        row::Entity::update_many()
            .col_expr(row::Column::State, Expr::value(UploadState::Open.as_str()))
            .filter(row::Column::State.eq(UploadState::Completing.as_str()))
            .exec(&self.db)
            .await?;
        Ok(())
    }

    /// Deletes an upload that is not being completed; `false` when it is, or is not there.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn delete_upload(&self, id: Uuid) -> Result<bool, StoreError> {
        let deleted = row::Entity::delete_many()
            .filter(row::Column::Id.eq(id))
            .filter(row::Column::State.ne(UploadState::Completing.as_str()))
            .exec(&self.db)
            .await?;
        Ok(deleted.rows_affected > 0)
    }

    /// Forgets uploads that nothing has come to for this long, and tells the ids of those that are left.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_uploads(&self, idle: Duration) -> Result<Vec<Uuid>, StoreError> {
        let idle_ms = i64::try_from(idle.as_millis()).unwrap_or(i64::MAX);
        row::Entity::delete_many()
            .filter(row::Column::UpdatedAtMs.lt(now_ms().saturating_sub(idle_ms)))
            .filter(row::Column::State.ne(UploadState::Completing.as_str()))
            .exec(&self.db)
            .await?;
        let left = row::Entity::find()
            .select_only()
            .column(row::Column::Id)
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(left)
    }
}

impl From<row::Model> for PartedUpload {
    fn from(row: row::Model) -> Self {
        let state = match row.state.as_str() {
            "completed" => UploadState::Completed,
            "completing" => UploadState::Completing,
            _ => UploadState::Open,
        };
        Self {
            id: row.id,
            dataset_id: row.dataset_id,
            name: row.name,
            size_bytes: u64::try_from(row.size_bytes).unwrap_or_default(),
            sha256: row.sha256,
            choice: row.choice,
            state,
            answer: row.answer,
            created_at: time_of(row.created_at_ms),
            updated_at: time_of(row.updated_at_ms),
        }
    }
}
