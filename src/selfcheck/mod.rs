//! Whether a device computes what the CPU computes: the frozen layers, attention, LoRA gradients and updates that training
//! is made of, with the same numbers on both. Drivers and shader compilers err silently; a GPU is checked before its
//! first run, and what was found is remembered.

mod compare;
mod inputs;
mod layers;
mod lora;
mod remembered;
mod update;

use std::time::Instant;

use burn::tensor::{DType, Device, FloatDType};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::diffusion::devices::{AdapterClass, ComputeDevice, DeviceInfo};

pub use remembered::Remembered;

use compare::judge;
use inputs::{Inputs, Outputs};

/// What all checks of a device have found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfCheck {
    /// When they ended.
    #[serde(with = "time::serde::rfc3339")]
    pub checked_at: OffsetDateTime,
    /// How long they took, the compilation of shaders included.
    pub duration_s: f64,
    /// Each of them.
    pub checks: Vec<CheckResult>,
}

impl SelfCheck {
    /// Whether something was checked and all of it is right.
    pub fn passed(&self) -> bool {
        !self.checks.is_empty() && self.failed().next().is_none()
    }

    /// The checks that are not right.
    pub fn failed(&self) -> impl Iterator<Item = &CheckResult> {
        self.checks.iter().filter(|check| !check.passed)
    }
}

/// What one check has found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckResult {
    /// Its name, a stable word.
    pub name: String,
    /// Largest difference from the CPU in units of the CPU's largest value, of all tensors that were compared; absent
    /// when a value is not finite or the computation broke off.
    pub error: Option<f64>,
    /// Largest error that is allowed.
    pub tolerance: f64,
    /// Whether it is within.
    pub passed: bool,
    /// The tensor that is furthest off, or how the computation broke off.
    pub detail: String,
}

/// Whether a device is checked before its first run: all but the CPU, which others are compared with.
pub fn applies_to(info: &DeviceInfo) -> bool {
    info.class != AdapterClass::Cpu
}

/// Runs every check that the device is able to run; a panic on it is a failed check.
///
/// `go_on` is asked before each check with the number of checks done and their count; no answer when it says no.
pub fn run(
    device: &ComputeDevice,
    mut go_on: impl FnMut(usize, usize) -> bool,
) -> Option<SelfCheck> {
    let begun = Instant::now();
    let has_f16 = device.device.supports_dtype(DType::F16);
    let checks: Vec<&Check> = CHECKS
        .iter()
        .filter(|check| has_f16 || !check.needs_f16)
        .collect();
    let mut results = Vec::with_capacity(checks.len());
    for (done, check) in checks.iter().enumerate() {
        if !go_on(done, checks.len()) {
            return None;
        }
        results.push(check.run(&device.device));
    }
    Some(SelfCheck {
        checked_at: OffsetDateTime::now_utc(),
        duration_s: begun.elapsed().as_secs_f64(),
        checks: results,
    })
}

/// One computation, done on the device and on the CPU.
struct Check {
    name: &'static str,
    tolerance: f64,
    needs_f16: bool,
    compute: fn(&mut Inputs) -> Outputs,
}

impl Check {
    fn run(&self, device: &Device) -> CheckResult {
        let found = || (self.compute)(&mut Inputs::new(self.name, device, FloatDType::F16));
        let cpu = Device::flex();
        // Halves are exact in f32: the CPU's result has no rounding of its own to be taken for an error.
        let expected = || (self.compute)(&mut Inputs::new(self.name, &cpu, FloatDType::F32));
        judge(self.name, self.tolerance, found, expected)
    }
}

/// Sums of up to a thousand f32 products in any order, and the exponentials behind them, are within 1e-5 of each
/// other; wrong kernels are off in the first digits.
const F32: f64 = 1e-4;
/// Blocks on top of each other add up their rounding, twice: softmax and norms pass small differences on enlarged.
const F32_DEEP: f64 = 1e-3;
/// Half precision keeps 11 bits (5e-4), and a sum of 320 products may be kept in it.
const F16: f64 = 5e-3;
/// A block rounds to halves a dozen times.
const F16_DEEP: f64 = 2e-2;

