//! 3×3 convolutions with 2.25 times fewer multiplications: Winograd's F(2×2, 3×3).
//!
//! `Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A` for each tile of 2×2 results, with the sum over channels inside the brackets:
//! sixteen matrix products instead of nine taps over four times as many pixels (Lavin & Gray 2015,
//! arXiv:1509.09308). The transforms add and halve only; the error stays that of a direct sum in f32.
//!
//! Image and weights are transformed straight into the panels that the micro-kernel reads.

use rayon::prelude::*;

use super::Shared;
use super::gemm::{BLOCK_DEPTH, Operand};
use super::instructions::Level;
use super::pack::Panels;
use super::patches::Window;
use super::tile::{Into, Tile};

/// Products that a tile of results takes.
const POSITIONS: usize = 16;
/// Tiles whose transformed image is held at once.
const GROUP: usize = 1024;
/// Channels of the result that a task computes: as many as keep the sums of one position in a second-level cache.
const MOST_CHANNELS: usize = 112;
/// Tiles below which the sixteen products are too narrow to pay.
const FEWEST_TILES: usize = 64;

/// A convolution with a 3×3 window that keeps the image's size.
pub struct Convolution<'a> {
    /// `[images, channels, height, width]`, contiguous.
    pub pixels: &'a [f32],
    /// Images, channels, height, width.
    pub shape: [usize; 4],
    /// The weights of each tap: lanes are channels of the result, depths those of the image.
    pub taps: [&'a dyn Operand; 9],
    /// Channels of the result.
    pub channels_out: usize,
    /// Added to each channel.
    pub bias: Option<&'a [f32]>,
}

/// Whether a convolution is of this kind, and large enough.
pub fn applies(window: Window, images: usize, [height, width]: [usize; 2]) -> bool {
    let tiles = images * height.div_ceil(2) * width.div_ceil(2);
    // A matrix unit is faster than the transforms.
    Level::best() < Level::Amx
        && window.kernel == [3, 3]
        && window.stride == [1, 1]
        && window.padding == [1, 1]
        && tiles >= FEWEST_TILES
}

/// Some tiles, counted through all images.
#[derive(Clone, Copy)]
struct Group {
    first: usize,
    count: usize,
}

