//! Scaled dot-product attention that never holds the score matrix.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, FloatDType, Tensor, TensorData};

use super::cpu::attention::{backward, forward};
use super::operation::{Operation, apply};
use super::precision::Precision;

/// The largest score matrix that other devices than the CPU make at once, in elements (128 MiB of f32: what a
/// software Vulkan device binds).
const MAX_SCORES: usize = 32 << 20;

/// `softmax(q kᵀ / sqrt(d)) v` per head (Vaswani et al. 2017, arXiv:1706.03762), with `causal` over the keys up to
/// the query's own position.
///
/// Queries are taken in blocks; the backward computes each block's probabilities again. Beside the inputs only one
/// number per query is kept.
///
/// # Shapes
/// - `q`: `[batch, heads, queries, d]`; `k`, `v`: `[batch, heads, keys, d]`
/// - output: `[batch, heads, queries, d]`
pub fn attention([q, k, v]: [Tensor<4>; 3], causal: bool, precision: Precision) -> Tensor<4> {
    apply(Attention { causal, precision }, [q, k, v])
}

#[derive(Clone, Debug)]
struct Attention {
    causal: bool,
    precision: Precision,
}

#[derive(Clone, Debug)]
struct Saved {
    inputs: [Tensor<4>; 3],
    /// The result; on the CPU, where the next layer keeps it anyway.
    output: Option<Tensor<4>>,
    /// `ln Σ e^score` of each row; on the CPU.
    log_sums: Vec<f32>,
}

impl Operation<3, 4> for Attention {
    type Saved = Saved;

    fn forward(&self, inputs: [Tensor<4>; 3]) -> (Tensor<4>, Saved) {
        let scale = scale(&inputs[0]);
        let [q, k, v] = &inputs;
        match forward([q, k, v], scale as f32, self.causal, self.precision) {
            Some((output, log_sums)) => {
                let saved = Saved {
                    inputs,
                    output: Some(output.clone()),
                    log_sums,
                };
                (output, saved)
            }
            None => {
                let output = self.by_blocks(&inputs, scale);
                let saved = Saved {
                    inputs,
                    output: None,
                    log_sums: Vec::new(),
                };
                (output, saved)
            }
        }
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: Tensor<4>,
        _wanted: [bool; 3],
    ) -> [Option<Tensor<4>>; 3] {
        let scale = scale(&saved.inputs[0]);
        let [q, k, v] = &saved.inputs;
        let found = saved.output.as_ref().and_then(|output| {
            let output = (output, &saved.log_sums[..]);
            let (scale, causal) = (scale as f32, self.causal);
            backward([q, k, v], output, &gradient, scale, causal, self.precision)
        });
        found
            .unwrap_or_else(|| self.backward_by_blocks(&saved.inputs, &gradient, scale))
            .map(Some)
    }
}

/// `1 / sqrt(d)`
fn scale(q: &Tensor<4>) -> f64 {
    (q.dims()[3] as f64).powf(-0.5)
}

impl Attention {
    fn by_blocks(&self, [q, k, v]: &[Tensor<4>; 3], scale: f64) -> Tensor<4> {
        let parts = blocks(q, k)
            .map(|(first, rows)| {
                let q = q.clone().narrow(2, first, rows);
                let p = self.probabilities(q, k, first, scale);
                p.matmul(v.clone())
            })
            .collect();
        Tensor::cat(parts, 2)
    }

    fn probabilities(&self, q: Tensor<4>, k: &Tensor<4>, first: usize, scale: f64) -> Tensor<4> {
        let dtype = q.dtype();
        // Scaling the queries is cheaper than scaling the scores.
        let scores = q.mul_scalar(scale).matmul(k.clone().swap_dims(2, 3));
        let scores = if dtype == DType::F32 {
            scores
        } else {
            scores.cast(FloatDType::F32)
        };
        let scores = if self.causal {
            let [_, _, rows, keys] = scores.dims();
            let mask = causal_mask(first, rows, keys, &scores);
            scores + mask
        } else {
            scores
        };
        let p = softmax(scores, 3);
        if dtype == DType::F32 {
            p
        } else {
            p.cast(FloatDType::from(dtype))
        }
    }

