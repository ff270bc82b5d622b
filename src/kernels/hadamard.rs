//! A product of two low-rank matrices, element by element, as a weight: made where it is used, and never kept.

use burn::tensor::Tensor;

use super::operation::{Operation, apply};

/// The factors of `(a1 b1) ⊙ (a2 b2)`.
#[derive(Clone, Debug)]
pub struct Hadamard {
    /// `[rows, rank]`
    pub a1: Tensor<2>,
    /// `[rank, columns]`
    pub b1: Tensor<2>,
    /// `[rows, rank]`
    pub a2: Tensor<2>,
    /// `[rank, columns]`
    pub b2: Tensor<2>,
    /// Factor of the product.
    pub scale: f64,
}

impl Hadamard {
    /// `scale · (a1 b1) ⊙ (a2 b2)`; of the two inner products neither is kept for the backward.
    ///
    /// # Shapes
    /// - output: `[rows, columns]`
    pub fn weight(self) -> Tensor<2> {
        let Self {
            a1,
            b1,
            a2,
            b2,
            scale,
        } = self;
        apply(Weight { scale }, [a1, b1, a2, b2])
    }

    /// `x Wᵀ` with that weight, which is made again in the backward.
    ///
    /// # Shapes
    /// - `x`: `[n, columns]`
    /// - output: `[n, rows]`
    pub fn linear(self, x: Tensor<2>) -> Tensor<2> {
        let Self {
            a1,
            b1,
            a2,
            b2,
            scale,
        } = self;
        apply(Linear { scale }, [x, a1, b1, a2, b2])
    }
}

type Factors = [Tensor<2>; 4];

fn product([a1, b1, a2, b2]: Factors, scale: f64) -> Tensor<2> {
    (a1.matmul(b1) * a2.matmul(b2)).mul_scalar(scale)
}

/// The factors' gradients from that of the weight.
fn of_factors(
    [a1, b1, a2, b2]: Factors,
    gradient: Tensor<2>,
    scale: f64,
    wanted: [bool; 4],
) -> [Option<Tensor<2>>; 4] {
    let gradient = gradient.mul_scalar(scale);
    let half = |wanted: [bool; 2], a: &Tensor<2>, b: &Tensor<2>, other: Tensor<2>| {
        let inner = gradient.clone() * other;
        [
            wanted[0].then(|| inner.clone().matmul(b.clone().transpose())),
            wanted[1].then(|| a.clone().transpose().matmul(inner.clone())),
        ]
    };
    let [of_a1, of_b1] = half(
        [wanted[0], wanted[1]],
        &a1,
        &b1,
        a2.clone().matmul(b2.clone()),
    );
    let [of_a2, of_b2] = half(
        [wanted[2], wanted[3]],
        &a2,
        &b2,
        a1.clone().matmul(b1.clone()),
    );
    [of_a1, of_b1, of_a2, of_b2]
}

#[derive(Clone, Debug)]
struct Weight {
    scale: f64,
}

impl Operation<4, 2> for Weight {
    type Saved = Factors;

    fn forward(&self, factors: Factors) -> (Tensor<2>, Factors) {
        (product(factors.clone(), self.scale), factors)
    }

    fn backward(
        &self,
        factors: Factors,
        gradient: Tensor<2>,
        wanted: [bool; 4],
    ) -> [Option<Tensor<2>>; 4] {
        of_factors(factors, gradient, self.scale, wanted)
    }
}

#[derive(Clone, Debug)]
struct Linear {
    scale: f64,
}

impl Operation<5, 2> for Linear {
    type Saved = [Tensor<2>; 5];

    fn forward(&self, inputs: [Tensor<2>; 5]) -> (Tensor<2>, [Tensor<2>; 5]) {
        let [x, a1, b1, a2, b2] = inputs.clone();
        let weight = product([a1, b1, a2, b2], self.scale);
        (x.matmul(weight.transpose()), inputs)
    }

    fn backward(
        &self,
        [x, a1, b1, a2, b2]: [Tensor<2>; 5],
        gradient: Tensor<2>,
        wanted: [bool; 5],
    ) -> [Option<Tensor<2>>; 5] {
        let factors = [a1, b1, a2, b2];
        let of_x = wanted[0].then(|| {
            let weight = product(factors.clone(), self.scale);
            gradient.clone().matmul(weight)
        });
        let [_, wanted @ ..] = wanted;
        let of_weight = gradient.transpose().matmul(x);
        let [of_a1, of_b1, of_a2, of_b2] = of_factors(factors, of_weight, self.scale, wanted);
        [of_x, of_a1, of_b1, of_a2, of_b2]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    #[test]
    fn results_and_gradients_equal_those_of_plain_operations() {
        let device = Device::flex();
        let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Default, &device);
        let inputs = [
            random([9, 14]),
            random([11, 3]),
            random([3, 14]),
            random([11, 3]),
            random([3, 14]),
        ];
        let seed = random([9, 11]);
        let run = |way: usize| {
            let [x, a1, b1, a2, b2] = inputs.clone().map(|t| t.autodiff().require_grad());
            let leaves = [&x, &a1, &b1, &a2, &b2].map(Clone::clone);
            let factors = Hadamard {
                a1: a1.clone(),
                b1: b1.clone(),
                a2: a2.clone(),
                b2: b2.clone(),
                scale: 0.5,
            };
            let y = match way {
                0 => factors.linear(x),
                1 => x.matmul(factors.weight().transpose()),
                _ => {
                    let weight = a1.matmul(b1) * a2.matmul(b2);
                    x.matmul(weight.transpose()).mul_scalar(0.5)
                }
            };
            let mut gradients = (y.clone() * seed.clone()).sum().backward();
            let mut found = vec![y.without_autodiff()];
            found.extend(leaves.map(|leaf| leaf.grad_remove(&mut gradients).expect("tracked")));
            found
        };
        for way in [0, 1] {
            for (ours, plain) in run(way).into_iter().zip(run(2)) {
                ours.into_data()
                    .assert_approx_eq::<f32>(&plain.into_data(), Tolerance::rel_abs(1e-5, 1e-5));
            }
        }
    }
}