impl Convolution<'_> {
    /// `[images, channels_out, height, width]`
    pub fn compute(&self) -> Vec<f32> {
        let [images, _, height, width] = self.shape;
        let mut result = Vec::<f32>::with_capacity(images * self.channels_out * height * width);
        let total = result.capacity();
        let to = Shared(result.as_mut_ptr());
        let tiles = images * self.grid()[0] * self.grid()[1];
        for first in (0..tiles).step_by(GROUP) {
            let group = Group {
                first,
                count: GROUP.min(tiles - first),
            };
            let image = self.transform_image(group);
            let channels = self.channels_of_task();
            (0..self.channels_out)
                .into_par_iter()
                .step_by(channels)
                .for_each(|first| {
                    let last = self.channels_out.min(first + channels);
                    self.channels(first..last, &image, group, to);
                });
        }
        debug_assert_eq!(total, images * self.channels_out * height * width);
        // SAFETY: every pixel of every channel belongs to one tile of one group.
        unsafe { result.set_len(images * self.channels_out * height * width) };
        result
    }

    /// Whole row panels, and an equal share of tasks for every thread.
    fn channels_of_task(&self) -> usize {
        let tasks = self.channels_out.div_ceil(MOST_CHANNELS);
        let tasks = tasks.next_multiple_of(rayon::current_num_threads());
        let rows = Tile::best().rows;
        self.channels_out.div_ceil(tasks).next_multiple_of(rows)
    }

    /// Tiles of an image, vertical and horizontal.
    fn grid(&self) -> [usize; 2] {
        [self.shape[2].div_ceil(2), self.shape[3].div_ceil(2)]
    }

    /// Length of one position's panels for one block of depths.
    fn block_size(group: Group) -> usize {
        let columns = Tile::best().columns;
        group.count.div_ceil(columns) * BLOCK_DEPTH * columns
    }

    /// `Bᵀ d B` of all tiles and channels: `[position][depth block][panel][depth][lane]`
    fn transform_image(&self, group: Group) -> Vec<f32> {
        let channels = self.shape[1];
        let blocks = channels.div_ceil(BLOCK_DEPTH);
        let size = Self::block_size(group);
        let columns = Tile::best().columns;
        // Lanes that fill up the last panel are read by the micro-kernel, though by nobody after it.
        let mut panels = if group.count.is_multiple_of(columns) {
            Vec::with_capacity(POSITIONS * blocks * size)
        } else {
            vec![0.0_f32; POSITIONS * blocks * size]
        };
        let to = Shared(panels.as_mut_ptr());
        let mut rows = Vec::new();
        self.each_tile_row(group, |image, row, tiles, at| {
            rows.push((image, row, tiles, at));
        });
        rows.into_par_iter()
            .for_each(|(image, tile_row, tiles, first)| {
                let mut scratch = RowScratch::new(self.shape[3]);
                // Channels are neighbours in the panels: they come one after the other.
                for channel in 0..channels {
                    let (block, d) = (channel / BLOCK_DEPTH, channel % BLOCK_DEPTH);
                    let plane = self.plane(image, channel);
                    scratch.read(plane, [self.shape[2], self.shape[3]], tile_row);
                    for position in 0..POSITIONS {
                        let mut from =
                            &scratch.horizontal[position / 4][position % 4][tiles.clone()];
                        let mut at = first;
                        while !from.is_empty() {
                            let (panel, lane) = (at / columns, at % columns);
                            let (run, rest) = from.split_at(from.len().min(columns - lane));
                            let place = (position * blocks + block) * size
                                + (panel * BLOCK_DEPTH + d) * columns
                                + lane;
                            // SAFETY: inside the panels, and of this row of tiles alone.
                            unsafe { copy_short(run, to.at(place)) };
                            at += run.len();
                            from = rest;
                        }
                    }
                }
            });
        // SAFETY: of every panel all lanes of all channels are written; depths behind the last channel are not read.
        unsafe { panels.set_len(POSITIONS * blocks * size) };
        panels
    }

    fn plane(&self, image: usize, channel: usize) -> &[f32] {
        let [_, channels, height, width] = self.shape;
        let plane = height * width;
        &self.pixels[(image * channels + channel) * plane..][..plane]
    }

    /// Calls with image, row of tiles, the tiles of it that are in the group, and where they begin in the group.
    fn each_tile_row(
        &self,
        group: Group,
        mut each: impl FnMut(usize, usize, std::ops::Range<usize>, usize),
    ) {
        let [rows, columns] = self.grid();
        let end = group.first + group.count;
        let mut at = group.first;
        while at < end {
            let (row, first) = (at / columns, at % columns);
            let last = columns.min(first + end - at);
            each(row / rows, row % rows, first..last, at - group.first);
            at += last - first;
        }
    }

    /// Some channels of the result, for the tiles of a group.
    fn channels(
        &self,
        channels: std::ops::Range<usize>,
        image: &[f32],
        group: Group,
        to: Shared<f32>,
    ) {
        let tile = Tile::best();
        let depth = self.shape[1];
        let size = Self::block_size(group);
        let blocks = depth.div_ceil(BLOCK_DEPTH);
        let row_panels = channels.len().div_ceil(tile.rows);
        let ldc = group.count.next_multiple_of(tile.columns);
        let of_position = row_panels * tile.rows * ldc;
        let mut sums = vec![0.0_f32; POSITIONS * of_position];
        let depths = |block: usize| block * BLOCK_DEPTH..depth.min((block + 1) * BLOCK_DEPTH);
        let weights: Vec<Vec<f32>> = (0..blocks)
            .map(|block| transformed(&self.taps, channels.clone(), depths(block), tile.rows))
            .collect();
        // Position by position: its sums stay in the cache while the depths go by.
        for (position, c) in sums.chunks_exact_mut(of_position).enumerate() {
            for (block, weights) in weights.iter().enumerate() {
                let deep = depths(block).len();
                let into = if block == 0 {
                    Into::Nothing
                } else {
                    Into::Present
                };
                let panel = deep * tile.rows;
                let a = &weights[position * row_panels * panel..][..row_panels * panel];
                let b = &image[(position * blocks + block) * size..][..size];
                for (column, b) in b.chunks_exact(BLOCK_DEPTH * tile.columns).enumerate() {
                    for (row, a) in a.chunks_exact(panel).enumerate() {
                        let at = row * tile.rows * ldc + column * tile.columns;
                        // SAFETY: panels hold `deep` rows, and `c` whole tiles.
                        unsafe {
                            let c = c.as_mut_ptr().add(at);
                            tile.multiply(deep, a.as_ptr(), b.as_ptr(), c, ldc, into);
                        }
                    }
                }
            }
        }
        for (row, channel) in channels.enumerate() {
            let of = |position: usize| &sums[position * of_position + row * ldc..][..ldc];
            self.transform_back(channel, of, group, to);
        }
    }

    /// `Aᵀ m A` of one channel, with its bias.
    fn transform_back<'s>(
        &self,
        channel: usize,
        sums: impl Fn(usize) -> &'s [f32],
        group: Group,
        to: Shared<f32>,
    ) {
        let [_, _, height, width] = self.shape;
        let bias = self.bias.map_or(0.0, |bias| bias[channel]);
        let m: [&[f32]; POSITIONS] = std::array::from_fn(sums);
        let mut pixels: [Vec<f32>; 4] = std::array::from_fn(|_| vec![0.0; self.grid()[1]]);
        let mut row = vec![0.0; 2 * self.grid()[1]];
        self.each_tile_row(group, |image, tile_row, tiles, at| {
            let plane = (image * self.channels_out + channel) * height * width;
            let count = tiles.len();
            from_positions(&m.map(|values| &values[at..at + count]), bias, &mut pixels);
            for (i, sides) in pixels.chunks_exact(2).enumerate() {
                let y = 2 * tile_row + i;
                if y >= height {
                    break;
                }
                interleave(&sides[0][..count], &sides[1][..count], &mut row);
                let x = 2 * tiles.start;
                let length = (2 * count).min(width - x);
                // SAFETY: the pixels are in the image; this channel is this task's alone.
                unsafe {
                    let to = to.at(plane + y * width + x);
                    to.copy_from_nonoverlapping(row.as_ptr(), length);
                }
            }
        });
    }
}

