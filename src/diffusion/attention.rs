//! The shape changes around attention.

use burn::tensor::Tensor;

pub use crate::kernels::attention;

/// `[batch, tokens, heads * d]` to `[batch, heads, tokens, d]`
pub fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, tokens, width] = x.dims();
    x.reshape([batch, tokens, heads, width / heads])
        .swap_dims(1, 2)
}

/// `[batch, heads, tokens, d]` to `[batch, tokens, heads * d]`
pub fn merge_heads(x: Tensor<4>) -> Tensor<3> {
    let [batch, heads, tokens, d] = x.dims();
    x.swap_dims(1, 2).reshape([batch, tokens, heads * d])
}
