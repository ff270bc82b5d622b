//! What `lorasmith plugins` and `lorasmith devices` print.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::json;

use crate::api::plugins::Plugins;
use crate::diffusion::devices;
use crate::plugin_host::PluginHost;

/// Every plugin file: loaded with what it brings, or refused and why.
///
/// # Errors
/// Never in practice; writing JSON could fail.
pub fn plugins(host: &PluginHost, as_json: bool) -> Result<String> {
    if as_json {
        return Ok(serde_json::to_string_pretty(&Plugins::from(host))? + "\n");
    }
    let mut text = String::new();
    for plugin in host.plugins() {
        match &plugin.reason {
            Some(reason) => writeln!(
                text,
                "refused  {}\n         {reason}",
                plugin.path.display()
            )?,
            None => {
                writeln!(
                    text,
                    "loaded   {} {}  {}",
                    plugin.id.as_deref().unwrap_or_default(),
                    plugin.version.as_deref().unwrap_or_default(),
                    plugin.path.display()
                )?;
                for (kind, ids) in [
                    ("optimizers", &plugin.optimizers),
                    ("schedulers", &plugin.schedulers),
                ] {
                    if !ids.is_empty() {
                        writeln!(text, "         {kind}: {}", ids.join(", "))?;
                    }
                }
            }
        }
    }
    if text.is_empty() {
        text.push_str(
            "no plugins were found: set plugin_dirs, or build them with `cargo build --release`\n",
        );
    }
    Ok(text)
}

/// Every device; the one that `auto` takes is marked.
///
/// # Errors
/// Never in practice; writing JSON could fail.
pub fn devices(as_json: bool) -> Result<String> {
    let found = devices::list();
    if as_json {
        return Ok(serde_json::to_string_pretty(&json!({"data": found}))? + "\n");
    }
    let mut text = String::new();
    for device in found {
        writeln!(
            text,
            "{} {:<10} {:<10} {}{}",
            if device.is_default { "*" } else { " " },
            device.id,
            format!("{:?}", device.class).to_lowercase(),
            device.name,
            if device.driver.is_empty() {
                String::new()
            } else {
                format!("  ({})", device.driver)
            },
        )?;
    }
    Ok(text)
}
