//! Compute devices: which adapters this machine has, and the one that a name such as `auto` or `vulkan:0` means.
//!
//! A software rasteriser (lavapipe, WARP) reports itself as a graphics adapter. It is listed and can be asked for
//! by name, but `auto` never takes it for a GPU: the CPU backend is an order of magnitude faster.

use std::fmt;
use std::str::FromStr;

use burn::backend::{Backend, Dispatch};
use burn::tensor::wgpu::{WgpuBackend, wgpu};
use burn::tensor::{Device, DeviceKind};
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};

use super::device_memory::{self, MemoryGauge};
use super::vendor::VendorRuntime;
use crate::kernels::Precision;
pub use crate::kernels::is_cpu;

/// A graphics API that a device name can pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GraphicsApi {
    /// Vulkan: Linux, Windows, Android.
    Vulkan,
    /// Metal: macOS and iOS.
    Metal,
    /// Direct3D 12: Windows.
    Dx12,
}

impl GraphicsApi {
    const ALL: [Self; 3] = [Self::Vulkan, Self::Metal, Self::Dx12];

    /// Its name, as device names have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
            Self::Dx12 => "dx12",
        }
    }

    /// The language that kernels are handed to the driver in: WGSL, which wgpu translates; or the driver's own, in
    /// builds with the feature of that name. Where a Vulkan driver lacks what SPIR-V kernels need it is WGSL after all:
    /// [`ComputeDevice::compiler`] tells.
    pub fn code(self) -> &'static str {
        match self {
            Self::Vulkan if cfg!(feature = "vulkan") => "spirv",
            Self::Metal if cfg!(feature = "metal") => "msl",
            _ => "wgsl",
        }
    }

    fn wgpu_backends(self) -> wgpu::Backends {
        match self {
            Self::Vulkan => wgpu::Backends::VULKAN,
            Self::Metal => wgpu::Backends::METAL,
            Self::Dx12 => wgpu::Backends::DX12,
        }
    }

    fn burn_backend(self) -> WgpuBackend {
        match self {
            Self::Vulkan => WgpuBackend::Vulkan,
            Self::Metal => WgpuBackend::Metal,
            Self::Dx12 => WgpuBackend::Dx12,
        }
    }
}

/// What a user asks for: `auto`, `cpu`, an adapter of one graphics API (`vulkan:0`, `metal:0`, `dx12:1`), or a device of
/// a vendor's runtime (`cuda:0`, `rocm:0`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceSpec {
    /// The first discrete GPU, else the first integrated one, else the CPU.
    #[default]
    Auto,
    /// The CPU backend.
    Cpu,
    /// The adapter with this index among all adapters of one graphics API, software rasterisers included.
    Adapter(GraphicsApi, usize),
    /// The device with this index of a vendor's runtime.
    Vendor(VendorRuntime, usize),
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Adapter(api, index) => write!(f, "{}:{index}", api.name()),
            Self::Vendor(runtime, index) => write!(f, "{}:{index}", runtime.name()),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            _ => {}
        }
        let (name, index) = text.split_once(':').unwrap_or((text, "0"));
        let unknown = || DeviceError::UnknownName(text.to_owned());
        let index = index.parse().map_err(|_| unknown())?;
        let mut apis = GraphicsApi::ALL.into_iter();
        let mut runtimes = VendorRuntime::ALL.into_iter();
        if let Some(api) = apis.find(|api| api.name() == name) {
            return Ok(Self::Adapter(api, index));
        }
        let runtime = runtimes.find(|runtime| runtime.name() == name);
        Ok(Self::Vendor(runtime.ok_or_else(unknown)?, index))
    }
}

/// How an adapter is built into the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterClass {
    /// A GPU with its own memory.
    Discrete,
    /// A GPU that shares the machine's memory.
    Integrated,
    /// A GPU of a virtual machine.
    Virtual,
    /// A graphics driver that computes on the CPU.
    Software,
    /// The CPU backend, without any graphics driver.
    Cpu,
    /// The driver does not say.
    Other,
}

/// One device that a run can be placed on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceInfo {
    /// The name to ask for it: `cpu`, `vulkan:0`.
    pub id: String,
    /// The part as its driver names it.
    pub name: String,
    /// How it is built in.
    pub class: AdapterClass,
    /// Driver name and version; empty for the CPU backend.
    pub driver: String,
    /// What kernels are compiled from for it: `wgsl`, `spirv`, `msl`, `cuda`, `hip`; `native` for the CPU backend.
    pub compiler: &'static str,
    /// Whether shaders can compute in half precision.
    pub supports_f16: bool,
    /// Largest buffer that the driver makes.
    pub max_buffer_bytes: Option<u64>,
    /// Memory of a GPU, where its driver tells.
    pub memory_bytes: Option<u64>,
    /// Whether `auto` would choose it.
    pub is_default: bool,
}

