//! Numbers as sums of bf16, packed for units that multiply bf16 and sum in f32.
//!
//! An f32 has 24 significant bits, a bf16 has 8: `x = x₀ + x₁ + x₂` holds exactly, with each part the rest rounded to
//! nearest. Weights in f16 (11 bits) are two parts, in bf16 one. Leaving out the products of parts whose indices add
//! up to more than two costs less than the rounding of one f32 product (Henry, Tang & Heinecke 2019,
//! arXiv:1904.06376).

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_mask_blend_epi16, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_srli_epi32,
    _mm512_storeu_ps, _mm512_sub_ps,
};

use std::cell::RefCell;
use std::ops::Range;

use super::gemm::Operand;
use super::pack::{Panels, Stored, Strides, transpose_16x16};
use crate::kernels::Precision;

/// Lanes of a panel: two tiles side by side.
pub const LANES: usize = 32;
/// Depths of a tile.
pub const STEP: usize = 32;
/// Elements of a tile.
pub const TILE: usize = 512;
/// Lanes of a tile.
const HALF: usize = 16;

/// How many parts a number is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Count {
    /// 8 bits: bf16 itself.
    One = 1,
    /// 16 bits: f16 exactly, and f32 with a relative error of 2⁻¹⁷.
    Two = 2,
    /// 24 bits: f32 exactly.
    Three = 3,
}

impl Count {
    /// The number.
    pub fn get(self) -> usize {
        self as usize
    }
}

impl Precision {
    /// Most parts of a number in products of this precision.
    pub fn parts(self) -> Count {
        match self {
            Self::Fp32 => Count::Three,
            Self::Fp16 => Count::Two,
            Self::Bf16 => Count::One,
        }
    }
}

/// The side of a product: its tiles are turned differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A row of a tile is a lane with 32 depths.
    Left,
    /// A row of a tile is two depths of 16 lanes.
    Right,
}

/// Where packed lanes go: `[panel][step][part][half][tile]`.
pub struct PartPanels<'a> {
    /// All panels.
    pub data: &'a mut [u16],
    /// The side that they are for.
    pub side: Side,
    /// Parts per number.
    pub parts: Count,
}

impl PartPanels<'_> {
    /// Elements of one panel of this depth.
    pub fn panel(depth: usize, parts: Count) -> usize {
        depth.div_ceil(STEP) * parts.get() * 2 * TILE
    }
}

/// Packs `lanes` × `depth` values; what fills up the last panel and the last step is zero.
///
/// `first_step` is where in each panel of `depth_in_all` depths they begin.
///
/// # Panics
/// When neither lanes nor depths are neighbours in memory, or a range is not inside of its slice.
pub fn pack_parts<T: Stored>(
    data: &[T],
    strides: Strides,
    [lanes, depth]: [usize; 2],
    [first_step, depth_in_all]: [usize; 2],
    to: &mut PartPanels<'_>,
) {
    if lanes == 0 || depth == 0 {
        return;
    }
    assert!(strides.lane == 1 || strides.depth == 1);
    let last = (lanes - 1) * strides.lane + (depth - 1) * strides.depth;
    let panel = PartPanels::panel(depth_in_all, to.parts);
    assert!(last < data.len() && lanes.div_ceil(LANES) * panel <= to.data.len());
    assert!(first_step + depth.div_ceil(STEP) <= depth_in_all.div_ceil(STEP));
    assert!(super::has_avx512());
    let source = Source {
        data,
        strides,
        lanes,
        depth,
    };
    let step = to.parts.get() * 2 * TILE;
    for (panel, lane) in to
        .data
        .chunks_exact_mut(panel)
        .zip((0..lanes).step_by(LANES))
    {
        let steps = panel[first_step * step..].chunks_exact_mut(step);
        for (tiles, d) in steps.zip((0..depth).step_by(STEP)) {
            // SAFETY: the instruction set was just found, the ranges were just checked.
            unsafe {
                match to.parts {
                    Count::One => source.tiles::<1>(lane, d, to.side, tiles),
                    Count::Two => source.tiles::<2>(lane, d, to.side, tiles),
                    Count::Three => source.tiles::<3>(lane, d, to.side, tiles),
                }
            }
        }
    }
}

