//! The service put together: store, plugins, runs and API. The only module that sees all of them.

use std::fs::{File, TryLockError};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::access::Access;
use crate::api::limits::{LimitSettings, Limits as RequestLimits};
use crate::api::metrics::HttpMetrics;
use crate::api::origin::Origins;
use crate::api::run_logs::LogFolder;
use crate::api::server::{self, HttpService, Services, StopHandle};
use crate::config::Config;
use crate::datasets::limits::Limits;
use crate::datasets::{DatasetService, Trial};
use crate::loras::LoraService;
use crate::models::ModelCatalog;
use crate::plugin_host::{PluginFolders, PluginHost};
use crate::preparation::PreparationService;
use crate::runs::{
    self, CacheFolder, Room, RunService, Supervisor, WorkerCommand, WorkerEnd, WorkerParts,
};
use crate::selfcheck::Remembered;
use crate::store::{Store, Swept};
use crate::webhooks::{SendSettings, Sender, WebhookService};

/// How often blobs that no row names are removed, after the first time at the start.
const SWEEP_PERIOD: Duration = Duration::from_secs(24 * 60 * 60);
/// How long the log of webhooks' messages goes back.
const DELIVERIES_KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// How long a blob stays without a row. An upload, a worker's report and a run that is being made take far less.
const NAMELESS: Duration = Duration::from_secs(60 * 60);

/// A service on a thread of its own; for the demo and for tests.
pub struct Service {
    address: SocketAddr,
    handle: StopHandle,
    thread: JoinHandle<Result<()>>,
}

impl Service {
    /// Starts a service and returns once it answers.
    ///
    /// # Errors
    /// When the address is taken, or the data folder or the database cannot be used.
    pub fn start_in_background(config: Config) -> Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("service".to_owned())
            .spawn(move || {
                server::block_on(run(config, move |address, handle| {
                    // Nobody waits any more when the starting thread has gone.
                    let _ = sender.send((address, handle));
                }))
            })?;
        match receiver.recv() {
            Ok((address, handle)) => Ok(Self {
                address,
                handle,
                thread,
            }),
            Err(_) => match thread.join() {
                Ok(Ok(())) => Err(anyhow!("the service has ended before it was ready")),
                Ok(Err(error)) => Err(error),
                Err(_) => Err(anyhow!("the service has panicked at its start")),
            },
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends the service, its workers included.
    ///
    /// # Errors
    /// When it has failed meanwhile.
    pub fn stop(self) -> Result<()> {
        self.handle.stop();
        self.thread
            .join()
            .map_err(|_| anyhow!("the service has panicked"))?
    }
}

/// Serves until a signal comes.
///
/// # Errors
/// When the address is taken, or the data folder or the database cannot be used.
pub fn serve(config: Config) -> Result<()> {
    allow_many_files();
    server::block_on(run(config, |address, _| {
        println!(
            "lorasmith listens on http://{address} (API documentation at http://{address}/docs)"
        );
    }))
}

/// Lets the process open as many files as the system allows: every stream of events is one, and shells allow 1024.
#[cfg(unix)]
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::info!(%error, allowed = ?limit.current, "the limit of open files stays as it is");
    }
}

#[cfg(not(unix))]
fn allow_many_files() {}

/// The whole life of a service.
async fn run(config: Config, ready: impl FnOnce(SocketAddr, StopHandle)) -> Result<()> {
    let config = with_absolute_paths(config)?;
    let _alone = OneServer::begin(&config.data_dir)?;
    let store = open_store(&config).await?;
    let access = open_access(&config, &store).await?;
    store.blobs().clear_scratch()?;
    store.reopen_uploads().await?;
    let models = model_catalog(&config);
    models.clear_uploads();
    let plugins = Arc::new(find_plugins(&config));
    for plugin in plugins.plugins() {
        if let Some(reason) = &plugin.reason {
            tracing::warn!(file = %plugin.path.display(), reason, "a plugin was refused");
        }
    }
    let wake = Arc::new(Notify::new());
    let runs = RunService::new(
        store.clone(),
        models.clone(),
        plugins.clone(),
        config.device.clone(),
        room(&config),
        wake.clone(),
    );
    let command = worker_command(&config)?;
    let uploaded = Arc::new(Notify::new());
    let preparation = PreparationService::new(store.clone(), uploaded.clone());

    let datasets = DatasetService::new(store.clone(), Limits::default())
        .trying_with(Trial {
            program: command.program.clone(),
        })
        .telling(uploaded);
    let send = Arc::new(Notify::new());
    let services = Services {
        access,
        origins: Origins {
            hosts: config.allowed_hosts.clone(),
            pages: config.cors_origins.clone(),
        },
        limits: RequestLimits::new(LimitSettings {
            requests_per_s: config.rate_limit_per_s,
            burst: config.rate_limit_burst,
            concurrent: config.max_concurrent_requests,
            streams: config.max_event_streams,
        }),
        metrics: HttpMetrics::new()?,
        logs: LogFolder(command.log_dir.clone()),
        store: store.clone(),
        datasets: datasets.clone(),
        preparation: preparation.clone(),
        models,
        runs,
        loras: LoraService::new(store.clone()),
        plugins,
        webhooks: WebhookService::new(
            store.clone(),
            config.webhook_allowed_networks.clone(),
            send.clone(),
        ),
        self_checks: Remembered::new(&config.data_dir),
    };
    let http = HttpService::listen(config.bind, config.http_workers, services)
        .with_context(|| format!("listening on {}", config.bind))?;
    let supervisor = Supervisor::start(store.clone(), command, wake);
    let measurer = tokio::spawn(preparation.measure_in_background());
    let sender = tokio::spawn(message_sender(&config, &store, send).run());
    let extendable = Duration::from_secs(config.extendable_days.saturating_mul(24 * 60 * 60));
    let sweeper = tokio::spawn(sweep(store, datasets, extendable));
    ready(http.address(), http.stop_handle());
    let ended = http.run().await;
    sweeper.abort();
    measurer.abort();
    supervisor.stop().await;
    sender.abort(); // the last events of workers had their chance; what is left is sent after the next start
    Ok(ended?)
}

