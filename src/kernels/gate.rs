//! Activations between linear layers.

use burn::tensor::{Tensor, activation};

use super::cpu::{View, elementwise, rows, tensor};
use super::operation::{Operation, apply};

/// GEGLU (Shazeer 2020, arXiv:2002.05202): `values · gelu(gates)`; keeps its input alone.
///
/// # Shapes
/// - `x`: `[batch, tokens, 2 d]`, values then gates
/// - output: `[batch, tokens, d]`
pub fn geglu(x: Tensor<3>) -> Tensor<3> {
    apply(Geglu, [x])
}

/// `x · Φ(x)` with the error function, OpenCLIP's and BERT's activation; keeps its input alone.
///
/// # Shapes
/// - `x` and output: any
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    apply(Gelu, [x])
}

#[derive(Clone, Debug)]
struct Gelu;

impl<const D: usize> Operation<1, D> for Gelu {
    type Saved = Tensor<D>;

    fn forward(&self, [x]: [Tensor<D>; 1]) -> (Tensor<D>, Tensor<D>) {
        let y = match View::contiguous(&x).filter(View::is_f32) {
            Some(view) => {
                let width = x.dims()[D - 1];
                let count = x.shape().num_elements() / width.max(1);
                let y = rows(count, width, |index, y| {
                    elementwise::gelus(&view.f32()[index * width..][..width], y);
                });
                tensor(y, x.dims())
            }
            None => plain_gelu(x.clone()),
        };
        (y, x)
    }

    fn backward(
        &self,
        x: Tensor<D>,
        gradient: Tensor<D>,
        [wanted]: [bool; 1],
    ) -> [Option<Tensor<D>>; 1] {
        [wanted.then(|| derivative(x, gradient, plain_gelu))]
    }
}

/// Written out, because the derivative that burn gives its own `gelu` is that of the approximation by tanh: it is off by
/// up to 4e-4.
fn plain_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let twice_phi = x
        .clone()
        .mul_scalar(std::f64::consts::FRAC_1_SQRT_2)
        .erf()
        .add_scalar(1.0);
    x.mul_scalar(0.5) * twice_phi
}

/// `x · sigmoid(1.702 x)`, CLIP's activation; keeps its input alone.
///
/// # Shapes
/// - `x` and output: `[batch, tokens, d]`
pub fn quick_gelu(x: Tensor<3>) -> Tensor<3> {
    apply(QuickGelu, [x])
}

#[derive(Clone, Debug)]
struct Geglu;

impl Operation<1, 3> for Geglu {
    type Saved = Tensor<3>;

    fn forward(&self, [x]: [Tensor<3>; 1]) -> (Tensor<3>, Tensor<3>) {
        let [batch, tokens, width] = x.dims();
        let d = width / 2;
        let y = match View::contiguous(&x).filter(View::is_f32) {
            Some(view) => {
                let y = rows(batch * tokens, d, |index, y| {
                    let row = &view.f32()[index * width..][..width];
                    elementwise::gate(&row[..d], &row[d..], y);
                });
                tensor(y, [batch, tokens, d])
            }
            None => plain_geglu(x.clone()),
        };
        (y, x)
    }

    fn backward(
        &self,
        x: Tensor<3>,
        gradient: Tensor<3>,
        [wanted]: [bool; 1],
    ) -> [Option<Tensor<3>>; 1] {
        if !wanted {
            return [None];
        }
        let [batch, tokens, width] = x.dims();
        let d = width / 2;
        let views = (View::contiguous(&x), View::contiguous(&gradient));
        let (Some(x_view), Some(dy)) = views else {
            return [Some(derivative(x, gradient, plain_geglu))];
        };
        if !(x_view.is_f32() && dy.is_f32()) {
            return [Some(derivative(x, gradient, plain_geglu))];
        }
        let dx = rows(batch * tokens, width, |index, dx| {
            let row = &x_view.f32()[index * width..][..width];
            let dy = &dy.f32()[index * d..][..d];
            let (dvalues, dgates) = dx.split_at_mut(d);
            elementwise::gate_backward(&row[..d], &row[d..], dy, dvalues, dgates);
        });
        [Some(tensor(dx, [batch, tokens, width]))]
    }
}

