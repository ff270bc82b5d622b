//! `/v1/captioners`: what makes captions, which models of it are there, and what is missing.

use actix_web::get;
use actix_web::web::{self, Data};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::{PartialSchema as _, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;

use super::captioning_settings::{BlipOptions, Captioner, TaggerOptions};
use super::problem::Problem;
use crate::captioning::{self, CaptionModel, CaptionerCatalog};
use crate::runs::RunService;

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config.service(list_captioners);
}

/// A model of a captioner.
#[derive(Serialize, ToSchema)]
pub struct CaptionerModel {
    /// What `model` of a captioning job takes: its folder's name.
    pub name: String,
    /// Where it is.
    pub folder: String,
    /// Whether all its files are there.
    pub complete: bool,
    /// Files that it lacks.
    pub missing: Vec<String>,
    /// What to do about it.
    pub problem: Option<String>,
}

impl From<CaptionModel> for CaptionerModel {
    fn from(model: CaptionModel) -> Self {
        Self {
            name: model.name,
            folder: model.folder.display().to_string(),
            complete: model.missing.is_none(),
            problem: model.missing.as_ref().map(ToString::to_string),
            missing: model
                .missing
                .map_or_else(Vec::new, |missing| missing.missing),
        }
    }
}

/// A captioner, its models and its settings.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "wd14", "summary": "tags by a WD tagger (ViT, SwinV2, ConvNeXt, EVA-02) in ONNX, on the CPU",
    "folder": "/srv/models/captioners/wd14", "files": ["model.onnx", "selected_tags.csv"],
    "source": "a WD tagger of https://huggingface.co/SmilingWolf, such as wd-vit-tagger-v3",
    "models": [{"name": "wd-vit-tagger-v3", "folder": "/srv/models/captioners/wd14/wd-vit-tagger-v3", "complete": true,
                "missing": [], "problem": null}],
    "settings_field": "tagger",
    "settings_schema": {"type": "object", "properties": {"general_threshold": {"type": "number", "default": 0.35,
                        "minimum": 0.05, "maximum": 1}}}
}))]
pub struct CaptionerInfo {
    /// What `captioner` of a captioning job takes.
    pub id: Captioner,
    pub summary: String,
    /// Each folder in it is a model.
    pub folder: String,
    /// The files of a model.
    pub files: Vec<String>,
    /// Where models can be had.
    pub source: String,
    /// Those that are there, complete or not.
    pub models: Vec<CaptionerModel>,
    /// The field of a captioning job that has its settings.
    pub settings_field: String,
    /// JSON Schema of them, with defaults and ranges.
    #[schema(value_type = Object)]
    pub settings_schema: Value,
}

/// Captioners.
#[derive(Serialize, ToSchema)]
pub struct Captioners {
    pub data: Vec<CaptionerInfo>,
}

impl CaptionerInfo {
    fn of(captioner: captioning::Captioner, catalog: &CaptionerCatalog) -> Self {
        use captioning::Captioner as C;
        let summary = match captioner {
            C::Blip => "sentences by BLIP, on the CPU or a GPU",
            C::Wd14 => "tags by a WD tagger (ViT, SwinV2, ConvNeXt, EVA-02) in ONNX, on the CPU",
            C::DeepDanbooru => "tags by DeepDanbooru in ONNX, on the CPU",
        };
        let (settings_field, settings_schema) = match captioner.tagger() {
            Some(_) => (
                "tagger",
                with_defaults(TaggerOptions::schema(), &TaggerOptions::default()),
            ),
            None => (
                "blip",
                with_defaults(BlipOptions::schema(), &BlipOptions::default()),
            ),
        };
        let models = catalog.models(captioner);
        Self {
            id: captioner.into(),
            summary: summary.to_owned(),
            folder: catalog.folder_of(captioner).display().to_string(),
            files: captioner
                .files()
                .iter()
                .map(|name| (*name).to_owned())
                .collect(),
            source: captioner.source().to_owned(),
            models: models.into_iter().map(Into::into).collect(),
            settings_field: settings_field.to_owned(),
            settings_schema,
        }
    }
}

/// The schema of the settings with what they are when nothing is said of them.
fn with_defaults(schema: impl Serialize, defaults: &impl Serialize) -> Value {
    let mut schema = json!(schema);
    if let (Some(properties), Some(defaults)) = (
        schema["properties"].as_object_mut(),
        json!(defaults).as_object(),
    ) {
        for (name, property) in properties {
            let Some(default) = defaults.get(name) else {
                continue;
            };
            property["default"] = default.clone();
        }
    }
    schema
}

/// List the captioners.
///
/// What can caption images, which of its models are in the model folder, which files are missing and where they belong,
/// and its settings with their ranges.
#[utoipa::path(
    tag = "models",
    responses((status = 200, description = "All captioners", body = Captioners)),
)]
#[get("/captioners")]
pub async fn list_captioners(runs: Data<RunService>) -> Result<web::Json<Captioners>, Problem> {
    let catalog = runs.captioners();
    let look = move || {
        let all = captioning::Captioner::ALL.into_iter();
        all.map(|captioner| CaptionerInfo::of(captioner, &catalog))
            .collect()
    };
    let data = web::block(look).await.map_err(Problem::internal)?;
    Ok(web::Json(Captioners { data }))
}
