//! Rows of API keys. A row has the digest of a key; the key itself is nowhere.

use sea_orm::sea_query::Expr;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, EntityTrait as _, PaginatorTrait as _,
    QueryFilter as _, QueryOrder as _, Set,
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::rows::api_key as row;
use super::{Store, StoreError, now_ms, time_of};

/// A key as its row has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// Its id: what it is revoked by.
    pub id: Uuid,
    /// What its maker calls it.
    pub name: String,
    /// Digest of the key, in hex.
    pub sha256: String,
    /// The key's first characters.
    pub hint: String,
    /// Words with spaces between; `access` knows what they mean.
    pub scopes: String,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When it was last used, to the minute.
    pub last_used_at: Option<OffsetDateTime>,
    /// Since when it opens nothing.
    pub revoked_at: Option<OffsetDateTime>,
}

/// A key to be made.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// See [`StoredKey::name`].
    pub name: String,
    /// See [`StoredKey::sha256`].
    pub sha256: String,
    /// See [`StoredKey::hint`].
    pub hint: String,
    /// See [`StoredKey::scopes`].
    pub scopes: String,
}

impl Store {
    /// Makes a key.
    ///
    /// # Errors
    /// [`StoreError::Exists`] when there is one of the same digest.
    pub async fn create_api_key(&self, new: NewKey) -> Result<StoredKey, StoreError> {
        let made = row::ActiveModel {
            id: Set(Uuid::now_v7()),
            name: Set(new.name),
            sha256: Set(new.sha256),
            hint: Set(new.hint),
            scopes: Set(new.scopes),
            created_at_ms: Set(now_ms()),
            last_used_at_ms: Set(None),
            revoked_at_ms: Set(None),
        };
        Ok(read(made.insert(&self.db).await?))
    }

    /// Every key, revoked ones too, in the order of making.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn api_keys(&self) -> Result<Vec<StoredKey>, StoreError> {
        let rows = row::Entity::find()
            .order_by_asc(row::Column::Id)
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().map(read).collect())
    }

    /// The keys that open something.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn active_api_keys(&self) -> Result<Vec<StoredKey>, StoreError> {
        let rows = row::Entity::find()
            .filter(row::Column::RevokedAtMs.is_null())
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().map(read).collect())
    }

    /// How many keys open something.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_active_api_keys(&self) -> Result<u64, StoreError> {
        let found = row::Entity::find().filter(row::Column::RevokedAtMs.is_null());
        Ok(found.count(&self.db).await?)
    }

    /// Notes that a key was used just now.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn touch_api_key(&self, id: Uuid) -> Result<(), StoreError> {
        row::Entity::update_many()
            .col_expr(row::Column::LastUsedAtMs, Expr::value(Some(now_ms())))
            .filter(row::Column::Id.eq(id))
            .exec(&self.db)
            .await?;
        Ok(())
    }

    /// Takes a key's power; the row stays. Doing it twice changes nothing.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn revoke_api_key(&self, id: Uuid) -> Result<StoredKey, StoreError> {
        row::Entity::update_many()
            .col_expr(row::Column::RevokedAtMs, Expr::value(Some(now_ms())))
            .filter(row::Column::Id.eq(id))
            .filter(row::Column::RevokedAtMs.is_null())
            .exec(&self.db)
            .await?;
        let found = row::Entity::find_by_id(id).one(&self.db).await?;
        found.map(read).ok_or(StoreError::NotFound)
    }
}

fn read(row: row::Model) -> StoredKey {
    StoredKey {
        id: row.id,
        name: row.name,
        sha256: row.sha256,
        hint: row.hint,
        scopes: row.scopes,
        created_at: time_of(row.created_at_ms),
        last_used_at: row.last_used_at_ms.map(time_of),
        revoked_at: row.revoked_at_ms.map(time_of),
    }
}
