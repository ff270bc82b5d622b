//! Products and singular values of the matrices of adapters. Each call works on one thread: modules are worked on side
//! by side.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

/// A matrix in f32, as adapters are trained.
pub type Matrix = Mat<f32>;

/// Columns that a search for the first singular vectors has more than are wanted.
const OVERSAMPLED: usize = 16;
/// How often such a search multiplies by the matrix and its transpose.
const POWER_STEPS: usize = 6;

/// A matrix of values that lie row by row.
pub fn from_rows(values: &[f32], rows: usize, columns: usize) -> Matrix {
    MatRef::from_row_major_slice(values, rows, columns).to_owned()
}

/// The values row by row.
pub fn to_rows(matrix: MatRef<'_, f32>) -> Vec<f32> {
    let mut values = vec![0.0; matrix.nrows() * matrix.ncols()];
    MatMut::from_row_major_slice_mut(&mut values, matrix.nrows(), matrix.ncols()).copy_from(matrix);
    values
}

/// `a b`
pub fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Matrix {
    let mut c = Matrix::zeros(a.nrows(), b.ncols());
    add_product(c.as_mut(), a, b, 1.0);
    c
}

/// `c ← c + scale a b`
pub fn add_product(c: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, scale: f32) {
    matmul(c, Accum::Add, a, b, scale, Par::Seq);
}

/// Frobenius norm of `up down`, without making it: `‖AB‖² = ⟨AᵀA, BBᵀ⟩`.
pub fn norm_of_product(up: &Matrix, down: &Matrix) -> f64 {
    let left = product(up.transpose(), up.as_ref());
    let right = product(down.as_ref(), down.transpose());
    let mut sum = 0.0;
    for j in 0..left.ncols() {
        for i in 0..left.nrows() {
            sum += f64::from(left[(i, j)]) * f64::from(right[(i, j)]);
        }
    }
    sum.max(0.0).sqrt()
}

/// Frobenius norm.
pub fn norm(matrix: &Matrix) -> f64 {
    let mut sum = 0.0;
    for j in 0..matrix.ncols() {
        for i in 0..matrix.nrows() {
            sum += f64::from(matrix[(i, j)]).powi(2);
        }
    }
    sum.sqrt()
}

/// `u diag(s) vᵀ`, with the largest singular value first.
#[derive(Debug)]
pub struct Svd {
    /// `[rows, k]`
    pub u: Matrix,
    /// `k` of them.
    pub s: Vec<f32>,
    /// `[columns, k]`
    pub v: Matrix,
}

/// All singular values. `None` where the iteration does not converge, which finite numbers do not bring about.
pub fn svd(matrix: MatRef<'_, f32>) -> Option<Svd> {
    let found = matrix.thin_svd().ok()?;
    Some(Svd {
        s: found.S().column_vector().iter().copied().collect(),
        u: found.U().to_owned(),
        v: found.V().to_owned(),
    })
}

/// The singular values of `up down`: both are orthogonalised, and only the small product of what is left is decomposed,
/// so that the whole matrix never exists.
///
/// # Shapes
/// - `up`: `[out, rank]`
/// - `down`: `[rank, in]`
pub fn svd_of_product(up: &Matrix, down: &Matrix) -> Option<Svd> {
    let left = up.qr();
    let right = down.transpose().to_owned().qr();
    let core = product(left.thin_R(), right.thin_R().transpose()); // [≤ rank, ≤ rank]
    let core = svd(core.as_ref())?;
    Some(Svd {
        u: product(left.compute_thin_Q().as_ref(), core.u.as_ref()),
        v: product(right.compute_thin_Q().as_ref(), core.v.as_ref()),
        s: core.s,
    })
}

/// The `rank` largest singular values of a matrix.
///
/// Where that is few of many it is found by multiplying a random subspace with the matrix again and again
/// (Halko, Martinsson, Tropp 2011, algorithm 4.4); the numbers are drawn from a fixed seed.
pub fn first_of(matrix: &Matrix, rank: usize) -> Option<Svd> {
    // Squares of numbers that are far from 1 would leave the range of f32.
    let largest = largest(matrix)?;
    if largest == 0.0 {
        return svd(matrix.as_ref());
    }
    let matrix = &Matrix::from_fn(matrix.nrows(), matrix.ncols(), |i, j| {
        matrix[(i, j)] / largest
    });
    let found = first_of_scaled(matrix, rank)?;
    Some(Svd {
        s: found.s.iter().map(|value| value * largest).collect(),
        ..found
    })
}

/// The largest absolute value; `None` when one is not finite.
fn largest(matrix: &Matrix) -> Option<f32> {
    let mut largest = 0.0_f32;
    for j in 0..matrix.ncols() {
        for i in 0..matrix.nrows() {
            let value = matrix[(i, j)].abs();
            value.is_finite().then_some(())?;
            largest = largest.max(value);
        }
    }
    Some(largest)
}

