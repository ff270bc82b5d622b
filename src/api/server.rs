//! The HTTP server around the application; what the rest of the program needs to know of actix.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use actix_web::HttpServer;
use actix_web::dev::{Server, ServerHandle};
use actix_web::web::Data;

use super::event_feed::EventFeed;
use super::limits::Limits;
use super::metrics::HttpMetrics;
use super::origin::Origins;
use super::run_logs::LogFolder;
use crate::access::Access;
use crate::datasets::DatasetService;
use crate::loras::LoraService;
use crate::models::ModelCatalog;
use crate::plugin_host::PluginHost;
use crate::preparation::PreparationService;
use crate::runs::RunService;
use crate::selfcheck::Remembered;
use crate::store::Store;
use crate::webhooks::WebhookService;

/// How long open connections have to finish when the service ends, in seconds.
const SHUTDOWN_S: u64 = 5;

/// What the handlers work with.
#[derive(Clone)]
pub struct Services {
    /// Who may call.
    pub access: Access,
    /// From where, when nobody needs a key.
    pub origins: Origins,
    /// How much at once.
    pub limits: Limits,
    /// What is counted of requests.
    pub metrics: HttpMetrics,
    /// Where workers write.
    pub logs: LogFolder,
    /// Rows and blobs.
    pub store: Store,
    /// Datasets.
    pub datasets: DatasetService,
    /// Previews and reports of datasets.
    pub preparation: PreparationService,
    /// Base models.
    pub models: ModelCatalog,
    /// Runs.
    pub runs: RunService,
    /// LoRA files.
    pub loras: LoraService,
    /// Plugins.
    pub plugins: Arc<PluginHost>,
    /// Webhooks.
    pub webhooks: WebhookService,
    /// What is known of devices.
    pub self_checks: Remembered,
}

/// A server that listens, and answers once it is awaited.
pub struct HttpService {
    address: SocketAddr,
    server: Server,
}

/// Ends a server from another thread.
#[derive(Clone)]
pub struct StopHandle(ServerHandle);

impl StopHandle {
    /// Lets open requests finish, and ends.
    pub fn stop(&self) {
        // The command goes out when the future is made; the server's own thread carries it out.
        drop(self.0.stop(true));
    }
}

impl HttpService {
    /// Listens; port 0 takes a free one. `threads` answer requests.
    ///
    /// # Errors
    /// When the address is taken.
    pub fn listen(address: SocketAddr, threads: usize, services: Services) -> io::Result<Self> {
        let feed = EventFeed::new(services.store.clone());
        let server = HttpServer::new(move || {
            let feed = feed.clone();
            let services = services.clone();
            let cors = super::cors::cors(&services.origins.pages);
            super::app(cors, move |app| {
                app.app_data(Data::new(services.access))
                    .app_data(Data::new(services.limits))
                    .app_data(Data::new(services.origins))
                    .app_data(Data::new(services.metrics))
                    .app_data(Data::new(services.logs))
                    .app_data(Data::new(services.store))
                    .app_data(Data::new(feed))
                    .app_data(Data::new(services.datasets))
                    .app_data(Data::new(services.preparation))
                    .app_data(Data::new(services.models))
                    .app_data(Data::new(services.runs))
                    .app_data(Data::new(services.loras))
                    .app_data(Data::from(services.plugins))
                    .app_data(Data::new(services.webhooks))
                    .app_data(Data::new(services.self_checks));
            })
        })
        .workers(threads)
        .shutdown_timeout(SHUTDOWN_S)
        .bind(address)?;
        let bound = server.addrs().first().copied().unwrap_or(address);
        Ok(Self {
            address: bound,
            server: server.run(),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ends it.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.server.handle())
    }

    /// Answers requests until it is stopped or a signal comes.
    ///
    /// # Errors
    /// When listening fails.
    pub async fn run(self) -> io::Result<()> {
        self.server.await
    }
}

/// Runs a future on this thread in the runtime that the server needs.
pub fn block_on<F: Future>(future: F) -> F::Output {
    actix_web::rt::System::new().block_on(future)
}
