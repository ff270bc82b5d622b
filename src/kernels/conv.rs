//! The frozen convolution.

use burn::tensor::module::{conv_transpose2d, conv2d as plain_conv2d};
use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};
use burn::tensor::{FloatDType, Tensor};

pub use super::cpu::conv::Window as Geometry;
pub use super::cpu::conv::order_by_taps;
use super::cpu::conv::{backward, forward};
use super::operation::{Operation, Skippable, Value, apply_for};
use super::precision::{Precision, narrow};

/// `y = conv(x, W) + b` (cross-correlation) with weights that are never trained.
///
/// Nothing is kept for the backward but the image's size; weights stay in the precision that they are stored in.
///
/// # Shapes
/// - `x`: `[batch, c_in, height, width]`
/// - `weight`: `[c_out, c_in, kernel_h, kernel_w]`
/// - `bias`: `[c_out]`
/// - output: `[batch, c_out, height', width']`
pub fn conv2d(
    x: Tensor<4>,
    weight: &Tensor<4>,
    bias: Option<&Tensor<1>>,
    geometry: Geometry,
    precision: Precision,
    value: Value,
) -> Tensor<4> {
    let layer = FrozenConv {
        weight: weight.clone(),
        bias: bias.cloned(),
        geometry,
        precision,
    };
    apply_for(value, layer, [x])
}

#[derive(Clone, Debug)]
struct FrozenConv {
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    geometry: Geometry,
    precision: Precision,
}

impl Operation<1, 4> for FrozenConv {
    /// Height and width of the image.
    type Saved = [usize; 2];

    fn forward(&self, [x]: [Tensor<4>; 1]) -> (Tensor<4>, [usize; 2]) {
        let [_, _, height, width] = x.dims();
        let bias = self.bias.as_ref();
        let y =
            forward(&x, &self.weight, bias, self.geometry, self.precision).unwrap_or_else(|| {
                let Geometry {
                    stride, padding, ..
                } = self.geometry;
                let weight = self.weight.clone().cast(FloatDType::from(x.dtype()));
                let options = ConvOptions::new(stride, padding, [1, 1], 1);
                let bias = bias.map(|bias| narrow(bias.clone(), x.dtype()));
                plain_conv2d(x, weight, bias, options)
            });
        (y, [height, width])
    }

    fn backward(
        &self,
        image: [usize; 2],
        gradient: Tensor<4>,
        [wanted]: [bool; 1],
    ) -> [Option<Tensor<4>>; 1] {
        [wanted.then(|| {
            let (weight, precision) = (&self.weight, self.precision);
            backward(&gradient, weight, self.geometry, image, precision)
                .unwrap_or_else(|| self.transposed(gradient, image))
        })]
    }
}

impl Skippable<1, 4> for FrozenConv {
    fn shape(&self, [x]: &[Tensor<4>; 1]) -> [usize; 4] {
        let [batch, _, height, width] = x.dims();
        let [height, width] = self.geometry.output([height, width]);
        [batch, self.weight.dims()[0], height, width]
    }

    fn saved(&self, [x]: [Tensor<4>; 1]) -> [usize; 2] {
        let [_, _, height, width] = x.dims();
        [height, width]
    }
}

impl FrozenConv {
    /// The input gradient as a transposed convolution.
    fn transposed(&self, gradient: Tensor<4>, image: [usize; 2]) -> Tensor<4> {
        let Geometry {
            kernel,
            stride,
            padding,
        } = self.geometry;
        let [_, _, height, width] = gradient.dims();
        let small = [height, width];
        // Rows at the end that no window reached: a stride that does not divide the image.
        let padding_out = [0, 1].map(|axis| {
            let reached = (small[axis] - 1) * stride[axis] + kernel[axis];
            (image[axis] + 2 * padding[axis]).saturating_sub(reached)
        });
        let weight = self.weight.clone().cast(FloatDType::from(gradient.dtype()));
        let options = ConvTransposeOptions::new(stride, padding, padding_out, [1, 1], 1);
        conv_transpose2d(gradient, weight, None, options)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    #[test]
    fn results_and_gradients_equal_those_of_plain_operations() {
        let device = Device::flex();
        let random = |shape: [usize; 4]| Tensor::<4>::random(shape, Distribution::Default, &device);
        for (images, size, kernel, stride, padding) in [
            (1, [9, 7], 3, 1, 1),
            (2, [8, 8], 3, 2, 1),
            (1, [9, 9], 3, 2, 0),
            (2, [5, 6], 1, 1, 0),
            (3, [4, 4], 3, 1, 1),
            (1, [33, 31], 3, 1, 1), // in tiles, with an odd edge
            (3, [16, 48], 3, 1, 1),
        ] {
            let geometry = Geometry {
                kernel: [kernel; 2],
                stride: [stride; 2],
                padding: [padding; 2],
            };
            let channels = [[33, 20], [64, 96]];
            for (by_taps, [c_out, c_in]) in [false, true].into_iter().zip(channels) {
                let x = random([images, c_in, size[0], size[1]]);
                let weight = random([c_out, c_in, kernel, kernel]);
                let bias = Tensor::<1>::random([c_out], Distribution::Default, &device);
                let weight = if by_taps {
                    let ordered = weight.clone().permute([2, 3, 0, 1]);
                    (ordered + 0.0).permute([2, 3, 0, 1])
                } else {
                    weight.clone()
                };
                let run = |ours: bool| {
                    let x = x.clone().autodiff().require_grad();
                    let y = if ours {
                        conv2d(
                            x.clone(),
                            &weight,
                            Some(&bias),
                            geometry,
                            Precision::Fp32,
                            Value::Read,
                        )
                    } else {
                        let options = ConvOptions::new([stride; 2], [padding; 2], [1, 1], 1);
                        plain_conv2d(x.clone(), weight.clone(), Some(bias.clone()), options)
                    };
                    let mut gradients = y.clone().square().sum().backward();
                    (y.without_autodiff(), x.grad_remove(&mut gradients).unwrap())
                };
                let ((y, dx), (y_plain, dx_plain)) = (run(true), run(false));
                let tolerance = Tolerance::rel_abs(1e-5, 1e-4);
                y.into_data()
                    .assert_approx_eq::<f32>(&y_plain.into_data(), tolerance);
                dx.into_data()
                    .assert_approx_eq::<f32>(&dx_plain.into_data(), tolerance);
            }
        }
    }
}
