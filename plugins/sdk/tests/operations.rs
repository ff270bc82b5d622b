//! Each operation through the whole operation table, against numbers computed by hand.

use lorasmith_sdk::testing::TestHost;
use lorasmith_sdk::{Error, Optimizer, Result, Step, Tensor, schemars, serde};
use serde_json::json;

/// An optimizer that does what its setting names.
#[derive(serde::Deserialize, schemars::JsonSchema)]
#[serde(crate = "lorasmith_sdk::serde")]
#[schemars(crate = "lorasmith_sdk::schemars")]
struct Probe {
    what: String,
}

impl Optimizer for Probe {
    const ID: &'static str = "probe";
    const SUMMARY: &'static str = "Tests the operation table.";

    fn step(&self, step: &Step<'_>) -> Result<()> {
        match self.what.as_str() {
            "elementwise" => elementwise(step),
            "broadcasting" => broadcasting(step),
            "reductions" => reductions(step),
            "shapes" => shapes(step),
            "states" => states(step),
            "host errors" => {
                let w = step.params()[0].value();
                // The reshape fails; what follows is dead, and the assignment says so.
                step.params()[0].set_value(&(w.reshape(&[7]) * 2.0 + 1.0))
            }
            "ignored errors" => {
                let _ = step.params()[0].value().reshape(&[7]);
                Ok(())
            }
            "own errors" => Err(Error::new("no thanks")),
            _ => panic!("a bug"),
        }
    }
}

fn run(what: &str) -> std::result::Result<TestHost<Probe>, String> {
    let mut host = TestHost::<Probe>::new(json!({ "what": what }))?.param(
        "w",
        &[2, 2],
        &[1.0, 4.0, -9.0, 0.0],
        0.1,
    );
    host.step(&[vec![0.5; 4]])?;
    Ok(host)
}

#[track_caller]
fn assert_values(tensor: &Tensor<'_>, expected: &[f32]) {
    let found = tensor.read().expect("a live tensor");
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found - expected).abs() <= 1e-6 * expected.abs().max(1.0),
            "{found} {expected}"
        );
    }
}

fn elementwise(step: &Step<'_>) -> Result<()> {
    let w = step.params()[0].value();
    let p = step.tensor(&[1.0, 4.0, 0.25], &[3]);
    let q = step.tensor(&[2.0, 2.0, 0.25], &[3]);
    for (found, expected) in [
        (-&w, &[-1.0, -4.0, 9.0, 0.0][..]),
        (w.abs(), &[1.0, 4.0, 9.0, 0.0]),
        (w.sign(), &[1.0, 1.0, -1.0, 0.0]),
        (p.sqrt(), &[1.0, 2.0, 0.5]),
        (p.rsqrt(), &[1.0, 0.5, 2.0]),
        (w.square(), &[1.0, 16.0, 81.0, 0.0]),
        (
            w.clamp(-1.0, 1.0).exp(),
            &[
                std::f32::consts::E,
                std::f32::consts::E,
                1.0 / std::f32::consts::E,
                1.0,
            ],
        ),
        (p.log(), &[0.0, 4.0_f32.ln(), 0.25_f32.ln()]),
        (p.powf(1.5), &[1.0, 8.0, 0.125]),
        (p.pow(&q), &[1.0, 16.0, 0.25_f32.powf(0.25)]),
        (p.min(&q), &[1.0, 2.0, 0.25]),
        (p.max(&q), &[2.0, 4.0, 0.25]),
        (p.greater(&q), &[0.0, 1.0, 0.0]),
        (w.greater_than(0.0), &[1.0, 1.0, 0.0, 0.0]),
        (&p - &q, &[-1.0, 2.0, 0.0]),
        (&p / &q, &[0.5, 2.0, 1.0]),
        (&p * &q + &p, &[3.0, 12.0, 0.3125]),
        (&p - 1.0, &[0.0, 3.0, -0.75]),
        (1.0 - &p, &[0.0, -3.0, 0.75]),
        (&p / 2.0, &[0.5, 2.0, 0.125]),
        (2.0 / &p, &[2.0, 0.5, 8.0]),
        (2.0_f32 * &p + 1.0_f32, &[3.0, 9.0, 1.5]),
        (p.lerp(&q, 0.25), &[1.25, 3.5, 0.25]),
        (p.lerp(&q, 0.75), &[1.75, 2.5, 0.25]),
        (w.select(&step.full(&[], 7.0), &w), &[7.0, 7.0, 7.0, 0.0]),
        (w.clamp(-2.0, 3.0), &[1.0, 3.0, -2.0, 0.0]),
    ] {
        assert_values(&found, expected);
    }
    Ok(())
}