fn halves(x: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
    let d = x.dims()[2] / 2;
    (x.clone().narrow(2, 0, d), x.narrow(2, d, d))
}

fn plain_geglu(x: Tensor<3>) -> Tensor<3> {
    let (values, gates) = halves(x);
    values * plain_gelu(gates)
}

#[derive(Clone, Debug)]
struct QuickGelu;

impl Operation<1, 3> for QuickGelu {
    type Saved = Tensor<3>;

    fn forward(&self, [x]: [Tensor<3>; 1]) -> (Tensor<3>, Tensor<3>) {
        let y = match View::contiguous(&x).filter(View::is_f32) {
            Some(view) => {
                let [batch, tokens, width] = x.dims();
                let y = rows(batch * tokens, width, |index, y| {
                    elementwise::quick_gelu(&view.f32()[index * width..][..width], y);
                });
                tensor(y, x.dims())
            }
            None => plain_quick_gelu(x.clone()),
        };
        (y, x)
    }

    fn backward(
        &self,
        x: Tensor<3>,
        gradient: Tensor<3>,
        [wanted]: [bool; 1],
    ) -> [Option<Tensor<3>>; 1] {
        if !wanted {
            return [None];
        }
        let views = (View::contiguous(&x), View::contiguous(&gradient));
        let (Some(x_view), Some(dy)) = views else {
            return [Some(derivative(x, gradient, plain_quick_gelu))];
        };
        if !(x_view.is_f32() && dy.is_f32()) {
            return [Some(derivative(x, gradient, plain_quick_gelu))];
        }
        let [batch, tokens, width] = x.dims();
        let dx = rows(batch * tokens, width, |index, dx| {
            let range = index * width..(index + 1) * width;
            elementwise::quick_gelu_backward(&x_view.f32()[range.clone()], &dy.f32()[range], dx);
        });
        [Some(tensor(dx, x.dims()))]
    }
}

fn plain_quick_gelu(x: Tensor<3>) -> Tensor<3> {
    x.clone() * activation::sigmoid(x.mul_scalar(1.702))
}

/// The gradient of `function` at `x` in a graph of its own: burn allows a backward inside a backward step as long as
/// they share no node.
pub(super) fn derivative<const D: usize>(
    x: Tensor<D>,
    gradient: Tensor<D>,
    function: impl Fn(Tensor<D>) -> Tensor<D>,
) -> Tensor<D> {
    let zeros = x.zeros_like();
    let x = x.autodiff().require_grad();
    let mut gradients = (function(x.clone()) * gradient).sum().backward();
    x.grad_remove(&mut gradients).unwrap_or(zeros)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    type Function = fn(Tensor<3>) -> Tensor<3>;

    #[test]
    fn results_and_gradients_equal_those_of_plain_operations() {
        let device = Device::flex();
        let x = Tensor::<3>::random([2, 5, 34], Distribution::Normal(0.0, 2.0), &device);
        let pairs: [(Function, Function); 3] = [
            (geglu, plain_geglu),
            (gelu, plain_gelu),
            (quick_gelu, plain_quick_gelu),
        ];
        for (ours, plain) in pairs {
            let run = |function: Function| {
                let x = x.clone().autodiff().require_grad();
                let y = function(x.clone());
                let mut gradients = y.clone().square().sum().backward();
                (y.without_autodiff(), x.grad_remove(&mut gradients).unwrap())
            };
            let ((y, dx), (y_plain, dx_plain)) = (run(ours), run(plain));
            let tolerance = Tolerance::rel_abs(2e-6, 4e-6);
            y.into_data()
                .assert_approx_eq::<f32>(&y_plain.into_data(), tolerance);
            dx.into_data()
                .assert_approx_eq::<f32>(&dx_plain.into_data(), tolerance);
        }
    }
}
