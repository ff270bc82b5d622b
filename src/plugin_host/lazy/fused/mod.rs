//! A whole program as one kernel: every element is read once, all instructions are done on it in registers, and every
//! result is written once, in 8 bits where it is kept so.
//!
//! The kernel is built, and compiled by the driver, once for each form of program: numbers that differ from step to step
//! (learning rates, corrections of a bias) are its arguments.

mod buffers;
mod kernel;
mod plan;

use lorasmith_abi::host::Dims;

use super::Data;
use super::program::Program;
use buffers::Buffers;
use plan::plan;

/// The results of a program by root; `None` where the device has no kernels, or too few buffers for one.
///
/// # Shapes
/// - `inputs`: `dims`, or what spreads to them
/// - results: `dims`
pub fn run(program: &Program, inputs: &[Data], dims: Dims) -> Option<Vec<(usize, Data)>> {
    let device = match inputs.first()? {
        Data::Values(tensor) => tensor.device(),
        Data::Codes(blocks) => blocks.on_device()?.1.device(),
    };
    let elements = dims.iter().product();
    let mut buffers = Buffers::default();
    let mut access = Vec::with_capacity(inputs.len());
    for (input, kind) in inputs.iter().zip(&program.inputs) {
        access.push(buffers.input(input, *kind, dims)?);
    }
    let mut results = Vec::with_capacity(program.outputs.len());
    for output in &program.outputs {
        let made = buffers.output(output.kind, dims, &device)?;
        results.push((output.root, made));
    }
    let (plan, numbers) = plan(program, access)?;
    if plan.has_codes() {
        buffers.tables(&device)?;
    }
    buffers.launch(elements, plan, numbers)?;
    Some(results)
}
