//! Matrix products over operands that are read where they are: strided, in half precision, or as image patches.
//!
//! The blocking is that of Goto & van de Geijn 2008 (doi:10.1145/1356052.1356053): parts of both operands are packed
//! into cache-sized panels, and a micro-kernel multiplies panels. Packing is where weights are widened and where image
//! patches are gathered, so neither ever exists as a whole.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::Shared;
use super::pack::{Panels, Stored, Strides, pack};
use super::tile::{Into, MAX_TILE, Tile};

/// Depth of a packed block: a panel of each side of this depth fits into a first-level cache of 48 KiB.
pub const BLOCK_DEPTH: usize = 192;
/// Rows of a packed block.
const BLOCK_ROWS: usize = 224;
/// Columns of a packed block.
const BLOCK_COLUMNS: usize = 384;
/// Products below this many multiplications stay on the calling thread.
const SERIAL: usize = 1 << 18;

/// One side of a product: lanes (rows of the left side, columns of the right one) by depth.
pub trait Operand: Sync {
    /// Writes the given lanes and depths into panels; lanes that fill up the last panel are zero.
    fn pack(&self, lanes: Range<usize>, depth: Range<usize>, to: &mut Panels<'_>);
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
pub fn product(size: Size, a: &dyn Operand, b: &dyn Operand, start: Start<'_>) -> Vec<f32> {
    let count = size.rows * size.columns;
    let mut c = Vec::<f32>::with_capacity(count);
    let start = match start {
        Start::Present => Start::Zero, // there is nothing yet
        start => start,
    };
    // SAFETY: the memory is reserved, and all of it written.
    unsafe {
        in_parallel(size, a, b, c.as_mut_ptr(), start);
        c.set_len(count);
    }
    c
}

/// Adds the product to a row-major matrix; otherwise as [`product`].
pub fn add_product(size: Size, a: &dyn Operand, b: &dyn Operand, c: &mut [f32]) {
    assert_eq!(c.len(), size.rows * size.columns);
    // SAFETY: the matrix has this size and is ours.
    unsafe { in_parallel(size, a, b, c.as_mut_ptr(), Start::Present) }
}

/// # Safety
/// `c` points to `rows * columns` elements that nobody else uses; with [`Start::Present`] they are initialised.
unsafe fn in_parallel(size: Size, a: &dyn Operand, b: &dyn Operand, c: *mut f32, start: Start<'_>) {
    let product = Product {
        size,
        a,
        b,
        c: Shared(c),
        ldc: size.columns,
        start,
        tile: Tile::best(),
    };
    if size.rows * size.columns * size.depth < SERIAL {
        product.blocks(1).for_each(|block| {
            // SAFETY: the caller's promise; one block at a time.
            unsafe { product.compute(&block) };
        });
    } else {
        let blocks: Vec<Block> = product.blocks(2 * rayon::current_num_threads()).collect();
        blocks.par_iter().for_each(|block| {
            // SAFETY: the caller's promise; blocks do not overlap.
            unsafe { product.compute(block) };
        });
    }
}

/// `c = start + a b` on the calling thread, in rows that are `ldc` apart.
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
        size,
        a,
        b,
        c: Shared(c),
        ldc,
        start,
        tile: Tile::best(),
    };
    for block in product.blocks(1) {
        // SAFETY: the caller's promise.
        unsafe { product.compute(&block) };
    }
}

struct Product<'a> {
    size: Size,
    a: &'a dyn Operand,
    b: &'a dyn Operand,
    c: Shared<f32>,
    ldc: usize,
    start: Start<'a>,
    tile: &'static Tile,
}

/// Part of the result.
struct Block {
    rows: Range<usize>,
    columns: Range<usize>,
}

