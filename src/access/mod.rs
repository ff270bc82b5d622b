//! Who may call: API keys with scopes. Rows hold digests; a key is shown once, when it is made.

mod key;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq as _;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::store::api_keys::{NewKey, StoredKey};
use crate::store::{Store, StoreError};

use key::KeyDigest;

/// How long keys are remembered: a key that another process revokes opens nothing after this time.
const REMEMBERED: Duration = Duration::from_secs(1);
/// How exact the time of a key's last use is.
const LAST_USE: Duration = Duration::from_secs(60);
/// Longest name of a key, in characters.
const MAX_NAME_CHARS: usize = 128;

/// What a key allows. A scope includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Look at everything but webhooks.
    Read,
    /// Also make, change and delete.
    Write,
    /// Also webhooks, which send data to other machines.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Admin];

    /// The word in rows, on the command line and on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no scope.
#[derive(Debug, thiserror::Error)]
#[error("found `{0}`, expected `read`, `write` or `admin`")]
pub struct UnknownScope(String);

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(word: &str) -> Result<Self, UnknownScope> {
        let mut all = Self::ALL.into_iter();
        all.find(|scope| scope.as_str() == word)
            .ok_or_else(|| UnknownScope(word.to_owned()))
    }
}

/// Why keys cannot be made or found.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The name is no name.
    #[error("the key's name has {0} characters, expected 1 to {MAX_NAME_CHARS}")]
    Name(usize),
    /// A key without a scope would open nothing.
    #[error("a key needs at least one scope: `read`, `write` or `admin`")]
    NoScope,
    /// The system has no randomness to give.
    #[error("the system gives no randomness: {0}")]
    Randomness(String),
    /// Rows.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Whoever a request comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The key's id; `None` for the one of the settings.
    pub key_id: Option<Uuid>,
    /// The widest scope of the key.
    pub scope: Scope,
}

/// A key as lists show it.
#[derive(Clone, Debug)]
pub struct ApiKey {
    /// Its id.
    pub id: Uuid,
    /// What its maker calls it.
    pub name: String,
    /// Its first characters.
    pub hint: String,
    /// What it allows, as it was made.
    pub scopes: BTreeSet<Scope>,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When it was last used, to the minute.
    pub last_used_at: Option<OffsetDateTime>,
    /// Since when it opens nothing.
    pub revoked_at: Option<OffsetDateTime>,
}

/// Makes keys and recognises them. Cloning is cheap.
#[derive(Clone)]
pub struct Access {
    store: Store,
    /// Digest of the key in the settings, which allows everything.
    configured: Option<KeyDigest>,
    /// Whether requests need a key at all.
    required: bool,
    known: Arc<Mutex<Known>>,
}

#[derive(Default)]
struct Known {
    keys: Vec<KnownKey>,
    read_at: Option<Instant>,
}

#[derive(Clone)]
struct KnownKey {
    id: Uuid,
    digest: KeyDigest,
    scope: Scope,
    last_used_at: Option<OffsetDateTime>,
}

impl Access {
    /// `configured` is the key of the settings, if there is one.
    pub fn new(store: Store, configured: Option<&str>, required: bool) -> Self {
        let configured = configured.filter(|key| !key.is_empty());
        Self {
            store,
            configured: configured.map(key::digest),
            required,
            known: Arc::default(),
        }
    }

    /// Whether requests need a key.
    pub fn is_required(&self) -> bool {
        self.required
    }

    /// Makes a key and returns it with its row; it cannot be read again.
    ///
    /// # Errors
    /// [`AccessError::Name`], [`AccessError::NoScope`], or when the database fails.
    pub async fn create(
        &self,
        name: &str,
        scopes: &BTreeSet<Scope>,
    ) -> Result<(String, ApiKey), AccessError> {
        let length = name.trim().chars().count();
        if !(1..=MAX_NAME_CHARS).contains(&length) {
            return Err(AccessError::Name(length));
        }
        if scopes.is_empty() {
            return Err(AccessError::NoScope);
        }
        let text = key::generate().map_err(|error| AccessError::Randomness(error.to_string()))?;
        let words: Vec<&str> = scopes.iter().map(|scope| scope.as_str()).collect();
        let row = self
            .store
            .create_api_key(NewKey {
                name: name.trim().to_owned(),
                sha256: hex::encode(key::digest(&text)),
                hint: key::hint(&text),
                scopes: words.join(" "),
            })
            .await?;
        Ok((text, row.into()))
    }

