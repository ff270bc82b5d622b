//! `/v1/loras`: LoRA files, those of runs and others.

use std::collections::HashMap;

use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, route};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;
use uuid::Uuid;

use super::codes::Code;
use super::download::{self, Download};
use super::extract::Query;
use super::page::{Page, PageQuery, PageRequest};
use super::patch::check_if_match;
use super::problem::{Problem, ProblemBody};
use crate::loras::{Checked, Origin, OriginKind};
use crate::runs::RunService;
use crate::store::loras as rows;
use crate::store::{Store, StoreError};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(list_loras)
        .service(list_checkpoints)
        .service(get_lora)
        .service(delete_lora)
        .service(get_lora_content);
}

/// A LoRA file.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "019a9c20-1111-7c30-a4b2-3d1f2f6f0a11", "run_id": "019a9c1f-0000-7c30-a4b2-3d1f2f6f0a11",
    "file_name": "lumo.safetensors", "step": 400, "epoch": 10, "final": true, "best": true,
    "validation_loss": 0.0983, "validation_error": 0.0031, "size_bytes": 9876543,
    "sha256": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
    "origin": {"kind": "trained", "sources": []},
    "self_check": {"modules": 264, "tensors": 792, "with_effect": 264, "norm_mean": 0.41, "norm_max": 1.9},
    "created_at": "2026-11-25T06:44:00Z"
}))]
pub struct Lora {
    pub id: Uuid,
    /// The run that has made it; `null` of a file that was uploaded, or made of others.
    pub run_id: Option<Uuid>,
    pub file_name: String,
    /// Optimizer steps behind it; 0 of a file that no run of this service has made.
    pub step: u64,
    /// Epoch it was saved in; 0 of a file that no run of this service has made.
    pub epoch: u64,
    /// Whether it is the run's result, not one saved on the way.
    #[serde(rename = "final")]
    pub is_final: bool,
    /// Whether no other file of its run has a lower validation loss.
    pub best: bool,
    /// Loss on the run's held-out images; `null` when it has none.
    pub validation_loss: Option<f64>,
    /// Standard error of that loss: how far it would move with other pictures.
    pub validation_error: Option<f64>,
    pub size_bytes: u64,
    /// Also its ETag.
    pub sha256: String,
    pub origin: LoraOrigin,
    /// What was seen when the file was read again after it was saved, before it was offered; `null` of files that no
    /// run has made, and of those that older versions have saved. A file that does not pass fails its run.
    pub self_check: Option<LoraSelfCheck>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// Where a LoRA file comes from.
#[derive(Serialize, ToSchema)]
pub struct LoraOrigin {
    pub kind: LoraOriginKind,
    /// What it was made of.
    pub sources: Vec<LoraSource>,
}

/// Ways in which a LoRA file comes to be.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraOriginKind {
    Trained,
    Uploaded,
    Merged,
    Resized,
    Converted,
}

/// A LoRA file that another was made of; it may be deleted.
#[derive(Serialize, ToSchema)]
pub struct LoraSource {
    pub lora_id: Uuid,
    pub file_name: String,
    pub sha256: String,
    /// How much of it was taken; `null` unless files were merged.
    pub strength: Option<f64>,
}

/// What was seen when a file was read again: every key and shape is of a layer of the base model, every number finite.
#[derive(Serialize, ToSchema)]
pub struct LoraSelfCheck {
    /// Adapters that were found in the base model.
    pub modules: u64,
    pub tensors: u64,
    /// Adapters that change something; 0 is right only before the first step.
    pub with_effect: u64,
    /// Mean of the Frobenius norms of what is added to the weights; `null` of kinds that only scale them.
    pub norm_mean: Option<f64>,
    /// The largest of them.
    pub norm_max: Option<f64>,
}

impl LoraOrigin {
    /// A text that cannot be read any more tells nothing.
    fn of(text: Option<&str>) -> Self {
        let origin = text.and_then(|text| serde_json::from_str::<Origin>(text).ok());
        let Some(origin) = origin else {
            return Self {
                kind: LoraOriginKind::Trained,
                sources: Vec::new(),
            };
        };
        let sources = origin.sources.into_iter().map(|source| LoraSource {
            lora_id: source.lora_id,
            file_name: source.file_name,
            sha256: source.sha256,
            strength: source.strength,
        });
        Self {
            kind: match origin.kind {
                OriginKind::Uploaded => LoraOriginKind::Uploaded,
                OriginKind::Merged => LoraOriginKind::Merged,
                OriginKind::Resized => LoraOriginKind::Resized,
                OriginKind::Converted => LoraOriginKind::Converted,
            },
            sources: sources.collect(),
        }
    }
}

impl LoraSelfCheck {
    fn of(text: &str) -> Option<Self> {
        let checked: Checked = serde_json::from_str(text).ok()?;
        Some(Self {
            modules: checked.modules as u64,
            tensors: checked.tensors as u64,
            with_effect: checked.with_effect as u64,
            norm_mean: checked.norm_mean,
            norm_max: checked.norm_max,
        })
    }
}

impl Lora {
    /// A file that no run has made.
    pub(super) fn other(row: rows::Lora) -> Self {
        Self::of(row, &HashMap::new())
    }