fn first_of_scaled(matrix: &Matrix, rank: usize) -> Option<Svd> {
    let smaller = matrix.nrows().min(matrix.ncols());
    let width = rank + OVERSAMPLED;
    if width * 4 > smaller {
        return svd(matrix.as_ref());
    }
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let start = Matrix::from_fn(matrix.ncols(), width, |_, _| uniform(&mut state));
    let mut range = product(matrix.as_ref(), start.as_ref())
        .qr()
        .compute_thin_Q();
    for _ in 0..POWER_STEPS {
        let back = product(matrix.transpose(), range.as_ref())
            .qr()
            .compute_thin_Q();
        range = product(matrix.as_ref(), back.as_ref())
            .qr()
            .compute_thin_Q();
    }
    let small = product(range.transpose(), matrix.as_ref()); // [width, columns]
    let found = svd(small.as_ref())?;
    Some(Svd {
        u: product(range.as_ref(), found.u.as_ref()),
        ..found
    })
}

/// A number from -1 to 1 (splitmix64).
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f32 / 8_388_608.0 - 1.0
}

/// The first `rank` parts of a decomposition, as sd-scripts splits them: `up = u diag(s)`, `down = vᵀ`.
pub fn split(svd: &Svd, rank: usize) -> (Matrix, Matrix) {
    let rank = rank.min(svd.s.len());
    let up = Matrix::from_fn(svd.u.nrows(), rank, |i, j| svd.u[(i, j)] * svd.s[j]);
    let down = Matrix::from_fn(rank, svd.v.nrows(), |i, j| svd.v[(j, i)]);
    (up, down)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Matrix {
        let mut state = seed;
        Matrix::from_fn(rows, columns, |_, _| uniform(&mut state))
    }

    fn difference(a: &Matrix, b: &Matrix) -> f64 {
        norm(&(a - b)) / norm(b)
    }

    #[test]
    fn a_product_is_decomposed_without_being_made() {
        for (out, rank, columns) in [(40, 8, 60), (5, 8, 60), (40, 8, 3), (7, 1, 7)] {
            let (up, down) = (random(out, rank, 1), random(rank, columns, 2));
            let whole = product(up.as_ref(), down.as_ref());
            let found = svd_of_product(&up, &down).expect("converges");
            let expected = svd(whole.as_ref()).expect("converges");
            for (a, b) in found.s.iter().zip(&expected.s) {
                assert!((a - b).abs() < 2e-5 * expected.s[0], "{a} {b}");
            }
            let (up, down) = split(&found, rank);
            assert!(difference(&product(up.as_ref(), down.as_ref()), &whole) < 5e-6);
            assert!((norm_of_product(&up, &down) - norm(&whole)).abs() < 1e-5 * norm(&whole));
        }
    }

    #[test]
    fn the_first_singular_values_are_found_without_the_others() {
        // Singular values that fall slowly, as those of trained adapters do.
        let (u, v) = (
            random(200, 200, 3).qr().compute_thin_Q(),
            random(260, 200, 4),
        );
        let v = v.qr().compute_thin_Q();
        let s = |i: usize| 0.9_f32.powi(i as i32);
        let scaled = Matrix::from_fn(200, 200, |i, j| u[(i, j)] * s(j));
        let whole = product(scaled.as_ref(), v.transpose());
        let found = first_of(&whole, 8).expect("converges");
        for (i, found) in found.s.iter().take(8).enumerate() {
            assert!((found - s(i)).abs() < 1e-4, "{i}: {found}, {}", s(i));
        }
        let (up, down) = split(&found, 8);
        let rest = &whole - &product(up.as_ref(), down.as_ref());
        let least: f64 = (8..200)
            .map(|i| f64::from(s(i)).powi(2))
            .sum::<f64>()
            .sqrt();
        assert!((norm(&rest) - least).abs() < 1e-3 * least);
    }

    #[test]
    fn matrices_of_no_rank_are_decomposed() {
        let zero = (Matrix::zeros(9, 3), random(3, 7, 1));
        let found = svd_of_product(&zero.0, &zero.1).expect("converges");
        assert_eq!(found.s, [0.0; 3]);
        let found = first_of(&Matrix::zeros(9, 7), 2).expect("converges");
        assert!(found.s.iter().all(|value| *value == 0.0));
        // Two equal columns: rank 1 of 2.
        let up = Matrix::from_fn(5, 2, |i, _| i as f32);
        let found = svd_of_product(&up, &random(2, 6, 2)).expect("converges");
        assert!(found.s[1] < 1e-5 * found.s[0]);
        // Numbers whose squares are not finite, and those that are not finite themselves.
        let constant = |value| first_of(&Matrix::from_fn(5, 5, |_, _| value), 2);
        let found = constant(1e30).expect("converges");
        assert!((found.s[0] / 5e30 - 1.0).abs() < 1e-5);
        assert!(constant(f32::INFINITY).is_none() && constant(f32::NAN).is_none());
    }

    #[test]
    fn rows_come_back_as_rows() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let matrix = from_rows(&values, 2, 3);
        assert_eq!(matrix[(1, 0)], 4.0);
        assert_eq!(to_rows(matrix.as_ref()), values);
    }
}