/// Packs what has no memory order of its own by way of f32 panels, one at a time.
pub fn pack_staged<O: Operand + ?Sized>(
    operand: &O,
    lanes: Range<usize>,
    depth: Range<usize>,
    to: &mut PartPanels<'_>,
) {
    thread_local! {
        static STAGE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    STAGE.with_borrow_mut(|stage| {
        stage.resize(LANES * depth.len(), 0.0);
        let panels = to
            .data
            .chunks_exact_mut(PartPanels::panel(depth.len(), to.parts));
        for (data, first) in panels.zip(lanes.clone().step_by(LANES)) {
            let lanes = first..lanes.end.min(first + LANES);
            let mut panel = Panels {
                data: stage,
                width: LANES,
                stride: LANES * depth.len(),
            };
            operand.pack(lanes, depth.clone(), &mut panel);
            let mut to = PartPanels {
                data,
                side: to.side,
                parts: to.parts,
            };
            let strides = Strides {
                lane: 1,
                depth: LANES,
            };
            pack_parts(
                stage,
                strides,
                [LANES, depth.len()],
                [0, depth.len()],
                &mut to,
            );
        }
    });
}

struct Source<'a, T> {
    data: &'a [T],
    strides: Strides,
    lanes: usize,
    depth: usize,
}

impl<T: Stored> Source<'_, T> {
    /// All parts of 32 lanes and 32 depths.
    ///
    /// A pair is depths `p` and `p + 16` of the step, on both sides: the sum does not mind the order, and neither
    /// memory order has to be shuffled for it.
    ///
    /// # Safety
    /// The machine has AVX-512 F, BW and VL; the lane and the depth exist.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn tiles<const P: usize>(&self, lane: usize, d: usize, side: Side, to: &mut [u16]) {
        let by_depth = self.strides.lane == 1;
        let turned = by_depth == (side == Side::Left);
        for half in 0..2 {
            let first = lane + half * HALF;
            let lanes = self.lanes.saturating_sub(first).min(HALF);
            let mut tiles = [[_mm512_setzero_ps(); HALF]; P];
            if by_depth {
                for pair in 0..HALF.min(self.depth - d) {
                    let depth = d + pair;
                    // SAFETY: `load` asks for lanes of depths that exist.
                    let (x, y) = unsafe {
                        (
                            self.load(first, depth, lanes),
                            self.load(first, depth + HALF, lanes),
                        )
                    };
                    for (tile, row) in tiles.iter_mut().zip(split::<P>(x, y)) {
                        tile[pair] = row;
                    }
                }
            } else {
                let deep = self.depth - d;
                for row in 0..lanes {
                    // SAFETY: as above.
                    let (x, y) = unsafe {
                        (
                            self.load_depths(first + row, d, deep.min(HALF)),
                            self.load_depths(
                                first + row,
                                d + HALF,
                                deep.saturating_sub(HALF).min(HALF),
                            ),
                        )
                    };
                    for (tile, parts) in tiles.iter_mut().zip(split::<P>(x, y)) {
                        tile[row] = parts;
                    }
                }
            }
            for (part, tile) in tiles.into_iter().enumerate() {
                let tile = if turned { transpose_16x16(tile) } else { tile };
                let to = &mut to[(2 * part + half) * TILE..][..TILE];
                for (row, to) in tile.iter().zip(to.chunks_exact_mut(2 * HALF)) {
                    // SAFETY: a row of a tile is 64 bytes.
                    unsafe { _mm512_storeu_ps(to.as_mut_ptr().cast(), *row) };
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(&self, lane: usize, depth: usize, lanes: usize) -> __m512 {
        if depth >= self.depth || lanes == 0 {
            return _mm512_setzero_ps();
        }
        // SAFETY: lanes are neighbours, and so many are left.
        unsafe {
            T::load(
                self.data.as_ptr().add(depth * self.strides.depth + lane),
                lanes,
            )
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_depths(&self, lane: usize, depth: usize, count: usize) -> __m512 {
        if count == 0 {
            return _mm512_setzero_ps();
        }
        // SAFETY: depths are neighbours, and so many are left.
        unsafe {
            T::load(
                self.data.as_ptr().add(lane * self.strides.lane + depth),
                count,
            )
        }
    }
}

/// The parts of sixteen pairs: the first number of each in the low half of its 32 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn split<const P: usize>(x: __m512, y: __m512) -> [__m512; P] {
    let (mut x, mut y) = (x, y);
    let mut parts = [_mm512_setzero_ps(); P];
    for (part, to) in parts.iter_mut().enumerate() {
        let (top_x, top_y) = (rounded(x), rounded(y));
        let low = _mm512_srli_epi32::<16>(top_x);
        *to = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAA_AAAA, low, top_y));
        if part + 1 < P {
            x = rest(x, top_x);
            y = rest(y, top_y);
        }
    }
    parts
}

/// Bits whose upper half is the nearest bf16 (of two as near, the larger).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn rounded(x: __m512) -> __m512i {
    _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000))
}

/// What the bf16 leaves of the number: exact in f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn rest(x: __m512, rounded: __m512i) -> __m512 {
    let top = _mm512_and_si512(rounded, _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed()));
    _mm512_sub_ps(x, _mm512_castsi512_ps(top))
}
