//! What was compared, and how far off it was.

use std::fmt;

use burn::tensor::Tensor;
use serde::Serialize;

use super::goldens::{GoldenError, GoldenFile};
use crate::diffusion::devices::DeviceInfo;

/// One comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Item {
    /// `diffusers` or `single file`.
    pub layout: String,
    /// What was compared.
    pub name: String,
    /// Largest difference; `null` when it is not a number.
    pub max_error: f64,
    /// Largest difference that is allowed.
    pub tolerance: f64,
    /// Whether it is within.
    pub passed: bool,
    /// What else there is to say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// Every comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Id of the device.
    pub device: String,
    /// Its name and driver.
    pub device_name: String,
    /// The comparisons.
    pub items: Vec<Item>,
    /// Goldens that were left out, and why.
    pub skipped: Vec<String>,
}

impl VerifyReport {
    pub(super) fn new(device: &DeviceInfo) -> Self {
        Self {
            device: device.id.clone(),
            device_name: format!("{} {}", device.name, device.driver)
                .trim()
                .to_owned(),
            items: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// Whether something was compared and all of it is within its tolerance.
    pub fn passed(&self) -> bool {
        !self.items.is_empty() && self.items.iter().all(|item| item.passed)
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "device  {} ({})", self.device, self.device_name)?;
        for item in &self.items {
            writeln!(
                f,
                "{}  {:<12} {:<52} {:>8.1e} of {:>6.0e}  {}",
                if item.passed { "ok  " } else { "FAIL" },
                item.layout,
                item.name,
                item.max_error,
                item.tolerance,
                item.note
            )?;
        }
        for skipped in &self.skipped {
            writeln!(f, "skip  {skipped}")?;
        }
        let failed = self.items.iter().filter(|item| !item.passed).count();
        writeln!(f, "{} compared, {failed} failed", self.items.len())
    }
}

/// Adds comparisons of one layout to a report.
pub struct Checker<'a> {
    layout: &'static str,
    report: &'a mut VerifyReport,
}

impl<'a> Checker<'a> {
    pub fn new(layout: &'static str, report: &'a mut VerifyReport) -> Self {
        Self { layout, report }
    }

    /// A difference against a tolerance.
    pub fn add(&mut self, name: impl Into<String>, max_error: f64, tolerance: f64, note: String) {
        self.report.items.push(Item {
            layout: self.layout.to_owned(),
            name: name.into(),
            max_error,
            tolerance,
            passed: max_error <= tolerance, // false for what is not a number
            note,
        });
    }

    /// A tensor of this build against a golden one: largest absolute difference.
    pub fn tensor<const D: usize>(
        &mut self,
        name: &str,
        actual: Tensor<D>,
        file: &GoldenFile,
        key: &str,
        tolerance: f64,
    ) -> Result<(), GoldenError> {
        let expected = file.values(key)?;
        let actual: Vec<f64> = actual.into_data().iter::<f64>().collect();
        self.numbers(name, &actual, expected, tolerance);
        Ok(())
    }

    /// Numbers of this build against golden ones: largest absolute difference.
    pub fn numbers(&mut self, name: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
        if actual.len() == expected.len() {
            self.add(name, worst(actual, expected), tolerance, String::new());
        } else {
            let note = format!("has {} elements, expected {}", actual.len(), expected.len());
            self.add(name, f64::INFINITY, tolerance, note);
        }
    }

    /// The same, relative to each expected number.
    pub fn relative(&mut self, name: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
        let scaled = |values: &[f64]| -> Vec<f64> {
            let scale = |(value, expected): (&f64, &f64)| match *expected {
                0.0 => *value,
                expected => value / expected.abs(),
            };
            values.iter().zip(expected).map(scale).collect()
        };
        self.numbers(name, &scaled(actual), &scaled(expected), tolerance);
    }

    /// Something that must be equal.
    pub fn equal<T: PartialEq>(&mut self, name: &str, actual: &[T], expected: &[T]) {
        let wrong = actual.iter().zip(expected).filter(|(a, b)| a != b).count()
            + actual.len().abs_diff(expected.len());
        self.add(name, wrong as f64, 0.0, String::new());
    }

    /// A golden that this build does not compare.
    pub fn skip(&mut self, what: String) {
        if !self.report.skipped.contains(&what) {
            self.report.skipped.push(what);
        }
    }
}

/// The largest difference; not a number when one of the numbers is none.
pub fn worst(actual: &[f64], expected: &[f64]) -> f64 {
    let mut worst = 0.0_f64;
    for (a, b) in actual.iter().zip(expected) {
        let difference = (a - b).abs();
        if difference.is_nan() {
            return f64::NAN;
        }
        worst = worst.max(difference);
    }
    worst
}