fn broadcasting(step: &Step<'_>) -> Result<()> {
    let w = step.params()[0].value();
    let row = step.tensor(&[10.0, 20.0], &[2]);
    let column = step.tensor(&[10.0, 20.0], &[2, 1]);
    assert_values(&(&w + &row), &[11.0, 24.0, 1.0, 20.0]);
    assert_values(&(&w + &column), &[11.0, 14.0, 11.0, 20.0]);
    assert_values(&(&row * &column), &[100.0, 200.0, 200.0, 400.0]);
    assert_eq!((&row * &column).shape()?, [2, 2]);
    Ok(())
}

fn reductions(step: &Step<'_>) -> Result<()> {
    let w = step.params()[0].value();
    assert_values(&w.sum(), &[-4.0]);
    assert_values(&w.mean(), &[-1.0]);
    assert_values(&w.max_all(), &[4.0]);
    assert_values(&w.sum_axis(0), &[-8.0, 4.0]);
    assert_values(&w.mean_axis(-1), &[2.5, -4.5]);
    assert_values(&w.max_axis(1), &[4.0, 0.0]);
    assert_eq!(w.sum().shape()?, [0_u64; 0]);
    assert_eq!(w.sum_axis(1).shape()?, [2, 1]);
    assert_eq!(w.dot(&w).read_scalar()?, 98.0);
    assert!((w.norm().read_scalar()? - 98.0_f64.sqrt()).abs() < 1e-6);
    Ok(())
}

fn shapes(step: &Step<'_>) -> Result<()> {
    let w = step.params()[0].value();
    assert_values(&w.transpose(0, 1), &[1.0, -9.0, 4.0, 0.0]);
    assert_eq!(w.reshape(&[4, 1]).shape()?, [4, 1]);
    assert_values(&w.matmul(&w), &[-35.0, 4.0, -9.0, -36.0]);
    assert_values(&step.zeros(&[3]), &[0.0; 3]);
    Ok(())
}

fn states(step: &Step<'_>) -> Result<()> {
    let p = &step.params()[0];
    let doubled = p.state("a") + p.value() * 2.0;
    p.set_state("a", &doubled)?;
    // Asked again in the same step, a state has its new content.
    assert_values(&p.state("a"), &[2.0, 8.0, -18.0, 0.0]);
    p.set_state("row", &(p.shaped_state("row", &[1, 2]) + 3.0))
        .and_then(|()| step.set_state("d", &(step.scalar_state("d") + 5.0)))?;
    step.set_counter("k", step.counter("k")? + 2)?;
    p.count("n")?;
    p.set_value(&p.grad())
}

#[test]
fn each_operation_by_hand() {
    for what in ["elementwise", "broadcasting", "reductions", "shapes"] {
        run(what).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[test]
fn states_live_from_step_to_step() {
    let mut host = run("states").unwrap();
    assert_eq!(host.params[0].value, [0.5; 4]);
    host.params[0].value = vec![1.0, 4.0, -9.0, 0.0];
    assert_eq!(host.state("w", "row").unwrap(), [3.0, 3.0]);
    // The second step finds 2w where the first found 0, so its own check fails and nothing changes.
    let error = host.step(&[vec![0.5; 4]]).unwrap_err();
    assert!(error.contains("panicked"), "{error}");
    assert_eq!(host.state("w", "a").unwrap(), [2.0, 8.0, -18.0, 0.0]);
    assert_eq!(host.state("", "d").unwrap(), [5.0]);
    assert_eq!(host.state("", "k").unwrap(), [2.0]);
    assert_eq!(host.state("w", "n").unwrap(), [1.0]);
}

#[test]
fn errors_reach_the_user_and_panics_stop_at_the_boundary() {
    for (what, words) in [
        ("host errors", "reshape of [2, 2] to [7]"),
        ("ignored errors", "reshape of [2, 2] to [7]"),
        ("own errors", "no thanks"),
        ("something else", "the plugin panicked: a bug"),
    ] {
        let error = run(what).err().unwrap();
        assert!(error.contains(words), "{what}: {error}");
    }
}