    fn backward_by_blocks(
        &self,
        [q, k, v]: &[Tensor<4>; 3],
        gradient: &Tensor<4>,
        scale: f64,
    ) -> [Tensor<4>; 3] {
        let mut dq = Vec::new();
        let (mut dk, mut dv) = (None, None);
        for (first, rows) in blocks(q, k) {
            let q = q.clone().narrow(2, first, rows);
            let dy = gradient.clone().narrow(2, first, rows);
            let p = self.probabilities(q.clone(), k, first, scale);
            let dp = dy.clone().matmul(v.clone().swap_dims(2, 3));
            let weighted = p.clone() * dp;
            let along = weighted.clone().sum_dim(3);
            let ds = (weighted - p.clone() * along).mul_scalar(scale);
            dq.push(ds.clone().matmul(k.clone()));
            dk = Some(plus(dk, ds.swap_dims(2, 3).matmul(q)));
            dv = Some(plus(dv, p.swap_dims(2, 3).matmul(dy)));
        }
        let zeros = |of: &Tensor<4>| of.zeros_like();
        [
            Tensor::cat(dq, 2),
            dk.unwrap_or_else(|| zeros(k)),
            dv.unwrap_or_else(|| zeros(v)),
        ]
    }
}

fn plus(sum: Option<Tensor<4>>, term: Tensor<4>) -> Tensor<4> {
    match sum {
        Some(sum) => sum + term,
        None => term,
    }
}

/// First row and count of each block of queries.
fn blocks(q: &Tensor<4>, k: &Tensor<4>) -> impl Iterator<Item = (usize, usize)> + use<> {
    let [batch, heads, queries, _] = q.dims();
    let at_once = (MAX_SCORES / (batch * heads * k.dims()[2]).max(1)).clamp(1, queries.max(1));
    (0..queries)
        .step_by(at_once)
        .map(move |first| (first, at_once.min(queries - first)))
}

/// 0 where a token may look (itself and earlier ones), a large negative number elsewhere: `[1, 1, rows, keys]`.
fn causal_mask(first: usize, rows: usize, keys: usize, like: &Tensor<4>) -> Tensor<4> {
    let values: Vec<f32> = (0..rows * keys)
        .map(|index| {
            if index % keys > first + index / keys {
                // Finite, so that no device computes infinity minus infinity.
                -1e9
            } else {
                0.0
            }
        })
        .collect();
    Tensor::from_data(TensorData::new(values, [1, 1, rows, keys]), &like.device())
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    #[test]
    fn results_and_gradients_equal_naive_attention() {
        let device = Device::flex();
        let random = |shape: [usize; 4]| {
            // Heads lie between tokens, as `split_heads` leaves them.
            let [batch, heads, rows, d] = shape;
            let distribution = Distribution::Normal(0.0, 1.0);
            Tensor::<4>::random([batch, rows, heads, d], distribution, &device).swap_dims(1, 2)
        };
        for (queries, keys, causal) in [(300, 77, false), (77, 77, true), (5, 130, false)] {
            let inputs = [
                random([2, 3, queries, 20]),
                random([2, 3, keys, 20]),
                random([2, 3, keys, 20]),
            ];
            let seed = random([2, 3, queries, 20]);
            let run = |ours: bool| {
                let tracked = inputs.clone().map(|input| input.autodiff().require_grad());
                let [q, k, v] = tracked.clone();
                let y = if ours {
                    attention([q, k, v], causal, Precision::Fp32)
                } else {
                    let naive = Attention {
                        causal,
                        precision: Precision::Fp32,
                    };
                    let scale = scale(&q);
                    naive.probabilities(q, &k, 0, scale).matmul(v)
                };
                let mut gradients = (y.clone() * seed.clone()).sum().backward();
                let mut found = vec![y.without_autodiff()];
                found.extend(tracked.map(|t| t.grad_remove(&mut gradients).unwrap()));
                found
            };
            for (ours, naive) in run(true).into_iter().zip(run(false)) {
                ours.into_data()
                    .assert_approx_eq::<f32>(&naive.into_data(), Tolerance::rel_abs(1e-5, 1e-5));
            }
        }
    }

    #[test]
    fn the_path_of_other_devices_equals_the_cpu_path() {
        let device = Device::flex();
        let random = |rows| Tensor::<4>::random([1, 2, rows, 8], Distribution::Default, &device);
        let inputs = [random(40), random(40), random(40)];
        let gradient = random(40);
        let attention = Attention {
            causal: true,
            precision: Precision::Fp32,
        };
        let scale = scale(&inputs[0]);
        let (y, saved) = attention.forward(inputs.clone());
        y.into_data().assert_approx_eq::<f32>(
            &attention.by_blocks(&inputs, scale).into_data(),
            Tolerance::absolute(1e-6),
        );
        let ours = attention.backward(saved, gradient.clone(), [true; 3]);
        let theirs = attention.backward_by_blocks(&inputs, &gradient, scale);
        for (ours, theirs) in ours.into_iter().flatten().zip(theirs) {
            ours.into_data()
                .assert_approx_eq::<f32>(&theirs.into_data(), Tolerance::rel_abs(1e-5, 1e-5));
        }
    }
}
