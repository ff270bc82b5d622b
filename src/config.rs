//! Every setting of the service: its unit, its default and where it may come from.
//!
//! Later sources win: defaults, then `lorasmith.toml` (or the file named by `--config`), then environment variables
//! `LORASMITH_<NAME>`, then command-line flags.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The file that is read from the working directory when `--config` names none.
pub const DEFAULT_FILE: &str = "lorasmith.toml";

/// The service's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and port to listen on; port 0 takes a free one.
    pub bind: SocketAddr,
    /// Where rows (SQLite) and blobs are kept.
    pub data_dir: PathBuf,
    /// Database connection string; SQLite in `data_dir` when absent, `postgres://…` for Postgres.
    pub database_url: Option<String>,
    /// Where base models are looked for: `.safetensors` files and diffusers folders.
    pub models_dir: PathBuf,
    /// Plugin folders that are searched besides the program's own folder.
    pub plugin_dirs: Vec<PathBuf>,
    /// SHA-256 digests of the plugins that may be loaded; all when absent.
    pub plugin_sha256: Option<Vec<String>>,
    /// Device of runs that name none: `auto`, `cpu`, `vulkan:0`.
    pub device: String,
    /// Use devices that fail the comparison with the CPU, and compare no others.
    pub force_devices: bool,
    /// A bearer key that allows everything, besides those that `lorasmith keys` makes. An address that others can
    /// reach needs a key; on loopback requests need one as soon as there is one when the service starts.
    pub api_key: Option<String>,
    /// Ask for keys even on loopback where none was made.
    pub require_key: bool,
    /// Names, besides `localhost` and loopback addresses, under which a service without keys may be called. Others are
    /// refused: a web page could have its name point here (DNS rebinding).
    pub allowed_hosts: Vec<String>,
    /// Web pages on other origins that may call the service, such as `https://studio.example`; `*` for all.
    pub cors_origins: Vec<String>,
    /// Requests per second that one key, or without keys one address, may make on average; 0 for no limit.
    pub rate_limit_per_s: u32,
    /// Requests that may come at once before the average counts.
    pub rate_limit_burst: u32,
    /// Requests that are worked on at the same time; 0 for no limit. Open event streams do not count.
    pub max_concurrent_requests: usize,
    /// Event streams and waiting event lists that are open at the same time; 0 for no limit.
    pub max_event_streams: usize,
    /// Networks that webhooks may be in besides public ones, and without TLS: `10.0.0.0/8`, `127.0.0.1/32`.
    pub webhook_allowed_networks: Vec<IpNet>,
    /// The pause after the first failure to send a message to a webhook, in seconds; each further one is three times as
    /// long, up to six hours.
    pub webhook_retry_s: f64,
    /// When a message to a webhook is given up, in seconds after its event.
    pub webhook_give_up_s: u64,
    /// Threads that answer requests.
    pub http_workers: usize,
    /// How many runs may train at the same time, on all devices together.
    pub max_concurrent_runs: usize,
    /// How many runs may train at the same time on one device; runs on different devices do not wait for each other.
    pub max_runs_per_device: usize,
    /// Most bytes that latents and states of captions take in `data_dir/cache`, so that later runs need not compute
    /// them again; checked when a run begins. 0 switches the cache off.
    pub cache_max_bytes: u64,
    /// Seconds that workers have to keep their runs and leave when the service is stopped.
    pub shutdown_grace_s: u64,
    /// Days for which a succeeded run can be made longer; its resume point takes room until then.
    pub extendable_days: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7870),
            data_dir: PathBuf::from("lorasmith-data"),
            database_url: None,
            models_dir: PathBuf::from("models"),
            plugin_dirs: Vec::new(),
            plugin_sha256: None,
            device: "auto".to_owned(),
            force_devices: false,
            api_key: None,
            require_key: false,
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            rate_limit_per_s: 500,
            rate_limit_burst: 1000,
            max_concurrent_requests: 512,
            max_event_streams: 4096,
            webhook_allowed_networks: Vec::new(),
            webhook_retry_s: 5.0,
            webhook_give_up_s: 3 * 24 * 60 * 60,
            http_workers: 2,
            max_concurrent_runs: 16,
            max_runs_per_device: 1,
            cache_max_bytes: 10 << 30,
            shutdown_grace_s: 30,
            extendable_days: 7,
        }
    }
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A source could not be read, or holds a wrong value or an unknown name.
    #[error("settings: {0}")]
    Invalid(Box<figment::Error>),
    /// The file named by `--config` is not there.
    #[error("settings file `{0}` does not exist")]
    MissingFile(PathBuf),
    /// A number is out of range.
    #[error("`{name}` is {found}; expected {expected}")]
    OutOfRange {
        /// The setting.
        name: &'static str,
        /// Its value.
        found: String,
        /// What would be right.
        expected: &'static str,
    },
}

