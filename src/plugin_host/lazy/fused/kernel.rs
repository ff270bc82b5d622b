//! What runs on the device.
#![allow(missing_docs, clippy::wildcard_imports)] // `cube` writes functions that nobody calls by name

use cubecl::prelude::*;
use lorasmith_abi::host::{Binary, Code, Unary};

use super::plan::{Access, Place, Plan, Step, Target};

pub type Values = OwnedTensor<f32>;
pub type Codes = OwnedTensor<i32>;

/// One thread for each element.
#[cube(launch)]
pub fn perform(
    inputs: &Sequence<Values>,
    codes: &Sequence<Codes>,
    scales: &Sequence<Values>,
    tables: &Sequence<Values>,
    outputs: &mut Sequence<Values>,
    coded: &mut Sequence<Codes>,
    scaled: &mut Sequence<Values>,
    offsets: &Sequence<usize>,
    numbers: &Sequence<f32>,
    elements: usize,
    #[comptime] plan: Plan,
) {
    // Threads beyond the last element go on: all of a workgroup meet where codes are made.
    let inside = ABSOLUTE_POS < elements;
    let at = select(inside, ABSOLUTE_POS, 0usize);
    let mut values = Sequence::<f32>::new();
    #[unroll]
    for input in 0..plan.inputs.len() {
        let value = match comptime!(plan.inputs[input]) {
            Access::Same(number) => inputs[number].as_slice()[at],
            Access::One(number, offset) => inputs[number].as_slice()[offsets[offset]],
            Access::Strided(number) => strided(&inputs[number], at),
            Access::Codes(number, code) => {
                decode(&codes[number], &scales[number], &tables[0], at, code)
            }
        };
        values.push(value);
    }
    let mut made = Sequence::<f32>::new();
    #[unroll]
    for step in 0..plan.steps.len() {
        let value = match comptime!(plan.steps[step]) {
            Step::Unary(op, a) => unary(find(&values, numbers, &made, a), op),
            Step::Binary(op, a, b) => {
                let a = find(&values, numbers, &made, a);
                binary(a, find(&values, numbers, &made, b), op)
            }
            Step::Power(a, exponent) => power(find(&values, numbers, &made, a), exponent),
            Step::Clamp(a, low, high) => {
                let a = find(&values, numbers, &made, a);
                let low = find(&values, numbers, &made, low);
                let high = find(&values, numbers, &made, high);
                select(a < low, low, select(a > high, high, a))
            }
            Step::Select(condition, a, b) => {
                let condition = find(&values, numbers, &made, condition);
                let a = find(&values, numbers, &made, a);
                select(condition != 0.0, a, find(&values, numbers, &made, b))
            }
        };
        made.push(value);
    }
    #[unroll]
    for output in 0..plan.outputs.len() {
        match comptime!(plan.outputs[output]) {
            Target::Values(place, number) => {
                let value = find(&values, numbers, &made, place);
                if inside {
                    outputs.index_mut(number).as_mut_slice()[at] = value;
                }
            }
            Target::Codes(place, number, code) => {
                let value = find(&values, numbers, &made, place);
                let value = select(inside, value, 0.0f32);
                let words = coded.index_mut(number);
                encode(
                    value,
                    elements,
                    &tables[0],
                    words,
                    scaled.index_mut(number),
                    code,
                );
            }
        }
    }
}

#[cube]
fn strided(input: &Values, at: usize) -> f32 {
    let mut rest = at;
    let mut place = 0;
    #[unroll]
    for axis in 0..4usize {
        let axis = comptime!(3 - axis);
        let length = input.shape(axis);
        place += (rest % length) * input.stride(axis);
        rest /= length;
    }
    input.as_slice()[place]
}

#[cube]
fn decode(
    codes: &Codes,
    scales: &Values,
    tables: &Values,
    at: usize,
    #[comptime] code: Code,
) -> f32 {
    let table = comptime!(if code == Code::Signed { 0usize } else { 256 });
    let byte = at % 4;
    let word = codes.as_slice()[at / 4] >> (8 * byte as i32);
    // The highest byte is kept less 128.
    let number = (word + select(byte == 3, 128, 0)) & 255;
    tables.as_slice()[table + number as usize] * scales.as_slice()[at / 256]
}

/// A workgroup makes the codes of its block.
#[cube]
fn encode(
    value: f32,
    elements: usize,
    tables: &Values,
    words: &mut Codes,
    scales: &mut Values,
    #[comptime] code: Code,
) {
    let table = comptime!(if code == Code::Signed { 512usize } else { 768 });
    let unit = UNIT_POS as usize;
    let block = ABSOLUTE_POS / 256;
    let mut largest = Shared::<[f32]>::new_slice(256usize);
    largest[unit] = value.abs();
    sync_cube();
    #[unroll]
    for step in 0..8u32 {
        let half = comptime!(128usize >> step);
        if unit < half {
            largest[unit] = max(largest[unit], largest[unit + half]);
        }
        sync_cube();
    }
    // A block of zeros stays one.
    let normed = value * (1.0 / max(largest[0], f32::MIN_POSITIVE));
    // Binary search: the number of midpoints that are below.
    let mut below = 0usize;
    #[unroll]
    for step in 0..8u32 {
        let bit = comptime!(128usize >> step);
        below += select(
            normed > tables.as_slice()[table + below + bit - 1],
            bit,
            0usize,
        );
    }
    let mut bytes = Shared::<[i32]>::new_slice(256usize);
    bytes[unit] = below as i32;
    sync_cube();
    if block * 256 < elements {
        if unit < 64 {
            let first = 4 * unit;
            let low = bytes[first] + bytes[first + 1] * 256 + bytes[first + 2] * 65_536;
            words.as_mut_slice()[block * 64 + unit] = low + (bytes[first + 3] - 128) * 16_777_216;
        }
        if unit == 0 {
            scales.as_mut_slice()[block] = largest[0];
        }
    }
}

#[cube]
fn find(
    inputs: &Sequence<f32>,
    numbers: &Sequence<f32>,
    made: &Sequence<f32>,
    #[comptime] place: Place,
) -> f32 {
    match place {
        Place::Input(at) => inputs[at],
        Place::Number(at) => numbers[at],
        Place::Step(at) => made[at],
    }
}

#[cube]
fn unary(a: f32, #[comptime] op: Unary) -> f32 {
    match op {
        Unary::Neg => -a,
        Unary::Abs => a.abs(),
        Unary::Sign => select(a > 0.0, 1.0f32, select(a < 0.0, -1.0f32, 0.0f32)),
        Unary::Sqrt => a.sqrt(),
        Unary::Rsqrt => 1.0 / a.sqrt(),
        Unary::Square => a * a,
        Unary::Exp => a.exp(),
        Unary::Log => a.ln(),
    }
}

#[cube]
fn power(a: f32, #[comptime] exponent: i32) -> f32 {
    match exponent {
        0 => 1.0f32.runtime(),
        1 => a,
        2 => a * a,
        -1 => 1.0 / a,
        _ => 1.0 / (a * a),
    }
}

/// What is not a number goes through `Min` and `Max`.
#[cube]
fn binary(a: f32, b: f32, #[comptime] op: Binary) -> f32 {
    match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Pow => a.powf(b),
        Binary::Min => select(a < b || a.is_nan(), a, b),
        Binary::Max => select(a > b || a.is_nan(), a, b),
        Binary::Greater => select(a > b, 1.0f32, 0.0f32),
    }
}
