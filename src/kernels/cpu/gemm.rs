//! Matrix products over operands that are read where they are: strided, in half precision, or as image patches.
//!
//! The blocking is that of Goto & van de Geijn 2008 (doi:10.1145/1356052.1356053): parts of both operands are packed
//! into cache-sized panels, and a micro-kernel multiplies panels. Packing is where weights are widened and where image
//! patches are gathered, so neither ever exists as a whole.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::Shared;
use super::pack::{Panels, Stored, Strides, pack};
#[cfg(target_arch = "x86_64")]
use super::parts::{self, Count, PartPanels};
use super::tile::Into;
use super::unit::Unit;
use crate::kernels::Precision;

/// Depth of a packed block: a panel of each side of this depth fits into a first-level cache of 48 KiB.
pub const BLOCK_DEPTH: usize = 192;
/// Products below this many multiplications stay on the calling thread.
const SERIAL: usize = 1 << 18;

/// One side of a product: lanes (rows of the left side, columns of the right one) by depth.
pub trait Operand: Sync {
    /// Writes the given lanes and depths into panels; lanes that fill up the last panel are zero.
    fn pack(&self, lanes: Range<usize>, depth: Range<usize>, to: &mut Panels<'_>);

    /// In how many parts of bf16 the elements are what they are.
    #[cfg(target_arch = "x86_64")]
    fn parts(&self) -> Count {
        Count::Three
    }

    /// The same in parts of bf16; both lanes and depths that fill up are zero.
    #[cfg(target_arch = "x86_64")]
    fn pack_parts(&self, lanes: Range<usize>, depth: Range<usize>, to: &mut PartPanels<'_>) {
        parts::pack_staged(self, lanes, depth, to);
    }
}

/// A strided matrix.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    /// Begins at lane 0 and depth 0.
    pub data: &'a [T],
    /// Distances of its elements.
    pub strides: Strides,
}

impl<T: Stored> Operand for Matrix<'_, T> {
    fn pack(&self, lanes: Range<usize>, depth: Range<usize>, to: &mut Panels<'_>) {
        let begin = lanes.start * self.strides.lane + depth.start * self.strides.depth;
        let data = self.data.get(begin..).unwrap_or_default();
        pack(data, self.strides, lanes.len(), depth.len(), to);
    }

    #[cfg(target_arch = "x86_64")]
    fn parts(&self) -> Count {
        T::PARTS
    }

    #[cfg(target_arch = "x86_64")]
    fn pack_parts(&self, lanes: Range<usize>, depth: Range<usize>, to: &mut PartPanels<'_>) {
        if self.strides.lane != 1 && self.strides.depth != 1 {
            return parts::pack_staged(self, lanes, depth, to);
        }
        let begin = lanes.start * self.strides.lane + depth.start * self.strides.depth;
        let data = self.data.get(begin..).unwrap_or_default();
        let size = [lanes.len(), depth.len()];
        parts::pack_parts(data, self.strides, size, [0, depth.len()], to);
    }
}

/// What the result is added to.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// Nothing.
    Zero,
    /// What is there already.
    Present,
    /// One value per row.
    PerRow(&'a [f32]),
    /// One value per column.
    PerColumn(&'a [f32]),
}

/// Rows, columns and depth of a product.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Lanes of the left operand.
    pub rows: usize,
    /// Lanes of the right operand.
    pub columns: usize,
    /// Length of the sums.
    pub depth: usize,
}

/// The product of `a` (rows × depth) and `b` (depth × columns) in a new row-major matrix, in parallel where it pays.
///
/// The order of the sums depends on the depth alone: the result is the same on any number of threads.
pub fn product(
    precision: Precision,
    size: Size,
    a: &dyn Operand,
    b: &dyn Operand,
    start: Start<'_>,
) -> Vec<f32> {
    let count = size.rows * size.columns;
    let mut c = Vec::<f32>::with_capacity(count);
    let start = match start {
        Start::Present => Start::Zero, // there is nothing yet
        start => start,
    };
    // SAFETY: the memory is reserved, and all of it written.
    unsafe {
        in_parallel(precision, size, a, b, c.as_mut_ptr(), start);
        c.set_len(count);
    }
    c
}

/// Adds the product to a row-major matrix; otherwise as [`product`].
pub fn add_product(
    precision: Precision,
    size: Size,
    a: &dyn Operand,
    b: &dyn Operand,
    c: &mut [f32],
) {
    assert_eq!(c.len(), size.rows * size.columns);
    // SAFETY: the matrix has this size and is ours.
    unsafe { in_parallel(precision, size, a, b, c.as_mut_ptr(), Start::Present) }
}

