//! LoKr: the Kronecker product of two matrices.

use burn::tensor::Tensor;

use super::{Delta, conv_like, through_core};
use crate::diffusion::layers::Conv2d;
use crate::networks::form::Kronecker;
use crate::networks::targets::Target;

/// `scale · w1 ⊗ w2`, where one or both are products of narrow matrices.
///
/// A product with it is one with `w2` in groups of inputs and one with `w1` between the groups: the large matrix is never
/// made. Edalati et al. 2022, arXiv:2212.10650, as in LyCORIS.
#[derive(Debug)]
pub struct KroneckerDelta {
    left: Tensor<2>,
    /// `[rows, columns · kh · kw]`
    right: Tensor<2>,
    form: Kronecker,
    kernel: [usize; 2],
    scale: f64,
}

impl KroneckerDelta {
    /// Of a layer's tensors.
    pub fn new(target: &Target, form: Kronecker, tensors: &[Tensor<4>]) -> Option<Self> {
        let mut tensors = tensors.iter().cloned();
        let [height, width] = target.shape.kernel();
        let (rank, taps) = (target.rank, height * width);
        let [left_rows, left_columns] = form.left;
        let [right_rows, right_columns] = form.right;
        let mut next = |rows, columns| Some(tensors.next()?.reshape([rows, columns]));
        let left = if form.left_is_product {
            next(left_rows, rank)?.matmul(next(rank, left_columns)?)
        } else {
            next(left_rows, left_columns)?
        };
        let right = if !form.right_is_product {
            next(right_rows, right_columns * taps)?
        } else if form.core {
            let core = next(rank, rank * taps)?.reshape([rank, rank, height, width]);
            let (a, b) = (next(rank, right_rows)?, next(rank, right_columns)?);
            a.transpose().matmul(through_core(core, b))
        } else {
            next(right_rows, rank)?.matmul(next(rank, right_columns * taps)?)
        };
        Some(Self {
            left,
            right,
            form,
            kernel: [height, width],
            scale: target.alpha / target.rank as f64,
        })
    }

    /// `‖ΔW‖²`: `[1]`
    pub fn norm_square(&self) -> Tensor<1> {
        let square = |matrix: &Tensor<2>| matrix.clone().square().sum();
        (square(&self.left) * square(&self.right)).mul_scalar(self.scale.powi(2))
    }
}

impl Delta for KroneckerDelta {
    fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        let [rows, _] = x.dims();
        let ([out_left, in_left], [out_right, in_right]) = (self.form.left, self.form.right);
        let grouped = x.reshape([rows * in_left, in_right]);
        let inner = grouped.matmul(self.right.clone().transpose()); // [rows · in_left, out_right]
        let inner = inner
            .reshape([rows, in_left, out_right])
            .swap_dims(1, 2)
            .reshape([rows * out_right, in_left]);
        let outer = inner.matmul(self.left.clone().transpose()); // [rows · out_right, out_left]
        let outer = outer
            .reshape([rows, out_right, out_left])
            .swap_dims(1, 2)
            .reshape([rows, out_left * out_right]);
        outer.mul_scalar(self.scale)
    }

    fn conv(&self, layer: &Conv2d, x: Tensor<4>) -> Tensor<4> {
        let [batch, _, height, width] = x.dims();
        let ([out_left, in_left], [out_right, in_right]) = (self.form.left, self.form.right);
        let [kernel_height, kernel_width] = self.kernel;
        let grouped = x.reshape([batch * in_left, in_right, height, width]);
        let weight = self
            .right
            .clone()
            .reshape([out_right, in_right, kernel_height, kernel_width]);
        let inner = conv_like(layer, grouped, weight); // [batch · in_left, out_right, h, w]
        let [_, _, height, width] = inner.dims();
        let inner = inner.reshape([batch, in_left, out_right * height * width]);
        let left = self.left.clone().reshape([1, out_left, in_left]);
        let outer = left.matmul(inner); // [batch, out_left, out_right · h · w]
        outer
            .reshape([batch, out_left * out_right, height, width])
            .mul_scalar(self.scale)
    }

    fn weight(&self) -> Tensor<2> {
        let ([out_left, in_left], [out_right, in_right]) = (self.form.left, self.form.right);
        let columns = in_right * self.kernel[0] * self.kernel[1];
        let left = self.left.clone().reshape([out_left, 1, in_left, 1]);
        let right = self.right.clone().reshape([1, out_right, 1, columns]);
        (left * right)
            .reshape([out_left * out_right, in_left * columns])
            .mul_scalar(self.scale)
    }
}