/// Copies a few values: by eights, which the compiler makes registers of, where a call would take longer.
///
/// # Safety
/// As many values can be written at `to`.
#[inline(always)]
unsafe fn copy_short(from: &[f32], to: *mut f32) {
    let (eights, rest) = from.as_chunks::<8>();
    for (index, eight) in eights.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { to.add(8 * index).cast::<[f32; 8]>().write(*eight) };
    }
    for (index, value) in rest.iter().enumerate() {
        // SAFETY: as above.
        unsafe { to.add(8 * eights.len() + index).write(*value) };
    }
}

vectorised! {
    /// `Bᵀ d`: four rows of pixels by vertical position.
    pub fn by_vertical_position(rows: &[Vec<f32>; 4], to: &mut [Vec<f32>; 4]) {
        let [r0, r1, r2, r3] = rows;
        let [v0, v1, v2, v3] = to;
        let (top, bottom) = (r0.iter().zip(r1), r2.iter().zip(r3));
        let to = v0.iter_mut().zip(v1).zip(v2.iter_mut().zip(v3));
        for (((r0, r1), (r2, r3)), ((v0, v1), (v2, v3))) in top.zip(bottom).zip(to) {
            *v0 = r0 - r2;
            *v1 = r1 + r2;
            *v2 = r2 - r1;
            *v3 = r1 - r3;
        }
    }
}

vectorised! {
    /// `(Bᵀ d) B`: a row by horizontal position, one value per tile.
    pub fn by_horizontal_position(v: &[f32], to: &mut [Vec<f32>; 4]) {
        let [h0, h1, h2, h3] = to;
        let to = h0.iter_mut().zip(h1).zip(h2.iter_mut().zip(h3));
        for (x, ((h0, h1), (h2, h3))) in v.windows(4).step_by(2).zip(to) {
            *h0 = x[0] - x[2];
            *h1 = x[1] + x[2];
            *h2 = x[2] - x[1];
            *h3 = x[1] - x[3];
        }
    }
}

