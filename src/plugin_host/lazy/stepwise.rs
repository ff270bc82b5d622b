//! A program by burn's operations, one for each instruction: where one kernel for all of them cannot be had.

use lorasmith_abi::host::{Binary, Dims, Scalar, Tensors as _};

use super::super::tensors::{BurnTensor, BurnTensors};
use super::Data;
use super::program::{InputKind, Operation, OutputKind, Program, Source};

/// The results of a program by root, one burn operation for each instruction.
pub fn run(
    eager: &BurnTensors,
    program: &Program,
    inputs: &[Data],
    dims: Dims,
) -> Result<Vec<(usize, Data)>, String> {
    let mut values = Vec::with_capacity(inputs.len());
    for (input, kind) in inputs.iter().zip(&program.inputs) {
        values.push(match (input, kind) {
            (Data::Values(tensor), _) => tensor.clone(),
            (Data::Codes(blocks), InputKind::Codes(code)) => {
                eager.dequantize(blocks, *code, dims)?
            }
            (Data::Codes(_), _) => return Err("codes where values belong".to_owned()),
        });
    }
    let mut registers: Vec<Option<BurnTensor>> = vec![None; program.registers];
    let mut made = Vec::with_capacity(program.outputs.len());
    let mut waiting = program.outputs.iter().peekable();
    for at in 0..=program.instructions.len() {
        while let Some(output) = waiting.next_if(|output| output.after == at) {
            let result = find(eager, output.source, &values, &registers)?.expand(dims);
            let result = match output.kind {
                OutputKind::Values => Data::Values(result),
                OutputKind::Codes(code) => Data::Codes(eager.quantize(&result, code)?),
            };
            made.push((output.root, result));
        }
        if let Some(instruction) = program.instructions.get(at) {
            let find = |source| find(eager, source, &values, &registers);
            let result = instruct(eager, instruction.operation, dims, find)?;
            registers[instruction.to] = Some(result);
        }
    }
    Ok(made)
}

fn find(
    eager: &BurnTensors,
    source: Source,
    inputs: &[BurnTensor],
    registers: &[Option<BurnTensor>],
) -> Result<BurnTensor, String> {
    match source {
        Source::Register(register) => registers[register].clone().ok_or("an empty register"),
        Source::Input(input) => Ok(inputs[input].clone()),
        Source::Number(bits) => return eager.full([1; 4], f64::from(f32::from_bits(bits))),
    }
    .map_err(str::to_owned)
}

fn instruct(
    eager: &BurnTensors,
    operation: Operation,
    dims: Dims,
    find: impl Fn(Source) -> Result<BurnTensor, String>,
) -> Result<BurnTensor, String> {
    let number = |bits| f64::from(f32::from_bits(bits));
    match operation {
        Operation::Unary(op, a) => eager.unary(op, &find(a)?),
        Operation::Scalar(op, a, s) => eager.scalar(op, &find(a)?, number(s)),
        Operation::Clamp(a, low, high) => eager.clamp(&find(a)?, number(low), number(high)),
        Operation::Select(condition, a, b) => {
            eager.select(&find(condition)?, &find(a)?, &find(b)?, dims)
        }
        Operation::Binary(op, a, b) => match with_number(op, a, b) {
            Some((op, a, s)) => eager.scalar(op, &find(a)?, number(s)),
            None => eager.binary(op, &find(a)?, &find(b)?, dims),
        },
    }
}

/// The same operation on a tensor and a number, where one of the two is one.
fn with_number(op: Binary, a: Source, b: Source) -> Option<(Scalar, Source, u32)> {
    let (op, a, s) = match (op, a, b) {
        (Binary::Add, a, Source::Number(s)) | (Binary::Add, Source::Number(s), a) => {
            (Scalar::Add, a, s)
        }
        (Binary::Mul, a, Source::Number(s)) | (Binary::Mul, Source::Number(s), a) => {
            (Scalar::Mul, a, s)
        }
        (Binary::Sub, a, Source::Number(s)) => (Scalar::Sub, a, s),
        (Binary::Sub, Source::Number(s), a) => (Scalar::ReverseSub, a, s),
        (Binary::Div, a, Source::Number(s)) => (Scalar::Div, a, s),
        (Binary::Div, Source::Number(s), a) => (Scalar::ReverseDiv, a, s),
        (Binary::Pow, a, Source::Number(s)) => (Scalar::Pow, a, s),
        (Binary::Greater, a, Source::Number(s)) => (Scalar::Greater, a, s),
        _ => return None,
    };
    // Of two numbers a tensor has to be made.
    (!matches!(a, Source::Number(_))).then_some((op, a, s))
}
