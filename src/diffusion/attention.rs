//! Scaled dot-product attention, and the shape changes around it.

use burn::tensor::Tensor;
use burn::tensor::activation::softmax;

/// The largest score matrix that is made at once when nothing is tracked, in elements (256 MiB of f32).
const MAX_SCORES: usize = 64 << 20;

/// `softmax(q kᵀ / sqrt(d) + mask) v`, per head (Vaswani et al. 2017, arXiv:1706.03762).
///
/// Without a gradient to compute, long queries are taken in parts, so that the score matrix stays small.
///
/// # Shapes
/// - `q`: `[batch, heads, queries, d]`; `k`, `v`: `[batch, heads, keys, d]`
/// - `mask`: `[1, 1, queries, keys]`, added to the scores
/// - output: `[batch, heads, queries, d]`
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<Tensor<4>>) -> Tensor<4> {
    let [batch, heads, queries, _] = q.dims();
    let keys = k.dims()[2];
    let at_once = (MAX_SCORES / (batch * heads * keys).max(1)).max(1);
    let tracked = q.is_autodiff() || k.is_autodiff() || v.is_autodiff();
    if tracked || queries <= at_once || mask.is_some() {
        return attend(q, k, v, mask);
    }
    let parts = (0..queries)
        .step_by(at_once)
        .map(|start| {
            let rows = q.clone().narrow(2, start, at_once.min(queries - start));
            attend(rows, k.clone(), v.clone(), None)
        })
        .collect();
    Tensor::cat(parts, 2)
}

fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<Tensor<4>>) -> Tensor<4> {
    let d = q.dims()[3];
    // Scaling the queries is cheaper than scaling the scores.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a head has a few hundred elements"
    )]
    let scale = (d as f64).powf(-0.5);
    let scores = q.mul_scalar(scale).matmul(k.swap_dims(2, 3)); // [batch, heads, queries, keys]
    let scores = match mask {
        Some(mask) => scores + mask,
        None => scores,
    };
    softmax(scores, 3).matmul(v)
}

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