/// Keys are needed as soon as there is one, and an address that others can reach needs one.
async fn open_access(config: &Config, store: &Store) -> Result<Access> {
    let configured = config.api_key.as_deref().filter(|key| !key.is_empty());
    let there_are_keys = configured.is_some() || store.count_active_api_keys().await? > 0;
    let reachable = !config.bind.ip().is_loopback();
    if (reachable || config.require_key) && !there_are_keys {
        let why = if reachable {
            format!("`bind` is {}, which others can reach", config.bind)
        } else {
            "`require_key` is set".to_owned()
        };
        bail!(
            "{why}, and there is no API key: make one with `lorasmith keys create --name NAME --scope admin --data-dir {}`, \
             set `api_key` (LORASMITH_API_KEY), or bind to 127.0.0.1",
            config.data_dir.display()
        );
    }
    tracing::info!(keys_needed = there_are_keys, "who may call");
    Ok(Access::new(store.clone(), configured, there_are_keys))
}

fn message_sender(config: &Config, store: &Store, wake: Arc<Notify>) -> Sender {
    let settings = SendSettings {
        allowed: config.webhook_allowed_networks.clone(),
        first_pause: Duration::from_secs_f64(config.webhook_retry_s),
        give_up_after: Duration::from_secs(config.webhook_give_up_s),
    };
    Sender::new(store.clone(), settings, wake)
}

/// Removes what deleted datasets, images and ended runs have left, in the background.
async fn sweep(store: Store, datasets: DatasetService, extendable: Duration) {
    let mut period = tokio::time::interval(SWEEP_PERIOD);
    loop {
        period.tick().await; // the first one is now
        if let Err(error) = store.forget_deliveries(DELIVERIES_KEPT).await {
            tracing::error!(%error, "forgetting messages that were sent long ago");
        }
        if let Err(error) = datasets.sweep_uploads().await {
            tracing::error!(%error, "removing uploads that were given up");
        }
        if let Err(error) = store.forget_picture_measures().await {
            tracing::error!(%error, "forgetting measures of pictures that are gone");
        }
        match store.sweep_blobs(NAMELESS).await {
            Ok(Swept { blobs: 0, .. }) => {}
            Ok(Swept { blobs, size_bytes }) => {
                tracing::info!(blobs, size_bytes, "removed blobs that no row names");
            }
            Err(error) => tracing::error!(%error, "removing blobs that no row names"),
        }
        if let Err(error) = crate::runs::sweep_folders(&store, extendable).await {
            tracing::error!(%error, "removing the folders of ended runs");
        }
    }
}

/// The right to be the only server of a data folder; it ends with the process.
struct OneServer {
    _lock: File,
}

impl OneServer {
    fn begin(data_dir: &Path) -> Result<Self> {
        let path = data_dir.join("server.lock");
        let mut options = File::options();
        let opened = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let lock = opened.with_context(|| format!("opening {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                // The pid is in a file of its own: some systems let nobody read a locked one.
                let pid = std::fs::read_to_string(path.with_extension("pid")).unwrap_or_default();
                bail!(
                    "another server (process {}) already uses the data folder {}: stop it, or choose another folder \
                     with --data-dir",
                    pid.trim(),
                    data_dir.display()
                );
            }
            Err(TryLockError::Error(error)) => {
                tracing::warn!(%error, "the data folder cannot be locked: take care that it has one server only");
            }
        }
        let pid = std::process::id().to_string();
        std::fs::write(path.with_extension("pid"), pid)
            .with_context(|| format!("writing to {}", data_dir.display()))?;
        Ok(Self { _lock: lock })
    }
}

