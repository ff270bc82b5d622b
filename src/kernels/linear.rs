//! The frozen linear layer, alone and with a low-rank branch beside it.

use burn::tensor::{FloatDType, Tensor};

use super::cpu::gemm::{Matrix, Size, Start, add_product, product};
use super::cpu::{Strides, View, elementwise, tensor};
use super::operation::{Operation, Skippable, Value, apply_for};
use super::precision::{Precision, narrow, widen};

/// `y = x Wᵀ + b` with weights that are never trained.
///
/// Nothing is kept for the backward but the weights themselves; they stay in the precision that they are stored in.
///
/// # Shapes
/// - `x`: `[rows, d_in]`
/// - `weight`: `[d_out, d_in]`
/// - `bias`: `[d_out]`
/// - output: `[rows, d_out]`
pub fn linear(
    x: Tensor<2>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    precision: Precision,
    value: Value,
) -> Tensor<2> {
    let layer = FrozenLinear {
        weight: weight.clone(),
        bias: bias.cloned(),
        precision,
    };
    apply_for(value, layer, [x])
}

/// A low-rank branch: `scale · up(down(x))`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[rank, d_in]`
    pub down: Tensor<2>,
    /// `[d_out, rank]`
    pub up: Tensor<2>,
    /// Its strength.
    pub scale: f64,
}

/// `y = x Wᵀ + b + scale · (x downᵀ) upᵀ`: a frozen layer with its LoRA in one operation.
///
/// Sums are added where they are computed, and the branch's narrow middle is computed again in the backward. On other
/// devices than the CPU the branch is in f32 whatever the layer computes in.
///
/// # Shapes
/// As [`linear`].
pub fn linear_with_branch(
    x: Tensor<2>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    branch: LowRank,
    precision: Precision,
    value: Value,
) -> Tensor<2> {
    let layer = FrozenLinear {
        weight: weight.clone(),
        bias: bias.cloned(),
        precision,
    };
    let LowRank { down, up, scale } = branch;
    apply_for(value, BranchedLinear { layer, scale }, [x, down, up])
}

#[derive(Clone, Debug)]
struct FrozenLinear {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    precision: Precision,
}

impl Operation<1, 2> for FrozenLinear {
    type Saved = ();