/// A device that could not be found or opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The text is not a device name.
    #[error(
        "unknown device `{0}`: expected `auto`, `cpu`, or `vulkan:N`, `metal:N`, `dx12:N`, `cuda:N`, `rocm:N` as listed by `GET /v1/devices`"
    )]
    UnknownName(String),
    /// The device cannot compute in the number format.
    #[error("device `{device}` cannot compute in {found}; `precision` may be {possible} there")]
    Precision {
        /// The device.
        device: String,
        /// What was asked for.
        found: String,
        /// What it can.
        possible: &'static str,
    },
    /// The runtime is not part of this build.
    #[error(
        "device `{wanted}`: this program is built without `{feature}` (`cargo build --features {feature}` has it)"
    )]
    NotBuiltIn {
        /// The name that was asked for.
        wanted: String,
        /// The feature of this crate.
        feature: &'static str,
    },
    /// The name is well formed, but this machine has no such adapter.
    #[error("no device `{wanted}` on this machine; there are: {found}")]
    NotFound {
        /// The name that was asked for.
        wanted: String,
        /// The names that exist, comma separated.
        found: String,
    },
    /// The driver refused to open the adapter.
    #[error("device `{id}` ({name}) did not open: {reason}")]
    Open {
        /// The device's name.
        id: String,
        /// The part's name.
        name: String,
        /// What the driver said.
        reason: String,
    },
}

/// A device that is open, with what is known of it.
#[derive(Clone, Debug)]
pub struct ComputeDevice {
    /// The handle that tensors are made on.
    pub device: Device,
    /// What it is.
    pub info: DeviceInfo,
}

impl ComputeDevice {
    /// What its kernels are compiled from, as the open device says: `wgpu<spirv>`.
    pub fn compiler(&self) -> String {
        let name = Dispatch::name(self.device.as_dispatch());
        let name = name.strip_prefix("dispatch<cubecl<").unwrap_or(&name);
        name.trim_end_matches(">>").to_owned()
    }

    /// Whether it computes in this precision.
    ///
    /// # Errors
    /// When its shaders lack the number format. WGSL has no bf16.
    pub fn check(&self, precision: Precision) -> Result<(), DeviceError> {
        let half = self.info.supports_f16;
        let can = match precision {
            Precision::Fp32 => true,
            _ if self.info.class == AdapterClass::Cpu => true,
            Precision::Fp16 => half,
            Precision::Bf16 => false,
        };
        if can {
            return Ok(());
        }
        Err(DeviceError::Precision {
            device: self.info.id.clone(),
            found: format!("{precision:?}").to_lowercase(),
            possible: if half { "fp32 or fp16" } else { "fp32" },
        })
    }
}

struct Adapter {
    info: DeviceInfo,
    reached: Reached,
}

/// How burn is told which device is meant.
enum Reached {
    Graphics {
        api: GraphicsApi,
        /// Counts adapters of the same class only: that is how burn addresses them.
        kind: Option<DeviceKind>,
    },
    Vendor(Device),
}

/// The graphics APIs that this build reaches.
pub fn graphics_apis() -> Vec<GraphicsApi> {
    let compiled = wgpu::Instance::enabled_backend_features();
    GraphicsApi::ALL
        .into_iter()
        .filter(|api| compiled.contains(api.wgpu_backends()))
        .collect()
}

/// The vendors' runtimes that this build has.
pub fn vendor_runtimes() -> Vec<VendorRuntime> {
    let all = VendorRuntime::ALL.into_iter();
    all.filter(|runtime| runtime.is_built_in()).collect()
}

/// Every device of this machine; the CPU is always there and comes last.
pub fn list() -> Vec<DeviceInfo> {
    let adapters = adapters();
    let chosen = automatic(&adapters);
    let cpu_is_default = chosen.is_none();
    let mut devices: Vec<DeviceInfo> = adapters
        .into_iter()
        .enumerate()
        .map(|(index, adapter)| DeviceInfo {
            is_default: chosen == Some(index),
            ..adapter.info
        })
        .collect();
    devices.push(cpu_info(cpu_is_default));
    devices
}

