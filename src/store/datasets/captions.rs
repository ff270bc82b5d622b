//! Changes of captions: each is a row, so that it can be looked up and undone.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::Expr;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, ConnectionTrait, EntityTrait as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{check_revision, touch};
use crate::store::rows::{caption_change, dataset, image};
use crate::store::{Store, StoreError, now_ms, time_of};

/// Where a change of a caption comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// Somebody has written one caption.
    Edit,
    /// A caption file was uploaded for an image that was there.
    Upload,
    /// One of many changes at once.
    Batch,
    /// A captioning job.
    Captioner,
    /// An earlier change was taken back.
    Undo,
}

impl ChangeKind {
    /// The word in rows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Edit => "edit",
            Self::Upload => "upload",
            Self::Batch => "batch",
            Self::Captioner => "captioner",
            Self::Undo => "undo",
        }
    }

    /// The kind of a word; an unknown one is an edit.
    pub fn parse(word: &str) -> Self {
        let known = [Self::Upload, Self::Batch, Self::Captioner, Self::Undo];
        let found = known.into_iter().find(|kind| kind.as_str() == word);
        found.unwrap_or(Self::Edit)
    }
}

/// A change that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionChange {
    pub id: Uuid,
    pub image_id: Uuid,
    /// The revision of the dataset that it has made; all changes of one call have the same.
    pub revision: i64,
    pub kind: ChangeKind,
    pub before: Option<String>,
    pub after: Option<String>,
    /// The API key that asked for it.
    pub api_key_id: Option<Uuid>,
    /// Whether it was undone.
    pub undone: bool,
    pub changed_at: OffsetDateTime,
}

/// A caption that is to be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionEdit {
    pub image_id: Uuid,
    pub caption: Option<String>,
}

/// What became of undoing a revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// The dataset's new revision; `None` when nothing was changed.
    pub revision: Option<i64>,
    /// Images that have their old captions again.
    pub images: Vec<Uuid>,
    /// Images whose captions were changed since, and stay as they are.
    pub changed_since: Vec<Uuid>,
}

/// Who changes captions, and which revision of the dataset that makes.
pub(super) struct Author {
    pub(super) kind: ChangeKind,
    pub(super) revision: i64,
    pub(super) api_key_id: Option<Uuid>,
}

impl Store {
    /// Changes captions of a dataset in one transaction, if it is still at the expected revision. Images that are gone
    /// are left out.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`]; or when the database fails.
    pub async fn edit_captions(
        &self,
        dataset_id: Uuid,
        expected: i64,
        edits: Vec<CaptionEdit>,
        api_key_id: Option<Uuid>,
    ) -> Result<i64, StoreError> {
        let write = self.begin().await?;
        let row = dataset::Entity::find_by_id(dataset_id).one(&write).await?;
        check_revision(Some(expected), row.ok_or(StoreError::NotFound)?.revision)?;
        let author = Author {
            kind: ChangeKind::Batch,
            revision: touch(&write, dataset_id).await?,
            api_key_id,
        };
        for CaptionEdit { image_id, caption } in edits {
            if let Some(row) = image::Entity::find_by_id(image_id).one(&write).await?
                && row.dataset_id == dataset_id
            {
                write_caption(&write, row, caption, &author).await?;
            }
        }
        write.commit().await?;
        Ok(author.revision)
    }

    /// Takes back what one call has changed; a caption that was changed since stays as it is.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such dataset, or no change of that revision that is not undone yet; or
    /// when the database fails.
    pub async fn undo_captions(
        &self,
        dataset_id: Uuid,
        revision: i64,
        api_key_id: Option<Uuid>,
    ) -> Result<Undone, StoreError> {
        let write = self.begin().await?;
        let changes = caption_change::Entity::find()
            .filter(caption_change::Column::DatasetId.eq(dataset_id))
            .filter(caption_change::Column::Revision.eq(revision))
            .filter(caption_change::Column::Undone.eq(false))
            .order_by_asc(caption_change::Column::Id)
            .all(&write)
            .await?;
        if changes.is_empty() {
            return Err(StoreError::NotFound);
        }
        let author = Author {
            kind: ChangeKind::Undo,
            revision: touch(&write, dataset_id).await?,
            api_key_id,
        };
        let mut undone = Undone::default();
        for change in changes {
            let row = image::Entity::find_by_id(change.image_id)
                .one(&write)
                .await?;
            let Some(row) = row else { continue };
            if row.caption != change.after {
                undone.changed_since.push(row.id);
                continue;
            }
            undone.images.push(row.id);
            write_caption(&write, row, change.before, &author).await?;
            caption_change::Entity::update_many()
                .col_expr(caption_change::Column::Undone, Expr::value(true))
                .filter(caption_change::Column::Id.eq(change.id))
                .exec(&write)
                .await?;
        }
        if undone.images.is_empty() {
            return Ok(undone); // nothing is written: the dataset keeps its revision
        }
        write.commit().await?;
        undone.revision = Some(author.revision);
        Ok(undone)
    }

    /// The changes of an image's caption after `after`, oldest first.
    ///
    /// # Errors
    /// When the database fails. A missing image has none.
    pub async fn caption_changes(
        &self,
        image_id: Uuid,
        after: Option<Uuid>,
        limit: u64,
    ) -> Result<Vec<CaptionChange>, StoreError> {
        let mut query =
            caption_change::Entity::find().filter(caption_change::Column::ImageId.eq(image_id));
        if let Some(after) = after {
            query = query.filter(caption_change::Column::Id.gt(after));
        }
        let rows = query
            .order_by_asc(caption_change::Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().map(CaptionChange::from).collect())
    }
}

/// A caption that says the same is no change: the revision, and with it the ETag, stays.
pub(super) async fn write_caption<C: ConnectionTrait>(
    write: &C,
    row: image::Model,
    caption: Option<String>,
    author: &Author,
) -> Result<image::Model, StoreError> {
    if row.caption == caption {
        return Ok(row);
    }
    let change = caption_change::ActiveModel {
        id: Set(Uuid::now_v7()),
        dataset_id: Set(row.dataset_id),
        image_id: Set(row.id),
        revision: Set(author.revision),
        kind: Set(author.kind.as_str().to_owned()),
        before: Set(row.caption.clone()),
        after: Set(caption.clone()),
        api_key_id: Set(author.api_key_id),
        undone: Set(false),
        changed_at_ms: Set(now_ms()),
    };
    caption_change::Entity::insert(change)
        .exec_without_returning(write)
        .await?;
    let revision = row.revision + 1;
    let row = image::ActiveModel {
        caption: Set(caption),
        revision: Set(revision),
        updated_at_ms: Set(now_ms()),
        ..row.into()
    };
    Ok(row.update(write).await?)
}

impl From<caption_change::Model> for CaptionChange {
    fn from(row: caption_change::Model) -> Self {
        Self {
            id: row.id,
            image_id: row.image_id,
            revision: row.revision,
            kind: ChangeKind::parse(&row.kind),
            before: row.before,
            after: row.after,
            api_key_id: row.api_key_id,
            undone: row.undone,
            changed_at: time_of(row.changed_at_ms),
        }
    }
}
