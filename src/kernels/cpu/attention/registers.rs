//! Products of the squares of [`super::squares`] in vector registers: both sides are read where they are.
//!
//! A square's rows or columns are broadcast value by value, so that it is never packed. Distances are constants of a
//! kernel: with them every address is a register and a number.

use super::super::instructions::Level;
use super::super::tile::{Into, multiply_add};

/// Distance of a square's rows: no power of two, of which the cache would hold few.
pub const PITCH: usize = 272;
/// Keys that lie side by side in packed keys.
pub const PANEL: usize = 32;
/// Rows that a kernel may write together: results have a multiple of them.
pub const ROWS: usize = 8;

/// `c = a b`, or `+=`.
///
/// # Safety
/// The sides are as the field of [`Kernels`] says, for rows up to a multiple of [`ROWS`].
type Multiply = unsafe fn(size: Size, a: *const f32, b: *const f32, c: *mut f32, into: Into);

/// Size of a product.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result; where they are those of a head they are the kernel's own.
    pub columns: usize,
    /// Length of the sums.
    pub depth: usize,
}

/// The products of attention for heads of one width, in the best instruction set of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Values of a row, those that fill up included.
    pub width: usize,
    /// A square from rows `[rows][width]` and packed keys `[panel][depth][PANEL]`.
    pub scores: Multiply,
    /// `[rows][width]` from a square and rows `[depth][width]`.
    pub values: Multiply,
    /// `[rows][width]` from a square's columns and rows `[depth][width]`.
    pub keys: Multiply,
}

impl Kernels {
    /// For heads of this size; none for larger ones than any UNet or text encoder has.
    pub fn of(d: usize) -> Option<Self> {
        match d {
            0..=48 => Some(best::<48>()),
            49..=64 => Some(best::<64>()),
            65..=80 => Some(best::<80>()),
            81..=96 => Some(best::<96>()),
            97..=128 => Some(best::<128>()),
            129..=160 => Some(best::<160>()),
            _ => None,
        }
    }
}

fn best<const WIDTH: usize>() -> Kernels {
    match Level::best() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Amx => avx512::kernels::<WIDTH>(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::kernels::<WIDTH>(),
        _ => portable::kernels::<WIDTH>(),
    }
}

/// A register of neighbouring values.
trait Vector: Copy {
    const LANES: usize;
    /// Zeros.
    unsafe fn zero() -> Self;
    /// One value in all lanes.
    unsafe fn splat(value: f32) -> Self;
    /// `LANES` values in memory.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes them.
    unsafe fn store(self, to: *mut f32);
    /// `self · by + to`
    unsafe fn multiply_add(self, by: Self, to: Self) -> Self;
    /// `self + other`
    unsafe fn add(self, other: Self) -> Self;
}

/// What is multiplied in a tile.
#[derive(Clone, Copy)]
struct Sides {
    depth: usize,
    a: *const f32,
    /// Distance of the rows of `a`, and of the values that are summed.
    lane: usize,
    step: usize,
    b: *const f32,
    /// Distance of the rows of `b`.
    pitch: usize,
}

