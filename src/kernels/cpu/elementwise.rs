//! Passes over contiguous values, compiled once for each instruction set.
//!
//! Exponential and error function are polynomials without branches, so that the compiler vectorises the loops around
//! them; their errors are those of f32 itself (tests below).

/// Compiles the body for AVX-512, for AVX2 and for the target's baseline, and takes the best that is there.
macro_rules! vectorised {
    ($(#[$meta:meta])* pub fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        pub fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512($($arg: $type),*) $(-> $result)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) $(-> $result)? { body($($arg),*) }
                if $crate::kernels::has_avx512() {
                    // SAFETY: the instruction set was just found.
                    return unsafe { avx512($($arg),*) };
                }
                if $crate::kernels::has_avx2() {
                    // SAFETY: the instruction set was just found.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

pub(crate) use vectorised;

/// Lanes that sums are kept in: the compiler may not reorder additions by itself.
const LANES: usize = 16;

/// `e^x`: `2^n · p(r)` with `x = n ln 2 + r`, |r| ≤ ln 2 / 2 (the coefficients are those of Cephes' `expf`).
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to a whole number
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_66;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    p * power
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function: a quotient of odd and even polynomials on |x| ≤ 4, ±1 beyond (as in Eigen).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let p = -2.726_142_4e-10;
    let p = p * s + 2.770_681_4e-8;
    let p = p * s - 2.101_024e-6;
    let p = p * s - 5.692_506_5e-5;
    let p = p * s - 7.349_906e-4;
    let p = p * s - 2.954_6e-3;
    let p = p * s - 1.609_603_3e-2;
    let q = -1.456_607_2e-5;
    let q = q * s - 2.133_740_5e-4;
    let q = q * s - 1.682_827e-3;
    let q = q * s - 7.373_329e-3;
    let q = q * s - 1.426_473_9e-2;
    x * p / q
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// `Φ(x) + x φ(x)`
#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let density = 0.398_942_3 * exp(-0.5 * x * x);
    0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * density
}

#[inline(always)]
fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// Sums of `term(index)` in lanes, then over the lanes.
#[inline(always)]
fn sum(length: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = length / LANES * LANES;
    let mut at = 0;
    while at < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(at + lane);
        }
        at += LANES;
    }
    let rest: f32 = (whole..length).map(&term).sum();
    lanes.iter().sum::<f32>() + rest
}

vectorised! {
    /// Mean and reciprocal standard deviation (biased variance plus `eps`) in two passes.
    pub fn moments(x: &[f32], eps: f32) -> [f32; 2] {
        let count = x.len() as f32;
        let mean = sum(x.len(), |i| x[i]) / count;
        let variance = sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / count;
        [mean, 1.0 / (variance + eps).sqrt()]
    }
}

vectorised! {
    /// `y = x · scale + shift`, through SiLU when `silu`.
    pub fn affine(x: &[f32], y: &mut [f32], scale: f32, shift: f32, silu: bool) {
        if silu {
            for (y, x) in y.iter_mut().zip(x) {
                let z = x * scale + shift;
                *y = z * sigmoid(z);
            }
        } else {
            for (y, x) in y.iter_mut().zip(x) {
                *y = x * scale + shift;
            }
        }
    }
}

vectorised! {
    /// Gradient with respect to the standardised values of one channel, in `out`, and its sums `[Σ g, Σ g x̂]`.
    ///
    /// `x̂ = (x - mean) · rstd`, `z = x̂ · weight + bias`, `y = silu(z)` or `z`.
    pub fn affine_backward(
        x: &[f32],
        dy: &[f32],
        out: &mut [f32],
        moments: [f32; 2],
        affine: [f32; 2],
        silu: bool,
    ) -> [f32; 2] {
        let ([mean, rstd], [weight, bias]) = (moments, affine);
        if silu {
            for ((out, x), dy) in out.iter_mut().zip(x).zip(dy) {
                let z = (x - mean) * rstd * weight + bias;
                *out = dy * silu_slope(z) * weight;
            }
        } else {
            for (out, dy) in out.iter_mut().zip(dy) {
                *out = dy * weight;
            }
        }
        let plain = sum(x.len(), |i| out[i]);
        let along = sum(x.len(), |i| out[i] * ((x[i] - mean) * rstd));
        [plain, along]
    }
}

vectorised! {
    /// `g = rstd · (g - means[0] - x̂ · means[1])`: from the gradient of standardised values to that of the values.
    pub fn standardize_backward(x: &[f32], g: &mut [f32], moments: [f32; 2], means: [f32; 2]) {
        let [mean, rstd] = moments;
        for (g, x) in g.iter_mut().zip(x) {
            *g = rstd * (*g - means[0] - (x - mean) * rstd * means[1]);
        }
    }
}

vectorised! {
    /// Layer norm of one row: `y = (x - mean) · rstd · weight + bias`.
    pub fn norm_row(x: &[f32], y: &mut [f32], moments: [f32; 2], weight: &[f32], bias: &[f32]) {
        let [mean, rstd] = moments;
        for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
            *y = (x - mean) * rstd * weight + bias;
        }
    }
}

