//! Normalisations with frozen scale and shift.

use burn::tensor::{Tensor, activation};

use super::cpu::{View, elementwise, rows, tensor};
use super::gate::derivative;
use super::operation::{Operation, apply};
use super::precision::{narrow, widen};

/// Group normalisation over channels and pixels, and SiLU behind it when `silu`; keeps its input alone.
///
/// `z = (x - mean) / sqrt(var + eps) · weight + bias`, mean and (biased) variance over each group of channels; the
/// result is `z` or `z · sigmoid(z)`. Wu & He 2018, arXiv:1803.08494. Statistics are in f32 whatever `x` is.
///
/// # Shapes
/// - `x` and output: `[batch, channels, height, width]`
/// - `weight`, `bias`: `[channels]`, f32
pub fn group_norm(
    x: Tensor<4>,
    weight: &Tensor<1>,
    bias: &Tensor<1>,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Tensor<4> {
    let norm = GroupNorm {
        weight: weight.clone(),
        bias: bias.clone(),
        groups,
        eps,
        silu,
    };
    apply(norm, [x])
}

/// Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450); keeps its input alone.
///
/// # Shapes
/// - `x` and output: `[batch, tokens, d]`
/// - `weight`, `bias`: `[d]`, f32
pub fn layer_norm(x: Tensor<3>, weight: &Tensor<1>, bias: &Tensor<1>, eps: f64) -> Tensor<3> {
    let norm = LayerNorm {
        weight: weight.clone(),
        bias: bias.clone(),
        eps,
    };
    apply(norm, [x])
}

#[derive(Clone, Debug)]
struct GroupNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    groups: usize,
    eps: f64,
    silu: bool,
}

impl Operation<1, 4> for GroupNorm {
    type Saved = Tensor<4>;

    fn forward(&self, [x]: [Tensor<4>; 1]) -> (Tensor<4>, Tensor<4>) {
        let y = self
            .forward_cpu(&x)
            .unwrap_or_else(|| self.plain(x.clone()));
        (y, x)
    }

    fn backward(
        &self,
        x: Tensor<4>,
        gradient: Tensor<4>,
        [wanted]: [bool; 1],
    ) -> [Option<Tensor<4>>; 1] {
        [wanted.then(|| {
            self.backward_cpu(&x, &gradient)
                .unwrap_or_else(|| derivative(x, gradient, |x| self.plain(x)))
        })]
    }
}

impl GroupNorm {
    fn plain(&self, x: Tensor<4>) -> Tensor<4> {
        let dtype = x.dtype();
        let [batch, channels, height, width] = x.dims();
        let x = widen(x);
        let grouped = x.reshape([batch, self.groups, channels / self.groups * height * width]);
        let normed = standardize(grouped, self.eps).reshape([batch, channels, height, width]);
        let weight = self.weight.clone().reshape([1, channels, 1, 1]);
        let bias = self.bias.clone().reshape([1, channels, 1, 1]);
        let y = narrow(normed * weight + bias, dtype);
        if self.silu { activation::silu(y) } else { y }
    }

    /// Pixels of a channel, and values of a group.
    fn sizes(&self, [_, channels, height, width]: [usize; 4]) -> (usize, usize) {
        let pixels = height * width;
        (pixels, channels / self.groups * pixels)
    }

    fn affine(&self) -> Option<(View<1>, View<1>)> {
        let weight = View::contiguous(&self.weight).filter(View::is_f32)?;
        let bias = View::contiguous(&self.bias).filter(View::is_f32)?;
        Some((weight, bias))
    }

    fn forward_cpu(&self, x: &Tensor<4>) -> Option<Tensor<4>> {
        let x = View::contiguous(x).filter(View::is_f32)?;
        let (weight, bias) = self.affine()?;
        let (pixels, group_size) = self.sizes(x.dims);
        let per_group = group_size / pixels;
        let y = rows(x.dims[0] * self.groups, group_size, |group, y| {
            let x = &x.f32()[group * group_size..][..group_size];
            let [mean, rstd] = elementwise::moments(x, self.eps as f32);
            let first = group % self.groups * per_group;
            let channels = y.chunks_exact_mut(pixels).zip(x.chunks_exact(pixels));
            for (channel, (y, x)) in (first..).zip(channels) {
                let scale = rstd * weight.f32()[channel];
                let shift = bias.f32()[channel] - mean * scale;
                elementwise::affine(x, y, scale, shift, self.silu);
            }
        });
        Some(tensor(y, x.dims))
    }

    fn backward_cpu(&self, x: &Tensor<4>, dy: &Tensor<4>) -> Option<Tensor<4>> {
        let x = View::contiguous(x).filter(View::is_f32)?;
        let dy = View::contiguous(dy).filter(View::is_f32)?;
        let (weight, bias) = self.affine()?;
        let (pixels, group_size) = self.sizes(x.dims);
        let per_group = group_size / pixels;
        let dx = rows(x.dims[0] * self.groups, group_size, |group, dx| {
            let x = &x.f32()[group * group_size..][..group_size];
            let dy = &dy.f32()[group * group_size..][..group_size];
            let moments = elementwise::moments(x, self.eps as f32);
            let first = group % self.groups * per_group;
            let mut sums = [0.0_f32; 2];
            let channels = dx
                .chunks_exact_mut(pixels)
                .zip(x.chunks_exact(pixels))
                .zip(dy.chunks_exact(pixels));
            for (channel, ((dx, x), dy)) in (first..).zip(channels) {
                let affine = [weight.f32()[channel], bias.f32()[channel]];
                let part = elementwise::affine_backward(x, dy, dx, moments, affine, self.silu);
                sums = [sums[0] + part[0], sums[1] + part[1]];
            }
            let means = sums.map(|sum| sum / group_size as f32);
            elementwise::standardize_backward(x, dx, moments, means);
        });
        Some(tensor(dx, x.dims))
    }
}

