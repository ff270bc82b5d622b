//! How much memory a run may take: what the machine and the control groups around this process, or a GPU's driver,
//! leave to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::diffusion::StableDiffusion;
use crate::diffusion::device_memory::{DeviceMemory, MemoryGauge};
use crate::diffusion::devices::{self, AdapterClass, DeviceInfo};
use crate::store::runs::RunFailure;
use crate::training::memory::{Place, Remedy, in_gib};
use crate::training::{TrainSettings, TrainingSet, Workload};

/// Beyond this share of the limit a worker stops.
const SHARE: f64 = 0.95;

/// What a process on this machine may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemMemory {
    /// Free now, or can be freed without writing to a swap device.
    pub available_bytes: u64,
    /// The most that there is: of the machine, or of a control group.
    pub limit_bytes: u64,
}

impl SystemMemory {
    /// What the system says; `None` where it is not Linux.
    pub fn now() -> Option<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
        let machine = Self {
            available_bytes: kib_line(&meminfo, "MemAvailable:")?,
            limit_bytes: kib_line(&meminfo, "MemTotal:")?,
        };
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Some(
            control_groups(&own, Path::new("/sys/fs/cgroup"))
                .into_iter()
                .fold(machine, Self::within),
        )
    }

    fn within(self, group: Self) -> Self {
        Self {
            available_bytes: self.available_bytes.min(group.available_bytes),
            limit_bytes: self.limit_bytes.min(group.limit_bytes),
        }
    }

    /// What a worker may grow to.
    pub fn allowed_bytes(self) -> u64 {
        (self.limit_bytes as f64 * SHARE) as u64
    }
}

/// Memory of this process that is in RAM.
pub fn own_bytes() -> Option<u64> {
    memory_stats::memory_stats().map(|stats| stats.physical_mem as u64)
}

/// What a run is expected to take of the memory that its tensors are in, and what there is.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// The run.
    workload: Workload,
    /// Its estimated peak.
    pub estimated_peak_bytes: u64,
    /// What a worker may have; `None` where the system or the driver does not tell.
    pub available_bytes: Option<u64>,
}

impl MemoryPlan {
    /// The plan of this process, which has yet to load the model. Reads the headers of the model's files; `state_bytes` is
    /// what the optimizer keeps for each trained element.
    ///
    /// # Errors
    /// `model_unusable` when they cannot be read.
    pub fn new(
        data: &TrainingSet,
        settings: &TrainSettings,
        state_bytes: f64,
        device: &DeviceInfo,
    ) -> Result<Self, RunFailure> {
        let mut plan = Self::of_another_process(data, settings, state_bytes, device)?;
        if device.class == AdapterClass::Cpu {
            // What this process has already is part of the estimate.
            plan.available_bytes = plan
                .available_bytes
                .map(|bytes| bytes + own_bytes().unwrap_or(0));
        }
        Ok(plan)
    }

    /// The plan of a worker that is still to be started.
    ///
    /// # Errors
    /// Those of [`MemoryPlan::new`].
    pub fn of_another_process(
        data: &TrainingSet,
        settings: &TrainSettings,
        state_bytes: f64,
        device: &DeviceInfo,
    ) -> Result<Self, RunFailure> {
        let model = StableDiffusion::measure(&data.base_model)
            .map_err(|error| RunFailure::new("model_unusable", error))?;
        let machine = || SystemMemory::now().map(|memory| memory.available_bytes);
        let of_device = || devices::memory_gauge(device)?.read();
        let (place, available_bytes) = match device.class {
            AdapterClass::Cpu => (Place::Process, machine()),
            // The size that a software rasteriser tells is made up.
            AdapterClass::Software => (Place::Device, machine()),
            _ => (
                Place::Device,
                of_device().map(DeviceMemory::available_bytes),
            ),
        };
        let workload = Workload::new(&model, data, settings, state_bytes, place);
        Ok(Self {
            estimated_peak_bytes: workload.peak_bytes(),
            workload,
            available_bytes,
        })
    }

    /// What the optimizer keeps from step to step.
    pub fn optimizer_state_bytes(&self) -> u64 {
        self.workload.optimizer_state_bytes()
    }

    /// What the moving average of the adapters takes.
    pub fn ema_bytes(&self) -> u64 {
        self.workload.ema_bytes()
    }

