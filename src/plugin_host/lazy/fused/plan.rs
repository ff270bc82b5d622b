//! A program as steps whose results are never written over.

use lorasmith_abi::host::{Binary, Code, Scalar, Unary};

use super::super::program::{Operation, OutputKind, Program, Source};

/// What the kernel is built from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    pub inputs: Vec<Access>,
    pub steps: Vec<Step>,
    pub outputs: Vec<Target>,
}

/// Where the elements of an input are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// In this tensor, at the place of the result.
    Same(usize),
    /// In this tensor, at this one of the offsets: one element for all.
    One(usize, usize),
    /// In this tensor, where its strides lead to.
    Strided(usize),
    /// In these codes.
    Codes(usize, Code),
}

/// Where a step finds an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    Input(usize),
    Number(usize),
    /// What an earlier step has made.
    Step(usize),
}

/// An operation on one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Unary(Unary, Place),
    Binary(Binary, Place, Place),
    /// A small whole power, which negative numbers have, too.
    Power(Place, i32),
    /// A value between a low and a high one.
    Clamp(Place, Place, Place),
    /// The second where the first is not zero, else the third.
    Select(Place, Place, Place),
}

/// Where a result is written to: the number of a tensor, or of codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    Values(Place, usize),
    Codes(Place, usize, Code),
}

impl Plan {
    /// Whether there are tensors of 8 bits.
    pub fn has_codes(&self) -> bool {
        let read = self
            .inputs
            .iter()
            .any(|input| matches!(input, Access::Codes(..)));
        read || self
            .outputs
            .iter()
            .any(|output| matches!(output, Target::Codes(..)))
    }
}

/// Steps whose results are never written over, and the numbers in them.
pub fn plan(program: &Program, inputs: Vec<Access>) -> Option<(Plan, Vec<f32>)> {
    let mut numbers = Vec::new();
    let mut registers: Vec<Option<usize>> = vec![None; program.registers];
    let mut steps = Vec::with_capacity(program.instructions.len());
    let mut outputs = Vec::with_capacity(program.outputs.len());
    let (mut values, mut codes) = (0.., 0..);
    let mut waiting = program.outputs.iter().peekable();
    for at in 0..=program.instructions.len() {
        let mut place = |source| {
            Some(match source {
                Source::Register(register) => Place::Step(registers[register]?),
                Source::Input(input) => Place::Input(input),
                Source::Number(bits) => {
                    numbers.push(f32::from_bits(bits));
                    Place::Number(numbers.len() - 1)
                }
            })
        };
        while let Some(output) = waiting.next_if(|output| output.after == at) {
            let source = place(output.source)?;
            outputs.push(match output.kind {
                OutputKind::Values => Target::Values(source, values.next()?),
                OutputKind::Codes(code) => Target::Codes(source, codes.next()?, code),
            });
        }
        let Some(instruction) = program.instructions.get(at) else {
            break;
        };
        steps.push(match instruction.operation {
            Operation::Unary(op, a) => Step::Unary(op, place(a)?),
            Operation::Binary(op, a, b) => Step::Binary(op, place(a)?, place(b)?),
            Operation::Scalar(Scalar::Pow, a, s) if small_power(s).is_some() => {
                Step::Power(place(a)?, small_power(s)?)
            }
            Operation::Scalar(op, a, s) => {
                let (op, a, b) = of_two(op, place(a)?, place(Source::Number(s))?);
                Step::Binary(op, a, b)
            }
            Operation::Clamp(a, low, high) => {
                let [low, high] = [low, high].map(Source::Number);
                Step::Clamp(place(a)?, place(low)?, place(high)?)
            }
            Operation::Select(condition, a, b) => {
                Step::Select(place(condition)?, place(a)?, place(b)?)
            }
        });
        registers[instruction.to] = Some(at);
    }
    let plan = Plan {
        inputs,
        steps,
        outputs,
    };
    Some((plan, numbers))
}

/// An operation with a number as one of two values.
fn of_two(op: Scalar, a: Place, number: Place) -> (Binary, Place, Place) {
    match op {
        Scalar::Add => (Binary::Add, a, number),
        Scalar::Sub => (Binary::Sub, a, number),
        Scalar::ReverseSub => (Binary::Sub, number, a),
        Scalar::Mul => (Binary::Mul, a, number),
        Scalar::Div => (Binary::Div, a, number),
        Scalar::ReverseDiv => (Binary::Div, number, a),
        Scalar::Pow => (Binary::Pow, a, number),
        Scalar::Greater => (Binary::Greater, a, number),
    }
}

/// Exponents that are multiplications, as burn and the CPU have them.
fn small_power(bits: u32) -> Option<i32> {
    [0, 1, 2, -1, -2]
        .into_iter()
        .find(|whole| *whole as f32 == f32::from_bits(bits))
}
