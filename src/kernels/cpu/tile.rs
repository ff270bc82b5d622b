//! Micro-kernels: one tile of a matrix product, in the registers of the instruction set that the machine has.

use std::sync::OnceLock;

use super::instructions::Level;

/// `c[r][j] = Σ_d a[d][r] · b[d][j]` for a full tile, or `+=`.
///
/// `a` and `b` are packed panels `[depth][rows]` and `[depth][columns]`, `c` is row-major with row stride `ldc`.
type Kernel =
    unsafe fn(depth: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, into: Into);

/// What becomes of the values that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// They are overwritten, and need not be initialised.
    Nothing,
    /// They are added to.
    Present,
}

/// The tile of an instruction set.
#[derive(Debug, Clone, Copy)]
pub struct Tile {
    /// Rows of a tile.
    pub rows: usize,
    /// Columns of a tile.
    pub columns: usize,
    kernel: Kernel,
}

/// Room for the largest tile.
pub const MAX_TILE: usize = 14 * 32;

impl Tile {
    /// The best tile of this machine, found at the first call.
    pub fn best() -> &'static Self {
        static BEST: OnceLock<Tile> = OnceLock::new();
        BEST.get_or_init(|| Self::available()[0])
    }

    /// Every tile that this machine can run, the best first.
    pub fn available() -> Vec<Self> {
        let mut tiles = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if Level::best() >= Level::Avx512 {
                tiles.push(Self {
                    rows: 14,
                    columns: 32,
                    kernel: x86::avx512_14x32,
                });
            }
            if Level::best() >= Level::Avx2 {
                tiles.push(Self {
                    rows: 6,
                    columns: 16,
                    kernel: x86::avx2_6x16,
                });
            }
        }
        tiles.push(Self {
            rows: 6,
            columns: 16,
            kernel: portable_6x16,
        });
        tiles
    }

    /// Writes the product of two panels to `c`, or adds it.
    ///
    /// # Safety
    /// `a` holds `depth * rows` values, `b` `depth * columns`; `c` points to `rows` rows of `columns` values that are
    /// `ldc` apart.
    pub unsafe fn multiply(
        &self,
        depth: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        into: Into,
    ) {
        // SAFETY: the caller's promise; the instruction set was found by `available`.
        unsafe { (self.kernel)(depth, a, b, c, ldc, into) }
    }
}

/// Plain Rust in the shape of a 6×16 tile, for the compiler to vectorise (NEON has 32 registers of 4 lanes).
unsafe fn portable_6x16(
    depth: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    into: Into,
) {
    const ROWS: usize = 6;
    const COLUMNS: usize = 16;
    let mut sums = [[0.0_f32; COLUMNS]; ROWS];
    for d in 0..depth {
        // SAFETY: `d < depth`, and the panels have `depth` rows.
        let (a, b) = unsafe {
            (
                &*a.add(d * ROWS).cast::<[f32; ROWS]>(),
                &*b.add(d * COLUMNS).cast::<[f32; COLUMNS]>(),
            )
        };
        for (sums, a) in sums.iter_mut().zip(a) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = multiply_add(*a, *b, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (j, sum) in sums.iter().enumerate() {
            // SAFETY: the caller's `c` has 6 rows of 16 values.
            unsafe {
                let to = c.add(r * ldc + j);
                to.write(match into {
                    Into::Nothing => *sum,
                    Into::Present => to.read() + sum,
                });
            }
        }
    }
}

/// `a b + c`, fused where the target's baseline has an instruction for it.
#[inline(always)]
pub fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction a fused multiply-add is a function call.
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps,
        _mm256_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::Into;

    /// 28 of the 32 registers hold sums, two a row of `b`, one an element of `a`.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512_14x32(
        depth: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        into: Into,
    ) {
        const ROWS: usize = 14;
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        let (mut a, mut b) = (a, b);
        for _ in 0..depth {
            // SAFETY: both panels have `depth` rows; `c` is as the caller promised.
            unsafe {
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(r));
                    sums[0] = _mm512_fmadd_ps(a, b0, sums[0]);
                    sums[1] = _mm512_fmadd_ps(a, b1, sums[1]);
                }
                a = a.add(ROWS);
                b = b.add(32);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                // SAFETY: `c` has 14 rows of 32 values.
                unsafe {
                    let at = c.add(r * ldc + 16 * half);
                    let value = match into {
                        Into::Nothing => *sum,
                        Into::Present => _mm512_add_ps(_mm512_loadu_ps(at), *sum),
                    };
                    _mm512_storeu_ps(at, value);
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2_6x16(
        depth: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        into: Into,
    ) {
        const ROWS: usize = 6;
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        let (mut a, mut b) = (a, b);
        for _ in 0..depth {
            // SAFETY: both panels have `depth` rows.
            unsafe {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_broadcast_ss(&*a.add(r));
                    sums[0] = _mm256_fmadd_ps(a, b0, sums[0]);
                    sums[1] = _mm256_fmadd_ps(a, b1, sums[1]);
                }
                a = a.add(ROWS);
                b = b.add(16);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                // SAFETY: `c` has 6 rows of 16 values.
                unsafe {
                    let at = c.add(r * ldc + 8 * half);
                    let value = match into {
                        Into::Nothing => *sum,
                        Into::Present => _mm256_add_ps(_mm256_loadu_ps(at), *sum),
                    };
                    _mm256_storeu_ps(at, value);
                }
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Small whole numbers: sums are exact in f32, so results are compared for equality.
    pub fn numbers(count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7 + 3) % 11) as f32 - 5.0)
            .collect()
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
                assert_eq!(*found, 2.0 * sum, "{tile:?} at {row}, {column}");
            }
        }
    }
}