/// The widest gap between codes of 8 bits is 1.4e-2.
const CODES: f64 = 2e-2;

const CHECKS: [Check; 21] = [
    f32_check("linear", layers::linear),
    f32_check("conv_stride_1", |inputs| layers::conv(inputs, 1)),
    f32_check("conv_stride_2", |inputs| layers::conv(inputs, 2)),
    f32_check("group_norm_silu", layers::group_norm_silu),
    f32_check("layer_norm", layers::layer_norm),
    f32_check("attention", |inputs| layers::attention(inputs, false)),
    f32_check("attention_causal", |inputs| layers::attention(inputs, true)),
    f32_check("geglu", layers::geglu),
    f32_check("lora_linear", lora::linear),
    f32_check("lora_conv", lora::conv),
    Check {
        tolerance: F32_DEEP,
        ..f32_check("lora_blocks_input_tracked", |inputs| {
            lora::blocks(inputs, true)
        })
    },
    // The workaround of that issue is to track the block's input; the first block of a model is trained without.
    Check {
        tolerance: F32_DEEP,
        ..f32_check("lora_blocks_input_untracked_burn_5162", |inputs| {
            lora::blocks(inputs, false)
        })
    },
    f32_check("gradients_together", update::gradients),
    f32_check("optimizer_update", update::optimizer),
    Check {
        tolerance: CODES,
        ..f32_check("optimizer_8bit_state", update::codes)
    },
    Check {
        needs_f16: true,
        ..f32_check("f16_storage_linear", layers::linear_of_halves)
    },
    Check {
        needs_f16: true,
        ..f32_check("f16_storage_conv", layers::conv_of_halves)
    },
    Check {
        tolerance: F16,
        needs_f16: true,
        ..f32_check("f16_linear", layers::linear_in_halves)
    },
    Check {
        tolerance: F16,
        needs_f16: true,
        ..f32_check("f16_norm_conv", layers::conv_in_halves)
    },
    Check {
        tolerance: F16,
        needs_f16: true,
        ..f32_check("f16_geglu", layers::geglu_in_halves)
    },
    Check {
        tolerance: F16_DEEP,
        needs_f16: true,
        ..f32_check("f16_lora_block", lora::block_in_halves)
    },
];

const fn f32_check(name: &'static str, compute: fn(&mut Inputs) -> Outputs) -> Check {
    Check {
        name,
        tolerance: F32,
        needs_f16: false,
        compute,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::devices::{self, DeviceSpec};

    #[test]
    fn the_cpu_agrees_with_itself() {
        let cpu = devices::open(DeviceSpec::Cpu).unwrap();
        let mut asked = Vec::new();
        let go_on = |done, total| {
            asked.push((done, total));
            true
        };
        let result = run(&cpu, go_on).unwrap();
        let failed: Vec<_> = result.failed().collect();
        assert!(result.passed(), "{failed:?}");
        let names: Vec<&str> = result.checks.iter().map(|c| c.name.as_str()).collect();
        let all: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
        assert_eq!(names, all, "the CPU stores halves, too");
        assert_eq!(asked.last(), Some(&(CHECKS.len() - 1, CHECKS.len())));
        for check in &result.checks {
            // In f32 it is the same computation; values between layers are rounded to halves.
            let rounds = CHECKS
                .iter()
                .any(|known| known.name == check.name && known.tolerance >= F16);
            let tolerance = if rounds { check.tolerance } else { 1e-6 };
            assert!(check.error.unwrap() <= tolerance, "{check:?}");
        }
    }

    #[test]
    fn checks_have_names_of_their_own() {
        let names: std::collections::BTreeSet<_> = CHECKS.iter().map(|check| check.name).collect();
        assert_eq!(names.len(), CHECKS.len());
    }

    #[test]
    fn a_stopped_check_has_no_result() {
        let cpu = devices::open(DeviceSpec::Cpu).unwrap();
        assert_eq!(run(&cpu, |done, _| done < 1), None);
    }

    #[test]
    fn nothing_checked_is_not_passed() {
        let empty = SelfCheck {
            checked_at: OffsetDateTime::UNIX_EPOCH,
            duration_s: 0.0,
            checks: Vec::new(),
        };
        assert!(!empty.passed());
    }
}