    /// Every key, revoked ones too.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(&self) -> Result<Vec<ApiKey>, AccessError> {
        let rows = self.store.api_keys().await?;
        Ok(rows.into_iter().map(Into::into).collect())
    }

    /// Takes a key's power; servers notice within a second.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is none of this id.
    pub async fn revoke(&self, id: Uuid) -> Result<ApiKey, AccessError> {
        let row = self.store.revoke_api_key(id).await?;
        self.forget();
        Ok(row.into())
    }

    /// Whose key this is; `None` for a text that is nobody's.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn recognise(&self, text: &str) -> Result<Option<Caller>, StoreError> {
        let digest = key::digest(text);
        if let Some(configured) = &self.configured
            && bool::from(digest.ct_eq(configured))
        {
            return Ok(Some(Caller {
                key_id: None,
                scope: Scope::Admin,
            }));
        }
        if !key::is_well_formed(text) {
            return Ok(None);
        }
        let found = match self.remembered(&digest) {
            Some(found) => Some(found),
            // It may have been made by another process just now.
            None => self.read_again(&digest).await?,
        };
        let Some(found) = found else { return Ok(None) };
        self.note_use(&found).await;
        Ok(Some(Caller {
            key_id: Some(found.id),
            scope: found.scope,
        }))
    }

    fn remembered(&self, digest: &KeyDigest) -> Option<KnownKey> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = known.read_at.is_some_and(|at| at.elapsed() < REMEMBERED);
        fresh.then(|| find(&known.keys, digest)).flatten()
    }

    async fn read_again(&self, digest: &KeyDigest) -> Result<Option<KnownKey>, StoreError> {
        let rows = self.store.active_api_keys().await?;
        let keys: Vec<KnownKey> = rows.iter().filter_map(KnownKey::of).collect();
        let found = find(&keys, digest);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Known {
            keys,
            read_at: Some(Instant::now()),
        };
        Ok(found)
    }

    fn forget(&self) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.read_at = None;
    }

    /// A request is answered whether or not this can be written.
    async fn note_use(&self, key: &KnownKey) {
        let now = OffsetDateTime::now_utc();
        let recent = key.last_used_at.is_some_and(|at| now - at < LAST_USE);
        if recent {
            return;
        }
        {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let same = known.keys.iter_mut().find(|other| other.id == key.id);
            if let Some(same) = same {
                same.last_used_at = Some(now);
            }
        }
        if let Err(error) = self.store.touch_api_key(key.id).await {
            tracing::warn!(%error, "the use of a key was not noted");
        }
    }
}

/// Over every key and without an early end: the time says nothing about where digests differ.
fn find(keys: &[KnownKey], digest: &KeyDigest) -> Option<KnownKey> {
    let mut found = None;
    for key in keys {
        if bool::from(key.digest.ct_eq(digest)) {
            found = Some(key);
        }
    }
    found.cloned()
}

impl KnownKey {
    /// `None` for a row that this build cannot read: it opens nothing.
    fn of(row: &StoredKey) -> Option<Self> {
        let digest = hex::decode(&row.sha256).ok()?.try_into().ok()?;
        Some(Self {
            id: row.id,
            digest,
            scope: scopes(&row.scopes).into_iter().max()?,
            last_used_at: row.last_used_at,
        })
    }
}

fn scopes(words: &str) -> BTreeSet<Scope> {
    words
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

impl From<StoredKey> for ApiKey {
    fn from(row: StoredKey) -> Self {
        Self {
            scopes: scopes(&row.scopes),
            id: row.id,
            name: row.name,
            hint: row.hint,
            created_at: row.created_at,
            last_used_at: row.last_used_at,
            revoked_at: row.revoked_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing;

    async fn access(configured: Option<&str>) -> (testing::Scratch, Access) {
        let (scratch, store) = testing::store().await;
        (scratch, Access::new(store, configured, true))
    }

    #[tokio::test]
    async fn a_key_opens_until_it_is_revoked() {
        let (_folder, access) = access(None).await;
        let scopes = BTreeSet::from([Scope::Read, Scope::Write]);
        let (text, key) = access.create(" ci ", &scopes).await.expect("made");
        assert_eq!((key.name.as_str(), &key.scopes), ("ci", &scopes));
        let rows = access.store.api_keys().await.expect("rows");
        assert!(
            !format!("{rows:?}").contains(&text),
            "the key is in its row"
        );

        let caller = access.recognise(&text).await.expect("working");
        let expected = Caller {
            key_id: Some(key.id),
            scope: Scope::Write,
        };
        assert_eq!(caller, Some(expected));
        assert!(access.list().await.expect("keys")[0].last_used_at.is_some());
        for wrong in [&text[..text.len() - 1], "", "lorasmith_"] {
            assert_eq!(access.recognise(wrong).await.expect("working"), None);
        }
        let unknown = key::generate().expect("randomness");
        assert_eq!(access.recognise(&unknown).await.expect("working"), None);

        access.revoke(key.id).await.expect("revoked");
        access.revoke(key.id).await.expect("no mistake");
        assert_eq!(access.recognise(&text).await.expect("working"), None);
        let absent = access.revoke(Uuid::nil()).await;
        assert!(matches!(
            absent,
            Err(AccessError::Store(StoreError::NotFound))
        ));
    }

    #[tokio::test]
    async fn the_key_of_the_settings_allows_everything() {
        let (_folder, access) = access(Some("secret")).await;
        let caller = access.recognise("secret").await.expect("working");
        assert_eq!(caller.map(|caller| caller.scope), Some(Scope::Admin));
        assert_eq!(access.recognise("Secret").await.expect("working"), None);
        let (_folder, open) = super::tests::access(Some("")).await;
        assert_eq!(open.recognise("").await.expect("working"), None);
    }

    #[tokio::test]
    async fn a_key_needs_a_name_and_a_scope() {
        let (_folder, access) = access(None).await;
        let read = BTreeSet::from([Scope::Read]);
        assert!(matches!(
            access.create(" ", &read).await,
            Err(AccessError::Name(0))
        ));
        assert!(matches!(
            access.create("a", &BTreeSet::new()).await,
            Err(AccessError::NoScope)
        ));
    }
}