/// # Safety
/// `c` points to `rows * columns` elements that nobody else uses; with [`Start::Present`] they are initialised.
unsafe fn in_parallel(
    precision: Precision,
    size: Size,
    a: &dyn Operand,
    b: &dyn Operand,
    c: *mut f32,
    start: Start<'_>,
) {
    let product = Product {
        precision,
        size,
        a,
        b,
        c: Shared(c),
        ldc: size.columns,
        start,
    };
    if size.rows * size.columns * size.depth < SERIAL {
        // SAFETY: the caller's promise.
        unsafe { product.compute_here() };
    } else {
        let unit = Unit::of(size.depth);
        let blocks: Vec<Block> = product
            .blocks(unit, 2 * rayon::current_num_threads())
            .collect();
        blocks.par_iter().for_each(|block| {
            // SAFETY: the caller's promise; blocks do not overlap.
            unsafe { unit.compute(&product, block) };
        });
    }
}

/// `c = start + a b` in f32 on the calling thread, in rows that are `ldc` apart.
///
/// # Safety
/// `c` points to `rows` rows of `columns` elements that nobody else uses; with [`Start::Present`] they are initialised.
pub unsafe fn multiply_into(
    size: Size,
    a: &dyn Operand,
    b: &dyn Operand,
    c: *mut f32,
    ldc: usize,
    start: Start<'_>,
) {
    let product = Product {
        precision: Precision::Fp32,
        size,
        a,
        b,
        c: Shared(c),
        ldc,
        start,
    };
    // SAFETY: the caller's promise.
    unsafe { product.compute_here() };
}

/// A product that is being computed.
pub struct Product<'a> {
    /// What is multiplied in.
    pub precision: Precision,
    /// Its size.
    pub size: Size,
    /// The left side.
    pub a: &'a dyn Operand,
    /// The right side.
    pub b: &'a dyn Operand,
    /// The result.
    pub c: Shared<f32>,
    /// Distance of the result's rows.
    pub ldc: usize,
    /// What it is added to.
    pub start: Start<'a>,
}

/// Part of the result.
pub struct Block {
    /// Its rows.
    pub rows: Range<usize>,
    /// Its columns.
    pub columns: Range<usize>,
}

impl Product<'_> {
    /// # Safety
    /// Nobody else uses the result.
    unsafe fn compute_here(&self) {
        let unit = Unit::of(self.size.depth);
        for block in self.blocks(unit, 1) {
            // SAFETY: the caller's promise; one block at a time.
            unsafe { unit.compute(self, &block) };
        }
    }

    /// Blocks of whole tiles: as large as the caches allow, and at least `wanted` where there are as many tiles.
    fn blocks(&self, unit: Unit, wanted: usize) -> impl Iterator<Item = Block> + use<> {
        let Size { rows, columns, .. } = self.size;
        let ([tall, broad], [most_rows, most_columns]) = (unit.tile(), unit.block());
        let (mut high, mut wide) = (
            step(rows, most_rows, tall),
            step(columns, most_columns, broad),
        );
        let count = |high: usize, wide: usize| rows.div_ceil(high) * columns.div_ceil(wide);
        while count(high, wide) < wanted && (high > 2 * tall || wide > broad) {
            if high > wide || wide <= broad {
                high = step(rows, high / 2, tall);
            } else {
                wide = step(columns, wide / 2, broad);
            }
        }
        (0..columns).step_by(wide).flat_map(move |column| {
            (0..rows).step_by(high).map(move |row| Block {
                rows: row..rows.min(row + high),
                columns: column..columns.min(column + wide),
            })
        })
    }

    /// Calls with each block of depths and what it does to the sums, which begin as they should.
    ///
    /// # Safety
    /// No other task computes an overlapping block.
    pub unsafe fn each_depth(&self, block: &Block, mut add: impl FnMut(Range<usize>, Into)) {
        assert!(self.size.depth > 0, "a sum of nothing would write nothing");
        // SAFETY: the caller's promise.
        unsafe { self.begin(block) };
        for first in (0..self.size.depth).step_by(BLOCK_DEPTH) {
            let depth = first..self.size.depth.min(first + BLOCK_DEPTH);
            let into = match self.start {
                Start::Zero if first == 0 => Into::Nothing,
                _ => Into::Present,
            };
            add(depth, into);
        }
    }

    /// Writes what the sums begin with, unless the first of them is written as it is.
    unsafe fn begin(&self, block: &Block) {
        for row in block.rows.clone() {
            // SAFETY: the row is inside `c`, and this task's own.
            let to = unsafe {
                let at = self.c.at(row * self.ldc + block.columns.start);
                std::slice::from_raw_parts_mut(at.cast::<MaybeUninit<f32>>(), block.columns.len())
            };
            match self.start {
                Start::Zero | Start::Present => return,
                Start::PerRow(values) => to.fill(MaybeUninit::new(values[row])),
                Start::PerColumn(values) => {
                    to.write_copy_of_slice(&values[block.columns.clone()]);
                }
            }
        }
    }
}

