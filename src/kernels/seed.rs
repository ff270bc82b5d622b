//! Where a backward begins.

use burn::tensor::Tensor;

use super::operation::{Operation, apply};

/// A tensor of one zero, whose backward gives `output` the gradient `gradient`.
///
/// The usual way, a sum of products, reads and writes all of the output twice.
///
/// # Shapes
/// - `output` and `gradient`: any, the same
/// - result: one element
pub fn seed<const D: usize>(output: Tensor<D>, gradient: Tensor<D>) -> Tensor<D> {
    apply(Seed { gradient }, [output])
}

#[derive(Clone, Debug)]
struct Seed<const D: usize> {
    gradient: Tensor<D>,
}

impl<const D: usize> Operation<1, D> for Seed<D> {
    type Saved = ();

    fn forward(&self, [output]: [Tensor<D>; 1]) -> (Tensor<D>, ()) {
        (Tensor::zeros([1; D], &output.device()), ())
    }

    fn backward(
        &self,
        (): (),
        _gradient: Tensor<D>,
        [wanted]: [bool; 1],
    ) -> [Option<Tensor<D>>; 1] {
        [wanted.then(|| self.gradient.clone())]
    }
}
