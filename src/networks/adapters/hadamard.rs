//! LoHa: the element-wise product of two low-rank matrices.

use burn::tensor::Tensor;

use super::{Delta, conv_like, through_core};
use crate::diffusion::layers::Conv2d;
use crate::kernels::Hadamard;
use crate::networks::targets::Target;

/// `scale · (w1_a w1_b) ⊙ (w2_a w2_b)`; with cores each half is `w_aᵀ · core · w_b`.
///
/// Hyeon-Woo et al. 2022, arXiv:2108.06098, as in LyCORIS.
#[derive(Debug)]
pub struct HadamardDelta {
    halves: [Half; 2],
    scale: f64,
    /// Sizes of the weight, a linear layer's with a 1×1 kernel.
    dims: [usize; 4],
    rank: usize,
}

#[derive(Debug)]
struct Half {
    core: Option<Tensor<4>>,
    a: Tensor<4>,
    b: Tensor<4>,
}

impl Half {
    /// The two factors: `[out, rank]` and `[rank, in · kh · kw]`.
    fn factors(&self, rank: usize) -> (Tensor<2>, Tensor<2>) {
        let matrix = |tensor: &Tensor<4>, rows: usize, columns: usize| {
            tensor.clone().reshape([rows, columns])
        };
        let other = |tensor: &Tensor<4>| tensor.shape().num_elements() / rank;
        let b = matrix(&self.b, rank, other(&self.b));
        match &self.core {
            None => (matrix(&self.a, other(&self.a), rank), b),
            Some(core) => {
                let a = matrix(&self.a, rank, other(&self.a)).transpose();
                (a, through_core(core.clone(), b))
            }
        }
    }
}

impl HadamardDelta {
    /// Of a layer's tensors.
    pub fn new(target: &Target, core: bool, tensors: &[Tensor<4>]) -> Option<Self> {
        let mut tensors = tensors.iter().cloned();
        let mut half = || {
            Some(Half {
                core: if core { Some(tensors.next()?) } else { None },
                a: tensors.next()?,
                b: tensors.next()?,
            })
        };
        let [height, width] = target.shape.kernel();
        Some(Self {
            halves: [half()?, half()?],
            scale: target.alpha / target.rank as f64,
            dims: [target.shape.d_out(), target.shape.d_in(), height, width],
            rank: target.rank,
        })
    }

    fn product(&self) -> Hadamard {
        let [(a1, b1), (a2, b2)] = self.halves.each_ref().map(|half| half.factors(self.rank));
        Hadamard {
            a1,
            b1,
            a2,
            b2,
            scale: self.scale,
        }
    }
}

impl Delta for HadamardDelta {
    fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        self.product().linear(x)
    }

    fn conv(&self, layer: &Conv2d, x: Tensor<4>) -> Tensor<4> {
        conv_like(layer, x, self.weight().reshape(self.dims))
    }

    fn weight(&self) -> Tensor<2> {
        self.product().weight()
    }
}
