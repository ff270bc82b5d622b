//! How much room there is where the data is.

use std::path::Path;

/// Whether a folder's file system has so many bytes left for us; where the system does not tell, it is tried.
pub fn is_enough(folder: &Path, needed_bytes: u64) -> bool {
    free_bytes(folder).is_none_or(|free| free >= needed_bytes)
}

#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_measured_where_the_data_is() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(is_enough(folder.path(), 1));
        assert_eq!(is_enough(folder.path(), u64::MAX), cfg!(not(unix)));
    }
}
