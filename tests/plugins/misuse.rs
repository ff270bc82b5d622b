//! An optimizer that misuses the host ends its run with a message and changes nothing; the host lives on.
//!
//! One test per misuse. The cases are in `fixtures/misuse.c`; most of them claim success afterwards.

use lorasmith::training::optimizer::Optimizer;
use serde_json::json;

use crate::support::{Folder, Weight, gradient};

const START: [f32; 6] = [1.0, -2.0, 3.0, 0.5, 0.0, -0.25];

fn misusing(folder: &Folder, what: &str) -> Box<dyn Optimizer> {
    folder.build("misuse", "tests/plugins/fixtures/misuse.c", &[]);
    let host = folder.discover();
    host.create_optimizer("misuse", &json!({ "what": what }))
        .unwrap()
}

fn weight() -> Weight {
    Weight::new(&START, &[2, 3], 0.1)
}

/// The step fails with these words, nothing has changed, and the next step is refused in the same way.
fn assert_fails(what: &str, words: &str) {
    let folder = Folder::new();
    let mut optimizer = misusing(&folder, what);
    let mut weight = weight();
    for step in 0..2 {
        let error = weight
            .step(&mut *optimizer, step, &gradient(step, 6))
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "`{words}` in: {error}");
        assert!(error.contains("misuse"), "names the optimizer: {error}");
        assert_eq!(weight.values(), START);
        assert_eq!(optimizer.state().unwrap(), []);
    }
}

#[test]
fn without_misuse_the_assignment_counts() {
    let folder = Folder::new();
    let mut optimizer = misusing(&folder, "nothing_wrong");
    let mut weight = weight();
    weight.step(&mut *optimizer, 0, &gradient(0, 6)).unwrap();
    assert_eq!(weight.values(), [0.0; 6]);
}

#[test]
fn stale_handle() {
    let folder = Folder::new();
    let mut optimizer = misusing(&folder, "stale_handle");
    let mut weight = weight();
    weight.step(&mut *optimizer, 0, &gradient(0, 6)).unwrap();
    let error = weight
        .step(&mut *optimizer, 1, &gradient(1, 6))
        .unwrap_err()
        .to_string();
    assert!(error.contains("of another step"), "{error}");
}

#[test]
fn fail_with_message() {
    assert_fails("fail_with_message", "the gradient looks sad");
}

#[test]
fn fail_silently() {
    assert_fails("fail_silently", "status 42 without a message");
}

#[test]
fn zero_handle() {
    assert_fails("zero_handle", "dead tensor handle 0x0: zero");
}

#[test]
fn made_up_handle() {
    assert_fails("made_up_handle", "dead tensor handle");
}

#[test]
fn released_handle() {
    assert_fails("released_handle", "dead tensor handle");
}

#[test]
fn released_twice() {
    assert_fails("released_twice", "dead tensor handle");
}

#[test]
fn axis_out_of_range() {
    assert_fails("axis_out_of_range", "axis 2 of a tensor of shape [2, 3]");
}

#[test]
fn negative_axis_out_of_range() {
    assert_fails("negative_axis_out_of_range", "axis -3");
}

#[test]
fn shapes_that_do_not_broadcast() {
    assert_fails(
        "shapes_that_do_not_broadcast",
        "shapes [2, 3] and [2] do not broadcast",
    );
}

#[test]
fn matmul_of_misfits() {
    assert_fails("matmul_of_misfits", "matmul of [2, 3] and [2, 3]");
}

#[test]
fn reshape_to_another_size() {
    assert_fails("reshape_to_another_size", "reshape of [2, 3] to [2]");
}

#[test]
fn rank_too_high() {
    assert_fails("rank_too_high", "a tensor of rank 5");
}

#[test]
fn zero_dimension() {
    assert_fails("zero_dimension", "a dimension of zero");
}

#[test]
fn huge_tensor() {
    assert_fails("huge_tensor", "elements");
}

#[test]
fn null_shape() {
    assert_fails("null_shape", "null or misaligned");
}