vectorised! {
    /// `Aᵀ m A` and the bias: the four pixels of each tile, row by row.
    pub fn from_positions(m: &[&[f32]; POSITIONS], bias: f32, pixels: &mut [Vec<f32>; 4]) {
        let count = m[0].len();
        let m = m.map(|values| &values[..count]);
        let [p00, p01, p10, p11] = pixels.each_mut().map(|values| &mut values[..count]);
        for t in 0..count {
            let (a0, b0) = (m[0][t] + m[4][t] + m[8][t], m[4][t] - m[8][t] - m[12][t]);
            let (a1, b1) = (m[1][t] + m[5][t] + m[9][t], m[5][t] - m[9][t] - m[13][t]);
            let (a2, b2) = (m[2][t] + m[6][t] + m[10][t], m[6][t] - m[10][t] - m[14][t]);
            let (a3, b3) = (m[3][t] + m[7][t] + m[11][t], m[7][t] - m[11][t] - m[15][t]);
            p00[t] = a0 + a1 + a2 + bias;
            p01[t] = a1 - a2 - a3 + bias;
            p10[t] = b0 + b1 + b2 + bias;
            p11[t] = b1 - b2 - b3 + bias;
        }
    }
}

vectorised! {
    /// Two columns of pixels of every tile side by side.
    pub fn interleave(even: &[f32], odd: &[f32], to: &mut [f32]) {
        for (to, (even, odd)) in to.chunks_exact_mut(2).zip(even.iter().zip(odd)) {
            to[0] = *even;
            to[1] = *odd;
        }
    }
}

vectorised! {
    /// `G g Gᵀ` of many kernels: nine planes to sixteen.
    pub fn transform_kernels(taps: &[f32], to: &mut [f32]) {
        let size = taps.len() / 9;
        let g: [&[f32]; 9] = std::array::from_fn(|tap| &taps[tap * size..][..size]);
        let (mut planes, mut rest): ([&mut [f32]; POSITIONS], _) = (Default::default(), to);
        for plane in &mut planes {
            (*plane, rest) = rest.split_at_mut(size);
        }
        for k in 0..size {
            for (i, row) in planes.chunks_exact_mut(4).enumerate() {
                let [a, b, c] = [0, 1, 2].map(|x| weigh(i, [g[x][k], g[3 + x][k], g[6 + x][k]]));
                for (j, plane) in row.iter_mut().enumerate() {
                    plane[k] = weigh(j, [a, b, c]);
                }
            }
        }
    }
}

/// One row of tiles on its way into the panels.
struct RowScratch {
    /// Four rows of pixels with a border of zeros, then their vertical transforms.
    rows: [Vec<f32>; 4],
    vertical: [Vec<f32>; 4],
    /// By vertical and horizontal position, one value per tile.
    horizontal: [[Vec<f32>; 4]; 4],
}

impl RowScratch {
    fn new(width: usize) -> Self {
        let tiles = width.div_ceil(2);
        let row = || vec![0.0; 2 * tiles + 2];
        Self {
            rows: std::array::from_fn(|_| row()),
            vertical: std::array::from_fn(|_| row()),
            horizontal: std::array::from_fn(|_| std::array::from_fn(|_| vec![0.0; tiles])),
        }
    }

    fn read(&mut self, plane: &[f32], [height, width]: [usize; 2], tile_row: usize) {
        for (i, row) in self.rows.iter_mut().enumerate() {
            let y = (2 * tile_row + i).wrapping_sub(1);
            if y < height {
                row[1..=width].copy_from_slice(&plane[y * width..][..width]);
            } else {
                row.fill(0.0);
            }
        }
        by_vertical_position(&self.rows, &mut self.vertical);
        for (vertical, horizontal) in self.vertical.iter().zip(&mut self.horizontal) {
            by_horizontal_position(vertical, horizontal);
        }
    }
}

/// `G g Gᵀ` of some channels: `[position][row panel][depth][lane]`
fn transformed(
    taps: &[&dyn Operand; 9],
    lanes: std::ops::Range<usize>,
    depths: std::ops::Range<usize>,
    width: usize,
) -> Vec<f32> {
    let size = lanes.len().div_ceil(width) * width * depths.len();
    let mut packed = vec![0.0; 9 * size];
    for (tap, panels) in taps.iter().zip(packed.chunks_exact_mut(size)) {
        let mut to = Panels {
            data: panels,
            width,
            stride: depths.len() * width,
        };
        tap.pack(lanes.clone(), depths.clone(), &mut to);
    }
    let mut to = vec![0.0; POSITIONS * size];
    transform_kernels(&packed, &mut to);
    to
}

/// A row of `G` times three values.
#[inline(always)]
fn weigh(row: usize, [a, b, c]: [f32; 3]) -> f32 {
    match row {
        0 => a,
        1 => 0.5 * (a + b + c),
        2 => 0.5 * (a - b + c),
        _ => c,
    }
}