/// Opens the device that `spec` means.
///
/// # Errors
/// [`DeviceError::NotFound`] when there is no such adapter, [`DeviceError::Open`] when its driver refuses,
/// [`DeviceError::NotBuiltIn`] when this program cannot reach it.
pub fn open(spec: DeviceSpec) -> Result<ComputeDevice, DeviceError> {
    check_built_in(spec)?;
    let adapters = match spec {
        DeviceSpec::Cpu => return Ok(cpu()),
        _ => adapters(),
    };
    let chosen = automatic(&adapters);
    let index = match spec {
        DeviceSpec::Auto => chosen,
        _ => Some(find(&adapters, &spec.to_string())?),
    };
    match index {
        None => Ok(cpu()),
        Some(index) => open_adapter(&adapters[index], chosen == Some(index)),
    }
}

/// # Errors
/// [`DeviceError::NotBuiltIn`].
pub fn check_built_in(spec: DeviceSpec) -> Result<(), DeviceError> {
    match spec {
        DeviceSpec::Vendor(runtime, _) if !runtime.is_built_in() => Err(DeviceError::NotBuiltIn {
            wanted: spec.to_string(),
            feature: runtime.name(),
        }),
        _ => Ok(()),
    }
}

fn find(adapters: &[Adapter], wanted: &str) -> Result<usize, DeviceError> {
    adapters
        .iter()
        .position(|adapter| adapter.info.id == wanted)
        .ok_or_else(|| DeviceError::NotFound {
            wanted: wanted.to_owned(),
            found: adapters
                .iter()
                .map(|adapter| format!("{} ({})", adapter.info.id, adapter.info.name))
                .chain(["cpu".to_owned()])
                .collect::<Vec<_>>()
                .join(", "),
        })
}

fn open_adapter(adapter: &Adapter, is_default: bool) -> Result<ComputeDevice, DeviceError> {
    let failed = |reason: String| DeviceError::Open {
        id: adapter.info.id.clone(),
        name: adapter.info.name.clone(),
        reason,
    };
    let device = match &adapter.reached {
        Reached::Vendor(device) => device.clone(),
        Reached::Graphics { kind: None, .. } => {
            return Err(failed(
                "its class is not one that can be addressed".to_owned(),
            ));
        }
        Reached::Graphics {
            api,
            kind: Some(kind),
        } => Device::wgpu_options()
            .graphics_api(api.burn_backend())
            .device_kind(kind.clone())
            .init()
            .map_err(|error| failed(error.to_string()))?,
    };
    Ok(ComputeDevice {
        device,
        info: DeviceInfo {
            is_default,
            ..adapter.info.clone()
        },
    })
}

fn cpu() -> ComputeDevice {
    ComputeDevice {
        device: Device::flex(),
        info: cpu_info(false),
    }
}

fn cpu_info(is_default: bool) -> DeviceInfo {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    DeviceInfo {
        id: "cpu".to_owned(),
        name: format!("CPU, {threads} threads"),
        class: AdapterClass::Cpu,
        driver: String::new(),
        compiler: "native",
        supports_f16: false,
        max_buffer_bytes: None,
        memory_bytes: None,
        is_default,
    }
}

/// The index of the adapter that `auto` takes: a discrete GPU, then an integrated one, then a virtual one.
fn automatic(adapters: &[Adapter]) -> Option<usize> {
    [
        AdapterClass::Discrete,
        AdapterClass::Integrated,
        AdapterClass::Virtual,
    ]
    .into_iter()
    .find_map(|class| {
        adapters
            .iter()
            .position(|adapter| adapter.info.class == class)
    })
}

/// A vendor's own runtime comes first: who builds it in wants it.
fn adapters() -> Vec<Adapter> {
    let vendors = vendor_runtimes();
    let vendors = vendors
        .into_iter()
        .flat_map(VendorRuntime::devices)
        .map(|(info, device)| Adapter {
            info,
            reached: Reached::Vendor(device),
        });
    let graphics = GraphicsApi::ALL.into_iter().flat_map(adapters_of);
    vendors.chain(graphics).collect()
}

/// What asks the driver of a device for its memory; `None` for the CPU and for devices that are not there.
pub fn memory_gauge(info: &DeviceInfo) -> Option<MemoryGauge> {
    let Ok(DeviceSpec::Adapter(api, index)) = info.id.parse() else {
        return None;
    };
    let adapter = handles(api).into_iter().nth(index)?;
    Some(MemoryGauge::new(adapter))
}

