//! Whether a worker is alive, told by a file that it keeps locked: the system lets go of the lock when the process
//! ends, in whatever way. The lease tells it where locks do not reach, on another machine, only later.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::store::runs::HeldBy;

/// The sign of life of this process; it ends with it.
pub struct Alive {
    path: PathBuf,
    _lock: File,
}

impl Alive {
    /// Begins to show that the worker `owner` of the run with this folder lives; `None` where files cannot be locked.
    pub fn begin(folder: &Path, owner: &str) -> Option<Self> {
        fs::create_dir_all(folder).ok()?;
        let path = lock_file(folder, owner);
        let lock = File::create(&path).ok()?;
        lock.try_lock().ok()?;
        Some(Self { path, _lock: lock })
    }

    /// Removes the signs of life of workers that were killed. For the one that has taken the run: another one that
    /// only tries to may just be making its own.
    pub fn clear_others(&self) {
        let entries = self.path.parent().map(fs::read_dir);
        for entry in entries.into_iter().flatten().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            let is_lock = name.starts_with("worker-") && name.ends_with(".lock");
            if is_lock && path != self.path && is_free(&path) {
                let _ = fs::remove_file(path); // it says nothing either way
            }
        }
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // an unlocked one says the same
    }
}

fn is_free(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| file.try_lock().is_ok())
}

/// Whether a worker's process is certainly gone. A `false` says nothing.
pub fn is_gone(folder: &Path, worker: &HeldBy) -> bool {
    if worker.host.is_none() || worker.host != host() {
        return false;
    }
    let path = lock_file(folder, &worker.owner);
    match File::open(&path) {
        Ok(file) => match file.try_lock() {
            Ok(()) => {
                let _ = fs::remove_file(&path); // nobody else's
                true
            }
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => false,
        },
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// This machine, from its start to its end; `None` where the system does not tell.
pub fn host() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

fn lock_file(folder: &Path, owner: &str) -> PathBuf {
    folder.join(format!("worker-{owner}.lock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(owner: &str, host: Option<String>) -> HeldBy {
        HeldBy {
            owner: owner.to_owned(),
            pid: None,
            host,
            beat: 0,
        }
    }

    #[test]
    fn a_lock_tells_life_from_death() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path().join("run");
        let Some(host) = host() else { return };
        let own = worker("a", Some(host.clone()));
        let alive = Alive::begin(&folder, "a").expect("locked");
        assert!(!is_gone(&folder, &own));
        assert!(is_gone(&folder, &worker("b", Some(host.clone()))));
        // Of another machine, or the same after a restart, nothing is known.
        assert!(!is_gone(&folder, &worker("b", Some("other".to_owned()))));
        assert!(!is_gone(&folder, &worker("b", None)));
        // One that was killed long ago is forgotten; one that lives is not.
        fs::write(lock_file(&folder, "dead"), b"").expect("written");
        let other = Alive::begin(&folder, "other").expect("locked");
        alive.clear_others();
        assert!(!lock_file(&folder, "dead").exists());
        assert!(lock_file(&folder, "other").exists() && lock_file(&folder, "a").exists());
        drop((alive, other));
        assert!(is_gone(&folder, &own));
        // A process that was killed leaves its file behind, unlocked.
        fs::write(lock_file(&folder, "c"), b"").expect("written");
        assert!(is_gone(&folder, &worker("c", Some(host))));
        assert!(!lock_file(&folder, "c").exists());
    }
}
