//! The memory of what is computed, and who fills which part of it.
#![expect(
    unsafe_code,
    reason = "results go to memory that is not yet initialised"
)]

use std::mem::MaybeUninit;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use lorasmith_abi::host::blocks::{BLOCK, Quantized};

use super::super::super::blocks::BurnBlocks;
use super::super::LazyTensor;
use super::super::program::{Job, Made, OutputKind};
use super::PIECE;
use super::operations::Argument;

/// Elements that a thread takes at once.
const TASK: usize = 16 * PIECE;
/// Tensors begin at multiples of so many elements of a long one: a line of the cache.
const ALIGN: usize = 16;

/// Where a task's part of a result goes.
pub enum Place<'a> {
    Values(&'a mut [MaybeUninit<f32>]),
    Codes(&'a mut [u8], &'a mut [f32]),
}

impl Place<'_> {
    /// Takes what a program has made of elements from `start` on.
    pub fn put(&mut self, start: usize, length: usize, found: Argument<'_>, kind: OutputKind) {
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
pub struct Task<'a> {
    pub job: usize,
    pub first: usize,
    pub length: usize,
    pub outputs: Vec<Place<'a>>,
}

/// The memory of all results. Those of the first root of every job are one long tensor, and so on: large blocks are
/// used again from step to step.
pub struct Results {
    values: Vec<Vec<f32>>,
    /// By job and output.
    codes: Vec<Vec<Option<Quantized>>>,
}

fn aligned(elements: usize) -> usize {
    elements.next_multiple_of(ALIGN)
}

impl Results {
    /// Memory for what these jobs make.
    pub fn new(jobs: &[Job]) -> Self {
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
    pub fn tasks(&mut self, jobs: &[Job]) -> Vec<Task<'_>> {
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
    pub fn finish(self, jobs: &[Job]) -> Vec<Vec<Made>> {
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
