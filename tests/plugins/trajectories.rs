//! Optimizers over several steps: against the algorithm in double precision, and across a save and a restore.

use lorasmith::training::optimizer::{Optimizer, StateDtype};
use serde_json::json;

use crate::support::{Folder, Weight, discover, gradient};

const START: [f32; 6] = [0.5, -1.25, 0.0, 2.0, -0.01, 1.0];
const LR: f64 = 0.02;

fn adamw() -> Box<dyn Optimizer> {
    let host = discover(&[], None);
    host.create_optimizer("adamw", &json!({ "weight_decay": 0.1 }))
        .unwrap()
}

/// `torch.optim.AdamW` as its documentation writes it, in double precision.
fn adamw_reference(mut w: f64, grads: impl Iterator<Item = f64>) -> f64 {
    let (mut m, mut v) = (0.0, 0.0);
    for (t, g) in (1..).zip(grads) {
        w -= LR * 0.1 * w;
        m = 0.9 * m + 0.1 * g;
        v = 0.999 * v + 0.001 * g * g;
        let (m_hat, v_hat) = (m / (1.0 - 0.9_f64.powi(t)), v / (1.0 - 0.999_f64.powi(t)));
        w -= LR * m_hat / (v_hat.sqrt() + 1e-8);
    }
    w
}

#[test]
fn adamw_follows_the_algorithm_for_twenty_steps() {
    let mut optimizer = adamw();
    let mut weight = Weight::new(&START, &[3, 2], LR);
    for step in 0..20 {
        weight
            .step(&mut *optimizer, step, &gradient(step, 6))
            .unwrap();
    }
    for (i, (found, start)) in weight.values().into_iter().zip(START).enumerate() {
        let grads = (0..20).map(|step| f64::from(gradient(step, 6)[i]));
        let expected = adamw_reference(f64::from(start), grads);
        // Twenty float32 updates of at most 0.02 on values near 1.
        assert!(
            (f64::from(found) - expected).abs() < 2e-6,
            "{i}: {found} {expected}"
        );
    }
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_to_the_bit() {
    let mut optimizer = adamw();
    let mut weight = Weight::new(&START, &[2, 1, 3], LR);
    for step in 0..7 {
        weight
            .step(&mut *optimizer, step, &gradient(step, 6))
            .unwrap();
    }
    let saved = optimizer.state().unwrap();
    let mut resumed = adamw();
    resumed.restore(saved.clone()).unwrap();
    assert_eq!(resumed.state().unwrap(), saved, "before the first step too");

    let mut resumed_weight = Weight::new(&weight.values(), &[2, 1, 3], LR);
    for step in 7..20 {
        let grad = gradient(step, 6);
        weight.step(&mut *optimizer, step, &grad).unwrap();
        resumed_weight.step(&mut *resumed, step, &grad).unwrap();
    }
    let bits = |weight: &Weight| {
        weight
            .values()
            .into_iter()
            .map(f32::to_bits)
            .collect::<Vec<_>>()
    };
    assert_eq!(bits(&resumed_weight), bits(&weight));
    assert_eq!(resumed.state().unwrap(), optimizer.state().unwrap());
}

#[test]
fn the_state_is_named_shaped_and_typed() {
    let mut optimizer = adamw();
    let mut weight = Weight::new(&START, &[3, 2], LR);
    weight.step(&mut *optimizer, 0, &gradient(0, 6)).unwrap();
    let state = optimizer.state().unwrap();
    let facts: Vec<_> = state
        .iter()
        .map(|state| {
            (
                state.name.as_str(),
                state.shape.clone(),
                state.dtype,
                state.data.len(),
            )
        })
        .collect();
    assert_eq!(
        facts,
        [
            ("exp_avg", vec![3, 2], StateDtype::F32, 24),
            ("exp_avg_sq", vec![3, 2], StateDtype::F32, 24),
            ("step", vec![], StateDtype::I64, 8),
        ]
    );
    assert!(
        state
            .iter()
            .all(|state| state.param == "lora_unet_a.lora_down.weight")
    );
    assert_eq!(state[2].data, 1_i64.to_le_bytes());
}

#[test]
fn a_broken_state_is_an_error_of_the_step() {
    let mut optimizer = adamw();
    let mut weight = Weight::new(&START, &[6], LR);
    weight.step(&mut *optimizer, 0, &gradient(0, 6)).unwrap();
    let saved = optimizer.state().unwrap();

    let mut short = saved.clone();
    short[0].data.pop();
    let mut misshapen = saved;
    misshapen[0].shape = vec![2, 3];
    for broken in [short, misshapen] {
        let mut resumed = adamw();
        let restored = resumed.restore(broken);
        let outcome = restored.and_then(|()| weight.step(&mut *resumed, 1, &gradient(1, 6)));
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("exp_avg"), "{error}");
    }
}

#[test]
fn a_plugin_in_c_does_the_same_arithmetic() {
    let folder = Folder::new();
    folder.build("sgd_c", "plugins/sgd-c/sgd.c", &["-pedantic"]);
    let host = folder.discover();
    let mut optimizer = host.create_optimizer("sgd-momentum", &json!({})).unwrap();
    let mut weight = Weight::new(&[1.0, -1.0], &[2], 0.5);
    weight.step(&mut *optimizer, 0, &[1.0, 2.0]).unwrap();
    // buffer = [1, 2]
    assert_eq!(weight.values(), [0.5, -2.0]);
    weight.step(&mut *optimizer, 1, &[0.0, 4.0]).unwrap();
    // buffer = [0.9, 5.8]
    let expected = [0.5 - 0.5 * 0.9, -2.0 - 0.5 * 5.8];
    for (found, expected) in weight.values().into_iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
    assert_eq!(optimizer.state().unwrap()[0].name, "momentum_buffer");
    let errors = host
        .check_optimizer_settings("sgd-momentum", &json!({ "lr": 1 }))
        .unwrap_err();
    assert_eq!(errors[0].pointer.as_deref(), Some("/lr"));
}