    /// What would take less.
    pub fn remedies(&self) -> Vec<Remedy> {
        self.workload.remedies()
    }

    /// # Errors
    /// `memory_budget` when the run would not fit.
    pub fn check(&self) -> Result<(), RunFailure> {
        match self.available_bytes {
            Some(available) if self.estimated_peak_bytes > available => {
                let message = format!(
                    "the run would need about {} of {}, {} are free{}",
                    in_gib(self.estimated_peak_bytes),
                    self.workload.place(),
                    in_gib(available),
                    self.workload.advice()
                );
                Err(RunFailure::new("memory_budget", message))
            }
            _ => Ok(()),
        }
    }
}

/// Looks whether this process outgrows what it may have, of the machine's memory and of a GPU's.
#[derive(Debug)]
pub struct MemoryWatch {
    allowed_bytes: Option<u64>,
    device: OnceLock<MemoryGauge>,
    found: OnceLock<Outgrown>,
}

/// What a process has had when it had too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgrown {
    bytes: u64,
    place: Place,
}

impl Default for MemoryWatch {
    fn default() -> Self {
        Self {
            allowed_bytes: SystemMemory::now().map(SystemMemory::allowed_bytes),
            device: OnceLock::new(),
            found: OnceLock::new(),
        }
    }
}

impl MemoryWatch {
    /// From now on the memory of this GPU is looked at, too.
    pub fn watch(&self, gauge: MemoryGauge) {
        let _ = self.device.set(gauge); // a worker has one device
    }

    /// To be called again and again, as memory is at its peak in the middle of a step.
    pub fn look(&self) {
        let process = Outgrown {
            bytes: own_bytes().unwrap_or(0),
            place: Place::Process,
        };
        if self
            .allowed_bytes
            .is_some_and(|allowed| process.bytes > allowed)
        {
            let _ = self.found.set(process);
        }
        // Beyond this drivers begin to move memory to and fro, or fail.
        if let Some(memory) = self.device.get().and_then(MemoryGauge::read)
            && memory.used_bytes as f64 > SHARE * memory.allowed_bytes as f64
        {
            let _ = self.found.set(Outgrown {
                bytes: memory.used_bytes,
                place: Place::Device,
            });
        }
    }

    /// What was too much, the first time.
    pub fn outgrown(&self) -> Option<Outgrown> {
        self.found.get().copied()
    }
}

/// `memory_limit`: the worker has grown beyond what it may have.
pub fn outgrown(grown: Outgrown, plan: &MemoryPlan) -> RunFailure {
    let advice = plan.workload.advice();
    let message = format!(
        "the worker has grown to {}, more than {:.0} % of {}{advice}",
        in_gib(grown.bytes),
        100.0 * SHARE,
        grown.place,
    );
    RunFailure::new("memory_limit", message)
}

/// The limits of this process's control group and of those around it; `own` is `/proc/self/cgroup`.
fn control_groups(own: &str, root: &Path) -> Vec<SystemMemory> {
    let mut found = Vec::new();
    for line in own.lines() {
        // `0::/path` of version 2, `4:memory:/path` of version 1.
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (root, files) = if controllers.is_empty() {
            (root.to_owned(), &VERSION_2)
        } else if controllers.split(',').any(|name| name == "memory") {
            (root.join("memory"), &VERSION_1)
        } else {
            continue;
        };
        // Within a container the path may be that of the host: its root then is the container's group.
        for below in Path::new(path.trim_start_matches('/')).ancestors() {
            found.extend(files.read(&root.join(below)));
        }
    }
    found
}

/// Names of a control group's files.
struct GroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// The line of `memory.stat` with cached files that can be dropped.
    reclaimable: &'static str,
}

const VERSION_1: GroupFiles = GroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const VERSION_2: GroupFiles = GroupFiles {
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: "inactive_file",
};

impl GroupFiles {
    /// `None` without a limit.
    fn read(&self, group: &Path) -> Option<SystemMemory> {
        let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let limit_bytes = number(group.join(self.limit))?;
        let usage = number(group.join(self.usage))?;
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let reclaimable = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(name, _)| *name == self.reclaimable)
            .and_then(|(_, bytes)| bytes.trim().parse().ok())
            .unwrap_or(0);
        Some(SystemMemory {
            available_bytes: limit_bytes.saturating_sub(usage.saturating_sub(reclaimable)),
            limit_bytes,
        })
    }
}

