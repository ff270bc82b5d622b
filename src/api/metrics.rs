//! `/metrics`: requests, runs and messages in the text format of Prometheus.

use std::time::Instant;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header;
use actix_web::middleware::Next;
use actix_web::web::{self, Data};
use actix_web::{Error, HttpResponse, get};
use prometheus::{
    Encoder as _, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry,
    TEXT_FORMAT, TextEncoder,
};
use utoipa_actix_web::service_config::ServiceConfig;

use super::problem::Problem;
use crate::runs::state;
use crate::store::Store;
use crate::store::runs::{Run, RunState};

/// Upper ends of the histogram of answers' times, in seconds.
const TIMES_S: [f64; 11] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0,
];

/// The routes of this file, outside of `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(get_metrics);
}

/// What is counted as it happens. Cloning is cheap, and shares it.
#[derive(Clone)]
pub struct HttpMetrics {
    registry: Registry,
    requests: IntCounterVec,
    times: HistogramVec,
}

impl HttpMetrics {
    /// Nothing counted yet.
    ///
    /// # Errors
    /// When two metrics had the same name.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let labels = ["method", "route", "status"];
        let requests = Opts::new(
            "lorasmith_http_requests_total",
            "Requests that were answered.",
        );
        let requests = IntCounterVec::new(requests, &labels)?;
        let times = HistogramOpts::new(
            "lorasmith_http_request_duration_seconds",
            "Time to the head of the answer.",
        );
        let times = HistogramVec::new(times.buckets(TIMES_S.to_vec()), &labels[..2])?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(times.clone()))?;
        Ok(Self {
            registry,
            requests,
            times,
        })
    }
}

/// Counts requests and their time.
///
/// # Errors
/// Those of the service further in.
pub async fn count<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<B>, Error> {
    let began = Instant::now();
    let metrics = request.app_data::<Data<HttpMetrics>>().cloned();
    let method = request.method().clone();
    let response = next.call(request).await?;
    if let Some(metrics) = metrics {
        // Templates, not paths: ids would make a series each. Unknown methods are counted as one.
        let route = response.request().match_pattern();
        let route = route.as_deref().unwrap_or("none");
        let method = match method.as_str() {
            known @ ("GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS") => known,
            _ => "other",
        };
        let status = response.status();
        let labels = [method, route, status.as_str()];
        metrics.requests.with_label_values(&labels).inc();
        let times = metrics.times.with_label_values(&labels[..2]);
        times.observe(began.elapsed().as_secs_f64());
    }
    Ok(response)
}

/// Read the service's metrics.
///
/// In the text format of Prometheus: answers and their times by route, runs by state, the queue, step, loss, speed and
/// memory of runs that train, messages to webhooks, memory of the service.
#[utoipa::path(
    tag = "operations",
    responses((
        status = 200, description = "The metrics", content_type = "text/plain", body = String,
        example = json!("# TYPE lorasmith_runs gauge\nlorasmith_runs{state=\"running\"} 1\n"),
    )),
)]
#[get("/metrics")]
pub async fn get_metrics(
    metrics: Data<HttpMetrics>,
    store: Data<Store>,
) -> Result<HttpResponse, Problem> {
    let mut families = metrics.registry.gather();
    families.extend(of_runs(&store).await?.gather());
    let mut text = Vec::new();
    TextEncoder::new()
        .encode(&families, &mut text)
        .map_err(Problem::internal)?;
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, TEXT_FORMAT))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .body(web::Bytes::from(text)))
}

/// What the rows say now.
async fn of_runs(store: &Store) -> Result<Registry, Problem> {
    let by_state = store.count_runs_by_state().await;
    let by_state = by_state.map_err(Problem::internal)?;
    let deliveries = store.count_deliveries_by_state().await;
    let deliveries = deliveries.map_err(Problem::internal)?;
    let active = store.runs_in(&state::HELD).await;
    let mut active = active.map_err(Problem::internal)?;
    active.retain(Run::trains);
    gauges(&by_state, &deliveries, &active).map_err(Problem::internal)
}

fn gauges(
    by_state: &[(String, i64)],
    deliveries: &[(String, i64)],
    active: &[Run],
) -> Result<Registry, prometheus::Error> {
    let registry = Registry::new();
    let counted = |list: &[(String, i64)], word: &str| -> f64 {
        let found = list.iter().find(|(state, _)| state == word);
        found.map_or(0, |(_, count)| *count) as f64
    };
    let runs = gauge_vec(&registry, "lorasmith_runs", "Runs by state.", "state")?;
    for state in RunState::ALL {
        let word = state.as_str();
        runs.with_label_values(&[word]).set(counted(by_state, word));
    }
    let queue = gauge(
        &registry,
        "lorasmith_queue_length",
        "Runs that wait for a worker.",
    )?;
    queue.set(counted(by_state, RunState::Queued.as_str()));
    let help = "Messages to webhooks by state; those that were sent are forgotten after a while.";
    let messages = gauge_vec(&registry, "lorasmith_webhook_deliveries", help, "state")?;
    for word in ["pending", "delivered", "failed"] {
        let count = counted(deliveries, word);
        messages.with_label_values(&[word]).set(count);
    }
    if let Some(memory) = crate::runs::memory::own_bytes() {
        let help = "Memory of the service that is in RAM.";
        gauge(&registry, "process_resident_memory_bytes", help)?.set(memory as f64);
    }
    type Value = fn(&Run) -> Option<f64>;
    let of_run: [(&str, &str, Value); 5] = [
        ("lorasmith_run_step", "Optimizer steps done.", |run| {
            Some(run.step as f64)
        }),
        (
            "lorasmith_run_loss",
            "Mean loss of the last epoch.",
            |run| run.loss_average,
        ),
        (
            "lorasmith_run_steps_per_second",
            "Speed of training.",
            |run| run.steps_per_s,
        ),
        (
            "lorasmith_run_eta_seconds",
            "Expected time to the end.",
            |run| run.eta_s,
        ),
        (
            "lorasmith_run_memory_bytes",
            "Memory of the worker's process.",
            |run| run.memory_bytes.map(|bytes| bytes as f64),
        ),
    ];
    for (name, help, value) in of_run {
        let series = gauge_vec(&registry, name, help, "run_id")?;
        for run in active {
            if let Some(value) = value(run) {
                series.with_label_values(&[&run.id.to_string()]).set(value);
            }
        }
    }
    Ok(registry)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
    let gauge = Gauge::new(name, help)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

fn gauge_vec(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
) -> Result<GaugeVec, prometheus::Error> {
    let gauges = GaugeVec::new(Opts::new(name, help), &[label])?;
    registry.register(Box::new(gauges.clone()))?;
    Ok(gauges)
}
