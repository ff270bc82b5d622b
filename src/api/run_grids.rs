//! `/v1/runs/{run_id}/grids`: checkpoint × prompt × strength as one picture, drawn by a worker when the queue allows.

use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, get, post, route};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::auth;
use super::codes::Code;
use super::download::{self, Download};
use super::extract::{Json, Query};
use super::idempotency::{self, Created};
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{Problem, ProblemBody};
use super::run_outputs::Prompt;
use super::run_resource::{RunFailure, RunState};
use crate::runs::{GridRequest, GridSpec, RunError, RunService};
use crate::store::Store;
use crate::store::runs as rows;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(create_grid)
        .service(list_grids)
        .service(get_grid)
        .service(cancel_grid)
        .service(get_grid_content);
}

/// What to draw; an empty list stands for all that the run has.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(example = json!({
    "lora_ids": ["019a9c20-1111-7c30-a4b2-3d1f2f6f0a11"], "strengths": [0.6, 1.0],
    "prompts": [{"prompt": "lumo on the beach", "seed": 1}]
}))]
pub struct CreateGrid {
    /// LoRA files of the run, in the order of the rows; all of them when empty.
    #[schema(max_items = 200)]
    pub lora_ids: Vec<Uuid>,
    /// Prompts with their seeds, each a block of rows; those of the run's samples when empty.
    #[schema(max_items = 64)]
    pub prompts: Vec<Prompt>,
    /// Factors on the LoRA, in the order of the columns: 0 draws the base model; 1 alone when empty.
    #[schema(max_items = 200)]
    pub strengths: Vec<f64>,
}

impl From<CreateGrid> for GridRequest {
    fn from(wire: CreateGrid) -> Self {
        Self {
            lora_ids: wire.lora_ids,
            prompts: wire.prompts.into_iter().map(Into::into).collect(),
            strengths: wire.strengths,
        }
    }
}

/// A grid of pictures.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c21-6a00-7c30-a4b2-3d1f2f6f0a11", "run_id": "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11", "state": "running",
    "pictures_done": 3, "pictures": 8, "lora_ids": ["019a9c20-1111-7c30-a4b2-3d1f2f6f0a11"], "strengths": [0.6, 1.0],
    "prompts": [{"prompt": "lumo on the beach", "seed": 1}], "image": null, "error": null,
    "created_at": "2026-11-25T06:42:00Z", "finished_at": null
}))]
pub struct Grid {
    pub id: Uuid,
    pub run_id: Uuid,
    /// As of a run: it waits as `queued` for its turn, is drawn in `running`, and ends as `succeeded`, `failed` or
    /// `cancelled`.
    pub state: RunState,
    /// Pictures that are drawn.
    pub pictures_done: u64,
    /// Pictures of the whole grid.
    pub pictures: u64,
    /// The rows of each block.
    pub lora_ids: Vec<Uuid>,
    /// The blocks.
    pub prompts: Vec<Prompt>,
    /// The columns.
    pub strengths: Vec<f64>,
    /// The picture, once the grid has succeeded; its content is at `/content`.
    pub image: Option<GridImage>,
    /// Why it failed.
    pub error: Option<RunFailure>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    pub finished_at: Option<OffsetDateTime>,
}

/// The picture of a grid, a PNG.
#[derive(Serialize, ToSchema)]
pub struct GridImage {
    pub width_px: u32,
    pub height_px: u32,
    pub size_bytes: u64,
    pub sha256: String,
}

impl Grid {
    async fn of(store: &Store, row: rows::Run) -> Result<Self, Problem> {
        let spec: GridSpec = serde_json::from_str(&row.spec).map_err(Problem::internal)?;
        let image = picture(store, &row).await?;
        Ok(Self {
            id: row.id,
            run_id: row.grid_of.unwrap_or_default(),
            state: row.state.into(),
            pictures_done: row.step,
            pictures: spec.cells() as u64,
            lora_ids: spec.loras.iter().map(|lora| lora.id).collect(),
            prompts: spec.prompts.into_iter().map(Into::into).collect(),
            strengths: spec.strengths,
            image: image.map(|image| GridImage {
                width_px: image.width_px,
                height_px: image.height_px,
                size_bytes: image.size_bytes,
                sha256: image.sha256,
            }),
            error: row.error_code.map(|code| RunFailure {
                code,
                message: row.error_message.unwrap_or_default(),
            }),
            created_at: row.created_at,
            finished_at: row.finished_at,
        })
    }
}

async fn picture(store: &Store, row: &rows::Run) -> Result<Option<rows::Sample>, Problem> {
    if row.state != rows::RunState::Succeeded {
        return Ok(None);
    }
    let found = store.samples(row.id, None, 1).await;
    Ok(found.map_err(RunError::from)?.into_iter().next())
}

