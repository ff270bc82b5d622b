//! Reductions to one number that wait until one of them is needed, and are computed together then.
//!
//! Optimizers that estimate their learning rate sum up something of every parameter; done one by one, that would be
//! several launches for each.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use burn::tensor::Tensor;
use lorasmith_abi::host::{Reduce, Tensors as _};

use super::program::{Made, Root};
use super::{BurnTensor, Expression, LazyTensor, LazyTensors, Node, Part};
use crate::kernels::together::reduce_parts;

/// Reductions of one step that nobody has needed yet; those that nobody can need any more are gone.
#[derive(Clone, Default)]
pub struct Batch(Arc<Mutex<Vec<Weak<Node>>>>);

impl Batch {
    pub fn add(&self, node: &LazyTensor) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push(Arc::downgrade(&node.0));
    }

    fn take(&self) -> Vec<LazyTensor> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let there = waiting.drain(..).filter_map(|node| node.upgrade());
        let there = there.map(LazyTensor);
        there.filter(|node| node.0.value.get().is_none()).collect()
    }
}

/// Gives a reduction its value, and all that wait with it theirs.
pub fn reduce(tensors: &LazyTensors, node: &LazyTensor) -> Result<BurnTensor, String> {
    let Expression::Reduced(_, _, batch) = &node.0.expression else {
        return Err("not a reduction".to_owned());
    };
    let waiting = batch.take();
    let bundles = waiting.iter().filter_map(|node| match &node.0.expression {
        Expression::Reduced(_, of, _) => Some(vec![Root::Values(of.clone())]),
        _ => None,
    });
    let made = tensors.compute(&bundles.collect::<Vec<_>>())?;
    let made = made.into_iter().flatten().filter_map(Made::values);
    let mut groups: Vec<Group> = Vec::new();
    for (node, of) in waiting.iter().zip(made) {
        match (&node.0.expression, &of.0.expression) {
            (Expression::Reduced(op, ..), Expression::Part(part)) if *op != Reduce::Max => {
                Group::of(&mut groups, part, *op).add(node, part.first, of.elements());
            }
            (Expression::Reduced(op, ..), _) => {
                let value = tensors.eager.reduce(*op, &tensors.value(&of)?, None)?;
                node.0.value.get_or_init(|| value);
            }
            _ => {}
        }
    }
    for group in groups {
        group.compute(tensors)?;
    }
    match (node.0.value.get(), &node.0.expression) {
        (Some(value), _) => Ok(value.clone()),
        // It was needed for another one that waited with it.
        (None, Expression::Reduced(op, of, _)) => {
            let value = tensors.eager.reduce(*op, &tensors.value(of)?, None)?;
            Ok(node.0.value.get_or_init(|| value).clone())
        }
        (None, _) => Err("not a reduction".to_owned()),
    }
}

/// Reductions of parts of one long tensor.
struct Group<'a> {
    whole: Arc<Tensor<1>>,
    op: Reduce,
    nodes: Vec<&'a LazyTensor>,
    /// First element and length of each.
    parts: Vec<(usize, usize)>,
}

impl<'a> Group<'a> {
    fn of<'g>(groups: &'g mut Vec<Self>, part: &Part, op: Reduce) -> &'g mut Self {
        let known = (groups.iter())
            .position(|group| Arc::ptr_eq(&group.whole, &part.whole) && group.op == op);
        let at = known.unwrap_or_else(|| {
            groups.push(Self {
                whole: Arc::clone(&part.whole),
                op,
                nodes: Vec::new(),
                parts: Vec::new(),
            });
            groups.len() - 1
        });
        &mut groups[at]
    }

    fn add(&mut self, node: &'a LazyTensor, first: usize, elements: usize) {
        self.nodes.push(node);
        self.parts.push((first, elements));
    }

    fn compute(self, tensors: &LazyTensors) -> Result<(), String> {
        let together = reduce_parts(&self.whole, &self.parts, self.op == Reduce::Mean);
        for (at, (node, (first, elements))) in self.nodes.iter().zip(self.parts).enumerate() {
            let value = match &together {
                Some(results) => results.get(at).reshape([1; 4]),
                None => {
                    let own = Tensor::clone(&self.whole).narrow(0, first, elements);
                    let own = own.reshape([1, 1, 1, elements]);
                    tensors.eager.reduce(self.op, &own, None)?
                }
            };
            node.0.value.get_or_init(|| value);
        }
        Ok(())
    }
}
