//! The end of a step: everything that was assigned is computed.

use std::collections::HashMap;

use lorasmith_abi::host::{Dims, StateValue, States};

use super::super::tensors::BurnTensor;
use super::program::{Made, Root};
use super::{LazyBlocks, LazyTensor, LazyTensors};

/// What was assigned to one parameter and to its states of the same shape.
#[derive(Default)]
struct Bundle<'a> {
    roots: Vec<Root>,
    targets: Vec<Target<'a>>,
}

/// Where a result belongs.
enum Target<'a> {
    Value(usize),
    State(&'a mut StateValue<LazyTensors>),
}

#[derive(Default)]
struct Bundles<'a> {
    all: Vec<Bundle<'a>>,
    known: HashMap<(&'a str, Dims), usize>,
}

impl<'a> Bundles<'a> {
    fn add(&mut self, param: &'a str, root: Root, target: Target<'a>) {
        let next = self.all.len();
        let key = (param, root.tensor().dims());
        let place = *self.known.entry(key).or_insert(next);
        if place == next {
            self.all.push(Bundle::default());
        }
        self.all[place].roots.push(root);
        self.all[place].targets.push(target);
    }
}

/// Computes new values, in the order of `names`, and the states that have changed.
pub fn settle(
    tensors: &LazyTensors,
    names: &[&str],
    values: Vec<Option<LazyTensor>>,
    states: &mut States<LazyTensors>,
) -> Result<Vec<Option<BurnTensor>>, String> {
    let mut bundles = Bundles::default();
    let mut settled = vec![None; values.len()];
    for (index, (name, value)) in names.iter().zip(values).enumerate() {
        match value {
            Some(value) if value.is_leaf() => settled[index] = Some(tensors.value(&value)?),
            Some(value) => bundles.add(name, Root::Values(value), Target::Value(index)),
            None => {}
        }
    }
    for (param, _, state) in states.iter_mut() {
        if let Some(root) = pending(state) {
            bundles.add(param, root, Target::State(state));
        }
    }
    let (roots, targets): (Vec<_>, Vec<_>) = bundles
        .all
        .into_iter()
        .map(|bundle| (bundle.roots, bundle.targets))
        .unzip();
    let made = tensors.compute(&roots)?;
    // Nothing else keeps expressions now; what they were made of goes with them.
    drop(roots);
    let results = targets
        .into_iter()
        .flatten()
        .zip(made.into_iter().flatten());
    for (target, made) in results {
        match (target, made) {
            (Target::Value(index), Made::Values(value)) => {
                settled[index] = Some(tensors.value(&value)?);
            }
            (Target::State(StateValue::Tensor(state, _)), Made::Values(value)) => *state = value,
            (Target::State(StateValue::Blocks(state, code, _)), Made::Codes(blocks)) => {
                *state = LazyBlocks::ready(blocks, *code);
            }
            _ => return Err("a result of another kind than was asked for".to_owned()),
        }
    }
    Ok(settled)
}

/// What is left to compute of a state.
fn pending(state: &StateValue<LazyTensors>) -> Option<Root> {
    match state {
        StateValue::Tensor(tensor, _) if !tensor.is_leaf() => Some(Root::Values(tensor.clone())),
        StateValue::Blocks(blocks, code, _) => {
            let source = blocks.0.source.clone()?;
            Some(Root::Codes(source, *code))
        }
        _ => None,
    }
}