/// Values given on the command line; absent ones leave the other sources in force.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Overrides {
    /// See [`Config::bind`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind: Option<SocketAddr>,
    /// See [`Config::data_dir`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// See [`Config::models_dir`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models_dir: Option<PathBuf>,
    /// See [`Config::device`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// See [`Config::max_runs_per_device`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_runs_per_device: Option<usize>,
}

impl Config {
    /// Reads all sources.
    ///
    /// # Errors
    /// When a source is unreadable, a name is unknown, a value is wrong, or the combination is unsafe.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigError> {
        if let Some(file) = file
            && !file.is_file()
        {
            return Err(ConfigError::MissingFile(file.to_owned()));
        }
        let file = file.unwrap_or(Path::new(DEFAULT_FILE));
        let config: Self = Figment::from(Serialized::defaults(Self::default()))
            .merge(Toml::file(file))
            // `LORASMITH_LOG`, `_CONFIG` and `_INSTRUCTIONS` are read elsewhere.
            .merge(Env::prefixed("LORASMITH_").ignore(&["log", "config", "instructions"]))
            .merge(Serialized::defaults(overrides))
            .extract()
            .map_err(|error| ConfigError::Invalid(Box::new(error)))?;
        config.check()
    }

    fn check(self) -> Result<Self, ConfigError> {
        for (name, value) in [
            ("http_workers", self.http_workers),
            ("max_concurrent_runs", self.max_concurrent_runs),
            ("max_runs_per_device", self.max_runs_per_device),
        ] {
            if !(1..=256).contains(&value) {
                return Err(ConfigError::OutOfRange {
                    name,
                    found: value.to_string(),
                    expected: "1 to 256",
                });
            }
        }
        if !(0.01..=3600.0).contains(&self.webhook_retry_s) {
            return Err(ConfigError::OutOfRange {
                name: "webhook_retry_s",
                found: self.webhook_retry_s.to_string(),
                expected: "0.01 to 3600",
            });
        }
        if self.rate_limit_per_s > 0 && self.rate_limit_burst == 0 {
            return Err(ConfigError::OutOfRange {
                name: "rate_limit_burst",
                found: "0".to_owned(),
                expected: "1 or more, or `rate_limit_per_s` = 0 for no limit",
            });
        }
        for origin in &self.cors_origins {
            if !is_origin(origin) {
                return Err(ConfigError::OutOfRange {
                    name: "cors_origins",
                    found: origin.clone(),
                    expected: "`*`, or scheme, host and port such as `https://studio.example`",
                });
            }
        }
        Ok(self)
    }

    /// The database connection string in force.
    pub fn database_url(&self) -> String {
        self.database_url.clone().unwrap_or_else(|| {
            format!(
                "sqlite://{}?mode=rwc",
                self.data_dir.join("lorasmith.sqlite3").display()
            )
        })
    }
}

fn is_origin(text: &str) -> bool {
    let host = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    text == "*"
        || host.is_some_and(|host| {
            !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_in_the_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.toml");
        std::fs::write(&file, "bnid = \"127.0.0.1:1\"\n").unwrap();
        let error = Config::load(Some(&file), &Overrides::default()).unwrap_err();
        assert!(error.to_string().contains("bnid"), "{error}");
    }

    #[test]
    fn an_origin_has_no_path() {
        for (origin, right) in [
            ("*", true),
            ("https://studio.example", true),
            ("http://localhost:3000", true),
            ("https://studio.example/", false),
            ("studio.example", false),
        ] {
            let config = Config {
                cors_origins: vec![origin.to_owned()],
                ..Config::default()
            };
            assert_eq!(config.check().is_ok(), right, "{origin}");
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.toml");
        std::fs::write(&file, "device = \"cpu\"\nmax_concurrent_runs = 3\n").unwrap();
        let overrides = Overrides {
            device: Some("vulkan:0".to_owned()),
            ..Overrides::default()
        };
        let config = Config::load(Some(&file), &overrides).unwrap();
        assert_eq!(
            (config.device.as_str(), config.max_concurrent_runs),
            ("vulkan:0", 3)
        );
    }
}
