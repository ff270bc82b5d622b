//! What instructions do with the elements of a piece. All of it is inlined into one function for each kind of registers.

use lorasmith_abi::host::blocks::{BLOCK, Quantized};
use lorasmith_abi::host::{Binary, Scalar, Unary};

use super::super::program::{Operation, Source};

#[inline(always)]
pub fn argument<'a>(
    source: Source,
    inputs: &[Argument<'a>],
    registers: &'a [Vec<f32>],
    length: usize,
) -> Argument<'a> {
    match source {
        Source::Register(register) => Argument::Slice(&registers[register][..length]),
        Source::Input(input) => inputs[input],
        Source::Number(bits) => Argument::Number(f32::from_bits(bits)),
    }
}

/// What an operation works on.
#[derive(Clone, Copy)]
pub enum Argument<'a> {
    Slice(&'a [f32]),
    Number(f32),
}

#[inline(always)]
pub fn compute<'a>(operation: Operation, find: impl Fn(Source) -> Argument<'a>, to: &mut [f32]) {
    match operation {
        Operation::Unary(op, a) => unary(op, find(a), to),
        Operation::Scalar(op, a, bits) => scalar(op, find(a), f32::from_bits(bits), to),
        Operation::Binary(op, a, b) => binary(op, find(a), find(b), to),
        Operation::Clamp(a, low, high) => {
            let (low, high) = (f32::from_bits(low), f32::from_bits(high));
            each(find(a), to, |x| {
                // The first comparison passes NaN on.
                let x = if x < low { low } else { x };
                if x > high { high } else { x }
            });
        }
        Operation::Select(condition, a, b) => {
            let (condition, a, b) = (find(condition), find(a), find(b));
            for (index, to) in to.iter_mut().enumerate() {
                *to = if condition.at(index) == 0.0 {
                    b.at(index)
                } else {
                    a.at(index)
                };
            }
        }
    }
}

impl Argument<'_> {
    #[inline(always)]
    fn at(self, index: usize) -> f32 {
        match self {
            Self::Slice(values) => values[index],
            Self::Number(number) => number,
        }
    }
}

#[inline(always)]
fn each(a: Argument<'_>, to: &mut [f32], f: impl Fn(f32) -> f32) {
    match a {
        Argument::Slice(a) => to.iter_mut().zip(a).for_each(|(to, &a)| *to = f(a)),
        Argument::Number(a) => to.fill(f(a)),
    }
}

#[inline(always)]
fn pairs(a: Argument<'_>, b: Argument<'_>, to: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    match (a, b) {
        (Argument::Slice(a), Argument::Slice(b)) => {
            let both = a.iter().zip(b);
            to.iter_mut()
                .zip(both)
                .for_each(|(to, (&a, &b))| *to = f(a, b));
        }
        (a, Argument::Number(b)) => each(a, to, |a| f(a, b)),
        (Argument::Number(a), b) => each(b, to, |b| f(a, b)),
    }
}

#[inline(always)]
fn unary(op: Unary, a: Argument<'_>, to: &mut [f32]) {
    match op {
        Unary::Neg => each(a, to, |x| -x),
        Unary::Abs => each(a, to, f32::abs),
        Unary::Sign => each(a, to, |x| {
            if x > 0.0 {
                1.0
            } else if x < 0.0 {
                -1.0
            } else {
                0.0
            }
        }),
        Unary::Sqrt => each(a, to, f32::sqrt),
        Unary::Rsqrt => each(a, to, |x| 1.0 / x.sqrt()),
        Unary::Square => each(a, to, |x| x * x),
        Unary::Exp => each(a, to, f32::exp),
        Unary::Log => each(a, to, f32::ln),
    }
}

#[inline(always)]
fn number_of(condition: bool) -> f32 {
    if condition { 1.0 } else { 0.0 }
}

/// Small whole powers by multiplication, as burn has them.
#[inline(always)]
fn power(x: f32, exponent: f32) -> f32 {
    match exponent {
        0.0 => 1.0,
        1.0 => x,
        2.0 => x * x,
        -1.0 => 1.0 / x,
        -2.0 => 1.0 / (x * x),
        _ => x.powf(exponent),
    }
}

#[inline(always)]
fn scalar(op: Scalar, a: Argument<'_>, s: f32, to: &mut [f32]) {
    match op {
        Scalar::Add => each(a, to, |x| x + s),
        Scalar::Sub => each(a, to, |x| x - s),
        Scalar::ReverseSub => each(a, to, |x| s - x),
        Scalar::Mul => each(a, to, |x| x * s),
        Scalar::Div => each(a, to, |x| x / s),
        Scalar::ReverseDiv => each(a, to, |x| s / x),
        Scalar::Pow => each(a, to, |x| power(x, s)),
        Scalar::Greater => each(a, to, |x| number_of(x > s)),
    }
}

#[inline(always)]
fn binary(op: Binary, a: Argument<'_>, b: Argument<'_>, to: &mut [f32]) {
    match op {
        Binary::Add => pairs(a, b, to, |x, y| x + y),
        Binary::Sub => pairs(a, b, to, |x, y| x - y),
        Binary::Mul => pairs(a, b, to, |x, y| x * y),
        Binary::Div => pairs(a, b, to, |x, y| x / y),
        Binary::Pow => pairs(a, b, to, f32::powf),
        Binary::Min => pairs(a, b, to, |x, y| if x.is_nan() || x < y { x } else { y }),
        Binary::Max => pairs(a, b, to, |x, y| if x.is_nan() || x > y { x } else { y }),
        Binary::Greater => pairs(a, b, to, |x, y| number_of(x > y)),
    }
}

/// The values of codes from `first` on, which begins a block.
pub fn decode(quantized: &Quantized, map: &[f32; 256], first: usize, to: &mut [f32]) {
    let blocks = to.chunks_mut(BLOCK).zip(&quantized.absmax[first / BLOCK..]);
    let codes = quantized.codes[first..].chunks(BLOCK);
    for ((to, absmax), codes) in blocks.zip(codes) {
        for (to, &code) in to.iter_mut().zip(codes) {
            *to = map[usize::from(code)] * absmax;
        }
    }
}
