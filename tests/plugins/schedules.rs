//! The learning rates of sd-scripts, through the shared library.

use serde_json::{Value, json};

use crate::support::discover;

const GOLDEN: &str = include_str!("../fixtures/kohya/kohya_golden_lr.json");
const GROUP_LR: f64 = 2e-4;

fn assert_golden(id: &str, vector: &str, warmup_steps: u64) {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let expected: Vec<f64> = serde_json::from_value(golden["lr"][vector].clone()).unwrap();
    let host = discover(&[], None);
    let schedule = host
        .create_scheduler(id, &json!({}), GROUP_LR, warmup_steps, 20)
        .unwrap();
    for (step, expected) in (0..).zip(expected) {
        let found = schedule.factor(step).unwrap() * GROUP_LR;
        // One rounding of the product.
        assert!(
            (found - expected).abs() < 1e-18,
            "{vector} at {step}: {found} {expected}"
        );
    }
}

#[test]
fn constant() {
    assert_golden("constant", "constant", 0);
}

#[test]
fn constant_with_warmup() {
    assert_golden("constant_with_warmup", "constant_with_warmup", 4);
}

#[test]
fn cosine() {
    assert_golden("cosine", "cosine", 4);
    assert_golden("cosine", "cosine_w_float0.1", 2);
}

#[test]
fn constant_takes_no_warm_up() {
    let host = discover(&[], None);
    let error = host
        .create_scheduler("constant", &json!({}), GROUP_LR, 4, 20)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("constant_with_warmup"), "{error}");
}
