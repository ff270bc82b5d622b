//! What multiplies: the vector registers, or a matrix unit where there is one.

use std::cell::RefCell;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::amx::{TileProduct, Tiles};
use super::gemm::{BLOCK_DEPTH, Block, Operand, Product, add_edge};
#[cfg(target_arch = "x86_64")]
use super::instructions::Level;
use super::pack::Panels;
#[cfg(target_arch = "x86_64")]
use super::parts::{self, Count, PartPanels, Side};
use super::tile::{Into, MAX_TILE, Tile};

/// A way to multiply.
#[derive(Clone, Copy, Debug)]
pub enum Unit {
    /// In f32, in vector registers.
    Vector(&'static Tile),
    /// In parts of bf16, in tiles.
    #[cfg(target_arch = "x86_64")]
    Matrix,
}

/// Depth below which a step of 32 would be mostly empty.
#[cfg(target_arch = "x86_64")]
const SHALLOW: usize = 12;

thread_local! {
    /// Packed blocks of both operands.
    static PANELS: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

#[cfg(target_arch = "x86_64")]
thread_local! {
    static PARTS: RefCell<[Vec<Line>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// A row of a tile: it must not lie across two lines of the cache.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub struct Line([u16; 32]);

impl Unit {
    /// The best for sums of this length. The choice depends on the depth alone (and the machine): a row's bits are
    /// the same in whatever company it is computed.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "there is one unit")
    )]
    pub fn of(depth: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if Level::best() == Level::Amx && depth >= SHALLOW {
            return Self::Matrix;
        }
        Self::Vector(Tile::best())
    }

    /// Rows and columns of a tile.
    pub fn tile(self) -> [usize; 2] {
        match self {
            Self::Vector(tile) => [tile.rows, tile.columns],
            #[cfg(target_arch = "x86_64")]
            Self::Matrix => [parts::LANES, parts::LANES],
        }
    }

    /// Most rows and columns of a block: packed, the left side of it fits into a second-level cache, and both are
    /// multiplied often enough that packing them takes a small part of the time.
    pub fn block(self) -> [usize; 2] {
        match self {
            Self::Vector(_) => [640, 768],
            #[cfg(target_arch = "x86_64")]
            Self::Matrix => [640, 512],
        }
    }

    /// Computes a block of a product.
    ///
    /// # Safety
    /// No other task computes an overlapping block.
    pub unsafe fn compute(self, product: &Product<'_>, block: &Block) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Vector(tile) => by_vectors(tile, product, block),
                #[cfg(target_arch = "x86_64")]
                Self::Matrix => by_tiles(product, block),
            }
        }
    }
}

unsafe fn by_vectors(tile: &Tile, product: &Product<'_>, block: &Block) {
    let [mut a, mut b] = PANELS.take(); // a task that is stolen into this one makes its own
    let most = product.size.depth.min(BLOCK_DEPTH);
    let (rows, columns) = (tile.rows, tile.columns);
    a.resize(block.rows.len().next_multiple_of(rows) * most, 0.0);
    b.resize(block.columns.len().next_multiple_of(columns) * most, 0.0);
    let add = |depth: Range<usize>, into: Into| {
        let pack = |operand: &dyn Operand, lanes: &Range<usize>, width: usize, data: &mut [f32]| {
            let stride = depth.len() * width;
            let mut to = Panels {
                data,
                width,
                stride,
            };
            operand.pack(lanes.clone(), depth.clone(), &mut to);
        };
        pack(product.a, &block.rows, rows, &mut a);
        pack(product.b, &block.columns, columns, &mut b);
        let depth = depth.len();
        let right = b.chunks_exact(depth * columns);
        for (b, column) in right.zip(block.columns.clone().step_by(columns)) {
            let wide = columns.min(block.columns.end - column);
            let left = a.chunks_exact(depth * rows);
            for (a, row) in left.zip(block.rows.clone().step_by(rows)) {
                let high = rows.min(block.rows.end - row);
                let (a, b, ldc) = (a.as_ptr(), b.as_ptr(), product.ldc);
                let c = product.c.at(row * ldc + column);
                // SAFETY: the tile lies inside the block, which this task alone writes and has initialised.
                unsafe {
                    if high == rows && wide == columns {
                        tile.multiply(depth, a, b, c, ldc, into);
                    } else {
                        let mut full = [0.0_f32; MAX_TILE];
                        tile.multiply(depth, a, b, full.as_mut_ptr(), columns, Into::Nothing);
                        add_edge(&full, columns, c, ldc, [high, wide], into);
                    }
                }
            }
        }
    };
    // SAFETY: the caller's promise.
    unsafe { product.each_depth(block, add) };
    PANELS.set([a, b]);
}

