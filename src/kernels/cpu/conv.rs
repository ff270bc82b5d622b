//! Convolutions with frozen weights as matrix products.

use burn::tensor::{DType, Element, Tensor, TensorData};
use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;

use super::Shared;
use super::gemm::{Operand, Size, Start, product};
use super::pack::Strides;
pub use super::patches::Window;
use super::patches::{Direction, Patches, Taps};
use super::view::{View, tensor};
use super::winograd;
use crate::kernels::Precision;

/// `y = conv(x, w) + b`; none when a tensor is not on the CPU.
///
/// # Shapes
/// - `x`: `[batch, c_in, height, width]`, f32
/// - `weight`: `[c_out, c_in, kernel, kernel]`, f32, f16 or bf16
/// - `bias`: `[c_out]`
pub fn forward(
    x: &Tensor<4>,
    weight: &Tensor<4>,
    bias: Option<&Tensor<1>>,
    window: Window,
    precision: Precision,
) -> Option<Tensor<4>> {
    let x = View::contiguous(x).filter(View::is_f32)?;
    let weight = View::of(weight)?;
    let bias = match bias {
        Some(bias) => Some(View::contiguous(bias).filter(View::is_f32)?),
        None => None,
    };
    let [images, c_in, height, width] = x.dims;
    let c_out = weight.dims[0];
    let lanes = window.output([height, width]);
    let patches = Patches {
        pixels: x.f32(),
        channels: c_in,
        size: [height, width],
        lanes,
        window,
        direction: Direction::ToResult,
    };
    let start = match &bias {
        Some(bias) => Start::PerRow(&bias.f32()[..c_out]),
        None => Start::Zero,
    };
    let [lane, depth, ..] = weight.strides;
    let taps = taps(&weight, Strides { lane, depth }, c_in);
    let y = by_channel(
        precision,
        &*taps,
        &patches,
        [c_out, window.taps() * c_in],
        images,
        start,
    );
    Some(to_images(y, [images, c_out, lanes[0], lanes[1]]))
}

/// The gradient of the image: each of its pixels gathers from the windows that it was in.
///
/// # Shapes
/// - `gradient`: `[batch, c_out, height', width']`, f32
/// - output: `[batch, c_in, image[0], image[1]]`
pub fn backward(
    gradient: &Tensor<4>,
    weight: &Tensor<4>,
    window: Window,
    image: [usize; 2],
    precision: Precision,
) -> Option<Tensor<4>> {
    let gradient = View::contiguous(gradient).filter(View::is_f32)?;
    let weight = View::of(weight)?;
    let [images, c_out, height, width] = gradient.dims;
    let c_in = weight.dims[1];
    let patches = Patches {
        pixels: gradient.f32(),
        channels: c_out,
        size: [height, width],
        lanes: image,
        window,
        direction: Direction::ToImage,
    };
    let [depth, lane, ..] = weight.strides;
    let strides = Strides { lane, depth };
    if winograd::applies(window, images, image) {
        // The gradient is a convolution with the kernel turned by half a circle.
        let dx = by_tiles(&gradient, &weight, strides, c_in, None, |tap| 8 - tap);
        return Some(tensor(dx, [images, c_in, image[0], image[1]]));
    }
    let taps = taps(&weight, strides, c_out);
    let depth = window.taps() * c_out;
    let size = [c_in, depth];
    let dx = by_channel(precision, &*taps, &patches, size, images, Start::Zero);
    Some(to_images(dx, [images, c_in, image[0], image[1]]))
}

/// A 3×3 convolution that keeps the size: `[images, channels_out, height, width]`
fn by_tiles(
    x: &View<4>,
    weight: &View<4>,
    strides: Strides,
    channels_out: usize,
    bias: Option<&[f32]>,
    order: impl Fn(usize) -> usize,
) -> Vec<f32> {
    let taps: [_; 9] =
        std::array::from_fn(|tap| weight.operand(order(tap) * weight.strides[3], strides));
    winograd::Convolution {
        pixels: x.f32(),
        shape: x.dims,
        taps: taps.each_ref().map(|tap| &**tap),
        channels_out,
        bias,
    }
    .compute()
}

