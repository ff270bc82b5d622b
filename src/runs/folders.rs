//! What runs have on disk besides blobs, and when it goes: with their end, but for what an extension needs.

use std::path::Path;
use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use super::state;
use crate::store::runs::RunState;
use crate::store::{Store, StoreError};

/// Removes the folders of runs that have ended; those of succeeded ones only `extendable` after their end.
///
/// # Errors
/// When the database fails or the folder of folders cannot be read.
pub async fn sweep_folders(store: &Store, extendable: Duration) -> Result<(), StoreError> {
    let root = store.data_dir().join("runs");
    let Ok(entries) = std::fs::read_dir(&root) else {
        return Ok(()); // there was no run yet
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|name| name.parse::<Uuid>().ok()) else {
            continue; // not ours
        };
        if is_needed(store, id, extendable).await? {
            continue;
        }
        remove(&entry.path());
    }
    Ok(())
}

async fn is_needed(store: &Store, id: Uuid, extendable: Duration) -> Result<bool, StoreError> {
    let run = match store.run(id).await {
        Ok(run) => run,
        // The folder of a run that is being made is there before its row.
        Err(StoreError::NotFound) => return Ok(age_of(id) < Duration::from_secs(60 * 60)),
        Err(error) => return Err(error),
    };
    let now = OffsetDateTime::now_utc();
    let extendable = run.state == RunState::Succeeded
        && run.finished_at.is_none_or(|end| now - end < extendable);
    Ok(extendable || !state::has_ended(run.state))
}

/// How long ago an id was made, as it tells itself.
fn age_of(id: Uuid) -> Duration {
    let made = id.get_timestamp().map_or(0, |time| time.to_unix().0);
    let now = OffsetDateTime::now_utc().unix_timestamp();
    Duration::from_secs(u64::try_from(now).unwrap_or(0).saturating_sub(made))
}

/// Removes the folder of a run that nothing needs any more.
pub fn remove(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "a run's folder was not removed");
    }
}
