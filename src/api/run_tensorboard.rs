//! `/v1/runs/{run_id}/tensorboard`: the series and previews of a run as an event file of TensorBoard.

use actix_web::http::header::{self, ContentDisposition, DispositionParam, DispositionType};
use actix_web::web::{self, Bytes, Data};
use actix_web::{HttpResponse, get};
use futures_util::stream;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::extract::Query;
use super::problem::{Problem, ProblemBody};
use crate::runs::{RunService, tensorboard};
use crate::store::runs::{Metric, Run};
use crate::store::{Store, StoreError};

/// Steps that are read at once.
const STEPS_AT_ONCE: u64 = 2000;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(get_run_tensorboard);
}

/// Which steps of a run.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct TensorboardQuery {
    /// Only steps that this number divides, and those with a validation loss.
    #[param(minimum = 1)]
    every: Option<u64>,
    /// Also the preview pictures.
    #[serde(default)]
    #[param(default = false)]
    pictures: bool,
}

/// Download a run for TensorBoard.
///
/// An event file with the series of the run so far, and with `?pictures=true` its previews: put it into a folder of the
/// run's name and start `tensorboard --logdir` on the folder above. A file of a run that goes on replaces the one before.
/// Times are those of training, without the time between workers.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), TensorboardQuery),
    responses(
        (status = 200, description = "The event file", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/tensorboard")]
pub async fn get_run_tensorboard(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    query: Query<TensorboardQuery>,
) -> Result<HttpResponse, Problem> {
    let TensorboardQuery { every, pictures } = query.into_inner();
    if every == Some(0) {
        let message = "found 0, expected 1 or more";
        let code = "out_of_range";
        return Err(Problem::field(Code::InvalidQuery, "/every", code, message));
    }
    let run = runs.get(id.into_inner()).await?;
    let began = run.started_at.unwrap_or(run.created_at).unix_timestamp();
    let name = format!("events.out.tfevents.{began}.{}", run.id);
    let file = EventFile {
        store: store.get_ref().clone(),
        every,
        time_s: began as f64,
        step: 0,
        at: if pictures {
            Place::Head
        } else {
            Place::HeadOfSeries
        },
        run,
    };
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "application/octet-stream"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(ContentDisposition {
            disposition: DispositionType::Attachment,
            parameters: vec![DispositionParam::Filename(name)],
        })
        .streaming(stream::try_unfold(file, EventFile::next)))
}

/// An event file that is written as it is read: memory stays flat, whatever the run's length.
struct EventFile {
    store: Store,
    run: Run,
    every: Option<u64>,
    /// Time of the last step.
    time_s: f64,
    /// The last step.
    step: u64,
    at: Place,
}

/// What comes next.
#[derive(Clone, Copy)]
enum Place {
    /// The head, before series and pictures.
    Head,
    /// The head, before the series alone.
    HeadOfSeries,
    /// Steps after one, then pictures if they are wanted.
    Series { after: Option<u64>, pictures: bool },
    /// Pictures after one.
    Pictures(Option<Uuid>),
    /// Nothing.
    End,
}

impl EventFile {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, StoreError> {
        let part = match self.at {
            Place::Head | Place::HeadOfSeries => {
                let pictures = matches!(self.at, Place::Head);
                self.at = Place::Series {
                    after: None,
                    pictures,
                };
                tensorboard::head(self.time_s)
            }
            Place::Series { after, pictures } => self.series(after, pictures).await?,
            Place::Pictures(after) => self.picture(after).await?,
            Place::End => return Ok(None),
        };
        Ok(Some((part.into(), self)))
    }

    async fn series(&mut self, after: Option<u64>, pictures: bool) -> Result<Vec<u8>, StoreError> {
        let (run, every) = (self.run.id, self.every);
        let found = self.store.metrics(run, after, every, STEPS_AT_ONCE).await?;
        self.at = match found.last() {
            Some(last) => Place::Series {
                after: Some(last.step),
                pictures,
            },
            None if pictures => Place::Pictures(None),
            None => Place::End,
        };
        let mut part = Vec::new();
        for metric in &found {
            self.time_s += self.time_since(metric);
            self.step = metric.step;
            part.extend(tensorboard::scalars(self.time_s, metric));
        }
        Ok(part)
    }

    /// Steps that were left out are taken to be as long as this one.
    fn time_since(&self, metric: &Metric) -> f64 {
        let steps = metric.step.saturating_sub(self.step) as f64;
        steps * metric.step_time_s.unwrap_or(0.0)
    }

    async fn picture(&mut self, after: Option<Uuid>) -> Result<Vec<u8>, StoreError> {
        let found = self.store.samples(self.run.id, after, 1).await?;
        let Some(sample) = found.first() else {
            self.at = Place::End;
            return Ok(Vec::new());
        };
        self.at = Place::Pictures(Some(sample.id));
        let path = self.store.blobs().path(&sample.sha256);
        match tokio::fs::read(&path).await {
            Ok(png) => {
                let time_s = sample.created_at.unix_timestamp() as f64;
                Ok(tensorboard::picture(time_s, sample, &png))
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a preview is left out");
                Ok(Vec::new())
            }
        }
    }
}
