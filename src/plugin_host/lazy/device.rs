//! Programs on devices that burn launches kernels on: tensors that are computed alike are put behind one another, so
//! that an operation is one launch for all of them.

use std::sync::Arc;

use burn::backend::Cube;
use burn::tensor::{DType, Tensor};
use lorasmith_abi::host::blocks::BLOCK;
use lorasmith_abi::host::{Binary, Dims, Scalar, Tensors as _};

use super::super::blocks::BurnBlocks;
use super::super::tensors::{BurnTensor, BurnTensors};
use super::program::{Input, InputKind, Job, Made, Operation, Output, OutputKind, Program, Source};
use super::{Expression, LazyTensor, LazyTensors};
use crate::training::optimizer::GRADIENT_ALIGN;

/// Tensors begin at multiples of so many elements of a long one: whole blocks of codes, and where every device lets a
/// buffer begin, so that taking one out is no copy. Gradients come that way.
const ALIGN: usize = GRADIENT_ALIGN;
const _: () = assert!(ALIGN.is_multiple_of(BLOCK));

/// What each job makes, in the order of its roots.
pub fn run(eager: &BurnTensors, jobs: &[Job]) -> Result<Vec<Vec<Made>>, String> {
    let mut made: Vec<Vec<Made>> = jobs.iter().map(|_| Vec::new()).collect();
    for group in groups(jobs) {
        let members: Vec<&Job> = group.iter().map(|&index| &jobs[index]).collect();
        let results = match members.as_slice() {
            [job] => vec![alone(eager, job)?],
            members => together(eager, members)?,
        };
        for (index, results) in group.into_iter().zip(results) {
            made[index] = results;
        }
    }
    Ok(made)
}

/// Numbers of jobs that can be computed as one.
fn groups(jobs: &[Job]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        let spread = job.program.inputs.contains(&InputKind::Spread);
        // What fills up a last block would count in its scale.
        let codes = |output: &Output| matches!(output.kind, OutputKind::Codes(_));
        let ragged = job.program.outputs.iter().any(codes) && !job.elements().is_multiple_of(BLOCK);
        let alike = |group: &&mut Vec<usize>| {
            let first = &jobs[group[0]];
            first.program == job.program && first.shared == job.shared
        };
        match groups.iter_mut().find(alike) {
            Some(group) if !spread && !ragged => group.push(index),
            _ => groups.push(vec![index]),
        }
    }
    groups
}

fn alone(eager: &BurnTensors, job: &Job) -> Result<Vec<Made>, String> {
    let mut inputs = Vec::with_capacity(job.inputs.len());
    for (input, kind) in job.inputs.iter().zip(&job.program.inputs) {
        inputs.push(match (input, kind) {
            (Input::Codes(blocks), InputKind::Codes(code)) => {
                eager.dequantize(blocks, *code, job.dims)?
            }
            (Input::Tensor(tensor), _) => value(eager, tensor)?,
            (Input::Codes(_), _) => return Err("codes where values belong".to_owned()),
        });
    }
    let mut made = Vec::with_capacity(job.program.outputs.len());
    for (root, values) in interpret(eager, &job.program, &inputs, job.dims)? {
        let made_here = match job.program.kind_of(root) {
            OutputKind::Values => Made::Values(LazyTensor::leaf(values)),
            OutputKind::Codes(code) => Made::Codes(eager.quantize(&values, code)?),
        };
        made.push((root, made_here));
    }
    Ok(in_order(made))
}

/// Jobs whose programs are equal, as one.
fn together(eager: &BurnTensors, jobs: &[&Job]) -> Result<Vec<Vec<Made>>, String> {
    let program = &jobs[0].program;
    let mut begins = Vec::with_capacity(jobs.len());
    let mut length = 0;
    for job in jobs {
        begins.push(length);
        length += job.elements().next_multiple_of(ALIGN);
    }
    let dims = [1, 1, 1, length];
    let mut inputs = Vec::with_capacity(program.inputs.len());
    for (index, kind) in program.inputs.iter().enumerate() {
        let members = jobs.iter().map(|job| &job.inputs[index]);
        inputs.push(match kind {
            InputKind::One => match &jobs[0].inputs[index] {
                Input::Tensor(tensor) => value(eager, tensor)?,
                Input::Codes(_) => return Err("codes where a number belongs".to_owned()),
            },
            InputKind::Codes(code) => {
                let blocks: Vec<&BurnBlocks> = members
                    .filter_map(|input| match input {
                        Input::Codes(blocks) => Some(blocks),
                        Input::Tensor(_) => None,
                    })
                    .collect();
                eager.dequantize(&BurnBlocks::join(&blocks)?, *code, dims)?
            }
            InputKind::Each | InputKind::Spread => {
                let members: Vec<&LazyTensor> = members
                    .filter_map(|input| match input {
                        Input::Tensor(tensor) => Some(tensor),
                        Input::Codes(_) => None,
                    })
                    .collect();
                let whole = gather(eager, &members, &begins, length)?;
                whole.reshape(dims)
            }
        });
    }
    let mut made: Vec<Vec<(usize, Made)>> = jobs.iter().map(|_| Vec::new()).collect();
    for (root, values) in interpret(eager, program, &inputs, dims)? {
        match program.kind_of(root) {
            OutputKind::Values => {
                let whole = Arc::new(values.reshape([length]));
                for ((job, &first), made) in jobs.iter().zip(&begins).zip(&mut made) {
                    let own = LazyTensor::part(&whole, first, job.dims);
                    made.push((root, Made::Values(own)));
                }
            }
            OutputKind::Codes(code) => {
                let elements = jobs.iter().map(|job| job.elements());
                let parts = eager.quantize(&values, code)?.parts(elements)?;
                for (blocks, made) in parts.into_iter().zip(&mut made) {
                    made.push((root, Made::Codes(blocks)));
                }
            }
        }
    }
    Ok(made.into_iter().map(in_order).collect())
}

