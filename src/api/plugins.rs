//! `/v1/optimizers`, `/v1/schedulers`, `/v1/plugins`: what was loaded, and what was not and why.

use actix_web::get;
use actix_web::web::{self, Data};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_actix_web::service_config::ServiceConfig;

use super::codes::Code;
use super::extract::Query;
use super::problem::{FieldError, Problem, ProblemBody};
use crate::plugin_host::{self, ComponentInfo, PluginHost, PluginInfo};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(list_optimizers)
        .service(list_schedulers)
        .service(preview_scheduler)
        .service(list_plugins);
}

/// An optimizer or a scheduler.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "adamw", "aliases": ["AdamW", "PagedAdamW"], "summary": "Adam with decoupled weight decay", "plugin": "lorasmith-adamw", "plugin_version": "0.1.0",
    "settings_schema": {"type": "object", "properties": {"weight_decay": {"type": "number", "default": 0.01}}},
    "state_bytes_per_element": 8.0
}))]
pub struct Component {
    /// What `optimizer.id` or `scheduler.id` of a run takes.
    pub id: String,
    /// Other names that it takes, those of sd-scripts; capitals do not count.
    pub aliases: Vec<String>,
    pub summary: String,
    /// The plugin that brings it.
    pub plugin: String,
    pub plugin_version: String,
    /// JSON Schema of its settings, with defaults and ranges.
    #[schema(value_type = Object)]
    pub settings_schema: Value,
    /// Bytes of state that an optimizer keeps for each trained element, as its plugin says; 0 for schedulers.
    pub state_bytes_per_element: f64,
}

impl From<ComponentInfo> for Component {
    fn from(info: ComponentInfo) -> Self {
        Self {
            id: info.id,
            aliases: info.aliases.into_iter().map(str::to_owned).collect(),
            summary: info.summary,
            plugin: info.plugin_id,
            plugin_version: info.plugin_version,
            settings_schema: info.settings_schema,
            state_bytes_per_element: info.state_bytes_per_element,
        }
    }
}

/// Optimizers or schedulers.
#[derive(Serialize, ToSchema)]
pub struct Components {
    pub data: Vec<Component>,
}

/// A plugin file.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "file": "/opt/lorasmith/liblorasmith_adamw.so", "status": "loaded", "reason": null,
    "sha256": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef", "id": "lorasmith-adamw",
    "version": "0.1.0", "license": "MIT OR Apache-2.0", "abi": "1.1", "optimizers": ["adamw"], "schedulers": []
}))]
pub struct Plugin {
    pub file: String,
    pub status: PluginStatus,
    /// Why it was refused.
    pub reason: Option<String>,
    pub sha256: Option<String>,
    pub id: Option<String>,
    pub version: Option<String>,
    pub license: Option<String>,
    /// Version of the ABI it was built for.
    pub abi: Option<String>,
    pub optimizers: Vec<String>,
    pub schedulers: Vec<String>,
}

/// What became of a plugin file.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PluginStatus {
    /// Its components can be used.
    Loaded,
    /// It is not used; `reason` says why.
    Refused,
}

impl From<&PluginInfo> for Plugin {
    fn from(info: &PluginInfo) -> Self {
        Self {
            file: info.path.display().to_string(),
            status: match info.status {
                plugin_host::PluginStatus::Loaded => PluginStatus::Loaded,
                plugin_host::PluginStatus::Refused => PluginStatus::Refused,
            },
            reason: info.reason.clone(),
            sha256: info.sha256.clone(),
            id: info.id.clone(),
            version: info.version.clone(),
            license: info.license.clone(),
            abi: info.abi.map(|(major, minor)| format!("{major}.{minor}")),
            optimizers: info.optimizers.clone(),
            schedulers: info.schedulers.clone(),
        }
    }
}

/// Every plugin file.
#[derive(Serialize, ToSchema)]
pub struct Plugins {
    pub data: Vec<Plugin>,
}

