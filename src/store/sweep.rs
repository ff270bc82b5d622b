//! Removes the blobs that no row names any more. Which rows name blobs is written down here and nowhere else.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sea_orm::{ColumnTrait as _, EntityTrait, QueryFilter as _, QuerySelect as _};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::blobs::{Digest, Swept, parse_digest};
use super::rows::{image, lora, run, run_sample};
use super::{Store, StoreError};

impl Store {
    /// Removes blobs that no row names and that have been so for `min_age`.
    ///
    /// A blob is stored before its row is written, so `min_age` has to be longer than an upload takes from the one to
    /// the other. A database without a single name removes nothing: it may be new, or a wrong one, beside old blobs.
    ///
    /// # Errors
    /// When the database fails or a folder cannot be read; what was removed before stays removed.
    pub async fn sweep_blobs(&self, min_age: Duration) -> Result<Swept, StoreError> {
        // Taken before the names are read: whoever names a blob later has touched it later.
        let Some(before) = SystemTime::now().checked_sub(min_age) else {
            return Ok(Swept::default());
        };
        let named = Arc::new(self.named_blobs().await?);
        let mut total = Swept::default();
        if named.is_empty() {
            return Ok(total);
        }
        for first in 0..=u8::MAX {
            let (blobs, named) = (self.blobs.clone(), named.clone());
            let swept = spawn_blocking(move || blobs.sweep(first, &named, before)).await??;
            total.blobs += swept.blobs;
            total.size_bytes += swept.size_bytes;
        }
        Ok(total)
    }

    async fn named_blobs(&self) -> Result<HashSet<Digest>, StoreError> {
        let mut named = HashSet::new();
        for column in [
            self.digests::<image::Entity>(image::Column::Sha256).await?,
            self.digests::<run_sample::Entity>(run_sample::Column::Sha256)
                .await?,
            self.digests::<lora::Entity>(lora::Column::Sha256).await?,
            self.digests::<image::Entity>(image::Column::MaskSha256)
                .await?,
        ] {
            named.extend(column.iter().filter_map(|sha256| parse_digest(sha256)));
        }
        // A run names the images that its dataset had: they may be gone from there. One run at a time, as a list of
        // images can be long.
        let runs: Vec<Uuid> = run::Entity::find()
            .select_only()
            .column(run::Column::Id)
            .into_tuple()
            .all(&self.db)
            .await?;
        for id in runs {
            match self.run(id).await {
                Ok(run) => {
                    named.extend(run.provenance_sha256.as_deref().and_then(parse_digest));
                    // The LoRA that it begins with may be gone from its own row.
                    named.extend(digests_in(&run.spec));
                }
                Err(StoreError::NotFound) => {} // deleted meanwhile
                Err(error) => return Err(error),
            }
            match self.run_images(id).await {
                Ok(images) => named.extend(digests_in(&images)),
                Err(StoreError::NotFound) => {} // deleted meanwhile
                Err(error) => return Err(error),
            }
        }
        Ok(named)
    }

    async fn digests<E: EntityTrait>(&self, column: E::Column) -> Result<Vec<String>, StoreError> {
        let query = E::find().select_only().column(column).distinct();
        let query = query.filter(column.is_not_null());
        Ok(query.into_tuple().all(&self.db).await?)
    }
}

