//! A store for one test, and a clock that it can set.

use std::cell::Cell;

use tempfile::TempDir;

use super::Store;

#[path = "../../tests/support/database.rs"]
mod database;

/// What the store of a test is made of; it goes with this.
pub struct Scratch {
    /// The data folder.
    pub folder: TempDir,
    database: database::TestDatabase,
}

impl Scratch {
    /// Another store of the same rows and blobs, as another process has it.
    pub async fn store(&self) -> Store {
        let store = Store::open(self.database.url(), self.folder.path()).await;
        store.expect("a store")
    }
}

/// An empty store.
pub async fn store() -> (Scratch, Store) {
    let folder = tempfile::tempdir().expect("a folder");
    let database = database::TestDatabase::new(folder.path());
    let scratch = Scratch { folder, database };
    let store = scratch.store().await;
    (scratch, store)
}

thread_local! {
    static JUMPED_MS: Cell<i64> = const { Cell::new(0) };
}

/// Sets the wall clock of this thread, as rows are told it, forward or back.
pub fn jump_clock(by_ms: i64) {
    JUMPED_MS.with(|jumped| jumped.set(jumped.get() + by_ms));
}

/// How far the clock was set.
pub fn jumped_ms() -> i64 {
    JUMPED_MS.with(Cell::get)
}