/// Tensors as one long one. Those that are its parts already are not copied.
fn gather(
    eager: &BurnTensors,
    tensors: &[&LazyTensor],
    begins: &[usize],
    length: usize,
) -> Result<Tensor<1>, String> {
    if let Some(whole) = whole_of(tensors, begins, length) {
        return Ok(whole);
    }
    let mut values: Vec<Tensor<1>> = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        values.push(value(eager, tensor)?.reshape([tensor.elements()]));
    }
    let first = values.first().ok_or("nothing to put together")?;
    if let Some(whole) = neighbours(&values, begins, length) {
        return Ok(whole);
    }
    let mut long = Tensor::zeros([length], (&first.device(), DType::F32));
    for (value, &first) in values.into_iter().zip(begins) {
        let range = first..first + value.dims()[0];
        long = long.slice_assign([range], value);
    }
    Ok(long)
}

/// The piece of a buffer in which tensors lie behind one another already: what the last step has made of the parameters,
/// and gradients.
pub(super) fn neighbours(
    tensors: &[Tensor<1>],
    begins: &[usize],
    length: usize,
) -> Option<Tensor<1>> {
    let bytes = |elements: usize| (elements * size_of::<f32>()) as u64;
    let primitive = |tensor: &Tensor<1>| tensor.clone().try_into_primitive::<Cube>().ok();
    let mut whole = primitive(tensors.first()?)?;
    let start = whole.handle.offset_start.unwrap_or(0);
    for (tensor, &begin) in tensors.iter().zip(begins) {
        let part = primitive(tensor)?;
        let place = part.handle.offset_start.unwrap_or(0);
        let next = part.handle.memory.descriptor() == whole.handle.memory.descriptor()
            && place == start + bytes(begin)
            && part.dtype == DType::F32
            && part.meta.strides()[..] == [1];
        if !next {
            return None;
        }
    }
    let behind = whole.handle.size().checked_sub(start + bytes(length))?;
    whole.handle.offset_end = Some(behind);
    whole.meta.shape_mut()[0] = length;
    Some(Tensor::from_primitive::<Cube>(whole))
}

fn whole_of(tensors: &[&LazyTensor], begins: &[usize], length: usize) -> Option<Tensor<1>> {
    let part = |tensor: &LazyTensor| match &tensor.0.expression {
        Expression::Part(part) => Some(part.clone()),
        _ => None,
    };
    let first = part(tensors.first()?)?;
    let fits = tensors.iter().zip(begins).all(|(tensor, &begin)| {
        part(tensor)
            .is_some_and(|part| Arc::ptr_eq(&part.whole, &first.whole) && part.first == begin)
    });
    (fits && first.whole.dims() == [length]).then(|| Tensor::clone(&first.whole))
}

fn value(eager: &BurnTensors, tensor: &LazyTensor) -> Result<BurnTensor, String> {
    LazyTensors {
        eager: eager.clone(),
    }
    .value(tensor)
}

fn in_order(mut made: Vec<(usize, Made)>) -> Vec<Made> {
    made.sort_by_key(|(root, _)| *root);
    made.into_iter().map(|(_, made)| made).collect()
}

impl Program {
    fn kind_of(&self, root: usize) -> OutputKind {
        let found = self.outputs.iter().find(|output| output.root == root);
        found.map_or(OutputKind::Values, |output| output.kind)
    }
}

/// The results of a program by root, one burn operation for each instruction.
fn interpret(
    eager: &BurnTensors,
    program: &Program,
    inputs: &[BurnTensor],
    dims: Dims,
) -> Result<Vec<(usize, BurnTensor)>, String> {
    let mut registers: Vec<Option<BurnTensor>> = vec![None; program.registers];
    let mut made = Vec::with_capacity(program.outputs.len());
    let mut waiting = program.outputs.iter().peekable();
    for at in 0..=program.instructions.len() {
        while let Some(output) = waiting.next_if(|output| output.after == at) {
            let values = find(eager, output.source, inputs, &registers)?;
            made.push((output.root, values.expand(dims)));
        }
        if let Some(instruction) = program.instructions.get(at) {
            let find = |source| find(eager, source, inputs, &registers);
            let result = perform(eager, instruction.operation, dims, find)?;
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

fn perform(
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
