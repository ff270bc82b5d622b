//! Copies of matrix parts in the order in which a micro-kernel reads them, widened to f32 on the way.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::parts::Count;
#[cfg(target_arch = "x86_64")]
pub use x86::transpose_16x16;

/// An element type that weights are stored in.
pub trait Stored: Copy + Sync + Send + 'static {
    /// In how many parts of bf16 every value is what it is.
    #[cfg(target_arch = "x86_64")]
    const PARTS: Count;

    /// The value in f32; exact.
    fn widen(self) -> f32;

    /// Sixteen values in a register.
    ///
    /// # Safety
    /// `lanes` (at most 16) values can be read at `from`, and the machine has AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self, lanes: usize) -> std::arch::x86_64::__m512;
}

/// Where panel element `(lane, depth)` comes from: `data[lane * lane_stride + depth * depth_stride]`.
#[derive(Clone, Copy)]
pub struct Strides {
    /// Distance of neighbouring lanes.
    pub lane: usize,
    /// Distance of neighbouring depths.
    pub depth: usize,
}

/// Where packed lanes go: panels of `width` lanes, one after the other, each `[depth][width]`.
pub struct Panels<'a> {
    /// All panels, from the first depth that is written on.
    pub data: &'a mut [f32],
    /// Lanes of a panel.
    pub width: usize,
    /// Distance of the panels.
    pub stride: usize,
}

/// Writes lane `p * width + l` and depth `d` to `panels[p * stride + d * width + l]`; lanes that fill up the last panel
/// are zero.
///
/// `data` begins at lane 0 and depth 0.
pub fn pack<T: Stored>(
    data: &[T],
    strides: Strides,
    lanes: usize,
    depth: usize,
    to: &mut Panels<'_>,
) {
    if lanes == 0 || depth == 0 {
        return;
    }
    let last = (lanes - 1) * strides.lane + (depth - 1) * strides.depth;
    let end = (lanes.div_ceil(to.width) - 1) * to.stride + depth * to.width;
    assert!(last < data.len() && end <= to.data.len());
    #[cfg(target_arch = "x86_64")]
    if super::has_avx512() && (strides.lane == 1 || strides.depth == 1) {
        // SAFETY: the instruction set was just found, the ranges were just checked.
        unsafe {
            if strides.lane == 1 {
                x86::copy(data, strides.depth, lanes, depth, to);
            } else {
                x86::transpose(data, strides.lane, lanes, depth, to);
            }
        }
        return;
    }
    for (panel, first) in (0..lanes).step_by(to.width).enumerate() {
        let there = to.width.min(lanes - first);
        let panel = &mut to.data[panel * to.stride..][..depth * to.width];
        for (d, row) in panel.chunks_exact_mut(to.width).enumerate() {
            let from = data[first * strides.lane + d * strides.depth..].iter();
            let (row, rest) = row.split_at_mut(there);
            for (to, from) in row.iter_mut().zip(from.step_by(strides.lane)) {
                *to = from.widen();
            }
            rest.fill(0.0);
        }
    }
}

/// Writes `length` neighbouring values of each depth to `to[d * pitch..]`, and nothing else.
pub fn copy_run(
    from: &[f32],
    stride: usize,
    length: usize,
    depth: usize,
    to: &mut [f32],
    pitch: usize,
) {
    if length == 0 || depth == 0 {
        return;
    }
    assert!((depth - 1) * stride + length <= from.len());
    assert!((depth - 1) * pitch + length <= to.len());
    #[cfg(target_arch = "x86_64")]
    if super::has_avx512() {
        // SAFETY: the instruction set was just found, the ranges were just checked.
        unsafe { x86::copy_run(from, stride, length, depth, to, pitch) };
        return;
    }
    for d in 0..depth {
        to[d * pitch..][..length].copy_from_slice(&from[d * stride..][..length]);
    }
}

impl Stored for f32 {
    #[cfg(target_arch = "x86_64")]
    const PARTS: Count = Count::Three;

    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self, lanes: usize) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { x86::load_f32(from, lanes) }
    }
}