/// Writes what of a tile lies inside the result, or adds it.
///
/// # Safety
/// `c` points to `size[0]` rows of `size[1]` values that are `ldc` apart; with [`Into::Present`] they are initialised.
pub unsafe fn add_edge(
    tile: &[f32],
    columns: usize,
    c: *mut f32,
    ldc: usize,
    size: [usize; 2],
    into: Into,
) {
    for (row, values) in tile.chunks_exact(columns).take(size[0]).enumerate() {
        for (column, value) in values[..size[1]].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let to = c.add(row * ldc + column);
                to.write(match into {
                    Into::Nothing => *value,
                    Into::Present => to.read() + value,
                });
            }
        }
    }
}

/// A multiple of `unit` near `most`, such that the parts are of about equal size.
fn step(length: usize, most: usize, unit: usize) -> usize {
    let parts = length.div_ceil(most.max(unit)).max(1);
    length.div_ceil(parts).next_multiple_of(unit).max(unit)
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::numbers;
    use super::*;

    #[test]
    fn products_of_every_remainder_are_exact() {
        for (rows, columns, depth) in [
            (1, 1, 1),
            (14, 32, 5),
            (15, 33, 257),
            (100, 7, 600),
            (300, 500, 64),
            (3, 900, 300),
        ] {
            let (a, b) = (numbers(rows * depth), numbers(depth * columns));
            let bias = numbers(columns);
            let left = Matrix {
                data: &a,
                strides: Strides {
                    lane: depth,
                    depth: 1,
                },
            };
            let right = Matrix {
                data: &b,
                strides: Strides {
                    lane: 1,
                    depth: columns,
                },
            };
            let size = Size {
                rows,
                columns,
                depth,
            };
            let c = product(
                Precision::Fp32,
                size,
                &left,
                &right,
                Start::PerColumn(&bias),
            );
            for row in 0..rows {
                for column in 0..columns {
                    let sum: f32 = (0..depth)
                        .map(|d| a[row * depth + d] * b[d * columns + column])
                        .sum();
                    let found = c[row * columns + column];
                    assert_eq!(found, sum + bias[column], "{size:?} at {row}, {column}");
                }
            }
        }
    }

    /// Numbers of all magnitudes, of which none is a short one.
    fn uneven(count: usize, seed: u64) -> Vec<f32> {
        use rand::{RngExt as _, SeedableRng as _};
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..count)
            .map(|_| random.random_range(-1.0_f32..1.0) * 2.0_f32.powi(random.random_range(-6..6)))
            .collect()
    }

    #[test]
    fn products_are_as_exact_as_f32_is() {
        use half::f16;
        let (rows, columns, depth) = (45, 50, 700);
        let a = uneven(rows * depth, 1);
        let b = uneven(depth * columns, 2);
        let stored: Vec<f16> = b.iter().map(|value| f16::from_f32(*value)).collect();
        let widened: Vec<f32> = stored.iter().map(|value| value.to_f32()).collect();
        let size = Size {
            rows,
            columns,
            depth,
        };
        let by_row = |length: usize| Strides {
            lane: length,
            depth: 1,
        };
        let by_column = |length: usize| Strides {
            lane: 1,
            depth: length,
        };
        // Either side in either memory order.
        let left = [(&a, by_row(depth)), (&a, by_column(rows))];
        let right = [by_row(depth), by_column(columns)];
        let mut worst = 0.0_f64;
        for (data, strides) in left {
            let a = Matrix { data, strides };
            for strides_b in right {
                let f32s = Matrix {
                    data: &b,
                    strides: strides_b,
                };
                let f16s = Matrix {
                    data: &stored,
                    strides: strides_b,
                };
                for (b, values) in [(&f32s as &dyn Operand, &b), (&f16s, &widened)] {
                    let c = product(Precision::Fp32, size, &a, b, Start::Zero);
                    for row in 0..rows {
                        for column in 0..columns {
                            let (mut sum, mut size) = (0.0_f64, 0.0_f64);
                            for d in 0..depth {
                                let x = f64::from(data[row * strides.lane + d * strides.depth]);
                                let at = column * strides_b.lane + d * strides_b.depth;
                                let y = f64::from(values[at]);
                                sum += x * y;
                                size += (x * y).abs();
                            }
                            let found = f64::from(c[row * columns + column]);
                            worst = worst.max((found - sum).abs() / size);
                        }
                    }
                }
            }
        }
        // A rounding to f32 is 6e-8, and sums of 700 products are rounded as they grow: 2.8e-7 with AVX-512,
        // 2.7e-7 in portable code, 3.2e-7 on the matrix unit.
        assert!(worst < 4e-7, "{worst:e}");
    }
}
