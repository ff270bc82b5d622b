//! How far a device's numbers are from the CPU's.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::CheckResult;
use super::inputs::Outputs;

/// Does both computations and compares every tensor of theirs.
pub fn judge(
    name: &str,
    tolerance: f64,
    found: impl FnOnce() -> Outputs,
    expected: impl FnOnce() -> Outputs,
) -> CheckResult {
    let worst = read(found).and_then(|found| {
        let expected = read(expected).map_err(|message| format!("on the CPU: {message}"))?;
        worst(&found, &expected)
    });
    let (error, detail) = match worst {
        Ok((error, tensor)) => (Some(error), tensor),
        Err(message) => (None, message),
    };
    CheckResult {
        name: name.to_owned(),
        error,
        tolerance,
        passed: error.is_some_and(|error| error <= tolerance),
        detail,
    }
}

/// Names and elements of tensors.
type Values = Vec<(String, Vec<f32>)>;

/// Computes, and waits for the results; a panic is an error like others.
fn read(compute: impl FnOnce() -> Outputs) -> Result<Values, String> {
    let values = AssertUnwindSafe(|| {
        compute()
            .into_iter()
            .map(|(name, tensor)| {
                let tensor = tensor.ok_or_else(|| format!("{name}: nothing arrives there"))?;
                match tensor.try_into_vec_as::<f32>() {
                    Ok(values) => Ok((name, values)),
                    Err(error) => Err(format!("{name}: {error}")),
                }
            })
            .collect()
    });
    catch_unwind(values).unwrap_or_else(|panic| Err(text_of(panic.as_ref())))
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    format!("broke off: {}", text.unwrap_or("a panic without words"))
}

/// The largest error, and the tensor that it is in.
fn worst(found: &Values, expected: &Values) -> Result<(f64, String), String> {
    if found.len() != expected.len() {
        return Err(format!(
            "{} tensors, expected {}",
            found.len(),
            expected.len()
        ));
    }
    let mut worst = (0.0, String::new());
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let error = error(found, expected).map_err(|message| format!("{name}: {message}"))?;
        if error >= worst.0 {
            worst = (error, name.clone());
        }
    }
    Ok(worst)
}

/// Largest difference in units of the largest expected value.
fn error(found: &[f32], expected: &[f32]) -> Result<f64, String> {
    if found.len() != expected.len() {
        return Err(format!(
            "{} values, expected {}",
            found.len(),
            expected.len()
        ));
    }
    let wrong = found.iter().filter(|value| !value.is_finite()).count();
    if wrong > 0 {
        return Err(format!("{wrong} of {} values are not finite", found.len()));
    }
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let difference = largest(
        &mut found
            .iter()
            .zip(expected)
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()),
    );
    let scale = largest(&mut expected.iter().map(|value| f64::from(*value).abs()));
    // What should be all zeros has no scale of its own.
    Ok(if scale == 0.0 {
        difference
    } else {
        difference / scale
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;

    fn outputs(values: &[f32]) -> Outputs {
        let tensor = Tensor::<1>::from_data(values, &Device::flex());
        vec![("output".to_owned(), Some(tensor))]
    }

    fn judged(found: impl FnOnce() -> Outputs) -> CheckResult {
        judge("faulty", 1e-4, found, || outputs(&[1.0, -2.0, 0.5]))
    }

    #[test]
    fn equal_numbers_pass() {
        let result = judged(|| outputs(&[1.0, -2.0, 0.5]));
        assert_eq!((result.error, result.passed), (Some(0.0), true));
    }

    #[test]
    fn a_wrong_number_is_found_and_measured_by_the_largest() {
        let result = judged(|| outputs(&[1.0, -2.0, 0.51]));
        assert!(!result.passed);
        assert!((result.error.unwrap() - 0.005).abs() < 1e-7, "{result:?}");
        assert_eq!(result.detail, "output");
    }

    #[test]
    fn what_is_not_finite_missing_or_panics_has_failed() {
        let result = judged(|| outputs(&[1.0, f32::NAN, 0.5]));
        assert_eq!((result.error, result.passed), (None, false));
        assert_eq!(result.detail, "output: 1 of 3 values are not finite");

        let result = judged(|| outputs(&[1.0, -2.0]));
        assert_eq!(result.detail, "output: 2 values, expected 3");
        let result = judged(Vec::new);
        assert_eq!(result.detail, "0 tensors, expected 1");
        let result = judged(|| vec![("gradient".to_owned(), None)]);
        assert_eq!(result.detail, "gradient: nothing arrives there");

        let result = judged(|| panic!("the device is lost"));
        assert_eq!((result.error, result.passed), (None, false));
        assert_eq!(result.detail, "broke off: the device is lost");
    }

    #[test]
    fn a_fault_on_the_cpu_is_told_apart() {
        let result = judge("faulty", 1.0, || outputs(&[1.0]), || panic!("no memory"));
        assert_eq!(result.detail, "on the CPU: broke off: no memory");
        assert!(!result.passed);
    }
}