impl Stored for f16 {
    #[cfg(target_arch = "x86_64")]
    const PARTS: Count = Count::Two;

    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self, lanes: usize) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { x86::load_f16(from.cast(), lanes) }
    }
}

impl Stored for bf16 {
    #[cfg(target_arch = "x86_64")]
    const PARTS: Count = Count::One;

    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(from: *const Self, lanes: usize) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { x86::load_bf16(from.cast(), lanes) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, __m512, _MM_HINT_T0, _mm_prefetch, _mm256_maskz_loadu_epi16, _mm512_castpd_ps,
        _mm512_castps_pd, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps,
        _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4,
        _mm512_slli_epi32, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
        _mm512_unpacklo_pd, _mm512_unpacklo_ps,
    };

    use super::{Panels, Stored};

    const LANES: usize = 16;

    #[inline(always)]
    fn mask(lanes: usize) -> u16 {
        if lanes >= LANES {
            u16::MAX
        } else {
            (1 << lanes) - 1
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn load_f32(from: *const f32, lanes: usize) -> __m512 {
        // SAFETY: lanes behind the mask are not read.
        unsafe { _mm512_maskz_loadu_ps(mask(lanes), from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn load_f16(from: *const i16, lanes: usize) -> __m512 {
        // SAFETY: lanes behind the mask are not read.
        _mm512_cvtph_ps(unsafe { load_16_bits(from, lanes) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn load_bf16(from: *const i16, lanes: usize) -> __m512 {
        // SAFETY: lanes behind the mask are not read.
        let bits = unsafe { load_16_bits(from, lanes) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_16_bits(from: *const i16, lanes: usize) -> __m256i {
        // SAFETY: lanes behind the mask are not read.
        unsafe { _mm256_maskz_loadu_epi16(mask(lanes), from) }
    }

    /// Rows ahead that are asked of memory: the distance of rows is too large for the hardware to guess.
    const ROWS_AHEAD: usize = 8;

    /// Lanes are neighbours in memory: rows are read in their whole length, for all panels at once.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn copy<T: Stored>(
        data: &[T],
        stride: usize,
        lanes: usize,
        depth: usize,
        to: &mut Panels<'_>,
    ) {
        let width = to.width;
        for d in 0..depth {
            let row = data.as_ptr().wrapping_add(d * stride);
            let ahead = row.wrapping_add(ROWS_AHEAD * stride);
            let mut panel = to.data.as_mut_ptr().wrapping_add(d * width);
            for first in (0..lanes).step_by(width) {
                for begin in (0..width).step_by(LANES) {
                    let lane = first + begin;
                    let there = lanes.saturating_sub(lane).min(LANES);
                    // SAFETY: `there` values are left in the row, `width - begin` in the panel's. What is only
                    // prefetched need not exist.
                    unsafe {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(lane).cast());
                        let values = if there == 0 {
                            _mm512_setzero_ps()
                        } else {
                            T::load(row.add(lane), there)
                        };
                        _mm512_mask_storeu_ps(panel.add(begin), mask(width - begin), values);
                    }
                }
                panel = panel.wrapping_add(to.stride);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn copy_run(
        from: &[f32],
        stride: usize,
        length: usize,
        depth: usize,
        to: &mut [f32],
        pitch: usize,
    ) {
        for d in 0..depth {
            for begin in (0..length).step_by(LANES) {
                let kept = mask(length - begin);
                // SAFETY: the caller has checked both ranges.
                unsafe {
                    let values = _mm512_maskz_loadu_ps(kept, from.as_ptr().add(d * stride + begin));
                    _mm512_mask_storeu_ps(to.as_mut_ptr().add(d * pitch + begin), kept, values);
                }
            }
        }
    }

    /// Depths are neighbours in memory: blocks of 16×16 are turned in registers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn transpose<T: Stored>(
        data: &[T],
        stride: usize,
        lanes: usize,
        depth: usize,
        to: &mut Panels<'_>,
    ) {
        let width = to.width;
        for first in (0..lanes).step_by(width) {
            let panel = first / width * to.stride;
            for begin in (0..width).step_by(LANES) {
                let lane = first + begin;
                let there = lanes.saturating_sub(lane).min(LANES).min(width - begin);
                let kept = mask(width - begin);
                for d in (0..depth).step_by(LANES) {
                    let deep = (depth - d).min(LANES);
                    let mut rows = [_mm512_setzero_ps(); LANES];
                    for (r, row) in rows.iter_mut().enumerate().take(there) {
                        let from = data.as_ptr().wrapping_add((lane + r) * stride + d);
                        // SAFETY: `deep` values are left in this lane. What is only prefetched (the lane that takes
                        // this one's place next) need not exist.
                        unsafe {
                            let next = from.wrapping_add(there * stride);
                            _mm_prefetch::<_MM_HINT_T0>(next.cast());
                            *row = T::load(from, deep);
                        }
                    }
                    let columns = transpose_16x16(rows);
                    for (c, column) in columns.iter().enumerate().take(deep) {
                        // SAFETY: the panel has `depth` rows of `width`; lanes behind it are masked.
                        unsafe {
                            let at = panel + (d + c) * width + begin;
                            let to = to.data.as_mut_ptr().add(at);
                            if kept == u16::MAX {
                                _mm512_storeu_ps(to, *column);
                            } else {
                                _mm512_mask_storeu_ps(to, kept, *column);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Pairs, then fours inside 128-bit parts, then the parts themselves.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub fn transpose_16x16(r: [__m512; LANES]) -> [__m512; LANES] {
        let mut pairs = r;
        for i in (0..LANES).step_by(2) {
            pairs[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        let mut fours = pairs;
        for i in (0..LANES).step_by(4) {
            for half in 0..2 {
                let a = _mm512_castps_pd(pairs[i + half]);
                let b = _mm512_castps_pd(pairs[i + half + 2]);
                fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        // fours[4 g + c] holds, in its four parts p, column 4 p + c of rows 4 g .. 4 g + 4.
        let mut columns = fours;
        for c in 0..4 {
            let [g0, g1, g2, g3] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            let low01 = _mm512_shuffle_f32x4::<0b10_00_10_00>(g0, g1); // parts 0 and 2
            let low23 = _mm512_shuffle_f32x4::<0b10_00_10_00>(g2, g3);
            let high01 = _mm512_shuffle_f32x4::<0b11_01_11_01>(g0, g1); // parts 1 and 3
            let high23 = _mm512_shuffle_f32x4::<0b11_01_11_01>(g2, g3);
            columns[c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(low01, low23);
            columns[4 + c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(high01, high23);
            columns[8 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(low01, low23);
            columns[12 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(high01, high23);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_are_the_same_from_both_directions_and_with_every_remainder() {
        for (lanes, depth, width) in [
            (14, 40, 14),
            (33, 17, 14),
            (64, 33, 32),
            (20, 3, 32),
            (6, 16, 6),
        ] {
            let value = |lane: usize, d: usize| f16::from_f32((lane * 10 + d) as f32);
            let by_lane: Vec<f16> = (0..lanes * depth)
                .map(|i| value(i / depth, i % depth))
                .collect();
            let by_depth: Vec<f16> = (0..lanes * depth)
                .map(|i| value(i % lanes, i / lanes))
                .collect();
            let count = lanes.div_ceil(width);
            let expected: Vec<f32> = (0..count * depth * width)
                .map(|i| {
                    let (panel, d, lane) = (i / (depth * width), i / width % depth, i % width);
                    let lane = panel * width + lane;
                    if lane < lanes {
                        value(lane, d).to_f32()
                    } else {
                        0.0
                    }
                })
                .collect();
            for (data, lane, step) in [(by_lane, depth, 1), (by_depth, 1, lanes)] {
                let mut panels = vec![f32::NAN; expected.len()];
                let mut to = Panels {
                    data: &mut panels,
                    width,
                    stride: depth * width,
                };
                let strides = Strides { lane, depth: step };
                pack(&data, strides, lanes, depth, &mut to);
                assert_eq!(panels, expected, "{lanes} lanes, {depth} deep");
            }
        }
    }
}