#[derive(Clone, Debug)]
struct LayerNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
}

impl Operation<1, 3> for LayerNorm {
    type Saved = Tensor<3>;

    fn forward(&self, [x]: [Tensor<3>; 1]) -> (Tensor<3>, Tensor<3>) {
        let y = self
            .forward_cpu(&x)
            .unwrap_or_else(|| self.plain(x.clone()));
        (y, x)
    }

    fn backward(
        &self,
        x: Tensor<3>,
        gradient: Tensor<3>,
        [wanted]: [bool; 1],
    ) -> [Option<Tensor<3>>; 1] {
        [wanted.then(|| {
            self.backward_cpu(&x, &gradient)
                .unwrap_or_else(|| derivative(x, gradient, |x| self.plain(x)))
        })]
    }
}

impl LayerNorm {
    fn plain(&self, x: Tensor<3>) -> Tensor<3> {
        let dtype = x.dtype();
        let normed = standardize(widen(x), self.eps);
        narrow(
            normed * self.weight.clone().unsqueeze() + self.bias.clone().unsqueeze(),
            dtype,
        )
    }

    fn forward_cpu(&self, x: &Tensor<3>) -> Option<Tensor<3>> {
        let x = View::contiguous(x).filter(View::is_f32)?;
        let weight = View::contiguous(&self.weight).filter(View::is_f32)?;
        let bias = View::contiguous(&self.bias).filter(View::is_f32)?;
        let [batch, tokens, d] = x.dims;
        let y = rows(batch * tokens, d, |index, y| {
            let x = &x.f32()[index * d..][..d];
            let moments = elementwise::moments(x, self.eps as f32);
            elementwise::norm_row(x, y, moments, weight.f32(), bias.f32());
        });
        Some(tensor(y, x.dims))
    }

    fn backward_cpu(&self, x: &Tensor<3>, dy: &Tensor<3>) -> Option<Tensor<3>> {
        let x = View::contiguous(x).filter(View::is_f32)?;
        let dy = View::contiguous(dy).filter(View::is_f32)?;
        let weight = View::contiguous(&self.weight).filter(View::is_f32)?;
        let [batch, tokens, d] = x.dims;
        let dx = rows(batch * tokens, d, |index, dx| {
            let x = &x.f32()[index * d..][..d];
            let dy = &dy.f32()[index * d..][..d];
            let moments = elementwise::moments(x, self.eps as f32);
            elementwise::norm_row_backward(x, dy, dx, moments, &weight.f32()[..d]);
        });
        Some(tensor(dx, x.dims))
    }
}

/// Rows of the last axis with mean 0 and variance 1.
fn standardize(x: Tensor<3>, eps: f64) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    centred / variance.add_scalar(eps).sqrt()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    fn check<const D: usize>(
        x: &Tensor<D>,
        ours: impl Fn(Tensor<D>) -> Tensor<D>,
        plain: impl Fn(Tensor<D>) -> Tensor<D>,
    ) {
        let device = Device::flex();
        let seed = Tensor::<D>::random(x.shape(), Distribution::Default, &device);
        let run = |function: &dyn Fn(Tensor<D>) -> Tensor<D>| {
            let x = x.clone().autodiff().require_grad();
            let y = function(x.clone());
            let mut gradients = (y.clone() * seed.clone()).sum().backward();
            (y.without_autodiff(), x.grad_remove(&mut gradients).unwrap())
        };
        let ((y, dx), (y_plain, dx_plain)) = (run(&ours), run(&plain));
        let tolerance = Tolerance::absolute(4e-6);
        y.into_data()
            .assert_approx_eq::<f32>(&y_plain.into_data(), tolerance);
        dx.into_data()
            .assert_approx_eq::<f32>(&dx_plain.into_data(), tolerance);
    }

    fn affine(length: usize) -> (Tensor<1>, Tensor<1>) {
        let random =
            || Tensor::<1>::random([length], Distribution::Uniform(-1.0, 1.5), &Device::flex());
        (random(), random())
    }

    #[test]
    fn group_norm_and_its_gradient_equal_plain_operations() {
        let (weight, bias) = affine(12);
        let distribution = Distribution::Normal(3.0, 2.0);
        let x = Tensor::<4>::random([2, 12, 5, 7], distribution, &Device::flex());
        for silu in [false, true] {
            let norm = GroupNorm {
                weight: weight.clone(),
                bias: bias.clone(),
                groups: 4,
                eps: 1e-5,
                silu,
            };
            check(
                &x,
                |x| group_norm(x, &weight, &bias, 4, 1e-5, silu),
                |x| norm.plain(x),
            );
        }
    }

    #[test]
    fn layer_norm_and_its_gradient_equal_plain_operations() {
        let (weight, bias) = affine(50);
        let distribution = Distribution::Normal(-1.0, 3.0);
        let x = Tensor::<3>::random([2, 9, 50], distribution, &Device::flex());
        let norm = LayerNorm {
            weight: weight.clone(),
            bias: bias.clone(),
            eps: 1e-5,
        };
        check(
            &x,
            |x| layer_norm(x, &weight, &bias, 1e-5),
            |x| norm.plain(x),
        );
    }
}
