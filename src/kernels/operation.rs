//! Operations with a hand-written backward, in burn's autodiff graph.

use std::fmt::Debug;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Backend, Cube, DispatchKindConversion, Flex};
use burn::tensor::{DispatchTensor, Tensor};

use super::cpu::is_cpu;

/// A function of `N` tensors of rank `D` to one of the same rank.
///
/// Both directions compute with untracked tensors, on whatever device these are.
pub trait Operation<const N: usize, const D: usize>: Clone + Debug + Send + Sync + 'static {
    /// What the backward needs.
    type Saved: Clone + Debug + Send + 'static;

    /// The result, and what the backward needs.
    fn forward(&self, inputs: [Tensor<D>; N]) -> (Tensor<D>, Self::Saved);

    /// The gradient of each input that is `wanted`, given that of the result.
    fn backward(
        &self,
        saved: Self::Saved,
        gradient: Tensor<D>,
        wanted: [bool; N],
    ) -> [Option<Tensor<D>>; N];
}

/// Whether anything reads the result of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// It is computed.
    Read,
    /// It is left out, and zeros stand for it: what runs again for its gradients alone ends in such operations.
    Unread,
}

/// An operation whose backward needs nothing that only its forward computes.
pub trait Skippable<const N: usize, const D: usize>: Operation<N, D> {
    /// The shape of the result.
    fn shape(&self, inputs: &[Tensor<D>; N]) -> [usize; D];

    /// What the backward needs.
    fn saved(&self, inputs: [Tensor<D>; N]) -> Self::Saved;
}

#[derive(Clone, Debug)]
struct Unread<O>(O);

impl<O: Skippable<N, D>, const N: usize, const D: usize> Operation<N, D> for Unread<O> {
    type Saved = O::Saved;

    fn forward(&self, inputs: [Tensor<D>; N]) -> (Tensor<D>, O::Saved) {
        let options = (&inputs[0].device(), inputs[0].dtype());
        let zeros = Tensor::zeros(self.0.shape(&inputs), options);
        (zeros, self.0.saved(inputs))
    }

    fn backward(
        &self,
        saved: O::Saved,
        gradient: Tensor<D>,
        wanted: [bool; N],
    ) -> [Option<Tensor<D>>; N] {
        self.0.backward(saved, gradient, wanted)
    }
}

/// Computes the operation, or records it alone where nothing reads its value.
pub fn apply_for<O, const N: usize, const D: usize>(
    value: Value,
    operation: O,
    inputs: [Tensor<D>; N],
) -> Tensor<D>
where
    O: Skippable<N, D>,
{
    match value {
        Value::Read => apply(operation, inputs),
        Value::Unread => apply(Unread(operation), inputs),
    }
}

/// Computes the operation, and records it when an input is tracked.
pub fn apply<O, const N: usize, const D: usize>(operation: O, inputs: [Tensor<D>; N]) -> Tensor<D>
where
    O: Operation<N, D>,
{
    if !inputs.iter().any(Tensor::is_autodiff) {
        return operation.forward(inputs).0;
    }
    let inputs = inputs.map(Tensor::autodiff);
    if is_cpu(&inputs[0].device()) {
        record::<Flex, O, N, D>(operation, inputs)
    } else {
        record::<Cube, O, N, D>(operation, inputs)
    }
}

fn record<B, O, const N: usize, const D: usize>(operation: O, inputs: [Tensor<D>; N]) -> Tensor<D>
where
    B: Backend,
    O: Operation<N, D>,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
{
    let mut guards = Vec::with_capacity(N);
    let inputs = inputs.map(|input| {
        let (value, guard) = primitive::<Autodiff<B>, D>(input).into_parts();
        guards.push(guard);
        Tensor::<D>::from_primitive::<B>(value)
    });
    let Ok(guards) = guards.try_into() else {
        unreachable!("one guard was pushed for each input")
    };
    let prepared = Recorded::<O, D>(operation.clone())
        .prepare::<NoCheckpointing>(guards)
        .compute_bound()
        .stateful();
    let (output, saved) = operation.forward(inputs);
    let output = primitive::<B, D>(output);
    Tensor::from_primitive::<Autodiff<B>>(match prepared {
        OpsKind::Tracked(step) => step.finish(saved, output),
        OpsKind::UnTracked(step) => step.finish(output),
    })
}

fn primitive<B: Backend, const D: usize>(tensor: Tensor<D>) -> B::FloatTensorPrimitive
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match tensor.try_into_primitive::<B>() {
        Ok(primitive) => primitive,
        Err(error) => unreachable!("the tensors of an operation share a device: {error:?}"),
    }
}

/// An operation as a step of the graph.
#[derive(Debug)]
struct Recorded<O, const D: usize>(O);

impl<B, O, const N: usize, const D: usize> Backward<B, N> for Recorded<O, D>
where
    B: Backend,
    O: Operation<N, D>,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = O::Saved;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let gradient = gradients.consume::<B>(&ops.node);
        let gradient = Tensor::<D>::from_primitive::<B>(gradient);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let found = self.0.backward(ops.state, gradient, wanted);
        for (parent, gradient) in ops.parents.iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<B>(parent.id, primitive::<B, D>(gradient));
            }
        }
    }
}