impl From<&PluginHost> for Plugins {
    fn from(host: &PluginHost) -> Self {
        Self {
            data: host.plugins().iter().map(Plugin::from).collect(),
        }
    }
}

/// List the optimizers.
///
/// Each with the JSON Schema of its settings.
#[utoipa::path(
    tag = "plugins",
    responses((status = 200, description = "The optimizers", body = Components)),
)]
#[get("/optimizers")]
pub async fn list_optimizers(host: Data<PluginHost>) -> web::Json<Components> {
    let data = host.optimizers().into_iter().map(Component::from).collect();
    web::Json(Components { data })
}

/// List the learning rate schedulers.
///
/// Each with the JSON Schema of its settings.
#[utoipa::path(
    tag = "plugins",
    responses((status = 200, description = "The schedulers", body = Components)),
)]
#[get("/schedulers")]
pub async fn list_schedulers(host: Data<PluginHost>) -> web::Json<Components> {
    let data = host.schedulers().into_iter().map(Component::from).collect();
    web::Json(Components { data })
}

/// The most points of a preview.
const MAX_POINTS: u64 = 2000;

/// What a learning rate curve is drawn for.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct PreviewQuery {
    /// Settings of the scheduler, a JSON object.
    #[param(example = "{\"num_cycles\": 3}", default = "{}")]
    settings: Option<String>,
    /// Optimizer steps of the run.
    #[param(minimum = 1, maximum = 10_000_000)]
    total_steps: u64,
    /// Steps of warm-up.
    #[param(default = 0, maximum = 10_000_000)]
    warmup_steps: Option<u64>,
    /// The learning rate that the factor applies to.
    #[param(minimum = 0, maximum = 1000, default = 1.0)]
    learning_rate: Option<f64>,
    /// How many points at most; spread evenly, with the first and the last step.
    #[param(minimum = 2, maximum = 2000, default = 200)]
    points: Option<u64>,
}

/// A learning rate curve.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "linear", "total_steps": 100, "warmup_steps": 10, "settings": {},
    "points": [{"step": 0, "factor": 0.0, "learning_rate": 0.0}, {"step": 99, "factor": 0.0111, "learning_rate": 1.11e-6}]
}))]
pub struct SchedulePreview {
    /// The scheduler.
    pub id: String,
    pub total_steps: u64,
    pub warmup_steps: u64,
    #[schema(value_type = Object)]
    pub settings: Value,
    pub points: Vec<SchedulePoint>,
}

/// A point of a learning rate curve.
#[derive(Serialize, ToSchema)]
pub struct SchedulePoint {
    /// Optimizer steps done before.
    pub step: u64,
    /// On every learning rate of the run.
    pub factor: f64,
    /// The factor times the `learning_rate` asked for.
    pub learning_rate: f64,
}

/// Draw a learning rate curve.
///
/// The factors that a run of these settings would have, at no cost: nothing is trained.
#[utoipa::path(
    tag = "plugins",
    params(("id" = String, Path, description = "The scheduler, as in `GET /v1/schedulers`", example = "cosine"), PreviewQuery),
    responses(
        (status = 200, description = "The curve", body = SchedulePreview),
        (status = 404, description = "`not_found`", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "`invalid_query`, `invalid_settings`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/schedulers/{id}:preview")]
pub async fn preview_scheduler(
    host: Data<PluginHost>,
    id: web::Path<String>,
    query: Query<PreviewQuery>,
) -> Result<web::Json<SchedulePreview>, Problem> {
    let Some(id) = host.scheduler_id(&id).map(str::to_owned) else {
        let detail = format!("no loaded plugin offers the scheduler `{id}`");
        return Err(Problem::new(Code::NotFound, detail));
    };
    let wanted = Wanted::try_from(query.into_inner())?;
    let points = wanted.points(&host, &id)?;
    Ok(web::Json(SchedulePreview {
        id,
        total_steps: wanted.total_steps,
        warmup_steps: wanted.warmup_steps,
        settings: wanted.settings,
        points,
    }))
}