thread_local! {
    /// Packed blocks of both operands.
    static PANELS: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

impl Product<'_> {
    /// Blocks of whole tiles: as large as the caches allow, and at least `wanted` where there are as many tiles.
    fn blocks(&self, wanted: usize) -> impl Iterator<Item = Block> + use<> {
        let Size { rows, columns, .. } = self.size;
        let (mut high, mut wide) = (
            step(rows, BLOCK_ROWS, self.tile.rows),
            step(columns, BLOCK_COLUMNS, self.tile.columns),
        );
        let count = |high: usize, wide: usize| rows.div_ceil(high) * columns.div_ceil(wide);
        while count(high, wide) < wanted && (high > 2 * self.tile.rows || wide > self.tile.columns)
        {
            if high > wide || wide <= self.tile.columns {
                high = step(rows, high / 2, self.tile.rows);
            } else {
                wide = step(columns, wide / 2, self.tile.columns);
            }
        }
        (0..columns).step_by(wide).flat_map(move |column| {
            (0..rows).step_by(high).map(move |row| Block {
                rows: row..rows.min(row + high),
                columns: column..columns.min(column + wide),
            })
        })
    }

    /// # Safety
    /// No other task computes an overlapping block.
    unsafe fn compute(&self, block: &Block) {
        assert!(self.size.depth > 0, "a sum of nothing would write nothing");
        PANELS.with(|panels| {
            let (mut a, mut b) = panels.take(); // a task that is stolen into this one makes its own
            let depth = self.size.depth.min(BLOCK_DEPTH);
            let of = |lanes: &Range<usize>, width: usize| lanes.len().next_multiple_of(width);
            a.resize(of(&block.rows, self.tile.rows) * depth, 0.0);
            b.resize(of(&block.columns, self.tile.columns) * depth, 0.0);
            // SAFETY: the caller's promise.
            unsafe {
                self.begin(block);
                for first in (0..self.size.depth).step_by(BLOCK_DEPTH) {
                    let depth = first..self.size.depth.min(first + BLOCK_DEPTH);
                    let into = match self.start {
                        Start::Zero if first == 0 => Into::Nothing,
                        _ => Into::Present,
                    };
                    self.add_depths(block, depth, into, &mut a, &mut b);
                }
            }
            panels.replace((a, b));
        });
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

    unsafe fn add_depths(
        &self,
        block: &Block,
        depth: Range<usize>,
        into: Into,
        a: &mut [f32],
        b: &mut [f32],
    ) {
        let (rows, columns) = (self.tile.rows, self.tile.columns);
        for (operand, lanes, width, data) in [
            (self.a, &block.rows, rows, &mut *a),
            (self.b, &block.columns, columns, &mut *b),
        ] {
            let stride = depth.len() * width;
            let mut to = Panels {
                data,
                width,
                stride,
            };
            operand.pack(lanes.clone(), depth.clone(), &mut to);
        }
        let depth = depth.len();
        for (b, column) in b
            .chunks_exact(depth * columns)
            .zip(block.columns.clone().step_by(columns))
        {
            let wide = columns.min(block.columns.end - column);
            for (a, row) in a
                .chunks_exact(depth * rows)
                .zip(block.rows.clone().step_by(rows))
            {
                let high = rows.min(block.rows.end - row);
                // SAFETY: the tile lies inside the block, which this task alone writes and has initialised.
                unsafe {
                    let c = self.c.at(row * self.ldc + column);
                    if high == rows && wide == columns {
                        self.tile
                            .multiply(depth, a.as_ptr(), b.as_ptr(), c, self.ldc, into);
                    } else {
                        self.add_edge(depth, into, a, b, c, [high, wide]);
                    }
                }
            }
        }
    }

    /// A tile that reaches over the edge of the result.
    unsafe fn add_edge(
        &self,
        depth: usize,
        into: Into,
        a: &[f32],
        b: &[f32],
        c: *mut f32,
        size: [usize; 2],
    ) {
        let mut full = [0.0_f32; MAX_TILE];
        let columns = self.tile.columns;
        // SAFETY: `full` has room for a tile; `size` is what of it lies inside `c`.
        unsafe {
            let to = full.as_mut_ptr();
            self.tile
                .multiply(depth, a.as_ptr(), b.as_ptr(), to, columns, Into::Nothing);
            for row in 0..size[0] {
                for column in 0..size[1] {
                    let to = c.add(row * self.ldc + column);
                    let value = full[row * columns + column];
                    to.write(match into {
                        Into::Nothing => value,
                        Into::Present => to.read() + value,
                    });
                }
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
    use super::*;

    /// Small whole numbers: sums are exact in f32, so results are compared for equality.
    fn numbers(count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7 + 3) % 11) as f32 - 5.0)
            .collect()
    }

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
            let c = product(size, &left, &right, Start::PerColumn(&bias));
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

    #[test]
    fn every_tile_of_this_machine_computes_the_same() {
        for tile in Tile::available() {
            let depth = 9;
            let (a, b) = (numbers(depth * tile.rows), numbers(depth * tile.columns));
            let mut c = vec![f32::NAN; tile.rows * tile.columns];
            // SAFETY: the panels and the result have the tile's size.
            unsafe {
                let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
                tile.multiply(depth, a, b, c, tile.columns, Into::Nothing);
                tile.multiply(depth, a, b, c, tile.columns, Into::Present);
            }
            for (i, found) in c.iter().enumerate() {
                let (row, column) = (i / tile.columns, i % tile.columns);
                let sum: f32 = (0..depth)
                    .map(|d| a[d * tile.rows + row] * b[d * tile.columns + column])
                    .sum();
                assert_eq!(*found, 2.0 * sum, "{} at {row}, {column}", tile.isa);
            }
        }
    }
}