/// `TALL` rows of `WIDE` registers.
#[inline(always)]
unsafe fn tile<V: Vector, const TALL: usize, const WIDE: usize>(
    sides: Sides,
    c: *mut f32,
    ldc: usize,
    into: Into,
) {
    // SAFETY: the callers' kernels are asked for whole tiles.
    unsafe {
        let mut sums = [[V::zero(); WIDE]; TALL];
        for d in 0..sides.depth {
            let (a, b) = (sides.a.add(d * sides.step), sides.b.add(d * sides.pitch));
            let mut right = [V::zero(); WIDE];
            for (v, right) in right.iter_mut().enumerate() {
                *right = V::load(b.add(v * V::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let left = V::splat(*a.add(r * sides.lane));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = left.multiply_add(right, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let at = c.add(r * ldc + v * V::LANES);
                match into {
                    Into::Nothing => sum.store(at),
                    Into::Present => V::load(at).add(*sum).store(at),
                }
            }
        }
    }
}

/// The kernels of one instruction set: tiles of `$tall` rows and two or three registers.
macro_rules! kernels {
    ($module:ident, $vector:ty, $tall:literal $(, $feature:literal)?) => {
        mod $module {
            use super::{Into, Kernels, PANEL, PITCH, Sides, Size, Vector, tile};

            const LANES: usize = <$vector>::LANES;

            $(#[target_feature(enable = $feature)])?
            unsafe fn scores<const WIDTH: usize>(
                size: Size,
                a: *const f32,
                b: *const f32,
                c: *mut f32,
                into: Into,
            ) {
                let depth = size.depth;
                for column in (0..size.columns).step_by(2 * LANES) {
                    let b = b.wrapping_add(column / PANEL * depth * PANEL + column % PANEL);
                    for row in (0..size.rows).step_by($tall) {
                        let a = a.wrapping_add(row * WIDTH);
                        let sides = Sides { depth, a, lane: WIDTH, step: 1, b, pitch: PANEL };
                        let c = c.wrapping_add(row * PITCH + column);
                        // SAFETY: the caller's promise.
                        unsafe { tile::<$vector, $tall, 2>(sides, c, PITCH, into) };
                    }
                }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn values<const WIDTH: usize>(
                size: Size,
                a: *const f32,
                b: *const f32,
                c: *mut f32,
                into: Into,
            ) {
                // SAFETY: the caller's promise.
                unsafe { rows::<WIDTH>(size, [PITCH, 1], [a, b], c, into) };
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn keys<const WIDTH: usize>(
                size: Size,
                a: *const f32,
                b: *const f32,
                c: *mut f32,
                into: Into,
            ) {
                // SAFETY: the caller's promise.
                unsafe { rows::<WIDTH>(size, [1, PITCH], [a, b], c, into) };
            }

            #[inline(always)]
            unsafe fn rows<const WIDTH: usize>(
                size: Size,
                [lane, step]: [usize; 2],
                [a, b]: [*const f32; 2],
                c: *mut f32,
                into: Into,
            ) {
                for row in (0..size.rows).step_by($tall) {
                    let mut column = 0;
                    while column < WIDTH {
                        let a = a.wrapping_add(row * lane);
                        let b = b.wrapping_add(column);
                        let sides = Sides { depth: size.depth, a, lane, step, b, pitch: WIDTH };
                        let c = c.wrapping_add(row * WIDTH + column);
                        // An odd number of registers begins with three.
                        let three = (WIDTH - column) / LANES % 2 == 1;
                        // SAFETY: the caller's promise.
                        unsafe {
                            if three {
                                tile::<$vector, $tall, 3>(sides, c, WIDTH, into);
                            } else {
                                tile::<$vector, $tall, 2>(sides, c, WIDTH, into);
                            }
                        }
                        column += if three { 3 * LANES } else { 2 * LANES };
                    }
                }
            }

            pub fn kernels<const WIDTH: usize>() -> Kernels {
                Kernels {
                    width: WIDTH,
                    scores: scores::<WIDTH>,
                    values: values::<WIDTH>,
                    keys: keys::<WIDTH>,
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(avx512, std::arch::x86_64::__m512, 8, "avx512f");
#[cfg(target_arch = "x86_64")]
kernels!(avx2, std::arch::x86_64::__m256, 4, "avx2,fma");
kernels!(portable, [f32; 8], 4);

/// Plain Rust, for the compiler to vectorise.
impl Vector for [f32; 8] {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; 8]
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self>().read() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self>().write(self) }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, by: Self, to: Self) -> Self {
        std::array::from_fn(|lane| multiply_add(self[lane], by[lane], to[lane]))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + other[lane])
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps,
        _mm256_setzero_ps, _mm256_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::Vector;

    /// Each is one instruction of the set whose kernels alone use the type.
    macro_rules! vector {
        ($vector:ty, $lanes:literal, $zero:ident, $splat:ident, $load:ident, $store:ident, $fma:ident, $add:ident) => {
            impl Vector for $vector {
                const LANES: usize = $lanes;

                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: the kernel's instruction set was found.
                    unsafe { $zero() }
                }

                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    // SAFETY: as above.
                    unsafe { $splat(value) }
                }

                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: as above, and the caller's promise.
                    unsafe { $load(from) }
                }

                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: as above, and the caller's promise.
                    unsafe { $store(to, self) }
                }

                #[inline(always)]
                unsafe fn multiply_add(self, by: Self, to: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $fma(self, by, to) }
                }

                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $add(self, other) }
                }
            }
        };
    }

    vector!(
        __m512,
        16,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps
    );
    vector!(
        __m256,
        8,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps
    );
}

#[cfg(test)]
mod tests {
    use super::super::super::tile::tests::numbers;
    use super::*;

    fn check<const WIDTH: usize>(kernels: &Kernels) {
        let (rows, columns, depth) = (16, 64, 40);
        let a = numbers(rows * WIDTH);
        let keys = numbers(columns * depth);
        let mut square = vec![f32::NAN; rows.max(depth) * PITCH];
        let size = |rows, depth| Size {
            rows,
            columns,
            depth,
        };
        // SAFETY: every side has the size that the kernel is told.
        unsafe {
            let (a, b, c) = (a.as_ptr(), keys.as_ptr(), square.as_mut_ptr());
            (kernels.scores)(size(rows, depth), a, b, c, Into::Nothing);
            (kernels.scores)(size(rows, depth), a, b, c, Into::Present);
        }
        for row in 0..rows {
            for column in 0..columns {
                let (panel, lane) = (column / PANEL, column % PANEL);
                let sum: f32 = (0..depth)
                    .map(|d| a[row * WIDTH + d] * keys[(panel * depth + d) * PANEL + lane])
                    .sum();
                assert_eq!(square[row * PITCH + column], 2.0 * sum, "{row}, {column}");
            }
        }
        let square = numbers(40 * PITCH);
        let b = numbers(40 * WIDTH);
        for (kernel, lane, step) in [(kernels.values, PITCH, 1), (kernels.keys, 1, PITCH)] {
            let mut c = vec![f32::NAN; rows * WIDTH];
            // SAFETY: as above.
            unsafe {
                let (a, b, c) = (square.as_ptr(), b.as_ptr(), c.as_mut_ptr());
                kernel(size(rows, 40), a, b, c, Into::Nothing);
            }
            for (i, found) in c.iter().enumerate() {
                let (row, column) = (i / WIDTH, i % WIDTH);
                let sum: f32 = (0..40)
                    .map(|d| square[row * lane + d * step] * b[d * WIDTH + column])
                    .sum();
                assert_eq!(*found, sum, "{row}, {column}");
            }
        }
    }

    fn every_width(kernels: [Kernels; 3]) {
        check::<48>(&kernels[0]);
        check::<80>(&kernels[1]);
        check::<160>(&kernels[2]);
    }

    #[test]
    fn kernels_of_every_instruction_set_are_exact() {
        let portable = [
            portable::kernels::<48>(),
            portable::kernels::<80>(),
            portable::kernels::<160>(),
        ];
        every_width(portable);
        #[cfg(target_arch = "x86_64")]
        {
            if Level::best() >= Level::Avx2 {
                let avx2 = [
                    avx2::kernels::<48>(),
                    avx2::kernels::<80>(),
                    avx2::kernels::<160>(),
                ];
                every_width(avx2);
            }
            if Level::best() >= Level::Avx512 {
                let avx512 = [
                    avx512::kernels::<48>(),
                    avx512::kernels::<80>(),
                    avx512::kernels::<160>(),
                ];
                every_width(avx512);
            }
        }
    }
}
