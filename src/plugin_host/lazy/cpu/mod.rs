//! Programs on the CPU: a piece of a tensor at a time, which stays in the cache from the first operation to the last,
//! with the pieces of all tensors shared out among the threads. No element depends on which thread computes it.
#![expect(unsafe_code, reason = "SIMD by run-time detection")]

mod operations;
mod results;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use lorasmith_abi::host::Dims;
use lorasmith_abi::host::blocks::{BLOCK, Quantized};
use rayon::prelude::*;

use super::super::blocks::BurnBlocks;
use super::program::{Input, InputKind, Job, Made, Program};
use operations::{Argument, argument, compute, decode};
use results::{Place, Results, Task};

use crate::kernels::vectorised;

/// Elements that go through a program at once: whole blocks of codes.
const PIECE: usize = 8 * BLOCK;

/// What each job makes, in the order of its roots.
pub fn run(jobs: &[Job]) -> Result<Vec<Vec<Made>>, String> {
    let mut inputs = Vec::with_capacity(jobs.len());
    for job in jobs {
        let found: Result<Vec<Held<'_>>, String> = job.inputs.iter().map(Held::new).collect();
        inputs.push(found?);
    }
    let prepared: Vec<Prepared<'_>> = jobs
        .iter()
        .zip(&inputs)
        .map(|(job, inputs)| Prepared::new(job, inputs))
        .collect();
    let mut results = Results::new(jobs);
    let tasks = results.tasks(jobs);
    tasks
        .into_par_iter()
        .for_each_init(Vec::new, |registers, task| {
            prepared[task.job].run(task, registers);
        });
    Ok(results.finish(jobs))
}

/// An input whose memory can be looked at.
enum Held<'a> {
    Values(FlexTensor),
    Codes(&'a Quantized),
}

impl<'a> Held<'a> {
    fn new(input: &'a Input) -> Result<Self, String> {
        match input {
            Input::Tensor(tensor) => {
                let tensor = tensor.0.value.get().ok_or("a tensor without a value")?;
                let tensor = tensor.clone().without_autodiff();
                let found = tensor.try_into_primitive::<Flex>();
                let found = found.map_err(|_| "a tensor that is not on the CPU")?;
                if found.dtype() != DType::F32 {
                    return Err(format!("a tensor of {:?}, expected f32", found.dtype()));
                }
                Ok(Self::Values(if found.is_contiguous() {
                    found
                } else {
                    found.to_contiguous()
                }))
            }
            Input::Codes(BurnBlocks::Host(quantized)) => Ok(Self::Codes(quantized)),
            Input::Codes(_) => Err("codes that are not on the CPU".to_owned()),
        }
    }

    fn values(&self) -> &[f32] {
        match self {
            Self::Values(tensor) => {
                let layout = tensor.layout();
                &tensor.storage::<f32>()[layout.start_offset()..][..layout.num_elements()]
            }
            Self::Codes(_) => &[],
        }
    }
}

/// An input of a program that runs.
enum Bound<'a> {
    Each(&'a [f32]),
    One(f32),
    Spread(Spread<'a>),
    Codes(&'a Quantized, &'static [f32; 256]),
}

/// A tensor whose axes of length 1 are spread.
struct Spread<'a> {
    values: &'a [f32],
    dims: Dims,
    /// Distance of neighbours along each axis; 0 where it is spread.
    strides: Dims,
}

impl<'a> Spread<'a> {
    fn new(values: &'a [f32], own: Dims, dims: Dims) -> Self {
        let mut strides = [0; 4];
        let mut distance = 1;
        for axis in (0..4).rev() {
            if own[axis] > 1 {
                strides[axis] = distance;
            }
            distance *= own[axis];
        }
        Self {
            values,
            dims,
            strides,
        }
    }

    fn fill(&self, first: usize, to: &mut [f32]) {
        let [_, d1, d2, d3] = self.dims;
        for (place, to) in (first..).zip(to) {
            let at = [
                place / (d1 * d2 * d3),
                place / (d2 * d3) % d1,
                place / d3 % d2,
                place % d3,
            ];
            let index: usize = at
                .iter()
                .zip(self.strides)
                .map(|(at, step)| at * step)
                .sum();
            *to = self.values[index];
        }
    }
}