    fn forward(&self, [x]: [Tensor<2>; 1]) -> (Tensor<2>, ()) {
        let y = self.forward_cpu(&x).unwrap_or_else(|| {
            let weight = self.weight.clone().cast(FloatDType::from(x.dtype()));
            let y = x.matmul(weight.transpose());
            match &self.bias {
                Some(bias) => {
                    let bias = narrow(bias.clone(), y.dtype());
                    y + bias.unsqueeze()
                }
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

impl Skippable<1, 2> for FrozenLinear {
    fn shape(&self, [x]: &[Tensor<2>; 1]) -> [usize; 2] {
        [x.dims()[0], self.weight.dims()[0]]
    }

    fn saved(&self, _: [Tensor<2>; 1]) {}
}

impl FrozenLinear {
    fn forward_cpu(&self, x: &Tensor<2>) -> Option<Tensor<2>> {
        let shape = [x.dims()[0], self.weight.dims()[0]];
        self.sums(x).map(|sums| tensor(sums, shape))
    }

    fn backward_cpu(&self, gradient: &Tensor<2>) -> Option<Tensor<2>> {
        let shape = [gradient.dims()[0], self.weight.dims()[1]];
        self.input_sums(gradient).map(|sums| tensor(sums, shape))
    }

    /// `x Wᵀ + b`
    fn sums(&self, x: &Tensor<2>) -> Option<Vec<f32>> {
        let (x, weight) = (View::of(x).filter(View::is_f32)?, View::of(&self.weight)?);
        let bias = match &self.bias {
            Some(bias) => Some(View::contiguous(bias).filter(View::is_f32)?),
            None => None,
        };
        let ([rows, depth], [columns, _]) = (x.dims, weight.dims);
        Some(product(
            self.precision,
            size(rows, columns, depth),
            &*x.operand(0, by_row(&x)),
            &*weight.operand(0, by_row(&weight)),
            match &bias {
                Some(bias) => Start::PerColumn(&bias.f32()[..columns]),
                None => Start::Zero,
            },
        ))
    }

    /// `dy W`
    fn input_sums(&self, gradient: &Tensor<2>) -> Option<Vec<f32>> {
        let gradient = View::of(gradient).filter(View::is_f32)?;
        let weight = View::of(&self.weight)?;
        let ([rows, depth], [_, columns]) = (gradient.dims, weight.dims);
        Some(product(
            self.precision,
            size(rows, columns, depth),
            &*gradient.operand(0, by_row(&gradient)),
            &*weight.operand(0, by_column(&weight)),
            Start::Zero,
        ))
    }
}

#[derive(Clone, Debug)]
struct BranchedLinear {
    layer: FrozenLinear,
    scale: f64,
}

impl Operation<3, 2> for BranchedLinear {
    type Saved = [Tensor<2>; 3];

    fn forward(&self, inputs: [Tensor<2>; 3]) -> (Tensor<2>, [Tensor<2>; 3]) {
        let [x, down, up] = inputs.clone();
        let y = self.forward_cpu(&x, &down, &up).unwrap_or_else(|| {
            let ([y], dtype) = ([self.layer.forward([x.clone()]).0], x.dtype());
            let middle = widen(x).matmul(down.transpose()).mul_scalar(self.scale);
            y + middle.matmul(up.transpose()).cast(FloatDType::from(dtype))
        });
        (y, inputs)
    }

    fn backward(
        &self,
        saved: [Tensor<2>; 3],
        gradient: Tensor<2>,
        wanted: [bool; 3],
    ) -> [Option<Tensor<2>>; 3] {
        if let Some(found) = self.backward_cpu(&saved, &gradient, wanted) {
            return found;
        }
        let [x, down, up] = saved;
        let dtype = gradient.dtype();
        let dy = widen(gradient.clone());
        let x = widen(x);
        let middle = x.clone().matmul(down.clone().transpose());
        let of_middle = dy.clone().matmul(up).mul_scalar(self.scale);
        let [dx] = self.layer.backward((), gradient, [wanted[0]]);
        [
            dx.map(|dx| dx + of_middle.clone().matmul(down).cast(FloatDType::from(dtype))),
            wanted[1].then(|| of_middle.transpose().matmul(x)),
            wanted[2].then(|| dy.transpose().matmul(middle).mul_scalar(self.scale)),
        ]
    }
}

impl Skippable<3, 2> for BranchedLinear {
    fn shape(&self, [x, ..]: &[Tensor<2>; 3]) -> [usize; 2] {
        [x.dims()[0], self.layer.weight.dims()[0]]
    }

    fn saved(&self, inputs: [Tensor<2>; 3]) -> [Tensor<2>; 3] {
        inputs
    }
}

impl BranchedLinear {
    fn forward_cpu(&self, x: &Tensor<2>, down: &Tensor<2>, up: &Tensor<2>) -> Option<Tensor<2>> {
        let mut y = self.layer.sums(x)?;
        let x = View::of(x)?;
        let (down, up) = branch_views(down, up)?;
        let ([rows, d_in], [columns, rank]) = (x.dims, up.dims);
        let mut middle = product(
            self.layer.precision,
            size(rows, rank, d_in),
            &*x.operand(0, by_row(&x)),
            &*down.operand(0, by_row(&down)),
            Start::Zero,
        );
        elementwise::scale(&mut middle, self.scale as f32);
        add_product(
            self.layer.precision,
            size(rows, columns, rank),
            &row_major(&middle, rank),
            &*up.operand(0, by_row(&up)),
            &mut y,
        );
        Some(tensor(y, [rows, columns]))
    }

    fn backward_cpu(
        &self,
        [x, down, up]: &[Tensor<2>; 3],
        gradient: &Tensor<2>,
        wanted: [bool; 3],
    ) -> Option<[Option<Tensor<2>>; 3]> {
        let dy = View::of(gradient).filter(View::is_f32)?;
        let x = View::of(x).filter(View::is_f32)?;
        let (down, up) = branch_views(down, up)?;
        let ([rows, d_in], [d_out, rank]) = (x.dims, up.dims);
        let mut of_middle = product(
            self.layer.precision,
            size(rows, rank, d_out),
            &*dy.operand(0, by_row(&dy)),
            &*up.operand(0, by_column(&up)),
            Start::Zero,
        );
        elementwise::scale(&mut of_middle, self.scale as f32);
        let dx = if wanted[0] {
            let mut dx = self.layer.input_sums(gradient)?;
            add_product(
                self.layer.precision,
                size(rows, d_in, rank),
                &row_major(&of_middle, rank),
                &*down.operand(0, by_column(&down)),
                &mut dx,
            );
            Some(tensor(dx, [rows, d_in]))
        } else {
            None
        };
        let ddown = wanted[1].then(|| {
            let sums = product(
                self.layer.precision,
                size(rank, d_in, rows),
                &column_major(&of_middle, rank),
                &*x.operand(0, by_column(&x)),
                Start::Zero,
            );
            tensor(sums, [rank, d_in])
        });
        let dup = wanted[2].then(|| {
            let mut middle = product(
                self.layer.precision,
                size(rows, rank, d_in),
                &*x.operand(0, by_row(&x)),
                &*down.operand(0, by_row(&down)),
                Start::Zero,
            );
            elementwise::scale(&mut middle, self.scale as f32);
            let sums = product(
                self.layer.precision,
                size(d_out, rank, rows),
                &*dy.operand(0, by_column(&dy)),
                &column_major(&middle, rank),
                Start::Zero,
            );
            tensor(sums, [d_out, rank])
        });
        Some([dx, ddown, dup])
    }
}

fn branch_views(down: &Tensor<2>, up: &Tensor<2>) -> Option<(View<2>, View<2>)> {
    Some((
        View::of(down).filter(View::is_f32)?,
        View::of(up).filter(View::is_f32)?,
    ))
}

fn size(rows: usize, columns: usize, depth: usize) -> Size {
    Size {
        rows,
        columns,
        depth,
    }
}

/// Rows of `length` values, as lanes.
fn row_major(values: &[f32], length: usize) -> Matrix<'_, f32> {
    let strides = Strides {
        lane: length,
        depth: 1,
    };
    Matrix {
        data: values,
        strides,
    }
}

/// Rows of `length` values, summed over.
fn column_major(values: &[f32], length: usize) -> Matrix<'_, f32> {
    let strides = Strides {
        lane: 1,
        depth: length,
    };
    Matrix {
        data: values,
        strides,
    }
}

/// Columns are lanes.
fn by_column(view: &View<2>) -> Strides {
    let [depth, lane] = view.strides;
    Strides { lane, depth }
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
                    linear(
                        x.clone(),
                        &weight,
                        Some(&bias),
                        Precision::Fp32,
                        Value::Read,
                    )
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

    #[test]
    fn a_branch_and_its_gradients_equal_plain_operations() {
        let device = Device::flex();
        let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Default, &device);
        let bias = Tensor::<1>::random([45], Distribution::Default, &device);
        let (weight, seed) = (random([45, 50]), random([37, 45]));
        let inputs = [random([37, 50]), random([8, 50]), random([45, 8])];
        for x_is_tracked in [true, false] {
            let run = |ours: bool| {
                let [x, down, up] = inputs.clone().map(|t| t.autodiff().require_grad());
                let x = if x_is_tracked { x } else { inputs[0].clone() };
                let tracked = [x.clone(), down.clone(), up.clone()];
                let y = if ours {
                    let branch = LowRank {
                        down,
                        up,
                        scale: 0.5,
                    };
                    linear_with_branch(
                        x,
                        &weight,
                        Some(&bias),
                        branch,
                        Precision::Fp32,
                        Value::Read,
                    )
                } else {
                    let plain = x.clone().matmul(weight.clone().transpose());
                    let middle = x.matmul(down.transpose());
                    plain + bias.clone().unsqueeze() + middle.matmul(up.transpose()).mul_scalar(0.5)
                };
                let mut gradients = (y.clone() * seed.clone()).sum().backward();
                let mut found = vec![y.without_autodiff()];
                found.extend(tracked.iter().filter_map(|t| t.grad_remove(&mut gradients)));
                found
            };
            let (ours, plain) = (run(true), run(false));
            assert_eq!(ours.len(), if x_is_tracked { 4 } else { 3 });
            for (ours, plain) in ours.into_iter().zip(plain) {
                ours.into_data().assert_approx_eq::<f32>(
                    &plain.into_data(),
                    burn::tensor::Tolerance::rel_abs(1e-5, 1e-5),
                );
            }
        }
    }
}
