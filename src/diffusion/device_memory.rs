//! Memory of a GPU, as its driver tells it to this process.
//!
//! Graphics APIs have no common word for it, and wgpu passes none on. Vulkan tells the size, and with
//! `VK_EXT_memory_budget` what of it this process may have and has; of other APIs nothing is known here, and whoever
//! asks has to do without.

use burn::tensor::wgpu::wgpu;

/// What a process may have of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All that there is, whoever has it.
    pub total_bytes: u64,
    /// The most that this process can have before allocations fail or memory is moved to and fro; what other
    /// programs hold is not in it.
    pub allowed_bytes: u64,
    /// What this process has; 0 where the driver counts nothing.
    pub used_bytes: u64,
}

impl DeviceMemory {
    /// What this process can still get.
    pub fn available_bytes(self) -> u64 {
        self.allowed_bytes.saturating_sub(self.used_bytes)
    }
}

/// Asks the driver of one GPU, as often as wanted.
#[derive(Clone, Debug)]
pub struct MemoryGauge(wgpu::Adapter);

impl MemoryGauge {
    pub(super) fn new(adapter: wgpu::Adapter) -> Self {
        Self(adapter)
    }

    /// What the driver says now; `None` when it does not tell.
    pub fn read(&self) -> Option<DeviceMemory> {
        read(&self.0)
    }
}

#[cfg(target_vendor = "apple")]
pub(super) fn read(_: &wgpu::Adapter) -> Option<DeviceMemory> {
    None
}

#[cfg(not(target_vendor = "apple"))]
#[expect(unsafe_code, reason = "Vulkan is asked beside wgpu")]
/// Memory of an adapter.
pub(super) fn read(adapter: &wgpu::Adapter) -> Option<DeviceMemory> {
    use ash::{ext, vk};

    // SAFETY: nothing is destroyed by way of the guard.
    let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let shared = adapter.shared_instance();
    if shared.instance_api_version() < vk::API_VERSION_1_1 {
        return None; // has no `vkGetPhysicalDeviceMemoryProperties2`
    }
    let (instance, device) = (shared.raw_instance(), adapter.raw_physical_device());
    // SAFETY: the device is one of the instance, which the guard keeps.
    let extensions = unsafe { instance.enumerate_device_extension_properties(device) }.ok()?;
    let counts = extensions
        .iter()
        .any(|known| known.extension_name_as_c_str() == Ok(ext::memory_budget::NAME));
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let mut properties = vk::PhysicalDeviceMemoryProperties2::default();
    if counts {
        properties = properties.push_next(&mut budget);
    }
    // SAFETY: as above; the device knows the extension whose structure is chained.
    unsafe { instance.get_physical_device_memory_properties2(device, &mut properties) };
    let memory = properties.memory_properties;
    let heaps = memory.memory_heaps_as_slice();
    if !counts {
        for (allowed, heap) in budget.heap_budget.iter_mut().zip(heaps) {
            *allowed = heap.size;
        }
    }
    largest(heaps, &budget)
}

/// The largest heap of the device's own memory: beside it there may be a small window for the host.
#[cfg(not(target_vendor = "apple"))]
fn largest(
    heaps: &[ash::vk::MemoryHeap],
    budget: &ash::vk::PhysicalDeviceMemoryBudgetPropertiesEXT<'_>,
) -> Option<DeviceMemory> {
    heaps
        .iter()
        .zip(budget.heap_budget.iter().zip(&budget.heap_usage))
        .filter(|(heap, _)| heap.flags.contains(ash::vk::MemoryHeapFlags::DEVICE_LOCAL))
        .map(|(heap, (&allowed_bytes, &used_bytes))| DeviceMemory {
            total_bytes: heap.size,
            allowed_bytes,
            used_bytes,
        })
        .max_by_key(|memory| memory.total_bytes)
}

#[cfg(all(test, not(target_vendor = "apple")))]
mod tests {
    use ash::vk;

    use super::*;

    #[test]
    fn the_largest_heap_of_the_device_counts() {
        let heap = |size, flags| vk::MemoryHeap { size, flags };
        let own = vk::MemoryHeapFlags::DEVICE_LOCAL;
        let heaps = [
            heap(256, own),
            heap(8000, own),
            heap(64_000, vk::MemoryHeapFlags::empty()),
        ];
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        budget.heap_budget[..3].copy_from_slice(&[200, 7000, 60_000]);
        budget.heap_usage[..3].copy_from_slice(&[10, 3000, 5]);
        let memory = largest(&heaps, &budget).expect("a heap");
        assert_eq!(
            memory,
            DeviceMemory {
                total_bytes: 8000,
                allowed_bytes: 7000,
                used_bytes: 3000
            }
        );
        assert_eq!(memory.available_bytes(), 4000);
        assert_eq!(largest(&heaps[2..], &budget), None);
    }
}