#[test]
fn null_out() {
    assert_fails("null_out", "null or misaligned");
}

#[test]
fn misaligned_out() {
    assert_fails("misaligned_out", "null or misaligned");
}

#[test]
fn assign_to_a_stranger() {
    assert_fails("assign_to_a_stranger", "parameter number 84 is not listed");
}

#[test]
fn assign_another_shape() {
    assert_fails("assign_another_shape", "a tensor of shape [2] to");
}

#[test]
fn state_of_another_shape() {
    assert_fails("state_of_another_shape", "state `a-state`");
}

#[test]
fn state_never_asked_for() {
    assert_fails("state_never_asked_for", "before it was asked for");
}

#[test]
fn state_of_unknown_kind() {
    assert_fails("state_of_unknown_kind", "unknown kind 9");
}

#[test]
fn global_state_like_a_parameter() {
    assert_fails("global_state_like_a_parameter", "not listed");
}

#[test]
fn counter_as_tensor() {
    assert_fails("counter_as_tensor", "is a counter");
}

#[test]
fn name_not_utf8() {
    assert_fails("name_not_utf8", "not UTF-8");
}

#[test]
fn name_null() {
    assert_fails("name_null", "null");
}

#[test]
fn read_scalar_of_many() {
    assert_fails(
        "read_scalar_of_many",
        "read_scalar of a tensor of shape [2, 3]",
    );
}

#[test]
fn read_to_too_little_room() {
    assert_fails(
        "read_to_too_little_room",
        "read of 6 elements to room for 2",
    );
}

#[test]
fn write_of_too_few() {
    assert_fails("write_of_too_few", "write of 1 floats to shape [2]");
}

#[test]
fn clamp_upside_down() {
    assert_fails("clamp_upside_down", "clamp");
}

#[test]
fn another_thread() {
    assert_fails("another_thread", "status 6 without a message");
}

#[test]
fn eight_bits_as_tensor() {
    assert_fails("eight_bits_as_tensor", "is in 8 bits with a sign");
}

#[test]
fn eight_bits_without_a_sign() {
    assert_fails("eight_bits_without_a_sign", "is in 8 bits with a sign");
}

#[test]
fn state_kind_changed_after_restore() {
    let folder = Folder::new();
    let mut optimizer = misusing(&folder, "state_kind_changed");
    let mut weight = weight();
    weight.step(&mut *optimizer, 0, &gradient(0, 6)).unwrap();
    let saved = optimizer.state().unwrap();
    optimizer.restore(saved).unwrap();
    let error = weight
        .step(&mut *optimizer, 1, &gradient(1, 6))
        .unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("a-state") && error.contains("is a tensor"),
        "{error}"
    );
}

#[test]
fn states_cannot_be_changed_in_eval() {
    let folder = Folder::new();
    let mut optimizer = misusing(&folder, "nothing_wrong");
    let weight = weight();
    let error = weight.eval(&mut *optimizer).unwrap_err().to_string();
    assert!(
        error.contains("`eval` may not change the state `a-state`"),
        "{error}"
    );
    assert_eq!(optimizer.state().unwrap(), []);
}

/// Of a process, in bytes.
#[cfg(target_os = "linux")]
fn resident_bytes() -> usize {
    memory_stats::memory_stats().unwrap().physical_mem
}

#[test]
#[cfg(target_os = "linux")]
fn handles_that_leak_are_freed_with_their_step() {
    let folder = Folder::new();
    let mut optimizer = misusing(&folder, "leaks_handles");
    // 32 KiB a tensor: 16 of them in each of 10 000 steps would be 5 GB.
    let mut weight = Weight::new(&[0.5; 8192], &[64, 128], 0.1);
    let grad = gradient(0, 8192);
    let mut run = |steps: std::ops::Range<u64>| {
        for step in steps {
            weight.step(&mut *optimizer, step, &grad).unwrap();
        }
        resident_bytes()
    };
    let warm = run(0..500);
    let after = run(500..10_000);
    // Other tests run in this process at the same time.
    assert!(after < warm + (256 << 20), "{warm} bytes became {after}");
}