vectorised! {
    /// The gradient of a row of [`norm_row`].
    pub fn norm_row_backward(x: &[f32], dy: &[f32], dx: &mut [f32], moments: [f32; 2], weight: &[f32]) {
        let [mean, rstd] = moments;
        let count = x.len() as f32;
        let plain = sum(x.len(), |i| dy[i] * weight[i]) / count;
        let along = sum(x.len(), |i| dy[i] * weight[i] * ((x[i] - mean) * rstd)) / count;
        for (((dx, x), dy), weight) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
            *dx = rstd * (dy * weight - plain - (x - mean) * rstd * along);
        }
    }
}

vectorised! {
    /// `y = values · gelu(gates)`
    pub fn gate(values: &[f32], gates: &[f32], y: &mut [f32]) {
        for ((y, value), gate) in y.iter_mut().zip(values).zip(gates) {
            *y = value * gelu(*gate);
        }
    }
}

vectorised! {
    /// The gradients of both sides of [`gate`].
    pub fn gate_backward(
        values: &[f32],
        gates: &[f32],
        dy: &[f32],
        dvalues: &mut [f32],
        dgates: &mut [f32],
    ) {
        for ((dvalue, gate), dy) in dvalues.iter_mut().zip(gates).zip(dy) {
            *dvalue = dy * gelu(*gate);
        }
        for (((dgate, value), gate), dy) in dgates.iter_mut().zip(values).zip(gates).zip(dy) {
            *dgate = dy * value * gelu_slope(*gate);
        }
    }
}

vectorised! {
    /// `y = x · Φ(x)`
    pub fn gelus(x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = gelu(*x);
        }
    }
}

vectorised! {
    /// `y = x · sigmoid(1.702 x)`
    pub fn quick_gelu(x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = x * sigmoid(1.702 * x);
        }
    }
}

vectorised! {
    /// The gradient of [`quick_gelu`].
    pub fn quick_gelu_backward(x: &[f32], dy: &[f32], dx: &mut [f32]) {
        for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
            let s = sigmoid(1.702 * x);
            *dx = dy * s * (1.0 + 1.702 * x * (1.0 - s));
        }
    }
}

/// `s = e^(scale · s - max)` in place; returns `[max, Σ]`.
pub fn exponentials(scores: &mut [f32], scale: f32) -> [f32; 2] {
    let max = maximum(scores) * scale;
    probabilities(scores, scale, max);
    [max, total(scores)]
}

vectorised! {
    /// `s = e^(scale · s - shift)` in place.
    pub fn probabilities(scores: &mut [f32], scale: f32, shift: f32) {
        for s in scores.iter_mut() {
            *s = exp(*s * scale - shift);
        }
    }
}

vectorised! {
    /// The largest value.
    pub fn maximum(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in x.chunks_exact(LANES) {
            for (max, x) in lanes.iter_mut().zip(chunk) {
                *max = max.max(*x);
            }
        }
        let rest = x.chunks_exact(LANES).remainder();
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, x| max.max(*x))
    }
}

vectorised! {
    /// The sum.
    pub fn total(x: &[f32]) -> f32 {
        sum(x.len(), |i| x[i])
    }
}

vectorised! {
    /// The gradient of scores, `along` being `Σ p d`: `d = scale · p · (d - along)` in place.
    pub fn scores_backward(p: &[f32], d: &mut [f32], scale: f32, along: f32) {
        for (d, p) in d.iter_mut().zip(p) {
            *d = scale * p * (*d - along);
        }
    }
}

vectorised! {
    /// The gradient of scores from that of probabilities: `d = scale · p · (d - Σ p d)` in place.
    pub fn softmax_backward(p: &[f32], d: &mut [f32], scale: f32) {
        let along = sum(p.len(), |i| p[i] * d[i]);
        scores_backward(p, d, scale, along);
    }
}

vectorised! {
    /// `x = x · factor` in place.
    pub fn scale(x: &mut [f32], factor: f32) {
        for x in x.iter_mut() {
            *x *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The series of the error function, in f64.
    fn erf_f64(x: f64) -> f64 {
        let mut term = x;
        let mut sum = x;
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn exponentials_are_exact_to_f32() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 2.5e-7, "e^{x}: relative error {error:e}");
        }
    }

    #[test]
    fn the_error_function_is_exact_to_f32() {
        for i in -500..=500 {
            let x = i as f32 * 0.01;
            let error = (f64::from(erf(x)) - erf_f64(f64::from(x))).abs();
            assert!(error < 4e-7, "erf({x}): error {error:e}");
        }
    }

    #[test]
    fn slopes_are_those_of_the_functions() {
        for i in -40..40 {
            let x = i as f32 * 0.1;
            let h = 1e-2;
            let slope = (gelu(x + h) - gelu(x - h)) / (2.0 * h);
            assert!((slope - gelu_slope(x)).abs() < 1e-4, "gelu at {x}");
            let silu = |x: f32| x * sigmoid(x);
            let slope = (silu(x + h) - silu(x - h)) / (2.0 * h);
            assert!((slope - silu_slope(x)).abs() < 1e-4, "silu at {x}");
        }
    }
}
