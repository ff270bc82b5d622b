//! Image patches as one side of a matrix product, gathered while they are packed ("implicit im2col").

use std::ops::Range;

use super::gemm::Operand;
use super::pack::{Panels, Stored, Strides, copy_run, pack};
#[cfg(target_arch = "x86_64")]
use super::parts::{self, Count, PartPanels, STEP};

/// Most lanes that are packed at a time.
const MAX_LANES: usize = 32;

/// A window over an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Step of the window, vertical and horizontal.
    pub stride: [usize; 2],
    /// Zeros around the image, vertical and horizontal.
    pub padding: [usize; 2],
}

impl Window {
    /// Positions of the kernel's elements.
    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Size of the result for an image of this size.
    pub fn output(&self, image: [usize; 2]) -> [usize; 2] {
        [0, 1].map(|axis| {
            let padded = image[axis] + 2 * self.padding[axis];
            (padded.saturating_sub(self.kernel[axis])) / self.stride[axis] + 1
        })
    }
}

/// Which way the window is looked through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A lane is a pixel of the result; it sees the pixels of the image below the window.
    ToResult,
    /// A lane is a pixel of the image; it sees the pixels of the result whose windows it was in.
    ToImage,
}

/// Lanes are pixels (of all images, one after the other), depths are (tap, channel).
pub struct Patches<'a> {
    /// What is looked at: `[images, channels, height, width]`, contiguous.
    pub pixels: &'a [f32],
    /// Channels of it.
    pub channels: usize,
    /// Height and width of it.
    pub size: [usize; 2],
    /// Height and width of the grid of lanes.
    pub lanes: [usize; 2],
    /// The window.
    pub window: Window,
    /// Its direction.
    pub direction: Direction,
}

/// Lanes that read neighbouring pixels.
#[derive(Clone, Copy, Default)]
struct Run {
    to: usize,
    from: usize,
    length: usize,
}

impl Patches<'_> {
    /// Where a lane looks through a tap, in the first channel.
    fn source(&self, lane: usize, tap: usize) -> Option<usize> {
        let [height, width] = self.lanes;
        let (image, pixel) = (lane / (height * width), lane % (height * width));
        let [ky, kx] = [tap / self.window.kernel[1], tap % self.window.kernel[1]];
        let y = self.along(0, pixel / width, ky)?;
        let x = self.along(1, pixel % width, kx)?;
        let [rows, columns] = self.size;
        Some((image * self.channels * rows + y) * columns + x)
    }

    fn along(&self, axis: usize, lane: usize, tap: usize) -> Option<usize> {
        let (stride, padding) = (self.window.stride[axis], self.window.padding[axis]);
        let at = match self.direction {
            Direction::ToResult => (lane * stride + tap).checked_sub(padding)?,
            Direction::ToImage => {
                let at = (lane + padding).checked_sub(tap)?;
                if !at.is_multiple_of(stride) {
                    return None;
                }
                at / stride
            }
        };
        (at < self.size[axis]).then_some(at)
    }

    fn runs(&self, lanes: &Range<usize>, tap: usize) -> ([Run; MAX_LANES], usize) {
        let mut runs = [Run::default(); MAX_LANES];
        let mut count = 0;
        for (to, lane) in lanes.clone().enumerate() {
            let Some(from) = self.source(lane, tap) else {
                continue;
            };
            if count > 0 {
                let run = &mut runs[count - 1];
                if run.to + run.length == to && run.from + run.length == from {
                    run.length += 1;
                    continue;
                }
            }
            let length = 1;
            runs[count] = Run { to, from, length };
            count += 1;
        }
        (runs, count)
    }
}

impl Operand for Patches<'_> {
    fn pack(&self, lanes: Range<usize>, depth: Range<usize>, to: &mut Panels<'_>) {
        let width = to.width;
        debug_assert!(width <= MAX_LANES);
        let plane = self.size[0] * self.size[1];
        for (panel, first) in lanes.clone().step_by(width).enumerate() {
            let lanes = first..lanes.end.min(first + width);
            let panel = &mut to.data[panel * to.stride..];
            by_tap(depth.clone(), self.channels, |tap, channels, at| {
                let (runs, count) = self.runs(&lanes, tap);
                let runs = &runs[..count];
                let depth = channels.len();
                let panel = &mut panel[at * width..][..depth * width];
                if runs.iter().map(|run| run.length).sum::<usize>() < width {
                    panel.fill(0.0);
                }
                for run in runs {
                    let from = &self.pixels[channels.start * plane + run.from..];
                    copy_run(from, plane, run.length, depth, &mut panel[run.to..], width);
                }
            });
        }
    }
}

/// Convolution weights: depths are (tap, channel).
pub struct Taps<'a, T> {
    /// All of them.
    pub data: &'a [T],
    /// Distances of lanes and of channels.
    pub strides: Strides,
    /// Distance of the kernel's elements.
    pub tap_stride: usize,
    /// Channels that are summed over.
    pub channels: usize,
}

impl<T: Stored> Operand for Taps<'_, T> {
    fn pack(&self, lanes: Range<usize>, depth: Range<usize>, to: &mut Panels<'_>) {
        by_tap(depth, self.channels, |tap, channels, at| {
            let begin = lanes.start * self.strides.lane
                + channels.start * self.strides.depth
                + tap * self.tap_stride;
            let data = &self.data[begin..];
            let mut to = Panels {
                data: &mut to.data[at * to.width..],
                width: to.width,
                stride: to.stride,
            };
            pack(data, self.strides, lanes.len(), channels.len(), &mut to);
        });
    }

    #[cfg(target_arch = "x86_64")]
    fn parts(&self) -> Count {
        T::PARTS
    }

    #[cfg(target_arch = "x86_64")]
    fn pack_parts(&self, lanes: Range<usize>, depth: Range<usize>, to: &mut PartPanels<'_>) {
        // Taps have to begin where steps do, and one of the orders must be that of the memory.
        let whole = self.channels.is_multiple_of(STEP) && depth.start.is_multiple_of(STEP);
        if !whole || (self.strides.lane != 1 && self.strides.depth != 1) {
            return parts::pack_staged(self, lanes, depth, to);
        }
        let in_all = depth.len();
        by_tap(depth, self.channels, |tap, channels, at| {
            let begin = lanes.start * self.strides.lane
                + channels.start * self.strides.depth
                + tap * self.tap_stride;
            let size = [lanes.len(), channels.len()];
            let place = [at / STEP, in_all];
            parts::pack_parts(&self.data[begin..], self.strides, size, place, to);
        });
    }
}

/// Cuts a range of depths at the taps: calls with the tap, its channels, and where they begin in the range.
fn by_tap(depth: Range<usize>, channels: usize, mut each: impl FnMut(usize, Range<usize>, usize)) {
    let mut at = depth.start;
    while at < depth.end {
        let (tap, first) = (at / channels, at % channels);
        let end = depth.end.min((tap + 1) * channels);
        each(tap, first..first + end - at, at - depth.start);
        at = end;
    }
}
