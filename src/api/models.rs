//! `/v1/models`: base models of the model folder.

use actix_web::http::header;
use actix_web::web::{self, Data};
use actix_web::{HttpRequest, HttpResponse, delete, get, patch, post};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;

use super::codes::Code;
use super::extract::Query;
use super::model_intake::{self, RegisterModel, UploadName, blocking};
use super::page::{Page, PageQuery, PageRequest};
use super::patch::{MergePatch, check_if_match, etag};
use super::problem::{Problem, ProblemBody};
use super::run_training::Prediction;
use crate::models::{BaseModel, Family, Kind, Layout, ModelCatalog, PredictionType, Record};
use crate::runs::RunService;
use crate::store::Store;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(list_models)
        .service(get_model)
        .service(create_model)
        .service(update_model)
        .service(delete_model);
}

/// A base model.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "6d2a1f8b0c9e4a57", "name": "v1-5-pruned-emaonly", "family": "sd1", "prediction_type": "epsilon",
    "zero_terminal_snr": false, "layout": "single_file", "dtype": "F16", "size_bytes": 2132625918,
    "sha256": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa", "trainable": true, "problem": null,
    "detected": {"prediction_type": "epsilon", "zero_terminal_snr": false}, "uploaded": false
}))]
pub struct Model {
    /// The same as long as the model stays where it is.
    pub id: String,
    /// Its path below the model folder, without `.safetensors`.
    pub name: String,
    /// `sd1`, `sd2` or `sdxl`; `null` when the file cannot be read.
    #[schema(value_type = Option<String>)]
    pub family: Option<Family>,
    /// What its UNet predicts: `epsilon` or `v_prediction`, told by its files, or as it was
    /// corrected. A run's `prediction_type` overrides it.
    #[schema(value_type = Option<String>)]
    pub prediction_type: Option<PredictionType>,
    /// Whether its noise schedule leaves nothing of the picture at the last timestep, told by its files, or as it was
    /// corrected. A run's `zero_terminal_snr` overrides it.
    pub zero_terminal_snr: Option<bool>,
    /// `diffusers` (a folder) or `single_file`.
    #[schema(value_type = Option<String>)]
    pub layout: Option<Layout>,
    /// What its files tell, whatever was corrected; `null` when it cannot be read.
    pub detected: Option<DetectedModel>,
    /// Number format of most of its weights: `F16`, `BF16`, `F32`, `F8_E4M3`.
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
    /// Whether it came by an upload, and can be deleted.
    pub uploaded: bool,
}

/// What the files of a base model tell of its noise.
#[derive(Serialize, ToSchema)]
pub struct DetectedModel {
    #[schema(value_type = String)]
    pub prediction_type: PredictionType,
    pub zero_terminal_snr: bool,
}

/// What of a base model can be corrected; `null` is what its files tell.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"prediction_type": "v_prediction", "zero_terminal_snr": true}))]
pub struct ModelPatch {
    /// Its generation. Tensors tell it without a doubt: any other is refused, with what they say.
    #[serde(default)]
    pub family: Option<ModelFamily>,
    /// What its UNet predicts.
    #[serde(default)]
    pub prediction_type: Option<Prediction>,
    /// Whether its noise schedule leaves nothing of the picture at the last timestep.
    #[serde(default)]
    pub zero_terminal_snr: Option<bool>,
}

/// Generations of Stable Diffusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelFamily {
    /// 1.x: one CLIP text encoder.
    Sd1,
    /// 2.x: one OpenCLIP text encoder.
    Sd2,
    /// XL: two text encoders.
    Sdxl,
}

