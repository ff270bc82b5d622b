//! The REST API: the only module that knows HTTP. One file per resource; the rules are in `openapi/CONVENTIONS.md`.

pub mod auth;
mod caption_operations;
mod captioners;
mod captioning;
mod captioning_jobs;
mod captioning_results;
mod captioning_settings;
pub mod captions;
pub mod codes;
mod colors;
mod cors;
pub mod datasets;
pub mod decode;
pub mod download;
pub mod event_feed;
mod events;
pub mod extract;
mod framing;
pub mod idempotency;
pub mod image_masks;
mod images;
pub mod limits;
mod lora_tools;
pub mod loras;
pub mod metrics;
pub mod middleware;
mod model_intake;
pub mod models;
pub mod multipart;
pub mod openapi;
pub mod openapi30;
mod openapi_links;
mod openapi_schemas;
mod openapi_shared;
pub mod operations;
pub mod origin;
pub mod page;
pub mod patch;
pub mod plugins;
mod previews;
pub mod problem;
mod reports;
pub mod run_actions;
pub mod run_dataset;
mod run_export;
pub mod run_grids;
mod run_judging;
pub mod run_logs;
mod run_metrics;
mod run_network;
mod run_objective;
mod run_outputs;
mod run_plan;
pub mod run_provenance;
mod run_resource;
mod run_samples;
pub mod run_settings;
pub mod run_tensorboard;
mod run_training;
pub mod runs;
pub mod server;
pub mod tagged;
mod twins;
mod upload_parts;
mod uploads;
mod vaes;
pub mod webhooks;

use actix_cors::Cors;
use actix_web::body::MessageBody;
use actix_web::dev::{ServiceFactory, ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderValue};
use actix_web::middleware::from_fn;
use actix_web::{App, Error, HttpRequest, HttpResponse, web};
use tracing_actix_web::TracingLogger;
use utoipa_actix_web::scope;
use utoipa_actix_web::service_config::ServiceConfig;
use utoipa_swagger_ui::SwaggerUi;

pub use codes::Code;
pub use extract::{Json, Query};
pub use openapi::openapi;
pub use openapi30::openapi30;
pub use page::{Page, PageQuery, PageRequest};
pub use patch::{MergePatch, check_if_match, etag};
pub use problem::{FieldError, Problem, ProblemBody};

use middleware::RequestSpan;
use openapi::RouteTable;
use openapi30::Document30;

/// Every route of the API. A resource adds its own in its file.
pub fn configure(config: &mut ServiceConfig<'_>) {
    config.configure(operations::routes);
    config.configure(metrics::routes);
    config.service(scope::scope("/v1").configure(|config| {
        config
            .configure(models::routes)
            .configure(vaes::routes)
            .configure(captioners::routes)
            .configure(datasets::routes)
            .configure(captioning_jobs::routes)
            .configure(captioning_results::routes)
            .configure(images::routes)
            .configure(image_masks::routes)
            .configure(captions::routes)
            .configure(uploads::routes)
            .configure(upload_parts::routes)
            .configure(previews::routes)
            .configure(reports::routes)
            .configure(runs::routes)
            .configure(run_metrics::routes)
            .configure(run_samples::routes)
            .configure(run_plan::routes)
            .configure(run_actions::routes)
            .configure(run_provenance::routes)
            .configure(run_dataset::routes)
            .configure(run_grids::routes)
            .configure(events::routes)
            .configure(run_logs::routes)
            .configure(run_tensorboard::routes)
            .configure(loras::routes)
            .configure(lora_tools::routes)
            .configure(plugins::routes)
            .configure(webhooks::routes)
            .configure(operations::v1_routes);
    }));
}

/// The whole application: routes, documentation, errors, request ids, keys.
///
/// `services` registers what the handlers want as [`web::Data`]: `Store`, `DatasetService` and their like; and `Access`
/// and `Origins`, without which nothing is answered. `cors` is of [`cors::cors`].
pub fn app(
    cors: Cors,
    services: impl FnOnce(&mut web::ServiceConfig),
) -> App<
    impl ServiceFactory<
        ServiceRequest,
        Config = (),
        Response = ServiceResponse<impl MessageBody>,
        Error = Error,
        InitError = (),
    >,
> {
    let document = openapi();
    App::new()
        .configure(services)
        .app_data(extract::path_config())
        .app_data(web::Data::new(RouteTable::new(&document)))
        .app_data(web::Data::new(Document30::new()))
        .configure(|config| configure(&mut ServiceConfig::new(config)))
        .service(web::redirect("/docs", "/docs/"))
        .service(SwaggerUi::new("/docs/{_:.*}").url("/openapi.json", document))
        .route("/openapi-3.0.json", web::get().to(openapi30::get_document))
        .default_service(web::to(no_route))
        .wrap(from_fn(limits::guard))
        .wrap(from_fn(auth::guard))
        .wrap(cors)
        .wrap(from_fn(middleware::finish))
        .wrap(from_fn(metrics::count))
        .wrap(TracingLogger::<RequestSpan>::new())
}

/// 404, or 405 when the path exists with other methods.
async fn no_route(
    request: HttpRequest,
    table: web::Data<RouteTable>,
) -> Result<HttpResponse, Problem> {
    let methods: Vec<String> = table
        .methods(request.path())
        .iter()
        .map(ToString::to_string)
        .collect();
    if methods.is_empty() {
        return Err(Problem::new(
            Code::NotFound,
            format!("there is nothing at `{}`", request.path()),
        ));
    }
    let allowed = methods.join(", ");
    let detail = format!("found {}, expected {allowed}", request.method());
    let problem = Problem::new(Code::MethodNotAllowed, detail);
    match HeaderValue::from_str(&allowed) {
        Ok(allowed) => Err(problem.with_header(header::ALLOW, allowed)),
        Err(_) => Err(problem),
    }
}