#[cfg(target_arch = "x86_64")]
unsafe fn by_tiles(product: &Product<'_>, block: &Block) {
    const LANES: usize = parts::LANES;
    let [mut a_room, mut b_room] = PARTS.take();
    let most = product.precision.parts();
    let [a_parts, b_parts] = [product.a, product.b].map(|side| side.parts().min(most));
    let most = product.size.depth.min(BLOCK_DEPTH);
    let a = room(&mut a_room, block.rows.len(), most, a_parts);
    let b = room(&mut b_room, block.columns.len(), most, b_parts);
    let tiles = Tiles::configure([a_parts, b_parts]);
    let add = |depth: Range<usize>, into: Into| {
        let sides = [
            (product.a, &block.rows, Side::Left, a_parts, &mut *a),
            (product.b, &block.columns, Side::Right, b_parts, &mut *b),
        ];
        for (operand, lanes, side, parts, data) in sides {
            let mut to = PartPanels { data, side, parts };
            operand.pack_parts(lanes.clone(), depth.clone(), &mut to);
        }
        let panel = |parts: Count| PartPanels::panel(depth.len(), parts);
        let steps = depth.len().div_ceil(parts::STEP);
        let right = b.chunks_exact(panel(b_parts));
        for (b, column) in right.zip(block.columns.clone().step_by(LANES)) {
            let wide = LANES.min(block.columns.end - column);
            let left = a.chunks_exact(panel(a_parts));
            for (a, row) in left.zip(block.rows.clone().step_by(LANES)) {
                let high = LANES.min(block.rows.end - row);
                let inside = TileProduct {
                    steps,
                    a: a.as_ptr(),
                    b: b.as_ptr(),
                    c: product.c.at(row * product.ldc + column),
                    ldc: product.ldc,
                    into,
                    half: wide <= LANES / 2,
                };
                // SAFETY: panels hold whole tiles. What is written lies inside the block, which this task alone
                // writes and has initialised.
                unsafe {
                    if high == LANES && (wide == LANES || wide == LANES / 2) {
                        tiles.multiply(&inside);
                    } else {
                        let mut full = [0.0_f32; LANES * LANES];
                        tiles.multiply(&TileProduct {
                            c: full.as_mut_ptr(),
                            ldc: LANES,
                            into: Into::Nothing,
                            ..inside
                        });
                        add_edge(&full, LANES, inside.c, product.ldc, [high, wide], into);
                    }
                }
            }
        }
    };
    // SAFETY: the caller's promise.
    unsafe { product.each_depth(block, add) };
    drop(tiles);
    PARTS.set([a_room, b_room]);
}

/// Room for the panels of so many lanes.
#[cfg(target_arch = "x86_64")]
pub fn room(lines: &mut Vec<Line>, lanes: usize, depth: usize, parts: Count) -> &mut [u16] {
    let count = lanes.div_ceil(parts::LANES) * PartPanels::panel(depth, parts);
    lines.resize(count / 32, Line([0; 32]));
    bytemuck::cast_slice_mut(lines)
}
