//! `/v1/models`: base models of the model folder.

use actix_web::get;
use actix_web::web::{self, Data};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;

use super::codes::Code;
use super::extract::Query;
use super::page::{Page, PageQuery, PageRequest};
use super::problem::{Problem, ProblemBody};
use crate::models::{BaseModel, Family, Layout, ModelCatalog, PredictionType};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(list_models).service(get_model);
}

/// A base model.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "6d2a1f8b0c9e4a57", "name": "v1-5-pruned-emaonly", "family": "sd1", "prediction_type": "epsilon",
    "zero_terminal_snr": false, "layout": "single_file", "dtype": "F16", "size_bytes": 2132625918,
    "sha256": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa", "trainable": true, "problem": null
}))]
pub struct Model {
    /// The same as long as the model stays where it is.
    pub id: String,
    /// Its path below the model folder, without `.safetensors`.
    pub name: String,
    /// `sd1`, `sd2` or `sdxl`; `null` when the file cannot be read.
    #[schema(value_type = Option<String>)]
    pub family: Option<Family>,
    /// What its UNet predicts: `epsilon` or `v_prediction`, told by its files. A run's `prediction_type` overrides it.
    #[schema(value_type = Option<String>)]
    pub prediction_type: Option<PredictionType>,
    /// Whether its noise schedule leaves nothing of the picture at the last timestep, told by its files. A run's
    /// `zero_terminal_snr` overrides it.
    pub zero_terminal_snr: Option<bool>,
    /// `diffusers` (a folder) or `single_file`.
    #[schema(value_type = Option<String>)]
    pub layout: Option<Layout>,
    /// Number format of most of its weights: `F16`, `BF16`, `F32`.
    pub dtype: Option<String>,
    pub size_bytes: Option<u64>,
    /// What tells its content apart. Of a single file its SHA-256; of a folder the SHA-256 of what `sha256sum` writes of
    /// its `.safetensors`, `.json` and `.txt` files: digest, two spaces, path below the folder, newline, in the order of
    /// the paths. `null` until all of it was read once, for a run or because somebody has asked for this model.
    pub sha256: Option<String>,
    /// Whether a run can use it.
    pub trainable: bool,
    /// Why a run cannot use it.
    pub problem: Option<String>,
}

impl Model {
    fn of(model: BaseModel, models: &ModelCatalog) -> Self {
        let sha256 = models.known_digest(&model).map(|digest| digest.sha256);
        let problem = model.problem().map(str::to_owned);
        let info = model.info.ok();
        Self {
            id: model.id,
            name: model.name,
            family: info.as_ref().map(|info| info.family),
            prediction_type: info.as_ref().map(|info| info.prediction),
            zero_terminal_snr: info.as_ref().map(|info| info.zero_terminal_snr),
            layout: info.as_ref().map(|info| info.layout),
            size_bytes: info.as_ref().map(|info| info.size_bytes),
            sha256,
            dtype: info.map(|info| info.dtype),
            trainable: problem.is_none(),
            problem,
        }
    }
}

/// List the base models.
///
/// Single files and diffusers folders below the model folder, by name; what is no base model is left out.
#[utoipa::path(
    tag = "models",
    params(PageQuery),
    responses(
        (status = 200, description = "A page of models", body = Page<Model>),
        (status = 422, description = "`invalid_query`, `invalid_cursor`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/models")]
pub async fn list_models(
    models: Data<ModelCatalog>,
    query: Query<PageQuery>,
) -> Result<web::Json<Page<Model>>, Problem> {
    let page = PageRequest::try_from(query.into_inner())?;
    let mut found = all(&models).await?;
    found.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(after) = &page.after {
        found.retain(|model| model.name > *after);
    }
    found.truncate(page.limit + 1);
    let models = models.get_ref().clone();
    // Sizes and times of files are looked at for the digests.
    let found: Vec<Model> = web::block(move || {
        let of = |model| Model::of(model, &models);
        found.into_iter().map(of).collect()
    })
    .await
    .map_err(Problem::internal)?;
    Ok(web::Json(page.page(
        found,
        |model| model.name.clone(),
        |model| model,
    )))
}

/// Read about a base model.
///
/// By its id, or by its name where that has no slash. Where its `sha256` is not known yet, it is made in the background:
/// ask again.
#[utoipa::path(
    tag = "models",
    params(("model_id" = String, Path)),
    responses(
        (status = 200, description = "The model", body = Model),
        (status = 404, description = "`model_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/models/{model_id}")]
pub async fn get_model(
    models: Data<ModelCatalog>,
    id: web::Path<String>,
) -> Result<web::Json<Model>, Problem> {
    let id = id.into_inner();
    let found = all(&models)
        .await?
        .into_iter()
        .find(|model| model.id == id || model.name == id);
    let missing = || {
        Problem::new(
            Code::ModelNotFound,
            format!("there is no base model `{id}`"),
        )
    };
    let found = found.ok_or_else(missing)?;
    let models = models.get_ref().clone();
    let model = web::block(move || {
        models.prepare_digest(&found);
        Model::of(found, &models)
    });
    Ok(web::Json(model.await.map_err(Problem::internal)?))
}

/// Reading headers blocks; what was read is remembered.
async fn all(models: &ModelCatalog) -> Result<Vec<BaseModel>, Problem> {
    let models = models.clone();
    let listed = web::block(move || models.list()).await;
    listed
        .map_err(Problem::internal)?
        .map_err(Problem::internal)
}