/// A query whose values can be used.
struct Wanted {
    settings: Value,
    total_steps: u64,
    warmup_steps: u64,
    learning_rate: f64,
    points: u64,
}

impl TryFrom<PreviewQuery> for Wanted {
    type Error = Problem;

    fn try_from(query: PreviewQuery) -> Result<Self, Problem> {
        const MAX_STEPS: u64 = 10_000_000;
        let warmup_steps = query.warmup_steps.unwrap_or(0);
        let learning_rate = query.learning_rate.unwrap_or(1.0);
        let points = query.points.unwrap_or(200);
        let mut errors = Vec::new();
        let mut check = |fits: bool, name: &str, found: &dyn std::fmt::Display, expected: &str| {
            if !fits {
                let message = format!("found {found}, expected {expected}");
                errors.push(FieldError::new(format!("/{name}"), "out_of_range", message));
            }
        };
        let steps = query.total_steps;
        check(
            (1..=MAX_STEPS).contains(&steps),
            "total_steps",
            &steps,
            "1 to 10000000",
        );
        check(
            warmup_steps <= MAX_STEPS,
            "warmup_steps",
            &warmup_steps,
            "at most 10000000",
        );
        check(
            (2..=MAX_POINTS).contains(&points),
            "points",
            &points,
            "2 to 2000",
        );
        let rate_fits = (0.0..=1000.0).contains(&learning_rate);
        check(rate_fits, "learning_rate", &learning_rate, "0 to 1000");
        let settings = match query.settings.as_deref().map(serde_json::from_str) {
            None => json!({}),
            Some(Ok(settings)) => settings,
            Some(Err(error)) => {
                let message = format!("is not JSON: {error}");
                errors.push(FieldError::new("/settings", "invalid_value", message));
                Value::Null
            }
        };
        if !errors.is_empty() {
            return Err(Problem::fields(Code::InvalidQuery, errors));
        }
        Ok(Self {
            settings,
            total_steps: steps,
            warmup_steps,
            learning_rate,
            points,
        })
    }
}

impl Wanted {
    fn points(&self, host: &PluginHost, id: &str) -> Result<Vec<SchedulePoint>, Problem> {
        host.check_scheduler_settings(id, &self.settings)
            .map_err(|errors| {
                let field = |error: plugin_host::SettingError| {
                    let pointer = format!("/settings{}", error.pointer.unwrap_or_default());
                    FieldError::new(pointer, "invalid_value", error.message)
                };
                Problem::fields(
                    Code::InvalidSettings,
                    errors.into_iter().map(field).collect(),
                )
            })?;
        let refused = |error: crate::plugin_host::ScheduleError| {
            Problem::field(
                Code::InvalidSettings,
                "/settings",
                "invalid_value",
                error.to_string(),
            )
        };
        let (steps, warmup) = (self.total_steps, self.warmup_steps);
        let schedule = host
            .create_scheduler(id, &self.settings, self.learning_rate, warmup, steps)
            .map_err(refused)?;
        let last = steps - 1;
        let intervals = (self.points - 1).min(last).max(1);
        let mut points = Vec::new();
        for index in 0..=intervals.min(last) {
            let step = index * last / intervals;
            let factor = schedule.factor(step).map_err(refused)?;
            points.push(SchedulePoint {
                step,
                factor,
                learning_rate: factor * self.learning_rate,
            });
        }
        Ok(points)
    }
}

/// List the plugins.
///
/// Every file that was found at the start, loaded or refused and why.
#[utoipa::path(
    tag = "plugins",
    responses((status = 200, description = "The plugins", body = Plugins)),
)]
#[get("/plugins")]
pub async fn list_plugins(host: Data<PluginHost>) -> web::Json<Plugins> {
    web::Json(Plugins::from(host.get_ref()))
}