/// Trains one run in this process.
///
/// # Errors
/// When the data folder or the database cannot be used.
pub fn work(config: Config, run: Uuid) -> Result<WorkerEnd> {
    let config = with_absolute_paths(config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1) // the cores are for training
        .enable_all()
        .build()?;
    let store = runtime.block_on(open_store(&config))?;
    let parts = WorkerParts {
        store,
        models: model_catalog(&config),
        plugins: find_plugins(&config),
        self_checks: Remembered::new(&config.data_dir),
        force_devices: config.force_devices,
        room: room(&config),
        cache: (config.cache_max_bytes > 0).then(|| CacheFolder {
            path: config.data_dir.join("cache"),
            max_bytes: config.cache_max_bytes,
        }),
    };
    let end = crate::runs::work(&runtime, &parts, run)?;
    runtime.shutdown_background(); // the thread that reads standard input never ends by itself
    Ok(end)
}

/// Base models, with their digests remembered for the service and its workers alike.
fn model_catalog(config: &Config) -> ModelCatalog {
    ModelCatalog::new(&config.models_dir)
        .remembering_in(config.data_dir.join("digests"))
        .keeping_in(config.data_dir.join("models"))
}

/// The plugins of the configured folders and of the program's own.
pub fn find_plugins(config: &Config) -> PluginHost {
    PluginHost::discover(&PluginFolders {
        folders: config.plugin_dirs.clone(),
        allowed_sha256: config.plugin_sha256.clone(),
    })
}

/// Rows and blobs of the settings, for commands that need no service.
///
/// # Errors
/// When the data folder or the database cannot be used.
pub async fn open_own_store(config: Config) -> Result<Store> {
    open_store(&with_absolute_paths(config)?).await
}

async fn open_store(config: &Config) -> Result<Store> {
    Store::open(&config.database_url(), &config.data_dir)
        .await
        .with_context(|| format!("opening the data folder {}", config.data_dir.display()))
}

/// Workers may be started elsewhere, so that relative paths would mean something else to them.
fn with_absolute_paths(config: Config) -> Result<Config> {
    let absolute = |path: &Path| {
        std::path::absolute(path).with_context(|| format!("the folder {}", path.display()))
    };
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("making the data folder {}", config.data_dir.display()))?;
    Ok(Config {
        data_dir: absolute(&config.data_dir)?,
        models_dir: absolute(&config.models_dir)?,
        plugin_dirs: config
            .plugin_dirs
            .iter()
            .map(|path| absolute(path))
            .collect::<Result<_>>()?,
        ..config
    })
}

/// A worker is this program again; it gets the settings it needs by its environment, and no secrets of the API.
fn worker_command(config: &Config) -> Result<WorkerCommand> {
    let mut environment = vec![
        setting("DATA_DIR", &text(&config.data_dir)?),
        setting("MODELS_DIR", &text(&config.models_dir)?),
        setting("DEVICE", &config.device),
        setting("FORCE_DEVICES", &config.force_devices.to_string()),
        setting("BIND", "127.0.0.1:0"), // it listens nowhere
        setting("DATABASE_URL", &config.database_url()),
        setting("CACHE_MAX_BYTES", &config.cache_max_bytes.to_string()),
        setting(
            "MAX_CONCURRENT_RUNS",
            &config.max_concurrent_runs.to_string(),
        ),
        setting(
            "MAX_RUNS_PER_DEVICE",
            &config.max_runs_per_device.to_string(),
        ),
    ];
    let folders: Vec<String> = config
        .plugin_dirs
        .iter()
        .map(|path| text(path))
        .collect::<Result<_>>()?;
    environment.push(setting("PLUGIN_DIRS", &serde_json::to_string(&folders)?));
    if let Some(digests) = &config.plugin_sha256 {
        environment.push(setting("PLUGIN_SHA256", &serde_json::to_string(digests)?));
    }
    Ok(WorkerCommand {
        program: worker_program()?,
        arguments: Vec::new(),
        environment,
        removed: vec!["LORASMITH_API_KEY".to_owned()],
        log_dir: config.data_dir.join("logs"),
        room: room(config),
        farewell: Duration::from_secs(config.shutdown_grace_s),
    })
}

/// How many runs may train at the same time.
fn room(config: &Config) -> Room {
    runs::room(config.max_concurrent_runs, config.max_runs_per_device)
}

fn setting(name: &str, value: &str) -> (String, String) {
    (format!("LORASMITH_{name}"), value.to_owned())
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str();
    text.map(str::to_owned)
        .with_context(|| format!("the folder {} has a name that is not UTF-8", path.display()))
}

/// This program; a test binary stands beside the program, one folder below.
fn worker_program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program's file")?;
    let name = format!("lorasmith{}", std::env::consts::EXE_SUFFIX);
    if own.file_name().is_some_and(|own| own == name.as_str()) {
        return Ok(own);
    }
    let beside = own
        .parent()
        .and_then(Path::parent)
        .map(|folder| folder.join(&name));
    beside
        .filter(|program| program.is_file())
        .with_context(|| format!("`{name}` is not beside {}", own.display()))
}
