//! `/v1/optimizers`, `/v1/schedulers`, `/v1/plugins`: what was loaded, and what was not and why.

use actix_web::get;
use actix_web::web::{self, Data};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;

use crate::plugin_host::{self, ComponentInfo, PluginHost, PluginInfo};

/// The routes of this file, under `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(list_optimizers)
        .service(list_schedulers)
        .service(list_plugins);
}

/// An optimizer or a scheduler.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "adamw", "summary": "Adam with decoupled weight decay", "plugin": "lorasmith-adamw", "plugin_version": "0.1.0",
    "settings_schema": {"type": "object", "properties": {"weight_decay": {"type": "number", "default": 0.01}}}
}))]
pub struct Component {
    /// What `optimizer.id` or `scheduler.id` of a run takes.
    pub id: String,
    pub summary: String,
    /// The plugin that brings it.
    pub plugin: String,
    pub plugin_version: String,
    /// JSON Schema of its settings, with defaults and ranges.
    #[schema(value_type = Object)]
    pub settings_schema: Value,
}

impl From<ComponentInfo> for Component {
    fn from(info: ComponentInfo) -> Self {
        Self {
            id: info.id,
            summary: info.summary,
            plugin: info.plugin_id,
            plugin_version: info.plugin_version,
            settings_schema: info.settings_schema,
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
    "version": "0.1.0", "license": "MIT OR Apache-2.0", "abi": "1.0", "optimizers": ["adamw"], "schedulers": []
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
