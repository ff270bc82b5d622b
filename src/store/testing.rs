//! A store for one test.

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