fn handles(api: GraphicsApi) -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: api.wgpu_backends(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    // Outside browsers the list is ready at once.
    instance
        .enumerate_adapters(api.wgpu_backends())
        .now_or_never()
        .unwrap_or_default()
}

fn adapters_of(api: GraphicsApi) -> Vec<Adapter> {
    let found = handles(api);
    let mut same_class = [0_usize; 5];
    found
        .iter()
        .enumerate()
        .map(|(index, adapter)| {
            let facts = adapter.get_info();
            let (class, slot) = classify(facts.device_type);
            let kind = device_kind(class, same_class[slot]);
            same_class[slot] += 1;
            Adapter {
                info: DeviceInfo {
                    id: DeviceSpec::Adapter(api, index).to_string(),
                    name: facts.name,
                    class,
                    driver: format!("{} {}", facts.driver, facts.driver_info)
                        .trim()
                        .to_owned(),
                    compiler: api.code(),
                    supports_f16: adapter.features().contains(wgpu::Features::SHADER_F16),
                    max_buffer_bytes: Some(adapter.limits().max_buffer_size),
                    memory_bytes: device_memory::read(adapter).map(|memory| memory.total_bytes),
                    is_default: false,
                },
                reached: Reached::Graphics { api, kind },
            }
        })
        .collect()
}

fn classify(device_type: wgpu::DeviceType) -> (AdapterClass, usize) {
    match device_type {
        wgpu::DeviceType::DiscreteGpu => (AdapterClass::Discrete, 0),
        wgpu::DeviceType::IntegratedGpu => (AdapterClass::Integrated, 1),
        wgpu::DeviceType::VirtualGpu => (AdapterClass::Virtual, 2),
        wgpu::DeviceType::Cpu => (AdapterClass::Software, 3),
        wgpu::DeviceType::Other => (AdapterClass::Other, 4),
    }
}

fn device_kind(class: AdapterClass, index: usize) -> Option<DeviceKind> {
    match class {
        AdapterClass::Discrete => Some(DeviceKind::DiscreteGpu(index)),
        AdapterClass::Integrated => Some(DeviceKind::IntegratedGpu(index)),
        AdapterClass::Virtual => Some(DeviceKind::VirtualGpu(index)),
        // burn knows one software rasteriser per graphics API.
        AdapterClass::Software if index == 0 => Some(DeviceKind::Cpu),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(id: &str, class: AdapterClass) -> Adapter {
        Adapter {
            info: DeviceInfo {
                id: id.to_owned(),
                class,
                ..cpu_info(false)
            },
            reached: Reached::Graphics {
                api: GraphicsApi::Vulkan,
                kind: None,
            },
        }
    }

    #[test]
    fn names_round_trip() {
        for name in [
            "auto", "cpu", "vulkan:0", "metal:2", "dx12:1", "cuda:1", "rocm:0",
        ] {
            assert_eq!(name.parse::<DeviceSpec>().unwrap().to_string(), name);
        }
        assert_eq!(
            "vulkan".parse::<DeviceSpec>().unwrap().to_string(),
            "vulkan:0"
        );
        for name in ["", "gpu", "vulkan:", "vulkan:-1", "cuda:x"] {
            assert!(name.parse::<DeviceSpec>().is_err(), "{name}");
        }
    }

    #[test]
    fn auto_prefers_discrete_and_never_software() {
        let software = || adapter("vulkan:0", AdapterClass::Software);
        let integrated = || adapter("vulkan:1", AdapterClass::Integrated);
        let discrete = || adapter("vulkan:2", AdapterClass::Discrete);
        assert_eq!(automatic(&[software()]), None);
        assert_eq!(automatic(&[software(), integrated()]), Some(1));
        assert_eq!(automatic(&[software(), integrated(), discrete()]), Some(2));
    }

    #[test]
    fn a_runtime_that_is_not_built_in_is_told_from_a_device_that_is_not_there() {
        for runtime in VendorRuntime::ALL {
            let wanted = format!("{}:99", runtime.name());
            let error = open(wanted.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains(&wanted), "{error}");
            let without = error.contains("is built without");
            assert_eq!(without, !runtime.is_built_in(), "{error}");
        }
    }

    #[test]
    fn an_absent_adapter_names_those_that_exist() {
        let error = find(&[adapter("vulkan:0", AdapterClass::Software)], "vulkan:7").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("vulkan:7") && text.contains("vulkan:0") && text.contains("cpu"),
            "{text}"
        );
    }
}
