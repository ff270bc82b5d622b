//! What operators ask: is it alive, is it ready, which version, which devices.

use actix_web::get;
use actix_web::web::{self, Data};
use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_actix_web::service_config::ServiceConfig;

use super::codes::Code;
use super::problem::{Problem, ProblemBody};
use crate::diffusion::devices::{self, AdapterClass, DeviceInfo};
use crate::doctor::{self, BackendInfo};
use crate::selfcheck::{CheckResult, Remembered, SelfCheck};
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
#[schema(example = json!({"status": "ok"}))]
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
#[schema(example = json!({"name": "lorasmith", "version": "0.1.0", "plugin_abi": "1.1"}))]
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
    "compiler": "wgsl", "supports_f16": true, "memory_bytes": 17163091968u64, "default": true,
    "self_check": {"status": "passed", "checked_at": "2026-05-04T09:30:00Z", "failed_checks": []}
}))]
pub struct Device {
    /// What `device` of a run takes.
    pub id: String,
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `software`, `cpu` or `other`.
    #[schema(value_type = String)]
    pub class: AdapterClass,
    pub driver: String,
    /// What kernels are compiled from for it: `wgsl`, `spirv`, `msl`, `cuda`, `hip`; `native` for the CPU.
    #[schema(value_type = String)]
    pub compiler: &'static str,
    /// Whether shaders can compute in 16 bits.
    pub supports_f16: bool,
    /// Memory of a GPU; `null` for the CPU, and where the driver does not tell.
    pub memory_bytes: Option<u64>,
    /// Whether `auto` takes it.
    pub default: bool,
    pub self_check: DeviceSelfCheck,
}

/// Whether the device computes what the CPU computes.
///
/// It is found out at the first use of an adapter and driver, by a run or by `lorasmith doctor`.
#[derive(Serialize, ToSchema)]
pub struct DeviceSelfCheck {
    pub status: SelfCheckStatus,
    #[serde(with = "time::serde::rfc3339::option")]
    pub checked_at: Option<OffsetDateTime>,
    /// A device with any is not used, unless the setting `force_devices` says so.
    pub failed_checks: Vec<FailedCheck>,
}

/// What the self-check said.
#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SelfCheckStatus {
    /// Every check is right.
    Passed,
    /// A check is wrong.
    Failed,
    /// The device was not used yet; or it is the CPU, which others are compared with.
    NotRun,
}

/// A check that is not right.
#[derive(Serialize, ToSchema)]
pub struct FailedCheck {
    pub name: String,
    /// Largest difference from the CPU, in units of the CPU's largest value; `null` when values are not finite or the
    /// computation broke off.
    pub error: Option<f64>,
    /// Largest error that is allowed.
    pub tolerance: f64,
    /// The tensor that is furthest off, or how the computation broke off.
    pub detail: String,
}

impl From<Option<SelfCheck>> for DeviceSelfCheck {
    fn from(found: Option<SelfCheck>) -> Self {
        let Some(found) = found else {
            return Self {
                status: SelfCheckStatus::NotRun,
                checked_at: None,
                failed_checks: Vec::new(),
            };
        };
        Self {
            status: if found.passed() {
                SelfCheckStatus::Passed
            } else {
                SelfCheckStatus::Failed
            },
            checked_at: Some(found.checked_at),
            failed_checks: found.failed().map(FailedCheck::from).collect(),
        }
    }
}

impl From<&CheckResult> for FailedCheck {
    fn from(check: &CheckResult) -> Self {
        Self {
            name: check.name.clone(),
            error: check.error,
            tolerance: check.tolerance,
            detail: check.detail.clone(),
        }
    }
}

impl Device {
    fn of(info: DeviceInfo, self_checks: &Remembered) -> Self {
        Self {
            self_check: self_checks.find(&info).into(),
            id: info.id,
            name: info.name,
            class: info.class,
            driver: info.driver,
            compiler: info.compiler,
            supports_f16: info.supports_f16,
            memory_bytes: info.memory_bytes,
            default: info.is_default,
        }
    }
}

/// A way to compute that this build of the service has.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"name": "wgpu", "code": "wgsl", "reaches": ["vulkan"]}))]
pub struct Backend {
    /// `flex` (the CPU), `wgpu`, `cuda` or `rocm`.
    #[schema(value_type = String)]
    pub name: &'static str,
    /// The instruction set in use, or the language that the device's compiler takes.
    #[schema(value_type = String)]
    pub code: &'static str,
    /// What the ids of the devices begin with that it is used for.
    #[schema(value_type = Vec<String>)]
    pub reaches: Vec<&'static str>,
}

impl From<BackendInfo> for Backend {
    fn from(info: BackendInfo) -> Self {
        Self {
            name: info.name,
            code: info.code,
            reaches: info.reaches,
        }
    }
}

/// Every device.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "data": [{
        "id": "vulkan:0", "name": "AMD Radeon RX 7900 XTX", "class": "discrete", "driver": "radv Mesa 24.2",
        "compiler": "wgsl", "supports_f16": true, "memory_bytes": 17163091968u64, "default": true,
        "self_check": {"status": "passed", "checked_at": "2026-05-04T09:30:00Z", "failed_checks": []}
    }],
    "backends": [
        {"name": "flex", "code": "avx512", "reaches": ["cpu"]},
        {"name": "wgpu", "code": "wgsl", "reaches": ["vulkan"]}
    ]
}))]
pub struct Devices {
    pub data: Vec<Device>,
    /// What this build can compute with, whether this machine has such a device or not.
    pub backends: Vec<Backend>,
}

/// List the compute devices.
///
/// GPUs that Vulkan, Metal, DX12 or a vendor's runtime reach, software rasterisers among them, and the CPU. `self_check`
/// is what is remembered; nothing is computed for this answer. `backends` is what this build holds.
#[utoipa::path(
    tag = "operations",
    responses((status = 200, description = "The devices", body = Devices)),
)]
#[get("/devices")]
pub async fn list_devices(self_checks: Data<Remembered>) -> Result<web::Json<Devices>, Problem> {
    let list = move || {
        let found = devices::list();
        let described = found.into_iter().map(|info| Device::of(info, &self_checks));
        described.collect()
    };
    let data = web::block(list).await.map_err(Problem::internal)?;
    let backends = doctor::backends().into_iter().map(Backend::from).collect();
    Ok(web::Json(Devices { data, backends }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_self_check_names_what_failed() {
        let check = |name: &str, error: Option<f64>, passed| CheckResult {
            name: name.to_owned(),
            error,
            tolerance: 1e-4,
            passed,
            detail: "output".to_owned(),
        };
        let mut found = SelfCheck {
            checked_at: OffsetDateTime::UNIX_EPOCH,
            duration_s: 2.0,
            checks: vec![check("linear", Some(1e-6), true)],
        };
        let wire = |found: &SelfCheck| {
            serde_json::to_value(DeviceSelfCheck::from(Some(found.clone()))).unwrap()
        };
        assert_eq!(
            wire(&found),
            json!({"status": "passed", "checked_at": "1970-01-01T00:00:00Z", "failed_checks": []})
        );
        found.checks.push(check("attention", None, false));
        assert_eq!(
            wire(&found),
            json!({"status": "failed", "checked_at": "1970-01-01T00:00:00Z", "failed_checks": [
                {"name": "attention", "error": null, "tolerance": 1e-4, "detail": "output"}
            ]})
        );
        let unknown = serde_json::to_value(DeviceSelfCheck::from(None)).unwrap();
        assert_eq!(
            unknown,
            json!({"status": "not_run", "checked_at": null, "failed_checks": []})
        );
    }
}
