//! `lorasmith doctor`: what this binary holds, which devices there are, and whether they compute what the CPU computes.

use std::fmt;

use serde::Serialize;

use crate::diffusion::devices::{self, AdapterClass, DeviceError, DeviceInfo, DeviceSpec};
use crate::kernels;
use crate::selfcheck::{self, Remembered, SelfCheck};

/// What to look at.
#[derive(Clone, Copy, Debug, Default)]
pub struct DoctorOptions {
    /// A device to check besides the hardware GPUs.
    pub device: Option<DeviceSpec>,
    /// Check again what is remembered.
    pub again: bool,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// Version of this program.
    pub version: &'static str,
    /// What it can compute with.
    pub backends: Vec<BackendInfo>,
    /// What this machine has.
    pub devices: Vec<DeviceInfo>,
    /// What was checked.
    pub self_checks: Vec<Verdict>,
}

/// A way to compute that is compiled in.
#[derive(Clone, Debug, Serialize)]
pub struct BackendInfo {
    /// `flex`, `wgpu`, `cuda` or `rocm`.
    pub name: &'static str,
    /// The instruction set in use here, or the language that the device's compiler takes.
    pub code: &'static str,
    /// How devices are reached.
    pub reaches: Vec<&'static str>,
}

/// What the self-check of one device said.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Id of the device.
    pub device: String,
    /// Whether the result is from an earlier time.
    pub remembered: bool,
    /// Whether the device computes what the CPU computes.
    pub passed: bool,
    /// What the device's kernels were compiled from; of a check that is made now.
    pub compiler: Option<String>,
    /// Why it could not be checked.
    pub problem: Option<String>,
    /// The checks.
    pub result: Option<SelfCheck>,
}

impl Diagnosis {
    /// Whether nothing that was checked is wrong.
    pub fn passed(&self) -> bool {
        self.self_checks.iter().all(|verdict| verdict.passed)
    }
}

/// Looks at this machine. Hardware GPUs that were never checked are checked now; `begin` is told which, and how many
/// checks there are.
///
/// # Errors
/// When this machine does not have the named device.
pub fn examine(
    options: &DoctorOptions,
    self_checks: &Remembered,
    mut begin: impl FnMut(&DeviceInfo, usize),
) -> Result<Diagnosis, DeviceError> {
    let found = devices::list();
    let named = match options.device {
        Some(DeviceSpec::Auto) => found.iter().find(|info| info.is_default),
        Some(spec) => found.iter().find(|info| info.id == spec.to_string()),
        None => None,
    };
    if let (Some(spec), None) = (options.device, named) {
        devices::open(spec)?; // says what there is instead
    }
    let verdicts = found
        .iter()
        .filter(|info| is_hardware(info) || named.is_some_and(|named| named.id == info.id))
        .filter(|info| selfcheck::applies_to(info))
        .map(|info| check(info, options.again, self_checks, &mut begin))
        .collect();
    Ok(Diagnosis {
        version: env!("CARGO_PKG_VERSION"),
        backends: backends(),
        self_checks: verdicts,
        devices: found,
    })
}

fn is_hardware(info: &DeviceInfo) -> bool {
    matches!(
        info.class,
        AdapterClass::Discrete | AdapterClass::Integrated | AdapterClass::Virtual
    )
}

/// What this build computes with.
pub fn backends() -> Vec<BackendInfo> {
    let mut backends = vec![BackendInfo {
        name: "flex",
        code: kernels::instruction_set(),
        reaches: vec!["cpu"],
    }];
    for code in ["wgsl", "spirv", "msl"] {
        // WGSL is what an adapter falls back to that does not take its API's own language.
        let apis = devices::graphics_apis().into_iter();
        let reaches: Vec<&str> = apis
            .filter(|api| code == "wgsl" || api.code() == code)
            .map(devices::GraphicsApi::name)
            .collect();
        if !reaches.is_empty() {
            backends.push(BackendInfo {
                name: "wgpu",
                code,
                reaches,
            });
        }
    }
    let vendors = devices::vendor_runtimes();
    backends.extend(vendors.into_iter().map(|runtime| BackendInfo {
        name: runtime.name(),
        code: runtime.code(),
        reaches: vec![runtime.name()],
    }));
    backends
}

