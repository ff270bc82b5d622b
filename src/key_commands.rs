//! `lorasmith keys`: makes, lists and revokes keys of the API, in the database of the settings.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::access::{Access, ApiKey};
use crate::app;
use crate::cli::{KeysArgs, KeysCommand};
use crate::config::Config;

/// Does what the command says and returns what it prints.
///
/// # Errors
/// When the database cannot be used, or a name, scope or id is wrong.
pub fn run(args: &KeysArgs, config: Config) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let store = app::open_own_store(config).await?;
        let access = Access::new(store, None, true);
        match &args.command {
            KeysCommand::Create {
                name,
                scopes,
                json: false,
            } => {
                let (text, key) = access.create(name, &scopes.iter().copied().collect()).await?;
                Ok(format!(
                    "{text}\n\nThis is key {} (`{}`). It is not kept anywhere and cannot be shown again.\n",
                    key.id, key.name
                ))
            }
            KeysCommand::Create { name, scopes, .. } => {
                let (text, key) = access.create(name, &scopes.iter().copied().collect()).await?;
                let mut value = wire(&key);
                value["key"] = json!(text);
                Ok(format!("{}\n", serde_json::to_string_pretty(&value)?))
            }
            KeysCommand::List(args) => {
                let keys = access.list().await?;
                if args.json {
                    let values: Vec<Value> = keys.iter().map(wire).collect();
                    return Ok(format!("{}\n", serde_json::to_string_pretty(&values)?));
                }
                Ok(table(&keys))
            }
            KeysCommand::Revoke { id } => {
                let revoked = access.revoke(*id).await;
                let key = revoked.with_context(|| format!("revoking key {id}"))?;
                Ok(format!("Key {} (`{}`) opens nothing any more.\n", key.id, key.name))
            }
        }
    })
}

fn wire(key: &ApiKey) -> Value {
    json!({
        "id": key.id,
        "name": key.name,
        "hint": key.hint,
        "scopes": words(key),
        "created_at": text(Some(key.created_at)),
        "last_used_at": text(key.last_used_at),
        "revoked_at": text(key.revoked_at),
    })
}

fn words(key: &ApiKey) -> Vec<&'static str> {
    key.scopes.iter().map(|scope| scope.as_str()).collect()
}

fn text(time: Option<OffsetDateTime>) -> Option<String> {
    time.and_then(|time| time.format(&Rfc3339).ok())
}

fn table(keys: &[ApiKey]) -> String {
    if keys.is_empty() {
        return "There are no keys; `lorasmith keys create --name NAME --scope read` makes one.\n"
            .to_owned();
    }
    let mut table = String::new();
    for key in keys {
        let state = match (text(key.revoked_at), text(key.last_used_at)) {
            (Some(at), _) => format!("revoked {at}"),
            (None, Some(at)) => format!("last used {at}"),
            (None, None) => "never used".to_owned(),
        };
        // Writing to a String does not fail.
        let _ = writeln!(
            table,
            "{}  {}…  {:<16}  {state}  {}",
            key.id,
            key.hint,
            words(key).join(","),
            key.name
        );
    }
    table
}
