//! Rows (sea-orm over SQLite or Postgres) and blobs. Queries, no rules.
//!
//! Several processes share one database: the server and one worker per run. Every transaction that writes takes the
//! write lock when it begins, so that none has to be tried again half-way.

pub mod api_keys;
pub mod blobs;
pub mod datasets;
mod gauges;
pub mod idempotency;
pub mod loras;
mod measures;
mod rows;
pub mod runs;
mod sweep;
#[cfg(test)]
pub mod testing;
pub mod uploads;
pub mod webhooks;

use std::path::{Path, PathBuf};
use std::time::Duration;

use lorasmith_migrations::{Migrator, MigratorTrait as _};
use sea_orm::sqlx::Connection as _;
use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::{
    ConnectOptions, Database, DatabaseConnection, DatabaseTransaction, DbErr, SqlErr,
    SqliteTransactionMode, TransactionOptions, TransactionTrait as _,
};
use time::OffsetDateTime;
use uuid::Uuid;

pub use blobs::{Blobs, StoredBlob, Swept};

/// How long a statement waits for another process's write.
const BUSY_TIMEOUT: Duration = Duration::from_secs(20);

/// A failed query or file operation.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database has refused or failed.
    #[error("database: {0}")]
    Database(DbErr),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The row is not there.
    #[error("there is no such row")]
    NotFound,
    /// A row of this unique key exists already.
    #[error("the row exists already")]
    Exists,
    /// Another row still refers to this one.
    #[error("the row is in use")]
    InUse,
    /// Somebody else has changed the row meanwhile.
    #[error("the row is at revision {found}, not {expected}")]
    Conflict {
        /// The revision that the change was based on.
        expected: i64,
        /// The row's revision.
        found: i64,
    },
    /// A background task has failed.
    #[error("a background task has failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// A row holds what this build cannot read.
    #[error("{what}: {message}")]
    Corrupt {
        /// Table, id and column.
        what: String,
        /// What is wrong with it.
        message: String,
    },
}

impl From<DbErr> for StoreError {
    fn from(error: DbErr) -> Self {
        match error.sql_err() {
            Some(SqlErr::UniqueConstraintViolation(_)) => Self::Exists,
            Some(SqlErr::ForeignKeyConstraintViolation(_)) => Self::InUse,
            _ => Self::Database(error),
        }
    }
}

impl StoreError {
    /// Whether there is no room left where the data is.
    pub fn is_storage_full(&self) -> bool {
        match self {
            Self::Io { source, .. } => is_storage_full(source),
            // SQLITE_FULL; of Postgres, 53100.
            Self::Database(error) => {
                let text = error.to_string();
                text.contains("database or disk is full") || text.contains("No space left")
            }
            _ => false,
        }
    }

    fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// Rows and blobs of one data folder. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Store {
    db: DatabaseConnection,
    blobs: Blobs,
    data_dir: PathBuf,
}

impl Store {
    /// Opens (and, where needed, makes) the data folder and the database, and brings its tables up to date.
    ///
    /// # Errors
    /// When the folder cannot be written, or the database cannot be reached or migrated.
    pub async fn open(database_url: &str, data_dir: &Path) -> Result<Self, StoreError> {
        let blobs = Blobs::open(data_dir)?;
        let mut options = ConnectOptions::new(database_url);
        options
            .max_connections(8)
            .acquire_timeout(Duration::from_secs(30))
            .sqlx_logging(false)
            .map_sqlx_sqlite_opts(|sqlite| {
                sqlite
                    .foreign_keys(true)
                    .journal_mode(SqliteJournalMode::Wal)
                    .synchronous(SqliteSynchronous::Full) // an answered request survives a power cut
                    .busy_timeout(BUSY_TIMEOUT)
            })
            .map_sqlx_sqlite_pool_opts(|pool| {
                // A commit that fails for want of room leaves its transaction open, and with it the write lock.
                pool.after_release(|connection, _| {
                    Box::pin(async move {
                        connection.ping().await?; // what was asked of it before is done now
                        Ok(!connection.is_in_transaction())
                    })
                })
            });
        let db = Database::connect(options).await?;
        Migrator::up(&db, None).await?;
        Ok(Self {
            db,
            blobs,
            data_dir: data_dir.to_owned(),
        })
    }

    /// The files.
    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    /// Where everything is but a database that is elsewhere.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// What a run has on disk besides blobs: resume points, and files that are being written.
    pub fn run_folder(&self, run: Uuid) -> PathBuf {
        self.data_dir.join("runs").join(run.to_string())
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        Ok(self.db.ping().await?)
    }

    /// Begins a transaction that will write.
    async fn begin(&self) -> Result<DatabaseTransaction, StoreError> {
        let options = TransactionOptions {
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        Ok(self.db.begin_with_options(options).await?)
    }
}

/// Whether the system has said that there is no room left.
pub fn is_storage_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
    )
}

/// Now, as rows hold it.
pub(crate) fn now_ms() -> i64 {
    let now = (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000) as i64;
    #[cfg(test)]
    let now = now + testing::jumped_ms();
    now
}

/// A row's time. Rows hold what [`now_ms`] gave, which is in range.
pub(crate) fn time_of(ms: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}