/// Every 64 hex digits in a row: how the text is laid out is `runs`' business, and no digest in it may be missed.
fn digests_in(text: &str) -> impl Iterator<Item = Digest> {
    text.split(|c: char| !c.is_ascii_hexdigit())
        .filter_map(parse_digest)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use serde_json::json;

    use super::*;
    use crate::store::StoredBlob;
    use crate::store::datasets::{AddedImage, NewImage, SubsetHints};
    use crate::store::runs::{Claim, NewLora, NewRun, NewSample, Room, WorkerReport};
    use crate::store::testing::store;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A blob that was stored two hours ago.
    fn old(store: &Store, content: &str) -> StoredBlob {
        let blob = store.blobs().put(content.as_bytes()).expect("stored");
        let file = File::options()
            .write(true)
            .open(store.blobs().path(&blob.sha256));
        let set = file
            .expect("there")
            .set_modified(SystemTime::now() - 2 * HOUR);
        set.expect("set");
        blob
    }

    fn picture(subset_id: Uuid, blob: &StoredBlob) -> NewImage {
        NewImage {
            subset_id,
            file_name: format!("{}.png", blob.sha256),
            sha256: blob.sha256.clone(),
            media_type: "image/png".to_owned(),
            size_bytes: blob.size_bytes,
            width_px: 64,
            height_px: 64,
            caption: None,
            has_alpha: false,
            mask_sha256: None,
            background: None,
        }
    }

    async fn images(store: &Store, blobs: &[&StoredBlob]) -> (Uuid, Vec<Uuid>) {
        let dataset = store.create_dataset("a").await.expect("made").id;
        let hints = SubsetHints::default();
        let subset = store.ensure_subset(dataset, "one", &hints).await;
        let subset = subset.expect("made").id;
        let rows = blobs.iter().map(|blob| picture(subset, blob)).collect();
        let added = store.add_images(dataset, rows).await.expect("added");
        let id = |added: &AddedImage| match added {
            AddedImage::New(id) | AddedImage::Present(id) => *id,
        };
        (dataset, added.iter().map(id).collect())
    }

    #[tokio::test]
    async fn only_old_blobs_without_a_name_go() {
        let (_folder, store) = store().await;
        let [image, snapshot, sample, lora] =
            ["image", "snapshot", "sample", "lora"].map(|content| old(&store, content));
        let (dataset, _) = images(&store, &[&image]).await;
        let run = store.create_run(NewRun {
            id: Uuid::now_v7(),
            name: "run".to_owned(),
            spec: "{}".to_owned(),
            images: json!([{"id": Uuid::nil(), "sha256": snapshot.sha256, "caption": "a face"}])
                .to_string(),
            dataset_id: dataset,
            base_model_id: "m".to_owned(),
            ..NewRun::default()
        });
        let run = run.await.expect("made").id;
        let room = Room {
            runs: 1,
            per_device: 1,
            held: &[],
        };
        let claimed = store.claim_run(run, "worker", 1, None, HOUR, room).await;
        assert!(matches!(claimed, Ok(Claim::Taken(_))), "{claimed:?}");
        let report = WorkerReport {
            samples: vec![NewSample {
                id: Uuid::now_v7(),
                step: 1,
                prompt_index: 0,
                prompt: "lumo".to_owned(),
                seed: 1,
                width_px: 64,
                height_px: 64,
                sha256: sample.sha256.clone(),
                size_bytes: sample.size_bytes,
            }],
            loras: vec![NewLora {
                id: Uuid::now_v7(),
                file_name: "lumo.safetensors".to_owned(),
                step: 1,
                epoch: 1,
                is_final: true,
                sha256: lora.sha256.clone(),
                size_bytes: lora.size_bytes,
                validation: None,
                self_check: None,
            }],
            ..WorkerReport::default()
        };
        assert!(store.record(run, "worker", report).await.expect("written"));
        let [gone, gone_too] = ["nobody's", "nobody's either"].map(|content| old(&store, content));
        let young = store.blobs().put(b"on its way").expect("stored");
        let foreign = store.blobs().path(&gone.sha256).with_file_name("notes");
        fs::write(&foreign, b"mine").expect("written");

        let swept = store.sweep_blobs(HOUR).await.expect("swept");
        assert_eq!(
            (swept.blobs, swept.size_bytes),
            (2, gone.size_bytes + gone_too.size_bytes)
        );
        for blob in [&gone, &gone_too] {
            assert!(!store.blobs().path(&blob.sha256).exists());
        }
        for blob in [&image, &snapshot, &sample, &lora, &young] {
            assert!(store.blobs().path(&blob.sha256).exists(), "{blob:?}");
        }
        assert!(foreign.exists());
        let again = store.sweep_blobs(HOUR).await.expect("swept");
        assert_eq!(again, Swept::default());
    }

    #[tokio::test]
    async fn a_deleted_image_keeps_its_file_for_a_while() {
        let (_folder, store) = store().await;
        let [kept, deleted] = ["kept", "deleted"].map(|content| old(&store, content));
        let (_, ids) = images(&store, &[&kept, &deleted]).await;
        store.delete_image(ids[1], None).await.expect("deleted");
        let swept = store.sweep_blobs(HOUR).await.expect("swept");
        assert_eq!(swept, Swept::default());
        old(&store, "deleted");
        let swept = store.sweep_blobs(HOUR).await.expect("swept");
        assert_eq!(swept.size_bytes, deleted.size_bytes);
    }

    #[tokio::test]
    async fn a_database_without_names_removes_nothing() {
        let (_folder, store) = store().await;
        let blob = old(&store, "of another database");
        let swept = store.sweep_blobs(HOUR).await.expect("swept");
        assert_eq!(swept, Swept::default());
        assert!(store.blobs().path(&blob.sha256).exists());
    }
}
