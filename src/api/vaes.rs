//! `/v1/vaes`: VAEs of the model folder, which take the place of a base model's own.

use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, post};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;

use super::codes::Code;
use super::extract::Query;
use super::model_intake::{self, RegisterModel, UploadName, blocking};
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{Problem, ProblemBody};
use crate::models::{self, Kind, ModelCatalog};
use crate::runs::RunService;
use crate::store::Store;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(list_vaes)
        .service(get_vae)
        .service(create_vae)
        .service(delete_vae);
}

/// A VAE that a run can use in place of its base model's own.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "9c1be2d07a5f3846", "name": "vae-ft-mse-840000-ema-pruned", "dtype": "F32", "size_bytes": 334640988,
    "sha256": "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75", "uploaded": false, "usable": true,
    "problem": null
}))]
pub struct Vae {
    /// The same as long as it stays where it is.
    pub id: String,
    /// Its path below the folder `vae` of the model folder, without `.safetensors`.
    pub name: String,
    /// Number format of most of its weights; `null` when it cannot be read.
    pub dtype: Option<String>,
    /// What its weights take in memory.
    pub size_bytes: Option<u64>,
    /// What tells its content apart, as of a base model. `null` until it was read once.
    pub sha256: Option<String>,
    /// Whether it came by an upload.
    pub uploaded: bool,
    /// Whether a run can use it.
    pub usable: bool,
    /// Why a run cannot use it.
    pub problem: Option<String>,
}

impl Vae {
    /// What the API says of a VAE.
    pub fn of(vae: models::Vae, models: &ModelCatalog) -> Self {
        let sha256 = models.known_digest(&vae.path).map(|digest| digest.sha256);
        let (info, problem) = match vae.info {
            Ok(info) => (Some(info), None),
            Err(message) => (None, Some(message)),
        };
        Self {
            id: vae.id,
            name: vae.name,
            size_bytes: info.as_ref().map(|info| info.size_bytes),
            dtype: info.map(|info| info.dtype),
            sha256,
            uploaded: vae.uploaded,
            usable: problem.is_none(),
            problem,
        }
    }
}

/// List the VAEs.
///
/// Files and diffusers folders in the folder `vae` of the model folder, by name: a VAE alone, or the one of a whole
/// checkpoint.
#[utoipa::path(
    tag = "models",
    params(PageQuery),
    responses(
        (status = 200, description = "A page of VAEs", body = Page<Vae>),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/vaes")]
pub async fn list_vaes(
    models: Data<ModelCatalog>,
    query: Query<PageQuery>,
) -> Result<web::Json<Page<Vae>>, Problem> {
    let page = PageRequest::try_from(query.into_inner())?;
    let (after, limit) = (page.after.clone(), page.limit);
    let found = blocking(models.get_ref().clone(), move |models| {
        let mut found = models.vaes()?;
        found.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(after) = after {
            found.retain(|vae| vae.name > after);
        }
        found.truncate(limit + 1);
        Ok(found.into_iter().map(|vae| Vae::of(vae, models)).collect())
    });
    Ok(web::Json(page.page(
        found.await?,
        |vae: &Vae| vae.name.clone(),
        |vae| vae,
    )))
}

/// Read about a VAE.
///
/// By its id, or by its name where that has no slash.
#[utoipa::path(
    tag = "models",
    params(("vae_id" = String, Path)),
    responses(
        (status = 200, description = "The VAE", body = Vae),
        (status = 404, description = "`vae_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/vaes/{vae_id}")]
pub async fn get_vae(
    models: Data<ModelCatalog>,
    id: web::Path<String>,
) -> Result<web::Json<Vae>, Problem> {
    let found = find(&models, &id).await?;
    let vae = blocking(models.get_ref().clone(), move |models| {
        models.prepare_digest(&found.path);
        Ok(Vae::of(found, models))
    });
    Ok(web::Json(vae.await?))
}

/// Take in a VAE.
///
/// As `POST /v1/models`: the JSON names a path below the folder `vae` of the model folder; a file is received into that
/// folder.
#[utoipa::path(
    tag = "models",
    params(
        UploadName,
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 characters that name this attempt"),
    ),
    request_body(content(
        (RegisterModel = "application/json"),
        (Vec<u8> = "application/octet-stream"),
    )),
    responses(
        (status = 201, description = "The VAE", body = Vae, headers(("Location" = String))),
        (status = 400, description = "`malformed_json`, `malformed_multipart`, `malformed_body`, `invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`model_exists`; `idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "`payload_too_large`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 415, description = "`unsupported_media_type`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_model`: it is no VAE, or its path or name cannot be used; `invalid_body`, `invalid_query`, `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/vaes")]
pub async fn create_vae(
    request: HttpRequest,
    models: Data<ModelCatalog>,
    store: Data<Store>,
    query: Query<UploadName>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let what = (Kind::Vae, query.into_inner().name);
    model_intake::take_in(&request, &models, &store, what, payload).await
}

/// Remove an uploaded VAE.
///
/// Its file is deleted. What was put into the model folder by hand stays: 409 `model_not_uploaded`.
#[utoipa::path(
    tag = "models",
    params(("vae_id" = String, Path)),
    responses(
        (status = 204, description = "Removed"),
        (status = 404, description = "`vae_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`model_in_use`, `model_not_uploaded`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/vaes/{vae_id}")]
pub async fn delete_vae(
    models: Data<ModelCatalog>,
    runs: Data<RunService>,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let vae = find(&models, &id).await?;
    if let Some(run) = runs.that_needs_model(&vae.id).await? {
        let detail = format!("run {run} has not ended and needs the VAE `{}`", vae.name);
        return Err(Problem::new(Code::ModelInUse, detail));
    }
    blocking(models.get_ref().clone(), move |models| {
        models.remove(&vae.id, &vae.path)
    })
    .await?;
    Ok(HttpResponse::NoContent().finish())
}

async fn find(models: &ModelCatalog, id: &str) -> Result<models::Vae, Problem> {
    let wanted = id.to_owned();
    let found = blocking(models.clone(), move |models| Ok(models.find_vae(&wanted)?)).await?;
    found.ok_or_else(|| Problem::new(Code::VaeNotFound, format!("there is no VAE `{id}`")))
}
