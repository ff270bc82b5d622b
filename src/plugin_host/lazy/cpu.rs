//! Programs on the CPU: a piece of a tensor at a time, which stays in the cache from the first operation to the last,
//! with the pieces of all tensors shared out among the threads. No element depends on which thread computes it.
#![expect(
    unsafe_code,
    reason = "SIMD by run-time detection; results go to memory that is not yet initialised"
)]

use std::mem::MaybeUninit;
use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Device, Tensor, TensorData};
use lorasmith_abi::host::blocks::{BLOCK, Quantized};
use lorasmith_abi::host::{Binary, Dims, Scalar, Unary};
use rayon::prelude::*;

use super::super::blocks::BurnBlocks;
use super::LazyTensor;
use super::program::{Input, InputKind, Job, Made, Operation, OutputKind, Program, Source};

/// Elements that go through a program at once: whole blocks of codes.
const PIECE: usize = 8 * BLOCK;
/// Elements that a thread takes at once.
const TASK: usize = 16 * PIECE;
/// Tensors begin at multiples of so many elements of a long one: a line of the cache.
const ALIGN: usize = 16;

/// The widest registers of this processor.
#[derive(Clone, Copy)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Level {
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw");
            if wide {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

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
        let level = Level::best();
        let (registers, staged) = memory[..wanted].split_at_mut(self.program.registers);
        for start in (0..task.length).step_by(PIECE) {
            let length = PIECE.min(task.length - start);
            let first = task.first + start;
            let inputs = self.look_at(first, length, staged);
            self.piece_for(level, start, length, &inputs, registers, &mut task.outputs);
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

    /// The same code for the widest registers there are. The bits are the same: no operation is contracted.
    fn piece_for(
        &self,
        level: Level,
        start: usize,
        length: usize,
        inputs: &[Argument<'_>],
        registers: &mut [Vec<f32>],
        outputs: &mut [Place<'_>],
    ) {
        match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has the instructions.
            Level::Avx512 => unsafe {
                self.piece_avx512(start, length, inputs, registers, outputs);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { self.piece_avx2(start, length, inputs, registers, outputs) },
            Level::Portable => self.piece(start, length, inputs, registers, outputs),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
    fn piece_avx512(
        &self,
        start: usize,
        length: usize,
        inputs: &[Argument<'_>],
        registers: &mut [Vec<f32>],
        outputs: &mut [Place<'_>],
    ) {
        self.piece(start, length, inputs, registers, outputs);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn piece_avx2(
        &self,
        start: usize,
        length: usize,
        inputs: &[Argument<'_>],
        registers: &mut [Vec<f32>],
        outputs: &mut [Place<'_>],
    ) {
        self.piece(start, length, inputs, registers, outputs);
    }

    #[inline(always)]
    fn piece(
        &self,
        start: usize,
        length: usize,
        inputs: &[Argument<'_>],
        registers: &mut [Vec<f32>],
        outputs: &mut [Place<'_>],
    ) {
        let mut waiting = self.program.outputs.iter().zip(outputs).peekable();
        for at in 0..=self.program.instructions.len() {
            while let Some((output, place)) = waiting.next_if(|(output, _)| output.after == at) {
                let found = argument(output.source, inputs, registers, length);
                place.put(start, length, found, output.kind);
            }
            if let Some(instruction) = self.program.instructions.get(at) {
                let mut to = std::mem::take(&mut registers[instruction.to]);
                let find = |source| argument(source, inputs, registers, length);
                compute(instruction.operation, find, &mut to[..length]);
                registers[instruction.to] = to;
            }
        }
    }
}

#[inline(always)]
fn argument<'a>(
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
enum Argument<'a> {
    Slice(&'a [f32]),
    Number(f32),
}

#[inline(always)]
fn compute<'a>(operation: Operation, find: impl Fn(Source) -> Argument<'a>, to: &mut [f32]) {
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

fn decode(quantized: &Quantized, map: &[f32; 256], first: usize, to: &mut [f32]) {
    // Pieces begin with a block.
    let blocks = to.chunks_mut(BLOCK).zip(&quantized.absmax[first / BLOCK..]);
    let codes = quantized.codes[first..].chunks(BLOCK);
    for ((to, absmax), codes) in blocks.zip(codes) {
        for (to, &code) in to.iter_mut().zip(codes) {
            *to = map[usize::from(code)] * absmax;
        }
    }
}

/// Where a task's part of a result goes.
enum Place<'a> {
    Values(&'a mut [MaybeUninit<f32>]),
    Codes(&'a mut [u8], &'a mut [f32]),
}

impl Place<'_> {
    fn put(&mut self, start: usize, length: usize, found: Argument<'_>, kind: OutputKind) {
        match (self, kind) {
            (Self::Values(to), _) => {
                let to = &mut to[start..][..length];
                match found {
                    Argument::Slice(values) => {
                        to.write_copy_of_slice(values);
                    }
                    Argument::Number(number) => {
                        to.fill(MaybeUninit::new(number));
                    }
                }
            }
            (Self::Codes(codes, absmax), OutputKind::Codes(code)) => {
                let codes = codes[start..][..length].chunks_mut(BLOCK);
                let absmax = &mut absmax[start / BLOCK..];
                for (block, (codes, absmax)) in codes.zip(absmax).enumerate() {
                    let mut values = [0.0; BLOCK];
                    let values = &mut values[..codes.len()];
                    match found {
                        Argument::Slice(found) => {
                            values.copy_from_slice(&found[block * BLOCK..][..codes.len()]);
                        }
                        Argument::Number(number) => values.fill(number),
                    }
                    *absmax = code.quantize_block(values, codes);
                }
            }
            (Self::Codes(..), OutputKind::Values) => {}
        }
    }
}

/// Neighbouring elements of one job.
struct Task<'a> {
    job: usize,
    first: usize,
    length: usize,
    outputs: Vec<Place<'a>>,
}

/// The memory of all results. Those of the first root of every job are one long tensor, and so on: large blocks are
/// used again from step to step.
struct Results {
    values: Vec<Vec<f32>>,
    /// By job and output.
    codes: Vec<Vec<Option<Quantized>>>,
}

fn aligned(elements: usize) -> usize {
    elements.next_multiple_of(ALIGN)
}

impl Results {
    fn new(jobs: &[Job]) -> Self {
        let outputs = |job: &Job| job.program.outputs.len();
        let longest = jobs.iter().map(outputs).max().unwrap_or(0);
        let needed = |place: usize| -> usize {
            let jobs = jobs.iter().filter(|job| {
                let output = job.program.outputs.get(place);
                output.is_some_and(|output| output.kind == OutputKind::Values)
            });
            jobs.map(|job| aligned(job.elements())).sum()
        };
        let codes = |job: &Job| {
            let outputs = job.program.outputs.iter();
            outputs
                .map(|output| match output.kind {
                    OutputKind::Values => None,
                    OutputKind::Codes(_) => Some(Quantized {
                        codes: vec![0; job.elements()],
                        absmax: vec![0.0; job.elements().div_ceil(BLOCK)],
                    }),
                })
                .collect()
        };
        Self {
            values: (0..longest)
                .map(|place| Vec::with_capacity(needed(place)))
                .collect(),
            codes: jobs.iter().map(codes).collect(),
        }
    }

    /// All memory, handed out.
    fn tasks(&mut self, jobs: &[Job]) -> Vec<Task<'_>> {
        let mut free: Vec<&mut [MaybeUninit<f32>]> = self
            .values
            .iter_mut()
            .map(Vec::spare_capacity_mut)
            .collect();
        let mut tasks = Vec::new();
        for (index, (job, codes)) in jobs.iter().zip(&mut self.codes).enumerate() {
            let elements = job.elements();
            let mut whole: Vec<Place<'_>> = codes
                .iter_mut()
                .zip(&mut free)
                .map(|(codes, free)| match codes {
                    Some(Quantized { codes, absmax }) => Place::Codes(codes, absmax),
                    None => {
                        let own = free.split_off_mut(..aligned(elements)).unwrap_or_default();
                        for unused in &mut own[elements..] {
                            unused.write(0.0);
                        }
                        Place::Values(&mut own[..elements])
                    }
                })
                .collect();
            for first in (0..elements).step_by(TASK) {
                let length = TASK.min(elements - first);
                tasks.push(Task {
                    job: index,
                    first,
                    length,
                    outputs: whole.iter_mut().map(|place| place.take(length)).collect(),
                });
            }
        }
        tasks
    }

    /// The tensors, when every task is done.
    fn finish(self, jobs: &[Job]) -> Vec<Vec<Made>> {
        let device = Device::flex();
        let whole: Vec<Tensor<1>> = self
            .values
            .into_iter()
            .enumerate()
            .map(|(place, mut values)| {
                let used = jobs.iter().filter(|job| {
                    let output = job.program.outputs.get(place);
                    output.is_some_and(|output| output.kind == OutputKind::Values)
                });
                let used = used.map(|job| aligned(job.elements())).sum();
                // SAFETY: the capacity was made for `used` elements; `tasks` has written what lies between the tensors
                // and handed out everything else, and each task has filled what it was given.
                unsafe { values.set_len(used) };
                Tensor::from_data(TensorData::new(values, [used]), &device)
            })
            .collect();
        let mut begun = vec![0; whole.len()];
        let mut made = Vec::with_capacity(jobs.len());
        for (job, codes) in jobs.iter().zip(self.codes) {
            let mut roots: Vec<(usize, Made)> = Vec::with_capacity(codes.len());
            let outputs = job.program.outputs.iter().zip(codes).enumerate();
            for (place, (output, codes)) in outputs {
                let value = match codes {
                    Some(quantized) => Made::Codes(BurnBlocks::Host(Arc::new(quantized))),
                    None => {
                        let elements = job.elements();
                        let own = whole[place].clone().narrow(0, begun[place], elements);
                        begun[place] += aligned(elements);
                        Made::Values(LazyTensor::leaf(own.reshape(job.dims)))
                    }
                };
                roots.push((output.root, value));
            }
            roots.sort_by_key(|(root, _)| *root);
            made.push(roots.into_iter().map(|(_, made)| made).collect());
        }
        made
    }
}

impl<'a> Place<'a> {
    /// The first `length` elements, which no longer belong to this.
    fn take(&mut self, length: usize) -> Place<'a> {
        match self {
            Self::Values(values) => {
                Place::Values(values.split_off_mut(..length).unwrap_or_default())
            }
            Self::Codes(codes, absmax) => Place::Codes(
                codes.split_off_mut(..length).unwrap_or_default(),
                absmax
                    .split_off_mut(..length.div_ceil(BLOCK))
                    .unwrap_or_default(),
            ),
        }
    }
}