/// The product of weights and patches: `[channels, images * pixels]`
fn by_channel(
    precision: Precision,
    weights: &dyn Operand,
    patches: &Patches<'_>,
    [rows, depth]: [usize; 2],
    images: usize,
    start: Start<'_>,
) -> Vec<f32> {
    let columns = images * patches.lanes[0] * patches.lanes[1];
    let size = Size {
        rows,
        columns,
        depth,
    };
    let plain = patches.window.taps() == 1
        && patches.window.stride == [1, 1]
        && patches.window.padding == [0, 0];
    if plain && images == 1 {
        // A 1×1 convolution is a product with the image itself.
        let pixels = super::gemm::Matrix {
            data: patches.pixels,
            strides: Strides {
                lane: 1,
                depth: columns,
            },
        };
        return product(precision, size, weights, &pixels, start);
    }
    product(precision, size, weights, patches, start)
}

/// `[channels, images * pixels]` to `[images, channels, height, width]`
fn to_images(values: Vec<f32>, shape: [usize; 4]) -> Tensor<4> {
    let [images, channels, height, width] = shape;
    if images == 1 {
        return tensor(values, shape);
    }
    let pixels = height * width;
    let mut ordered = Vec::with_capacity(values.len());
    for image in 0..images {
        for channel in 0..channels {
            let begin = (channel * images + image) * pixels;
            ordered.extend_from_slice(&values[begin..][..pixels]);
        }
    }
    tensor(ordered, shape)
}

/// The same weights, on the CPU with channels as neighbours in memory: what the kernels read in long runs.
///
/// # Shapes
/// - `weight` and output: `[c_out, c_in, kernel_h, kernel_w]`
pub fn order_by_taps(weight: Tensor<4>) -> Tensor<4> {
    let Some(view) = View::contiguous(&weight) else {
        return weight;
    };
    let [_, _, kernel_height, kernel_width] = view.dims;
    if kernel_height * kernel_width == 1 {
        return weight;
    }
    let ordered = match view.dtype() {
        DType::F16 => ordered::<f16>(&view),
        DType::BF16 => ordered::<bf16>(&view),
        _ => ordered::<f32>(&view),
    };
    Tensor::from_data(ordered, (&weight.device(), weight.dtype())).permute([2, 3, 0, 1])
}

/// `[kernel_h, kernel_w, c_out, c_in]`
fn ordered<T: Element + Pod>(weight: &View<4>) -> TensorData {
    let [c_out, c_in, kernel_height, kernel_width] = weight.dims;
    let taps = kernel_height * kernel_width;
    let from = &weight.stored::<T>()[..c_out * c_in * taps];
    let mut to = Vec::<T>::with_capacity(from.len());
    let place = Shared(to.as_mut_ptr());
    from.par_chunks_exact(c_in * taps)
        .enumerate()
        .for_each(|(channel, from)| {
            for tap in 0..taps {
                let row = place.at((tap * c_out + channel) * c_in);
                for (i, value) in from[tap..].iter().step_by(taps).enumerate() {
                    // SAFETY: a row of `c_in` values inside the reserved memory, of this channel alone.
                    unsafe { row.add(i).write(*value) };
                }
            }
        });
    // SAFETY: every row of every tap is written.
    unsafe { to.set_len(from.len()) };
    TensorData::new(to, [kernel_height, kernel_width, c_out, c_in])
}

fn taps(weight: &View<4>, strides: Strides, channels: usize) -> Box<dyn Operand + '_> {
    // A row of the kernel is as far from the next as its width says, in both memory orders that we load.
    let tap_stride = weight.strides[3];
    debug_assert!(
        weight.dims[2] == 1 || weight.strides[2] == weight.dims[3] * tap_stride,
        "kernel elements are evenly spaced"
    );
    match weight.dtype() {
        DType::F16 => Box::new(Taps {
            data: weight.stored::<f16>(),
            strides,
            tap_stride,
            channels,
        }),
        DType::BF16 => Box::new(Taps {
            data: weight.stored::<bf16>(),
            strides,
            tap_stride,
            channels,
        }),
        _ => Box::new(Taps {
            data: weight.f32(),
            strides,
            tap_stride,
            channels,
        }),
    }
}
