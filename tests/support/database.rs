//! A database for one test: a file of SQLite, or a new database of the Postgres server that
//! `TEST_DATABASE_URL` (`postgres://user:password@host/postgres`) names.

use std::path::Path;

use sea_orm::{ConnectionTrait as _, Database};
use uuid::Uuid;

/// A database; one of Postgres is dropped with this.
pub struct TestDatabase {
    url: String,
    /// The server, and the name there.
    made: Option<(String, String)>,
}

impl TestDatabase {
    /// An empty one; SQLite's file is in `folder`.
    pub fn new(folder: &Path) -> Self {
        let Ok(server) = std::env::var("TEST_DATABASE_URL") else {
            let file = folder.join("db.sqlite3");
            return Self {
                url: format!("sqlite://{}?mode=rwc", file.display()),
                made: None,
            };
        };
        let name = format!("lorasmith_test_{}", Uuid::new_v4().simple());
        execute(&server, &format!("CREATE DATABASE {name}"));
        let (host, _) = server.rsplit_once('/').expect("a URL with a database");
        Self {
            url: format!("{host}/{name}"),
            made: Some((server, name)),
        }
    }

    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if let Some((server, name)) = &self.made {
            execute(server, &format!("DROP DATABASE {name} WITH (FORCE)"));
        }
    }
}

/// On a thread of its own: the test may be asynchronous itself.
fn execute(server: &str, statement: &str) {
    let (server, statement) = (server.to_owned(), statement.to_owned());
    let done = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(async {
            let database = Database::connect(server).await.expect("the server");
            let done = database.execute_unprepared(&statement).await;
            done.expect("the right to make databases");
        });
    });
    assert!(
        done.join().is_ok() || std::thread::panicking(),
        "Postgres has failed"
    );
}
