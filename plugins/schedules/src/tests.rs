//! The factors against those of sd-scripts, transformers, diffusers, torch and pytorch_optimizer.

use lorasmith_sdk::testing::factors;
use lorasmith_sdk::{Run, Schedule};
use serde_json::{Value, json};

use super::*;

const KOHYA: &str = include_str!("../../../tests/fixtures/kohya/kohya_golden_lr.json");
const OTHERS: &str = include_str!("../../../tests/fixtures/optimizers/schedules.json");

fn run(base_lr: f64, warmup_steps: u64, total_steps: u64) -> Run {
    Run {
        base_lr,
        warmup_steps,
        total_steps,
    }
}

/// The schedule has the learning rates that sd-scripts had, with a group rate of 2e-4, an optimizer's of 1e-4 and 20
/// steps.
fn assert_kohya<S: Schedule>(vector: &str, settings: Value, warmup_steps: u64) {
    let golden: Value = serde_json::from_str(KOHYA).unwrap();
    let expected: Vec<f64> = serde_json::from_value(golden["lr"][vector].clone()).unwrap();
    let found = factors::<S>(settings, run(1e-4, warmup_steps, 20), 20).unwrap();
    for (step, (factor, lr)) in found.iter().zip(expected).enumerate() {
        // Roundings of the product.
        assert!(
            (factor * 2e-4 - lr).abs() < 1e-18,
            "{vector}, step {step}: {factor} {lr}"
        );
    }
}

#[test]
fn the_rates_are_those_of_sd_scripts() {
    assert_kohya::<Constant>("constant", json!({}), 0);
    assert_kohya::<ConstantWithWarmup>("constant_with_warmup", json!({}), 4);
    assert_kohya::<Linear>("linear", json!({}), 4);
    assert_kohya::<Cosine>("cosine", json!({}), 4);
    assert_kohya::<Cosine>("cosine_w_float0.1", json!({}), 2);
    assert_kohya::<CosineWithRestarts>("cosine_with_restarts_3", json!({"num_cycles": 3}), 4);
    assert_kohya::<Polynomial>("polynomial_2", json!({"power": 2.0}), 4);
    assert_kohya::<InverseSqrt>("inverse_sqrt", json!({}), 4);
    let least = json!({"min_lr_ratio": 0.1});
    assert_kohya::<CosineWithMinLr>("cosine_with_min_lr_0.1", least, 4);
    let decay = json!({"decay_steps": 5, "min_lr_ratio": 0.1});
    assert_kohya::<WarmupStableDecay>("warmup_stable_decay_5", decay, 4);
}

fn assert_other<S: Schedule>(vector: &str) {
    let golden: Value = serde_json::from_str(OTHERS).unwrap();
    let golden = &golden[vector];
    let expected: Vec<f64> = serde_json::from_value(golden["factors"].clone()).unwrap();
    let warmup_steps = golden["warmup_steps"].as_u64().unwrap();
    let run = run(1e-4, warmup_steps, golden["total_steps"].as_u64().unwrap());
    let found = factors::<S>(golden["settings"].clone(), run, expected.len() as u64).unwrap();
    for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() < 1e-12,
            "{vector}, step {step}: {found} {expected}"
        );
    }
}

#[test]
fn the_rest_are_those_of_their_references() {
    assert_other::<OneCycle>("one_cycle");
    assert_other::<OneCycle>("one_cycle_linear");
    assert_other::<PiecewiseConstant>("piecewise_constant");
    assert_other::<Rex>("rex");
    assert_other::<InverseSqrt>("inverse_sqrt_timescale");
    assert_other::<CosineWithMinLr>("cosine_with_min_lr_cycles");
    assert_other::<WarmupStableDecay>("warmup_stable_decay");
}

#[test]
fn without_a_warm_up_there_is_none() {
    for message in [
        factors::<Constant>(json!({}), run(1e-4, 4, 20), 1).unwrap_err(),
        factors::<PiecewiseConstant>(json!({}), run(1e-4, 4, 20), 1).unwrap_err(),
    ] {
        assert!(message.contains("constant_with_warmup"), "{message}");
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let piecewise = |settings| factors::<PiecewiseConstant>(settings, run(1e-4, 0, 20), 1);
    let message = piecewise(json!({"steps": [5], "factors": [1.0]})).unwrap_err();
    assert!(message.contains("1 steps and 1 factors"), "{message}");
    let message = piecewise(json!({"steps": [5, 5], "factors": [1, 1, 1]})).unwrap_err();
    assert!(message.contains("ascend"), "{message}");
    let settings = json!({"decay_steps": 18});
    let message = factors::<WarmupStableDecay>(settings, run(1e-4, 4, 20), 1).unwrap_err();
    assert!(message.contains("at most the run's 20"), "{message}");
}

fn assert_sane<S: Schedule>(settings: Value) {
    for (warmup_steps, total_steps) in [(0, 0), (5, 5), (9, 3), (0, 1), (2, 7)] {
        for base_lr in [1e-4, 1e-9, 0.0] {
            let run = run(base_lr, warmup_steps, total_steps);
            let Ok(found) = factors::<S>(settings.clone(), run, 30) else {
                continue; // refused at the creation of the run
            };
            let fits = |f: &f64| f.is_finite() && (0.0..=1.0).contains(f);
            assert!(found.iter().all(fits), "{}, {run:?}: {found:?}", S::ID);
        }
    }
}

#[test]
fn odd_lengths_and_steps_beyond_the_run_stay_sane() {
    assert_sane::<Constant>(json!({}));
    assert_sane::<ConstantWithWarmup>(json!({}));
    assert_sane::<Linear>(json!({}));
    assert_sane::<Cosine>(json!({"num_cycles": 2.5}));
    assert_sane::<CosineWithRestarts>(json!({"num_cycles": 3}));
    assert_sane::<CosineWithMinLr>(json!({}));
    assert_sane::<Polynomial>(json!({"power": 1.5}));
    assert_sane::<InverseSqrt>(json!({}));
    assert_sane::<WarmupStableDecay>(json!({"decay_steps": 1}));
    assert_sane::<PiecewiseConstant>(json!({"steps": [3], "factors": [1.0, 0.5]}));
    assert_sane::<Rex>(json!({}));
    assert_sane::<OneCycle>(json!({}));
}
