//! Devices of a GPU vendor's own runtime, in builds that have it: `--features cuda` and `--features rocm`. Its driver
//! and compiler are looked for when the program starts; a build with them runs on machines without.

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::devices::{AdapterClass, DeviceInfo, DeviceSpec};

/// A vendor's runtime that a device name can pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VendorRuntime {
    /// CUDA: NVIDIA.
    Cuda,
    /// ROCm's HIP: AMD.
    Rocm,
}

impl VendorRuntime {
    /// All of them, in this build or not.
    pub const ALL: [Self; 2] = [Self::Cuda, Self::Rocm];

    /// Its name, as device names and this crate's features have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
        }
    }

    /// Whether this build has it.
    pub fn is_built_in(self) -> bool {
        match self {
            Self::Cuda => cfg!(feature = "cuda"),
            Self::Rocm => cfg!(feature = "rocm"),
        }
    }

    /// What its compiler takes kernels in.
    pub fn code(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Rocm => "hip",
        }
    }

    /// The devices that its driver names, opened.
    pub fn devices(self) -> Vec<(DeviceInfo, Device)> {
        let found = std::panic::catch_unwind(|| self.handles()).unwrap_or_default();
        found
            .into_iter()
            .enumerate()
            .map(|(index, device)| (self.describe(index, &device), device))
            .collect()
    }

    fn describe(self, index: usize, device: &Device) -> DeviceInfo {
        // A driver that gives up while it is asked costs the name, not the program.
        let ask = || (device.identity(), supports_f16(device));
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(ask));
        let (identity, supports_f16) = asked.unwrap_or((None, false));
        DeviceInfo {
            id: DeviceSpec::Vendor(self, index).to_string(),
            name: identity.map_or_else(|| self.name().to_owned(), |identity| identity.name),
            class: AdapterClass::Discrete,
            driver: self.name().to_owned(),
            compiler: self.code(),
            supports_f16,
            max_buffer_bytes: None,
            memory_bytes: None,
            is_default: false,
        }
    }

    fn handles(self) -> Vec<Device> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda => Device::enumerate(burn::tensor::DeviceType::Cuda)
                .into_iter()
                .collect(),
            #[cfg(feature = "rocm")]
            Self::Rocm => Device::enumerate(burn::tensor::DeviceType::Rocm)
                .into_iter()
                .collect(),
            #[cfg(not(all(feature = "cuda", feature = "rocm")))]
            _ => Vec::new(),
        }
    }
}

fn supports_f16(device: &Device) -> bool {
    device.supports_dtype(burn::tensor::DType::F16)
}
