//! Answers kept under idempotency keys, so that a request that is sent again does not do its work again.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ActiveModelTrait as _, ColumnTrait as _, EntityTrait as _, QueryFilter as _};

use super::rows::idempotency_key as row;
use super::{Store, StoreError, now_ms};

/// How long an answer is kept.
const KEPT_MS: i64 = 24 * 60 * 60 * 1000;
/// A first request that has not ended after this long never will: its process has died.
const ABANDONED_MS: i64 = 10 * 60 * 1000;

/// What is known of a request with an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Idempotency {
    /// It is the first; finish or abandon it.
    Fresh,
    /// It was answered before, with this.
    Replay(KeptAnswer),
    /// The first one has not been answered yet.
    Running,
    /// The key was used for another payload.
    OtherPayload,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptAnswer {
    /// The HTTP status.
    pub status: u16,
    /// Where the new resource is.
    pub location: String,
    /// JSON.
    pub body: String,
}

impl Store {
    /// Claims a key within a scope (a caller, a method and path).
    ///
    /// # Errors
    /// When the database fails.
    pub async fn begin_idempotent(
        &self,
        key: &str,
        scope: &str,
        payload_sha256: &str,
    ) -> Result<Idempotency, StoreError> {
        let now = now_ms();
        let write = self.begin().await?;
        row::Entity::delete_many()
            .filter(row::Column::CreatedAtMs.lt(now - KEPT_MS))
            .exec(&write)
            .await?;
        row::Entity::delete_many()
            .filter(row::Column::Status.is_null())
            .filter(row::Column::CreatedAtMs.lt(now - ABANDONED_MS))
            .exec(&write)
            .await?;
        let found = row::Entity::find_by_id((key.to_owned(), scope.to_owned()))
            .one(&write)
            .await?;
        let answer = match found {
            Some(found) if found.payload_sha256 != payload_sha256 => Idempotency::OtherPayload,
            Some(found) => kept(found),
            None => {
                let claim = row::ActiveModel {
                    key: Set(key.to_owned()),
                    scope: Set(scope.to_owned()),
                    payload_sha256: Set(payload_sha256.to_owned()),
                    status: Set(None),
                    location: Set(None),
                    body: Set(None),
                    created_at_ms: Set(now),
                };
                // Of two that come at once Postgres lets both look; only one is in time.
                let nothing = OnConflict::new().do_nothing().to_owned();
                let claimed = row::Entity::insert(claim).on_conflict(nothing);
                match claimed.exec_without_returning(&write).await? {
                    0 => Idempotency::Running,
                    _ => Idempotency::Fresh,
                }
            }
        };
        write.commit().await?;
        Ok(answer)
    }

    /// Keeps the answer to the first request.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when the claim was given up meanwhile, or when the database fails.
    pub async fn finish_idempotent(
        &self,
        key: &str,
        scope: &str,
        answer: &KeptAnswer,
    ) -> Result<(), StoreError> {
        let write = self.begin().await?;
        let found = row::Entity::find_by_id((key.to_owned(), scope.to_owned()))
            .one(&write)
            .await?;
        let mut claim = row::ActiveModel::from(found.ok_or(StoreError::NotFound)?);
        claim.status = Set(Some(i32::from(answer.status)));
        claim.location = Set(Some(answer.location.clone()));
        claim.body = Set(Some(answer.body.clone()));
        claim.update(&write).await?;
        Ok(write.commit().await?)
    }

    /// Gives the key up: the first request has failed, and may be tried again.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn abandon_idempotent(&self, key: &str, scope: &str) -> Result<(), StoreError> {
        row::Entity::delete_many()
            .filter(row::Column::Key.eq(key))
            .filter(row::Column::Scope.eq(scope))
            .filter(row::Column::Status.is_null())
            .exec(&self.db)
            .await?;
        Ok(())
    }
}

fn kept(found: row::Model) -> Idempotency {
    match found.status.and_then(|status| u16::try_from(status).ok()) {
        None => Idempotency::Running,
        Some(status) => Idempotency::Replay(KeptAnswer {
            status,
            location: found.location.unwrap_or_default(),
            body: found.body.unwrap_or_default(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn age(store: &Store, by_ms: i64) {
        for found in row::Entity::find().all(&store.db).await.expect("rows") {
            let created = found.created_at_ms - by_ms;
            let mut older = row::ActiveModel::from(found);
            older.created_at_ms = Set(created);
            older.update(&store.db).await.expect("updated");
        }
    }

    #[tokio::test]
    async fn a_key_is_claimed_answered_and_forgotten() {
        let (_scratch, store) = crate::store::testing::store().await;
        let begin = async |payload: &str| {
            let claim = store.begin_idempotent("k", "POST /v1/x", payload).await;
            claim.expect("a working database")
        };
        assert_eq!(begin("a").await, Idempotency::Fresh);
        assert_eq!(begin("a").await, Idempotency::Running);
        assert_eq!(begin("b").await, Idempotency::OtherPayload);
        let other_scope = store.begin_idempotent("k", "POST /v1/y", "b").await;
        assert_eq!(other_scope.expect("working"), Idempotency::Fresh);

        store
            .abandon_idempotent("k", "POST /v1/x")
            .await
            .expect("given up");
        assert_eq!(begin("a").await, Idempotency::Fresh);
        age(&store, ABANDONED_MS + 1).await;
        assert_eq!(begin("a").await, Idempotency::Fresh);

        let answer = KeptAnswer {
            status: 201,
            location: "/v1/x/1".to_owned(),
            body: "{}".to_owned(),
        };
        let finished = store.finish_idempotent("k", "POST /v1/x", &answer).await;
        finished.expect("kept");
        store
            .abandon_idempotent("k", "POST /v1/x")
            .await
            .expect("no claim left");
        assert_eq!(begin("a").await, Idempotency::Replay(answer));
        assert_eq!(begin("b").await, Idempotency::OtherPayload);
        age(&store, KEPT_MS + 1).await;
        assert_eq!(begin("b").await, Idempotency::Fresh);
    }

    /// Over two pools, as two processes ask.
    #[tokio::test]
    async fn of_requests_that_come_at_once_one_is_the_first() {
        let (scratch, store) = crate::store::testing::store().await;
        let other = scratch.store().await;
        for key in ["a", "b", "c", "d"] {
            let begin = |store| Store::begin_idempotent(store, key, "POST /v1/x", "p");
            let (one, two) = tokio::join!(begin(&store), begin(&other));
            let mut both = [one.expect("working"), two.expect("working")];
            both.sort_by_key(|claim| *claim != Idempotency::Fresh);
            assert_eq!(both, [Idempotency::Fresh, Idempotency::Running]);
        }
    }
}
