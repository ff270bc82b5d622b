//! Copies of matrix parts in the order in which a micro-kernel reads them, widened to f32 on the way.

use half::{bf16, f16};

/// An element type that weights are stored in.
pub trait Stored: Copy + Sync + Send + 'static {
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

/// Writes `panel[d * width + lane]` for `lanes` lanes and all depths; lanes up to `width` are zero.
///
/// `panel` has `depth * width` elements, `data` begins at lane 0 and depth 0.
pub fn pack<T: Stored>(
    data: &[T],
    strides: Strides,
    lanes: usize,
    depth: usize,
    width: usize,
    panel: &mut [f32],
) {
    if lanes == 0 || depth == 0 {
        panel.fill(0.0);
        return;
    }
    let last = (lanes - 1) * strides.lane + (depth - 1) * strides.depth;
    assert!(last < data.len() && lanes <= width && panel.len() == depth * width);
    #[cfg(target_arch = "x86_64")]
    if super::has_avx512() && (strides.lane == 1 || strides.depth == 1) {
        // SAFETY: the instruction set was just found, the ranges were just checked.
        unsafe {
            if strides.lane == 1 {
                x86::copy(data, strides.depth, lanes, depth, width, panel);
            } else {
                x86::transpose(data, strides.lane, lanes, depth, width, panel);
            }
        }
        return;
    }
    if lanes < width {
        panel.fill(0.0);
    }
    if strides.lane == 1 {
        for (d, row) in panel.chunks_exact_mut(width).enumerate() {
            let from = &data[d * strides.depth..][..lanes];
            for (to, from) in row.iter_mut().zip(from) {
                *to = from.widen();
            }
        }
    } else {
        for lane in 0..lanes {
            let from = &data[lane * strides.lane..];
            for (d, row) in panel.chunks_exact_mut(width).enumerate() {
                row[lane] = from[d * strides.depth].widen();
            }
        }
    }
}

impl Stored for f32 {
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
        __m256i, __m512, _mm256_maskz_loadu_epi16, _mm512_castpd_ps, _mm512_castps_pd,
        _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_mask_storeu_ps,
        _mm512_maskz_loadu_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_slli_epi32,
        _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
        _mm512_unpacklo_ps,
    };

    use super::Stored;

    const LANES: usize = 16;

    fn mask(lanes: usize) -> u16 {
        if lanes >= LANES {
            u16::MAX
        } else {
            (1 << lanes) - 1
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn load_f32(from: *const f32, lanes: usize) -> __m512 {
        // SAFETY: lanes behind the mask are not read.
        unsafe { _mm512_maskz_loadu_ps(mask(lanes), from) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn load_f16(from: *const i16, lanes: usize) -> __m512 {
        // SAFETY: lanes behind the mask are not read.
        _mm512_cvtph_ps(unsafe { load_16_bits(from, lanes) })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn load_bf16(from: *const i16, lanes: usize) -> __m512 {
        // SAFETY: lanes behind the mask are not read.
        let bits = unsafe { load_16_bits(from, lanes) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_16_bits(from: *const i16, lanes: usize) -> __m256i {
        // SAFETY: lanes behind the mask are not read.
        unsafe { _mm256_maskz_loadu_epi16(mask(lanes), from) }
    }

    /// Lanes are neighbours in memory.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn copy<T: Stored>(
        data: &[T],
        stride: usize,
        lanes: usize,
        depth: usize,
        width: usize,
        panel: &mut [f32],
    ) {
        for d in 0..depth {
            for begin in (0..width).step_by(LANES) {
                let there = lanes.saturating_sub(begin).min(LANES);
                // SAFETY: `there` values are left in the row, `width - begin` in the panel's.
                unsafe {
                    let values = if there == 0 {
                        _mm512_setzero_ps()
                    } else {
                        T::load(data.as_ptr().add(d * stride + begin), there)
                    };
                    let to = panel.as_mut_ptr().add(d * width + begin);
                    _mm512_mask_storeu_ps(to, mask(width - begin), values);
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
        width: usize,
        panel: &mut [f32],
    ) {
        for lane in (0..width).step_by(LANES) {
            let there = lanes.saturating_sub(lane).min(LANES);
            let kept = mask(width - lane);
            for d in (0..depth).step_by(LANES) {
                let deep = (depth - d).min(LANES);
                let mut rows = [_mm512_setzero_ps(); LANES];
                for (r, row) in rows.iter_mut().enumerate().take(there) {
                    // SAFETY: `deep` values are left in this lane.
                    *row = unsafe { T::load(data.as_ptr().add((lane + r) * stride + d), deep) };
                }
                let columns = transpose_16x16(rows);
                for (c, column) in columns.iter().enumerate().take(deep) {
                    // SAFETY: the panel has `depth` rows of `width`; lanes behind it are masked.
                    unsafe {
                        let to = panel.as_mut_ptr().add((d + c) * width + lane);
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

    /// Pairs, then fours inside 128-bit parts, then the parts themselves.
    #[target_feature(enable = "avx512f")]
    fn transpose_16x16(r: [__m512; LANES]) -> [__m512; LANES] {
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
            (5, 17, 14),
            (32, 33, 32),
            (20, 3, 32),
            (6, 16, 6),
        ] {
            let value = |lane: usize, d: usize| f16::from_f32((lane * 100 + d) as f32);
            let by_lane: Vec<f16> = (0..lanes * depth)
                .map(|i| value(i / depth, i % depth))
                .collect();
            let by_depth: Vec<f16> = (0..lanes * depth)
                .map(|i| value(i % lanes, i / lanes))
                .collect();
            let expected: Vec<f32> = (0..depth * width)
                .map(|i| match (i % width, i / width) {
                    (lane, d) if lane < lanes => value(lane, d).to_f32(),
                    _ => 0.0,
                })
                .collect();
            for (data, strides) in [
                (
                    by_lane,
                    Strides {
                        lane: depth,
                        depth: 1,
                    },
                ),
                (
                    by_depth,
                    Strides {
                        lane: 1,
                        depth: lanes,
                    },
                ),
            ] {
                let mut panel = vec![f32::NAN; depth * width];
                pack(&data, strides, lanes, depth, width, &mut panel);
                assert_eq!(panel, expected, "{lanes} lanes, {depth} deep");
            }
        }
    }
}