    fn of(row: rows::Lora, best: &HashMap<Uuid, Uuid>) -> Self {
        Self {
            best: row
                .run_id
                .is_some_and(|run| best.get(&run) == Some(&row.id)),
            validation_loss: row.validation_loss,
            validation_error: row.validation_error,
            id: row.id,
            run_id: row.run_id,
            file_name: row.file_name,
            step: row.step,
            epoch: row.epoch,
            is_final: row.is_final,
            size_bytes: row.size_bytes,
            sha256: row.sha256,
            origin: LoraOrigin::of(row.origin.as_deref()),
            self_check: row.self_check.as_deref().and_then(LoraSelfCheck::of),
            created_at: row.created_at,
        }
    }
}

/// Filters of the list of LoRAs.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct LoraQuery {
    /// How many at most.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// Only files of this run.
    run_id: Option<Uuid>,
}

/// List the LoRA files.
///
/// Results and files saved on the way, uploaded ones and those made of others, in the order in which they were saved.
#[utoipa::path(
    tag = "loras",
    params(LoraQuery),
    responses(
        (status = 200, description = "A page of LoRAs", body = Page<Lora>),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/loras")]
pub async fn list_loras(
    store: Data<Store>,
    query: Query<LoraQuery>,
) -> Result<web::Json<Page<Lora>>, Problem> {
    let LoraQuery {
        limit,
        cursor,
        run_id,
    } = query.into_inner();
    let page = PageRequest::try_from(PageQuery { limit, cursor })?;
    page_of(&store, run_id, &page).await
}

/// List what a run has saved.
///
/// Its LoRA files in the order in which they were saved; `best` marks the one with the lowest loss on the held-out images.
#[utoipa::path(
    tag = "runs",
    params(("run_id" = Uuid, Path), PageQuery),
    responses(
        (status = 200, description = "A page of LoRAs", body = Page<Lora>),
        (status = 404, description = "`run_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/runs/{run_id}/checkpoints")]
pub async fn list_checkpoints(
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
    query: Query<PageQuery>,
) -> Result<web::Json<Page<Lora>>, Problem> {
    let page = PageRequest::try_from(query.into_inner())?;
    let run = runs.get(id.into_inner()).await?;
    page_of(&store, Some(run.id), &page).await
}

async fn page_of(
    store: &Store,
    run_id: Option<Uuid>,
    page: &PageRequest,
) -> Result<web::Json<Page<Lora>>, Problem> {
    let found = store.loras(run_id, page.after_id()?, page.rows()).await;
    let found = found.map_err(Problem::internal)?;
    let mut runs: Vec<Uuid> = found.iter().filter_map(|lora| lora.run_id).collect();
    runs.dedup();
    let best = store.best_loras(&runs).await.map_err(Problem::internal)?;
    Ok(web::Json(page.page(
        found,
        |lora| lora.id.to_string(),
        |lora| Lora::of(lora, &best),
    )))
}

/// Read about a LoRA file.
///
/// Its run, step, size and digest.
#[utoipa::path(
    tag = "loras",
    params(("lora_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The LoRA", body = Lora),
        (status = 404, description = "`lora_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/loras/{lora_id}")]
pub async fn get_lora(store: Data<Store>, id: web::Path<Uuid>) -> Result<web::Json<Lora>, Problem> {
    let lora = find(&store, id.into_inner()).await?;
    let best = store.best_loras(lora.run_id.as_slice()).await;
    let best = best.map_err(Problem::internal)?;
    Ok(web::Json(Lora::of(lora, &best)))
}

/// Delete a LoRA file.
///
/// Not as long as its run, or one that goes on from that, has not ended.
#[utoipa::path(
    tag = "loras",
    params(
        ("lora_id" = Uuid, Path),
        ("If-Match" = Option<String>, Header, description = "The ETag of the content that is to be deleted"),
    ),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`lora_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`still_needed`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/loras/{lora_id}")]
pub async fn delete_lora(
    request: HttpRequest,
    runs: Data<RunService>,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let lora = find(&store, id.into_inner()).await?;
    check_if_match(&request, &format!("\"{}\"", lora.sha256))?;
    runs.delete_lora(lora.id).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Download a LoRA file.
///
/// A `.safetensors` file for A1111, ComfyUI and diffusers; ranges, and its SHA-256 as ETag and `Repr-Digest`.
#[utoipa::path(
    method(get, head),
    tag = "loras",
    params(("lora_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The file", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 206, description = "The wanted part"),
        (status = 304, description = "The client has it already"),
        (status = 404, description = "`lora_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 416, description = "`range_not_satisfiable`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[route("/loras/{lora_id}/content", method = "GET", method = "HEAD")]
pub async fn get_lora_content(
    request: HttpRequest,
    store: Data<Store>,
    id: web::Path<Uuid>,
) -> Result<HttpResponse, Problem> {
    let lora = find(&store, id.into_inner()).await?;
    let file = Download {
        path: &store.blobs().path(&lora.sha256),
        sha256: &lora.sha256,
        media_type: "application/octet-stream",
        file_name: &lora.file_name,
        inline: false,
    };
    download::serve(&request, file).await
}

async fn find(store: &Store, id: Uuid) -> Result<rows::Lora, Problem> {
    store.lora(id).await.map_err(|error| match error {
        StoreError::NotFound => Problem::new(Code::LoraNotFound, format!("there is no LoRA {id}")),
        other => Problem::internal(other),
    })
}
