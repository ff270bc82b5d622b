//! How much memory a run may take: what the machine, and the control groups around this process, leave to it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::diffusion::StableDiffusion;
use crate::store::runs::RunFailure;
use crate::training::memory::{Remedy, in_gib};
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

/// What a run on the CPU is expected to take, and what there is.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// The run.
    workload: Workload,
    /// Its estimated peak.
    pub estimated_peak_bytes: u64,
    /// What this process may have, what it has included; `None` where the system does not tell.
    pub available_bytes: Option<u64>,
}

impl MemoryPlan {
    /// Reads the headers of the model's files; loads nothing.
    ///
    /// # Errors
    /// `model_unusable` when they cannot be read.
    pub fn new(data: &TrainingSet, settings: &TrainSettings) -> Result<Self, RunFailure> {
        let model = StableDiffusion::measure(&data.base_model)
            .map_err(|error| RunFailure::new("model_unusable", error))?;
        let workload = Workload::new(&model, data, settings);
        let available_bytes =
            SystemMemory::now().map(|memory| memory.available_bytes + own_bytes().unwrap_or(0));
        Ok(Self {
            estimated_peak_bytes: workload.peak_bytes(),
            workload,
            available_bytes,
        })
    }

    /// As [`MemoryPlan::new`], for a worker that is still to be started.
    ///
    /// # Errors
    /// Those of [`MemoryPlan::new`].
    pub fn of_another_process(
        data: &TrainingSet,
        settings: &TrainSettings,
    ) -> Result<Self, RunFailure> {
        let available_bytes = SystemMemory::now().map(|memory| memory.available_bytes);
        Ok(Self {
            available_bytes,
            ..Self::new(data, settings)?
        })
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
                    "the run would need about {} of memory, {} are free{}",
                    in_gib(self.estimated_peak_bytes),
                    in_gib(available),
                    self.workload.advice()
                );
                Err(RunFailure::new("memory_budget", message))
            }
            _ => Ok(()),
        }
    }
}

/// `memory_limit`: the worker has grown beyond what it may have. There is a plan for a run on the CPU.
pub fn outgrown(grown_bytes: u64, plan: Option<&MemoryPlan>) -> RunFailure {
    let advice = plan.map_or_else(
        || "; `gradient_checkpointing: blocks` or a smaller `batch_size` takes less".to_owned(),
        |plan| plan.workload.advice(),
    );
    let message = format!(
        "the worker has grown to {}, more than {:.0} % of the memory{advice}",
        in_gib(grown_bytes),
        100.0 * SHARE
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
    use crate::dataloader::{BucketSettings, TrainingImage};

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
            ..MemoryPlan::new(&data, &settings).expect("a model")
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
        let failure = outgrown(3 << 30, Some(&plan(None)));
        assert_eq!(failure.code, "memory_limit");
        for part in ["3.0 GiB", "95 %", "`batch_size: 1`: "] {
            assert!(failure.message.contains(part), "{}", failure.message);
        }
        let failure = outgrown(3 << 30, None);
        assert!(
            failure.message.contains("`batch_size`"),
            "{}",
            failure.message
        );
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
