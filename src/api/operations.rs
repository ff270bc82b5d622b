//! What operators ask: is it alive, is it ready, which version, which devices.

use actix_web::get;
use actix_web::web::{self, Data};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;

use super::codes::Code;
use super::problem::{Problem, ProblemBody};
use crate::diffusion::devices::{self, AdapterClass, DeviceInfo};
use crate::store::Store;

/// The routes of this file, outside of `/v1`.
pub fn routes(config: &mut ServiceConfig<'_>) {
    config
        .service(get_liveness)
        .service(get_readiness)
        .service(get_version);
}

/// The routes of this file, under `/v1`.
pub fn v1_routes(config: &mut ServiceConfig<'_>) {
    config.service(list_devices);
}

/// A word that says all is well.
#[derive(Serialize, ToSchema)]
pub struct Health {
    /// `ok`
    pub status: &'static str,
}

const OK: Health = Health { status: "ok" };

/// Tell whether the process answers.
///
/// Asks nothing else; needs no key.
#[utoipa::path(
    tag = "operations",
    responses((status = 200, description = "It does", body = Health)),
)]
#[get("/livez")]
pub async fn get_liveness() -> web::Json<Health> {
    web::Json(OK)
}

/// Tell whether requests can be served.
///
/// Asks the database; needs no key.
#[utoipa::path(
    tag = "operations",
    responses(
        (status = 200, description = "They can", body = Health),
        (status = 503, description = "`not_ready`", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
#[get("/readyz")]
pub async fn get_readiness(store: Data<Store>) -> Result<web::Json<Health>, Problem> {
    match store.ping().await {
        Ok(()) => Ok(web::Json(OK)),
        Err(error) => {
            tracing::error!(%error, "the database does not answer");
            Err(Problem::new(Code::NotReady, "the database does not answer"))
        }
    }
}

/// What is running.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"name": "lorasmith", "version": "0.1.0", "plugin_abi": "1.0"}))]
pub struct Version {
    pub name: &'static str,
    pub version: &'static str,
    /// Major and minor version of the plugin ABI.
    pub plugin_abi: String,
}

/// Tell the version.
///
/// Of the service and of its plugin ABI.
#[utoipa::path(
    tag = "operations",
    responses((status = 200, description = "The version", body = Version)),
)]
#[get("/version")]
pub async fn get_version() -> web::Json<Version> {
    let (major, minor) = crate::plugin_host::ABI_VERSION;
    web::Json(Version {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        plugin_abi: format!("{major}.{minor}"),
    })
}

/// A device that a run can be trained on.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "id": "vulkan:0", "name": "AMD Radeon RX 7900 XTX", "class": "discrete", "driver": "radv Mesa 24.2",
    "supports_f16": true, "default": true
}))]
pub struct Device {
    /// What `device` of a run takes.
    pub id: String,
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `software`, `cpu` or `other`.
    #[schema(value_type = String)]
    pub class: AdapterClass,
    pub driver: String,
    /// Whether shaders can compute in 16 bits.
    pub supports_f16: bool,
    /// Whether `auto` takes it.
    pub default: bool,
}

impl From<DeviceInfo> for Device {
    fn from(info: DeviceInfo) -> Self {
        Self {
            id: info.id,
            name: info.name,
            class: info.class,
            driver: info.driver,
            supports_f16: info.supports_f16,
            default: info.is_default,
        }
    }
}

/// Every device.
#[derive(Serialize, ToSchema)]
pub struct Devices {
    pub data: Vec<Device>,
}

/// List the compute devices.
///
/// GPUs that Vulkan, Metal or DX12 reach, software rasterisers among them, and the CPU.
#[utoipa::path(
    tag = "operations",
    responses((status = 200, description = "The devices", body = Devices)),
)]
#[get("/devices")]
pub async fn list_devices() -> Result<web::Json<Devices>, Problem> {
    let found = web::block(devices::list).await.map_err(Problem::internal)?;
    let data = found.into_iter().map(Device::from).collect();
    Ok(web::Json(Devices { data }))
}