fn check(
    info: &DeviceInfo,
    again: bool,
    self_checks: &Remembered,
    begin: &mut impl FnMut(&DeviceInfo, usize),
) -> Verdict {
    let verdict = |remembered, compiler, result: Result<SelfCheck, String>| Verdict {
        device: info.id.clone(),
        remembered,
        compiler,
        passed: result.as_ref().is_ok_and(SelfCheck::passed),
        problem: result.as_ref().err().cloned(),
        result: result.ok(),
    };
    if !again && let Some(found) = self_checks.find(info) {
        return verdict(true, None, Ok(found));
    }
    let opened = info.id.parse().and_then(devices::open);
    let compiler = opened.as_ref().ok().map(devices::ComputeDevice::compiler);
    let result = opened
        .map_err(|error| error.to_string())
        .and_then(|device| {
            let go_on = |done, total| {
                if done == 0 {
                    begin(info, total);
                }
                true
            };
            let result = self_checks.run(&device, go_on);
            result.ok_or_else(|| "the device has nothing to check".to_owned())
        });
    verdict(false, compiler, result)
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "lorasmith {}, computes with", self.version)?;
        for backend in &self.backends {
            let reaches = backend.reaches.join(", ");
            writeln!(f, "  {:<6} {:<10} {reaches}", backend.name, backend.code)?;
        }
        writeln!(f, "\ndevices (`auto` takes the one with *)")?;
        for device in &self.devices {
            write_device(f, device)?;
        }
        for verdict in &self.self_checks {
            writeln!(f)?;
            write_verdict(f, verdict)?;
        }
        if self.self_checks.is_empty() {
            writeln!(
                f,
                "\nno hardware GPU to check; `--device` checks a software device"
            )?;
        }
        Ok(())
    }
}

fn write_device(f: &mut fmt::Formatter<'_>, device: &DeviceInfo) -> fmt::Result {
    let mark = if device.is_default { "*" } else { " " };
    let class = format!("{:?}", device.class).to_lowercase();
    write!(f, "{mark} {:<10} {class:<10} {}", device.id, device.name)?;
    if device.class == AdapterClass::Cpu {
        return writeln!(f, "  (what others are compared with)");
    }
    let f16 = if device.supports_f16 { "f16" } else { "no f16" };
    write!(f, "  ({}; {}; {f16}", device.driver, device.compiler)?;
    if let Some(bytes) = device.memory_bytes {
        write!(f, "; {} MiB", bytes >> 20)?;
    }
    if let Some(bytes) = device.max_buffer_bytes {
        write!(f, "; buffers up to {} MiB", bytes >> 20)?;
    }
    writeln!(f, ")")
}

fn write_verdict(f: &mut fmt::Formatter<'_>, verdict: &Verdict) -> fmt::Result {
    let id = &verdict.device;
    if let Some(problem) = &verdict.problem {
        return writeln!(f, "self-check of {id}: FAILED, {problem}");
    }
    let Some(result) = &verdict.result else {
        return Ok(());
    };
    let (passed, count) = (verdict.passed, result.checks.len());
    write!(
        f,
        "self-check of {id}: {}, {count} checks in {:.1} s",
        if passed { "passed" } else { "FAILED" },
        result.duration_s,
    )?;
    if let Some(compiler) = &verdict.compiler {
        write!(f, ", kernels by {compiler}")?;
    }
    if verdict.remembered {
        let at = result.checked_at;
        write!(f, " on {} (--again runs them now)", at.date())?;
    }
    writeln!(f)?;
    for check in &result.checks {
        let error = check
            .error
            .map_or_else(|| "-".to_owned(), |error| format!("{error:.1e}"));
        write!(
            f,
            "  {}  {:<38} {error:>8} of {:>5.0e}",
            if check.passed { "ok  " } else { "FAIL" },
            check.name,
            check.tolerance,
        )?;
        if !check.passed {
            write!(f, "  {}", check.detail)?;
        }
        writeln!(f)?;
    }
    if !passed {
        writeln!(
            f,
            "  Runs on {id} fail: choose another device or update the driver; `force_devices = true` uses it nevertheless."
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_described_and_not_checked() {
        let folder = tempfile::tempdir().unwrap();
        let options = DoctorOptions {
            device: Some(DeviceSpec::Cpu),
            again: false,
        };
        let self_checks = Remembered::new(folder.path());
        let found = examine(&options, &self_checks, |_, _| ()).unwrap();
        assert!(found.devices.iter().any(|info| info.id == "cpu"));
        assert!(found.self_checks.iter().all(|v| v.device != "cpu"));
        let text = found.to_string();
        assert!(text.contains(kernels::instruction_set()), "{text}");
        assert!(text.contains("what others are compared with"), "{text}");
    }

    #[test]
    fn an_absent_device_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let options = DoctorOptions {
            device: Some("vulkan:99".parse().unwrap()),
            again: false,
        };
        let error = examine(&options, &Remembered::new(folder.path()), |_, _| ()).unwrap_err();
        assert!(error.to_string().contains("vulkan:99"), "{error}");
    }
}
