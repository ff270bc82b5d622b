//! Programs on devices that kernels are launched on: tensors that are computed alike are put behind one another, and the
//! program is one launch for all of them.

use std::sync::Arc;

use burn::tensor::Tensor;
use lorasmith_abi::host::Dims;
use lorasmith_abi::host::blocks::BLOCK;

use super::super::blocks::BurnBlocks;
use super::super::tensors::{BurnTensor, BurnTensors};
use super::program::{Input, InputKind, Job, Made, Output, OutputKind, Program};
use super::{Data, Expression, LazyTensor, LazyTensors, fused, stepwise};
use crate::kernels::together::{ALIGN, places, together};

// In a long tensor there are whole blocks of codes.
const _: () = assert!(ALIGN.is_multiple_of(BLOCK));

/// What each job makes, in the order of its roots.
pub fn run(eager: &BurnTensors, jobs: &[Job]) -> Result<Vec<Vec<Made>>, String> {
    let mut made: Vec<Vec<Made>> = jobs.iter().map(|_| Vec::new()).collect();
    for group in groups(jobs) {
        let members: Vec<&Job> = group.iter().map(|&index| &jobs[index]).collect();
        let results = match members.as_slice() {
            [job] => vec![alone(eager, job)?],
            members => as_one(eager, members)?,
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
    for input in &job.inputs {
        inputs.push(match input {
            Input::Codes(blocks) => Data::Codes(blocks.clone()),
            Input::Tensor(tensor) => Data::Values(value(eager, tensor)?),
        });
    }
    let made = perform(eager, &job.program, &inputs, job.dims)?;
    let made = made.into_iter().map(|(root, data)| match data {
        Data::Values(values) => (root, Made::Values(LazyTensor::leaf(values))),
        Data::Codes(blocks) => (root, Made::Codes(blocks)),
    });
    Ok(in_order(made.collect()))
}

/// Jobs whose programs are equal, as one.
fn as_one(eager: &BurnTensors, jobs: &[&Job]) -> Result<Vec<Vec<Made>>, String> {
    let program = &jobs[0].program;
    let (begins, length) = places(jobs.iter().map(|job| job.elements()));
    let dims = [1, 1, 1, length];
    let mut inputs = Vec::with_capacity(program.inputs.len());
    for (index, kind) in program.inputs.iter().enumerate() {
        let members = jobs.iter().map(|job| &job.inputs[index]);
        inputs.push(match kind {
            InputKind::One => match &jobs[0].inputs[index] {
                Input::Tensor(tensor) => Data::Values(value(eager, tensor)?),
                Input::Codes(_) => return Err("codes where a number belongs".to_owned()),
            },
            InputKind::Codes(_) => {
                let blocks: Vec<&BurnBlocks> = members
                    .filter_map(|input| match input {
                        Input::Codes(blocks) => Some(blocks),
                        Input::Tensor(_) => None,
                    })
                    .collect();
                Data::Codes(BurnBlocks::join(&blocks)?)
            }
            InputKind::Each | InputKind::Spread => {
                let members: Vec<&LazyTensor> = members
                    .filter_map(|input| match input {
                        Input::Tensor(tensor) => Some(tensor),
                        Input::Codes(_) => None,
                    })
                    .collect();
                let whole = gather(eager, &members, &begins, length)?;
                Data::Values(whole.reshape(dims))
            }
        });
    }
    let mut made: Vec<Vec<(usize, Made)>> = jobs.iter().map(|_| Vec::new()).collect();
    for (root, data) in perform(eager, program, &inputs, dims)? {
        match data {
            Data::Values(values) => {
                let whole = Arc::new(values.reshape([length]));
                for ((job, &first), made) in jobs.iter().zip(&begins).zip(&mut made) {
                    let own = LazyTensor::part(&whole, first, job.dims);
                    made.push((root, Made::Values(own)));
                }
            }
            Data::Codes(blocks) => {
                let parts = blocks.parts(jobs.iter().map(|job| job.elements()))?;
                for (blocks, made) in parts.into_iter().zip(&mut made) {
                    made.push((root, Made::Codes(blocks)));
                }
            }
        }
    }
    Ok(made.into_iter().map(in_order).collect())
}

/// The results of a program by root: by one kernel, where the device has kernels.
fn perform(
    eager: &BurnTensors,
    program: &Program,
    inputs: &[Data],
    dims: Dims,
) -> Result<Vec<(usize, Data)>, String> {
    match fused::run(program, inputs, dims) {
        Some(made) => Ok(made),
        None => stepwise::run(eager, program, inputs, dims),
    }
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
    together(values, begins, length).ok_or_else(|| "nothing to put together".to_owned())
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
    LazyTensors::over(eager).value(tensor)
}

fn in_order(mut made: Vec<(usize, Made)>) -> Vec<Made> {
    made.sort_by_key(|(root, _)| *root);
    made.into_iter().map(|(_, made)| made).collect()
}
