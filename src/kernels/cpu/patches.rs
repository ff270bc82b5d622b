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

    /// Lanes of a panel that read neighbouring pixels, row of the grid by row.
    fn runs(&self, lanes: &Range<usize>, tap: usize) -> ([Run; MAX_LANES], usize) {
        let mut runs = [Run::default(); MAX_LANES];
        let mut count = 0;
        let width = self.lanes[1];
        // With a stride between them no two lanes read neighbours.
        let most = if self.window.stride[1] == 1 { width } else { 1 };
        let mut lane = lanes.start;
        while lane < lanes.end {
            let row_end = (lane / width + 1) * width;
            let end = lanes.end.min(row_end).min(lane + most);
            if let Some(run) = self.run_of_row(lane..end, tap) {
                runs[count] = Run {
                    to: lane - lanes.start + run.to,
                    ..run
                };
                count += 1;
            }
            lane = end;
        }
        (runs, count)
    }

    /// What neighbouring lanes of one row of the grid see, in the first channel: one row of pixels, and padding beside it.
    fn run_of_row(&self, lanes: Range<usize>, tap: usize) -> Option<Run> {
        let [height, width] = self.lanes;
        let [rows, columns] = self.size;
        let (image, pixel) = (
            lanes.start / (height * width),
            lanes.start % (height * width),
        );
        let [ky, kx] = [tap / self.window.kernel[1], tap % self.window.kernel[1]];
        let y = self.along(0, pixel / width, ky)?;
        // The first lane that sees anything: those before it see the padding.
        let (skipped, first) = (0..lanes.len())
            .find_map(|lane| Some((lane, self.along(1, pixel % width + lane, kx)?)))?;
        let length = (lanes.len() - skipped).min(columns - first);
        Some(Run {
            to: skipped,
            from: (image * self.channels * rows + y) * columns + first,
            length,
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_each_lane_sees() {
        for (direction, kernel, stride, padding) in [
            (Direction::ToResult, 3, 1, 1),
            (Direction::ToImage, 3, 1, 1),
            (Direction::ToResult, 3, 2, 1),
            (Direction::ToImage, 3, 2, 1),
            (Direction::ToImage, 4, 2, 0),
            (Direction::ToResult, 1, 1, 0),
            (Direction::ToResult, 5, 1, 2),
        ] {
            let window = Window {
                kernel: [kernel; 2],
                stride: [stride; 2],
                padding: [padding; 2],
            };
            let image = [9, 6];
            let result = window.output(image);
            let (size, lanes) = match direction {
                Direction::ToResult => (image, result),
                Direction::ToImage => (result, image),
            };
            let patches = Patches {
                pixels: &[],
                channels: 3,
                size,
                lanes,
                window,
                direction,
            };
            let seen = |lane: usize, tap: usize| {
                let (image, pixel) = (lane / (lanes[0] * lanes[1]), lane % (lanes[0] * lanes[1]));
                let y = patches.along(0, pixel / lanes[1], tap / kernel)?;
                let x = patches.along(1, pixel % lanes[1], tap % kernel)?;
                Some((image * 3 * size[0] + y) * size[1] + x)
            };
            let all = 2 * lanes[0] * lanes[1];
            for first in (0..all).step_by(14) {
                let panel = first..all.min(first + 14);
                for tap in 0..kernel * kernel {
                    let mut found = vec![None; panel.len()];
                    let (runs, count) = patches.runs(&panel, tap);
                    for run in &runs[..count] {
                        for at in 0..run.length {
                            found[run.to + at] = Some(run.from + at);
                        }
                    }
                    let expected: Vec<_> = panel.clone().map(|lane| seen(lane, tap)).collect();
                    assert_eq!(
                        found, expected,
                        "{direction:?} {window:?} {panel:?} tap {tap}"
                    );
                }
            }
        }
    }
}
