//! The frozen linear layer.

use burn::tensor::{FloatDType, Tensor};

use super::cpu::gemm::{Size, Start, product};
use super::cpu::{Strides, View, tensor};
use super::operation::{Operation, apply};

/// `y = x Wᵀ + b` with weights that are never trained.
///
/// Nothing is kept for the backward but the weights themselves; they stay in the precision that they are stored in.
///
/// # Shapes
/// - `x`: `[rows, d_in]`
/// - `weight`: `[d_out, d_in]`
/// - `bias`: `[d_out]`
/// - output: `[rows, d_out]`
pub fn linear(x: Tensor<2>, weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
    let layer = FrozenLinear {
        weight: weight.clone(),
        bias: bias.cloned(),
    };
    apply(layer, [x])
}

#[derive(Clone, Debug)]
struct FrozenLinear {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
}

impl Operation<1, 2> for FrozenLinear {
    type Saved = ();

    fn forward(&self, [x]: [Tensor<2>; 1]) -> (Tensor<2>, ()) {
        let y = self.forward_cpu(&x).unwrap_or_else(|| {
            let weight = self.weight.clone().cast(FloatDType::from(x.dtype()));
            let y = x.matmul(weight.transpose());
            match &self.bias {
                Some(bias) => y + bias.clone().unsqueeze(),
                None => y,
            }
        });
        (y, ())
    }

    fn backward(&self, (): (), gradient: Tensor<2>, [wanted]: [bool; 1]) -> [Option<Tensor<2>>; 1] {
        [wanted.then(|| {
            self.backward_cpu(&gradient).unwrap_or_else(|| {
                let weight = self.weight.clone().cast(FloatDType::from(gradient.dtype()));
                gradient.matmul(weight)
            })
        })]
    }
}

impl FrozenLinear {
    fn forward_cpu(&self, x: &Tensor<2>) -> Option<Tensor<2>> {
        let (x, weight) = (View::of(x).filter(View::is_f32)?, View::of(&self.weight)?);
        let bias = match &self.bias {
            Some(bias) => Some(View::contiguous(bias).filter(View::is_f32)?),
            None => None,
        };
        let ([rows, depth], [columns, _]) = (x.dims, weight.dims);
        let y = product(
            Size {
                rows,
                columns,
                depth,
            },
            &*x.operand(0, by_row(&x)),
            &*weight.operand(0, by_row(&weight)),
            match &bias {
                Some(bias) => Start::PerColumn(&bias.f32()[..columns]),
                None => Start::Zero,
            },
        );
        Some(tensor(y, [rows, columns]))
    }

    fn backward_cpu(&self, gradient: &Tensor<2>) -> Option<Tensor<2>> {
        let gradient = View::of(gradient).filter(View::is_f32)?;
        let weight = View::of(&self.weight)?;
        let ([rows, depth], [_, columns]) = (gradient.dims, weight.dims);
        let [d_out, d_in] = weight.strides;
        let by_column = Strides {
            lane: d_in,
            depth: d_out,
        };
        let dx = product(
            Size {
                rows,
                columns,
                depth,
            },
            &*gradient.operand(0, by_row(&gradient)),
            &*weight.operand(0, by_column),
            Start::Zero,
        );
        Some(tensor(dx, [rows, columns]))
    }
}

/// Rows are lanes.
fn by_row(view: &View<2>) -> Strides {
    let [lane, depth] = view.strides;
    Strides { lane, depth }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;

    #[test]
    fn results_and_gradients_equal_those_of_plain_operations() {
        let device = Device::flex();
        for dtype in [FloatDType::F32, FloatDType::F16, FloatDType::BF16] {
            let x = Tensor::<2>::random([37, 50], Distribution::Default, &device);
            let weight = Tensor::<2>::random([45, 50], Distribution::Default, &device).cast(dtype);
            let bias = Tensor::<1>::random([45], Distribution::Default, &device);
            let seed = Tensor::<2>::random([37, 45], Distribution::Default, &device);
            let run = |ours: bool| {
                let x = x.clone().autodiff().require_grad();
                let y = if ours {
                    linear(x.clone(), &weight, Some(&bias))
                } else {
                    let weight = weight.clone().cast(FloatDType::F32);
                    x.clone().matmul(weight.transpose()) + bias.clone().unsqueeze()
                };
                let mut gradients = (y.clone() * seed.clone()).sum().backward();
                (y.without_autodiff(), x.grad_remove(&mut gradients).unwrap())
            };
            let ((y, dx), (y_plain, dx_plain)) = (run(true), run(false));
            y.into_data().assert_approx_eq::<f32>(
                &y_plain.into_data(),
                burn::tensor::Tolerance::absolute(1e-5),
            );
            dx.into_data().assert_approx_eq::<f32>(
                &dx_plain.into_data(),
                burn::tensor::Tolerance::absolute(1e-5),
            );
        }
    }
}