fn kib_line(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataloader::{Augment, BucketSettings, CaptionSettings, TrainingImage};

    fn cpu() -> DeviceInfo {
        let mut known = devices::list();
        known.pop().expect("the CPU comes last")
    }

    fn plan(available_bytes: Option<u64>) -> MemoryPlan {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/tiny-sd15/tiny-sd15-ldm.safetensors");
        let data = TrainingSet {
            images: vec![TrainingImage {
                id: "a".to_owned(),
                path: PathBuf::new(),
                sha256: String::new(),
                width_px: 512,
                height_px: 512,
                caption: String::new(),
                repeats: 1,
                regularization: false,
                mask: None,
                background: None,
                augment: Augment::default(),
                correction: None,
                captioning: CaptionSettings::default(),
            }],
            subsets: std::collections::HashMap::new(),
            buckets: BucketSettings::default(),
            cache: None,
            base_model: fixture,
        };
        let settings = TrainSettings {
            batch_size: 2,
            ..TrainSettings::default()
        };
        MemoryPlan {
            available_bytes,
            ..MemoryPlan::new(&data, &settings, 8.0, &cpu()).expect("a model")
        }
    }

    #[test]
    fn a_run_that_does_not_fit_is_refused_with_what_to_change() {
        let estimate = plan(None).estimated_peak_bytes;
        plan(None).check().expect("nothing is known");
        plan(Some(estimate)).check().expect("fits");
        let refused = plan(Some(estimate - 1)).check().expect_err("does not fit");
        assert_eq!(refused.code, "memory_budget");
        for part in [
            &in_gib(estimate),
            "are free; estimated with `gradient_checkpointing: blocks`: ",
            ", with `batch_size: 1`: ",
            ", with all of these: ",
        ] {
            assert!(refused.message.contains(part), "{}", refused.message);
        }
    }

    #[test]
    fn a_worker_that_has_grown_too_large_is_told_the_same() {
        let grown = |place| Outgrown {
            bytes: 3 << 30,
            place,
        };
        let failure = outgrown(grown(Place::Process), &plan(None));
        assert_eq!(failure.code, "memory_limit");
        for part in ["3.0 GiB", "95 %", "`batch_size: 1`: "] {
            assert!(failure.message.contains(part), "{}", failure.message);
        }
        let failure = outgrown(grown(Place::Device), &plan(None));
        for part in ["95 % of the device's memory", "`batch_size: 1`: "] {
            assert!(failure.message.contains(part), "{}", failure.message);
        }
    }

    #[test]
    fn the_tightest_control_group_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        };
        write("a/memory.max", "1000\n");
        write("a/memory.current", "700\n");
        write("a/memory.stat", "anon 500\ninactive_file 150\n");
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "10\n");
        let found = control_groups("0::/a/b\n", folder.path());
        let group = |available_bytes, limit_bytes| SystemMemory {
            available_bytes,
            limit_bytes,
        };
        assert_eq!(found, [group(450, 1000)]);
        assert_eq!(group(600, 900).within(found[0]), group(450, 900));

        write("memory/memory.limit_in_bytes", "2000\n");
        write("memory/memory.usage_in_bytes", "500\n");
        write("memory/memory.stat", "total_inactive_file 100\n");
        let own = "5:cpu,cpuacct:/x\n4:memory:/not/here\n";
        assert_eq!(control_groups(own, folder.path()), [group(1600, 2000)]);
        assert_eq!(control_groups("nonsense\n", folder.path()), []);
    }

    #[test]
    fn meminfo_is_read_in_kib() {
        let text = "MemTotal:       16000 kB\nMemAvailable:    8000 kB\n";
        assert_eq!(kib_line(text, "MemAvailable:"), Some(8000 * 1024));
        assert_eq!(kib_line(text, "SwapFree:"), None);
        if cfg!(target_os = "linux") {
            let memory = SystemMemory::now().expect("Linux tells");
            assert!(memory.available_bytes <= memory.limit_bytes);
            assert!(memory.allowed_bytes() < memory.limit_bytes);
        }
    }
}
