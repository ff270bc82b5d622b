//! The series of a run: loss, rates, speed and memory of each step, as JSON or as a table.

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, get};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::Query;
use super::problem::{Problem, ProblemBody};
use crate::runs::{RunError, RunService};
use crate::store::Store;
use crate::store::runs as rows;

/// The most steps that one answer has.
const MAX_METRICS: u64 = 10_000;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(list_metrics);
}

/// Which steps of a series.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct MetricQuery {
    /// Only steps after this one.
    since: Option<u64>,
    /// Only steps that this number divides, and those with a validation loss.
    #[param(minimum = 1)]
    every: Option<u64>,
}

/// One optimizer step; step 0 is the measurement before the first.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "step": 120, "epoch": 3, "loss": 0.0981, "loss_average": 0.1043, "validation_loss": null, "validation_error": null, "lr_unet": 1e-4,
    "lr_text_encoder": 5e-5, "grad_norm": 0.41, "grad_norm_unet": 0.4, "grad_norm_text_encoder": 0.09, "step_time_s": 0.52,
    "images_per_s": 3.8, "eta_s": 145.6, "memory_bytes": 4123456789u64, "device_memory_bytes": 8123456789u64
}))]
pub struct MetricPoint {
    pub step: u64,
    pub epoch: u64,
    pub loss: Option<f64>,
    /// Mean loss of the last epoch.
    pub loss_average: Option<f64>,
    /// Loss on the held-out images.
    pub validation_loss: Option<f64>,
    /// Standard error of that loss: how far it would move with other pictures.
    pub validation_error: Option<f64>,
    pub lr_unet: Option<f64>,
    pub lr_text_encoder: Option<f64>,
    /// L2 norm of all gradients before clipping.
    pub grad_norm: Option<f64>,
    /// That of the UNet's adapters alone.
    pub grad_norm_unet: Option<f64>,
    /// That of the text encoder's adapters alone.
    pub grad_norm_text_encoder: Option<f64>,
    pub step_time_s: Option<f64>,
    /// Mean over the steps so far, without caching, previews and validation.
    pub images_per_s: Option<f64>,
    /// Expected time of the remaining steps.
    pub eta_s: Option<f64>,
    /// Memory of the worker's process.
    pub memory_bytes: Option<u64>,
    /// Memory of the device that is set aside for it; `null` on the CPU, and where the device does not tell.
    pub device_memory_bytes: Option<u64>,
}

/// A series by step.
#[derive(Serialize, ToSchema)]
pub struct MetricSeries {
    pub data: Vec<MetricPoint>,
    /// Give it as `?since=` to get the rest; `null` at the end of the series.
    pub next_since: Option<u64>,
}

/// Read the series of a run.
///
/// Loss, learning rates, gradient norms, time, speed and memory of each optimizer step, at most 10 000 in one answer. With
/// `Accept: text/csv` the same as a table.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), MetricQuery),
    responses(
        (status = 200, description = "The series", content(
            (MetricSeries = "application/json"),
            (String = "text/csv", example = json!("step,epoch,loss,loss_average,validation_loss,validation_error,lr_unet,lr_text_encoder,grad_norm,grad_norm_unet,grad_norm_text_encoder,step_time_s,images_per_s,eta_s,memory_bytes,device_memory_bytes\n120,3,0.0981,0.1043,,,0.0001,0.00005,0.41,0.4,0.09,0.52,3.8,145.6,4123456789,8123456789\n")),
        )),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/metrics")]
pub async fn list_metrics(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    query: Query<MetricQuery>,
) -> Result<HttpResponse, Problem> {
    let MetricQuery { since, every } = query.into_inner();
    if every == Some(0) {
        let message = "found 0, expected 1 or more";
        return Err(Problem::field(
            Code::InvalidQuery,
            "/every",
            "out_of_range",
            message,
        ));
    }
    let run = runs.get(id.into_inner()).await?;
    let found = store.metrics(run.id, since, every, MAX_METRICS + 1).await;
    let mut data: Vec<MetricPoint> = found
        .map_err(RunError::from)?
        .into_iter()
        .map(Into::into)
        .collect();
    let more = data.len() as u64 > MAX_METRICS;
    data.truncate(MAX_METRICS as usize);
    let next_since = if more {
        data.last().map(|point| point.step)
    } else {
        None
    };
    Ok(if wants_csv(&request) {
        HttpResponse::Ok()
            .content_type("text/csv; charset=utf-8")
            .body(csv(&data))
    } else {
        HttpResponse::Ok().json(MetricSeries { data, next_since })
    })
}

impl From<rows::Metric> for MetricPoint {
    fn from(row: rows::Metric) -> Self {
        Self {
            step: row.step,
            epoch: row.epoch,
            loss: row.loss,
            loss_average: row.loss_average,
            validation_loss: row.validation_loss,
            validation_error: row.validation_error,
            lr_unet: row.lr_unet,
            lr_text_encoder: row.lr_text_encoder,
            grad_norm: row.grad_norm,
            grad_norm_unet: row.grad_norm_unet,
            grad_norm_text_encoder: row.grad_norm_text_encoder,
            step_time_s: row.step_time_s,
            images_per_s: row.images_per_s,
            eta_s: row.eta_s,
            memory_bytes: row.memory_bytes,
            device_memory_bytes: row.device_memory_bytes,
        }
    }
}

fn wants_csv(request: &HttpRequest) -> bool {
    let accept = request.headers().get(header::ACCEPT);
    accept
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with("text/csv"))
}

/// The columns of the table, in the order of the fields.
const COLUMNS: &str = "step,epoch,loss,loss_average,validation_loss,validation_error,lr_unet,lr_text_encoder,grad_norm,\
                       grad_norm_unet,grad_norm_text_encoder,step_time_s,images_per_s,eta_s,memory_bytes,\
                       device_memory_bytes\n";

fn csv(points: &[MetricPoint]) -> String {
    let mut text = COLUMNS.to_owned();
    for point in points {
        let cells = [
            point.step.to_string(),
            point.epoch.to_string(),
            cell(point.loss),
            cell(point.loss_average),
            cell(point.validation_loss),
            cell(point.validation_error),
            cell(point.lr_unet),
            cell(point.lr_text_encoder),
            cell(point.grad_norm),
            cell(point.grad_norm_unet),
            cell(point.grad_norm_text_encoder),
            cell(point.step_time_s),
            cell(point.images_per_s),
            cell(point.eta_s),
            cell(point.memory_bytes),
            cell(point.device_memory_bytes),
        ];
        text.push_str(&cells.join(","));
        text.push('\n');
    }
    text
}

/// A number, or an empty cell.
fn cell(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}