/// Draw a grid.
///
/// One labelled picture of checkpoint × prompt × strength: LoRA files of a run, each with the same noise. It waits in
/// the queue of the runs, with the priority of its run, and is drawn by a process of its own on the run's device: ask for
/// it until it has ended.
#[utoipa::path(
    tag = "runs",
    params(
        ("run_id" = Uuid, Path),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt"),
    ),
    request_body = CreateGrid,
    responses(
        (status = 202, description = "The grid, queued", body = Grid, headers(("Location" = String))),
        (status = 400, description = "`invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_settings`: an unknown LoRA file, a strength beyond ±4, more than 200 pictures or too many pixels; `invalid_body`, `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/grids")]
pub async fn create_grid(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    body: Json<CreateGrid>,
) -> Result<HttpResponse, Problem> {
    let payload = body.into_inner();
    let (run, asked) = (id.into_inner(), GridRequest::from(payload.clone()));
    let rows = store.clone();
    let key = auth::key_of(&request);
    let make = async move {
        let row = runs.draw_grid(run, asked, key).await?;
        let location = format!("/v1/runs/{run}/grids/{}", row.id);
        let grid = Grid::of(&rows, row).await?;
        Ok(Created {
            status: actix_web::http::StatusCode::ACCEPTED,
            ..Created::new(location, &grid)?
        })
    };
    let scope = format!("POST /v1/runs/{run}/grids");
    idempotency::once(&store, &request, &scope, &payload, make).await
}

/// List the grids of a run.
///
/// In the order in which they were asked for.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), PageQuery),
    responses(
        (status = 200, description = "A page of grids", body = Page<Grid>),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/grids")]
pub async fn list_grids(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    query: Query<PageQuery>,
) -> Result<web::Json<Page<Grid>>, Problem> {
    let page = PageRequest::try_from(query.into_inner())?;
    let found = runs
        .grids(id.into_inner(), page.after_id()?, page.rows())
        .await?;
    let mut grids = Vec::with_capacity(found.len());
    for row in found {
        grids.push(Grid::of(&store, row).await?);
    }
    Ok(web::Json(page.page(
        grids,
        |grid| grid.id.to_string(),
        |grid| grid,
    )))
}

/// Read a grid.
///
/// Its state, and how many of its pictures are drawn.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), ("grid_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The grid", body = Grid),
        (status = 404, description = "`run_not_found`, `grid_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/grids/{grid_id}")]
pub async fn get_grid(
    runs: Data<RunService>,
    store: Data<Store>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<web::Json<Grid>, Problem> {
    let (run, id) = path.into_inner();
    let row = runs.grid(run, id).await?;
    Ok(web::Json(Grid::of(&store, row).await?))
}

/// Cancel a grid.
///
/// A waiting one ends at once, one that is drawn after the current picture. Asking again changes nothing.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), ("grid_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The grid, `cancelled` or `cancelling`", body = Grid),
        (status = 404, description = "`run_not_found`, `grid_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`illegal_transition`: it has succeeded or failed", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/runs/{run_id}/grids/{grid_id}/cancel")]
pub async fn cancel_grid(
    runs: Data<RunService>,
    store: Data<Store>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<web::Json<Grid>, Problem> {
    let (run, id) = path.into_inner();
    let row = runs.cancel_grid(run, id).await?;
    Ok(web::Json(Grid::of(&store, row).await?))
}

/// Download the picture of a grid.
///
/// A PNG with a block for each prompt, in it a row for each LoRA file and a column for each strength.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), ("grid_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The picture", body = Vec<u8>, content_type = "image/png"),
        (status = 404, description = "`run_not_found`, `grid_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`grid_not_ready`: it has not succeeded", body = ProblemBody, content_type = "application/problem+json"),
        (status = 416, description = "`range_not_satisfiable`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[route(
    "/runs/{run_id}/grids/{grid_id}/content",
    method = "GET",
    method = "HEAD"
)]
pub async fn get_grid_content(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    path: web::Path<(Uuid, Uuid)>,
) -> Result<HttpResponse, Problem> {
    let (run, id) = path.into_inner();
    let row = runs.grid(run, id).await?;
    let Some(image) = picture(&store, &row).await? else {
        let found = row.state.as_str();
        let detail = format!("the grid is {found}, expected succeeded");
        return Err(Problem::new(Code::GridNotReady, detail));
    };
    let file = Download {
        path: &store.blobs().path(&image.sha256),
        sha256: &image.sha256,
        media_type: "image/png",
        file_name: &format!("grid-{id}.png"),
        inline: true,
    };
    download::serve(&request, file).await
}