/// A program and its inputs.
struct Prepared<'a> {
    program: &'a Program,
    inputs: Vec<Bound<'a>>,
}

impl<'a> Prepared<'a> {
    fn new(job: &'a Job, held: &'a [Held<'a>]) -> Self {
        let bind = |((input, held), kind): ((&Input, &'a Held<'a>), &InputKind)| match (kind, held)
        {
            (InputKind::Codes(code), Held::Codes(quantized)) => {
                Bound::Codes(quantized, code.values())
            }
            (InputKind::One, held) => {
                Bound::One(held.values().first().copied().unwrap_or(f32::NAN))
            }
            (InputKind::Spread, held) => {
                let own = match input {
                    Input::Tensor(tensor) => tensor.dims(),
                    Input::Codes(_) => job.dims,
                };
                Bound::Spread(Spread::new(held.values(), own, job.dims))
            }
            (_, held) => Bound::Each(held.values()),
        };
        let inputs = job.inputs.iter().zip(held).zip(&job.program.inputs);
        Self {
            program: &job.program,
            inputs: inputs.map(bind).collect(),
        }
    }

    /// Runs the program over a task's elements; `memory` is kept from task to task.
    fn run(&self, mut task: Task<'_>, memory: &mut Vec<Vec<f32>>) {
        let spread = |input: &Bound<'_>| matches!(input, Bound::Spread(_) | Bound::Codes(..));
        let decoded = self.inputs.iter().filter(|input| spread(input)).count();
        let wanted = self.program.registers + decoded;
        if memory.len() < wanted {
            memory.resize_with(wanted, || vec![0.0; PIECE]);
        }
        let (registers, staged) = memory[..wanted].split_at_mut(self.program.registers);
        for start in (0..task.length).step_by(PIECE) {
            let length = PIECE.min(task.length - start);
            let first = task.first + start;
            let inputs = self.look_at(first, length, staged);
            let outputs = &mut task.outputs;
            piece(self.program, start, length, &inputs, registers, outputs);
        }
    }

    /// What each input has from `first` on; what has to be worked out goes to `staged`.
    fn look_at<'b>(
        &'b self,
        first: usize,
        length: usize,
        staged: &'b mut [Vec<f32>],
    ) -> Vec<Argument<'b>> {
        let mut staged = staged.iter_mut();
        let mut stage = |fill: &dyn Fn(&mut [f32])| {
            let to = staged.next().map(|to| &mut to[..length]);
            to.map_or(Argument::Number(f32::NAN), |to| {
                fill(to);
                Argument::Slice(to)
            })
        };
        let inputs = self.inputs.iter().map(|input| match input {
            Bound::Each(values) => Argument::Slice(&values[first..][..length]),
            Bound::One(number) => Argument::Number(*number),
            Bound::Spread(spread) => stage(&|to| spread.fill(first, to)),
            Bound::Codes(quantized, map) => stage(&|to| decode(quantized, map, first, to)),
        });
        inputs.collect()
    }
}

vectorised! {
    /// Runs a program over one piece. The bits are the same for all kinds of registers: no operation is contracted.
    pub fn piece(
        program: &Program,
        start: usize,
        length: usize,
        inputs: &[Argument<'_>],
        registers: &mut [Vec<f32>],
        outputs: &mut [Place<'_>],
    ) {
        let mut waiting = program.outputs.iter().zip(outputs).peekable();
        for at in 0..=program.instructions.len() {
            while let Some((output, place)) = waiting.next_if(|(output, _)| output.after == at) {
                let found = argument(output.source, inputs, registers, length);
                place.put(start, length, found, output.kind);
            }
            if let Some(instruction) = program.instructions.get(at) {
                let mut to = std::mem::take(&mut registers[instruction.to]);
                let find = |source| argument(source, inputs, registers, length);
                compute(instruction.operation, find, &mut to[..length]);
                registers[instruction.to] = to;
            }
        }
    }
}
