//! Why a worker should stop, and how it hears that its process is to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Runtime;

use crate::runs::memory::MemoryWatch;
use crate::store::StoreError;
use crate::store::runs::Wish;

/// What the supervisor writes to a worker's standard input when the service ends.
pub const LEAVE: &str = "leave\n";

/// Why a worker should stop, and what else somebody wants of it.
#[derive(Debug, Default)]
pub struct Stop {
    cancelled: AtomicBool,
    pausing: AtomicBool,
    lost: AtomicBool,
    leaving: AtomicBool,
    storage_full: AtomicBool,
    pub(super) memory: MemoryWatch,
    save: AtomicBool,
    sample: AtomicBool,
}

impl Stop {
    /// Somebody wants the run to end.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Somebody wants the run to rest.
    pub fn is_pausing(&self) -> bool {
        self.pausing.load(Ordering::Relaxed)
    }

    /// The run is no longer this worker's, or cannot be written to.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// The process is asked to end.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Reports could not be written, as there is no room left.
    pub fn is_storage_full(&self) -> bool {
        self.storage_full.load(Ordering::Relaxed)
    }

    /// Whether there is any reason to end the training.
    pub(super) fn any(&self) -> bool {
        self.is_cancelled()
            || self.is_pausing()
            || self.is_lost()
            || self.is_leaving()
            || self.is_storage_full()
            || self.memory.outgrown().is_some()
    }

    /// From now on the run is not this worker's.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Reports cannot be written any more, for `error`.
    pub(super) fn cannot_write(&self, error: &StoreError) {
        let flag = if error.is_storage_full() {
            &self.storage_full
        } else {
            &self.lost
        };
        flag.store(true, Ordering::Relaxed);
    }

    /// Whether somebody wishes it.
    pub(super) fn wants(&self, wish: Wish) -> bool {
        self.flag(wish).load(Ordering::Relaxed)
    }

    /// Somebody wishes it, or (`false`) it was fulfilled.
    pub(super) fn set(&self, wish: Wish, wanted: bool) {
        self.flag(wish).store(wanted, Ordering::Relaxed);
    }

    fn flag(&self, wish: Wish) -> &AtomicBool {
        match wish {
            Wish::Cancel => &self.cancelled,
            Wish::Pause => &self.pausing,
            Wish::Save => &self.save,
            Wish::Sample => &self.sample,
            Wish::Leave => &self.leaving,
        }
    }
}

/// Sets the flag when the process is asked to end, by a signal or by its supervisor.
pub(super) fn leave_when_asked(runtime: &Runtime, stop: &Arc<Stop>) {
    let flag = stop.clone();
    runtime.spawn(async move {
        if wait_for_end_of_process().await.is_ok() {
            flag.set(Wish::Leave, true);
        }
    });
    let flag = stop.clone();
    // A thread of its own, as reading blocks; it ends with the process.
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            match line {
                Ok(line) if line.trim() == LEAVE.trim() => {
                    flag.set(Wish::Leave, true);
                    return;
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    });
}

/// Returns when a signal asks the process to end.
async fn wait_for_end_of_process() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