impl Model {
    /// What the API says of a model.
    pub fn of(model: BaseModel, models: &ModelCatalog) -> Self {
        let sha256 = models.known_digest(&model.path).map(|digest| digest.sha256);
        let problem = model.problem().map(str::to_owned);
        let (prediction_type, zero_terminal_snr) =
            (model.prediction_type(), model.zero_terminal_snr());
        let info = model.info.ok();
        Self {
            id: model.id,
            name: model.name,
            family: info.as_ref().map(|info| info.family),
            prediction_type,
            zero_terminal_snr,
            detected: info.as_ref().map(|info| DetectedModel {
                prediction_type: info.prediction,
                zero_terminal_snr: info.zero_terminal_snr,
            }),
            layout: info.as_ref().map(|info| info.layout),
            size_bytes: info.as_ref().map(|info| info.size_bytes),
            sha256,
            dtype: info.map(|info| info.dtype),
            trainable: problem.is_none(),
            problem,
            uploaded: model.record.uploaded,
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
        (status = 200, description = "The model", body = Model, headers(("ETag" = String))),
        (status = 404, description = "`model_not_found`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/models/{model_id}")]
pub async fn get_model(
    models: Data<ModelCatalog>,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let found = find(&models, &id).await?;
    answer(&models, found).await
}

/// Take in a base model.
///
/// Either JSON that names a path below the model folder: what lies there is opened, every tensor that training needs is
/// looked for, and it is listed from then on, also where no search comes. Or a file: as `application/octet-stream` with
/// its `name`, or as the one file of a form. It is streamed into the model folder, at most 10 GiB, opened like the other,
/// and offered only if it can be trained; otherwise it is removed and the answer says what is wrong with it.
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
        (status = 201, description = "The model", body = Model, headers(("Location" = String))),
        (status = 400, description = "`malformed_json`, `malformed_multipart`, `malformed_body`, `invalid_header`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`model_exists`; `idempotency_key_in_use`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "`payload_too_large`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 415, description = "`unsupported_media_type`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_model`: it cannot be trained, or its path or name cannot be used; `invalid_body`, `invalid_query`, `idempotency_key_reused`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "`storage_full`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[post("/models")]
pub async fn create_model(
    request: HttpRequest,
    models: Data<ModelCatalog>,
    store: Data<Store>,
    query: Query<UploadName>,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let what = (Kind::Model, query.into_inner().name);
    model_intake::take_in(&request, &models, &store, what, payload).await
}

/// Correct what is known of a base model.
///
/// A JSON merge-patch, for files that do not tell what their UNet predicts, or tell it wrongly. It holds for runs that
/// are made from then on and say nothing else. `null` goes back to what the files tell.
#[utoipa::path(
    tag = "models",
    params(
        ("model_id" = String, Path),
        ("If-Match" = Option<String>, Header, description = "The ETag that the change is based on"),
    ),
    request_body(content = ModelPatch, content_type = "application/merge-patch+json"),
    responses(
        (status = 200, description = "The model", body = Model, headers(("ETag" = String))),
        (status = 404, description = "`model_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_model`: its tensors say otherwise; `invalid_body`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[patch("/models/{model_id}")]
pub async fn update_model(
    request: HttpRequest,
    models: Data<ModelCatalog>,
    id: web::Path<String>,
    patch: MergePatch,
) -> Result<HttpResponse, Problem> {
    let found = find(&models, &id).await?;
    let before = found.record.revision;
    check_if_match(&request, &etag(before))?;
    let patch = patch.apply_to(&ModelPatch::of(&found))?;
    patch.check_family(&found)?;
    let record = Record {
        path: models.below(&found.path),
        uploaded: found.record.uploaded,
        prediction_type: patch.prediction_type.map(Into::into),
        zero_terminal_snr: patch.zero_terminal_snr,
        revision: before + 1,
    };
    let (catalog, kept) = (models.get_ref().clone(), record.clone());
    let model_id = found.id.clone();
    let replaced = web::block(move || catalog.correct(&model_id, before, &kept)).await;
    let replaced = replaced
        .map_err(Problem::internal)?
        .map_err(Problem::internal)?;
    if !replaced {
        let detail = format!("the model is no longer at {}", etag(before));
        return Err(Problem::new(Code::PreconditionFailed, detail));
    }
    answer(&models, BaseModel { record, ..found }).await
}

/// Delete an uploaded base model.
///
/// Its file is deleted. What was put into the model folder by hand stays (409 `model_not_uploaded`), and so does what a
/// run needs that has not ended (`model_in_use`).
#[utoipa::path(
    tag = "models",
    params(
        ("model_id" = String, Path),
        ("If-Match" = Option<String>, Header, description = "The ETag that the change is based on"),
    ),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "`model_not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 409, description = "`model_in_use`, `model_not_uploaded`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 412, description = "`precondition_failed`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[delete("/models/{model_id}")]
pub async fn delete_model(
    request: HttpRequest,
    models: Data<ModelCatalog>,
    runs: Data<RunService>,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let found = find(&models, &id).await?;
    check_if_match(&request, &etag(found.record.revision))?;
    if let Some(run) = runs.that_needs_model(&found.id).await? {
        let detail = format!(
            "run {run} has not ended and needs the base model `{}`",
            found.name
        );
        return Err(Problem::new(Code::ModelInUse, detail));
    }
    blocking(models.get_ref().clone(), move |models| {
        models.remove(&found.id, &found.path)
    })
    .await?;
    Ok(HttpResponse::NoContent().finish())
}

impl ModelPatch {
    fn of(model: &BaseModel) -> Self {
        Self {
            family: None,
            prediction_type: model.record.prediction_type.map(Into::into),
            zero_terminal_snr: model.record.zero_terminal_snr,
        }
    }

    /// A generation is no matter of opinion: names and shapes of its tensors are others.
    fn check_family(&self, model: &BaseModel) -> Result<(), Problem> {
        let Some(wanted) = self.family else {
            return Ok(());
        };
        let (told, why) = match &model.info {
            Ok(info) => match info.family {
                Family::Sd1 => (Some(ModelFamily::Sd1), "sd1: it has one CLIP text encoder"),
                Family::Sd2 => (
                    Some(ModelFamily::Sd2),
                    "sd2: it has one OpenCLIP text encoder",
                ),
                Family::Sdxl => (Some(ModelFamily::Sdxl), "sdxl: it has two text encoders"),
            },
            Err(message) => (None, message.as_str()),
        };
        if told == Some(wanted) {
            return Ok(());
        }
        let message = format!("the model's tensors say otherwise: {why}");
        Err(Problem::field(
            Code::InvalidModel,
            "/family",
            "invalid_value",
            message,
        ))
    }
}

async fn find(models: &ModelCatalog, id: &str) -> Result<BaseModel, Problem> {
    let wanted = id.to_owned();
    let found = blocking(models.clone(), move |models| Ok(models.find(&wanted)?)).await?;
    found.ok_or_else(|| {
        Problem::new(
            Code::ModelNotFound,
            format!("there is no base model `{id}`"),
        )
    })
}

async fn answer(models: &ModelCatalog, model: BaseModel) -> Result<HttpResponse, Problem> {
    let tag = etag(model.record.revision);
    let model = blocking(models.clone(), move |models| {
        models.prepare_digest(&model.path);
        Ok(Model::of(model, models))
    });
    Ok(HttpResponse::Ok()
        .insert_header((header::ETAG, tag))
        .json(model.await?))
}

/// Reading headers blocks; what was read is remembered.
async fn all(models: &ModelCatalog) -> Result<Vec<BaseModel>, Problem> {
    let models = models.clone();
    let listed = web::block(move || models.list()).await;
    listed
        .map_err(Problem::internal)?
        .map_err(Problem::internal)
}
