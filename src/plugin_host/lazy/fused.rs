//! A whole program as one kernel: every element is read once, all instructions are done on it in registers, and every
//! result is written once, in 8 bits where it is kept so.
//!
//! The kernel is built, and compiled by the driver, once for each form of program: numbers that differ from step to step
//! (learning rates, corrections of a bias) are its arguments.

use burn::backend::Cube;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use cubecl::prelude::{CubeDim, SequenceArg};
use cubecl::server::Handle;
use lorasmith_abi::host::blocks::BLOCK;
use lorasmith_abi::host::{Binary, Code, Dims, Scalar, Unary};

use super::super::blocks::BurnBlocks;
use super::super::tensors::BurnTensor;
use super::Data;
use super::program::{InputKind, Operation, OutputKind, Program, Source};
use kernel::{Codes, Values};

/// What the kernel is built from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    inputs: Vec<Access>,
    steps: Vec<Step>,
    outputs: Vec<Target>,
}

/// Where the elements of an input are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Access {
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
enum Place {
    Input(usize),
    Number(usize),
    /// What an earlier step has made.
    Step(usize),
}

/// An operation on one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Unary(Unary, Place),
    Binary(Binary, Place, Place),
    /// A value between a low and a high one.
    Clamp(Place, Place, Place),
    /// The second where the first is not zero, else the third.
    Select(Place, Place, Place),
}

/// Where a result is written to: the number of a tensor, or of codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Target {
    Values(Place, usize),
    Codes(Place, usize, Code),
}

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

/// What the kernel reads and writes.
#[derive(Default)]
struct Buffers {
    client: Option<cubecl::prelude::Client>,
    count: usize,
    inputs: SequenceArg<Values>,
    /// Buffers that single elements are in, and which of the inputs they are.
    ones: Vec<(Handle, usize)>,
    /// Where in them.
    offsets: Vec<usize>,
    outputs: SequenceArg<Values>,
    codes: SequenceArg<Codes>,
    scales: SequenceArg<Values>,
    coded: SequenceArg<Codes>,
    scaled: SequenceArg<Values>,
    tables: SequenceArg<Values>,
}

impl Buffers {
    fn input(&mut self, input: &Data, kind: InputKind, dims: Dims) -> Option<Access> {
        match (input, kind) {
            (Data::Codes(blocks), InputKind::Codes(code)) => {
                let (words, scales) = blocks.on_device()?;
                let words = words.try_into_primitive::<Cube>().ok()?;
                let scales = scales.try_into_primitive::<Cube>().ok()?;
                if !words.is_contiguous() || !scales.is_contiguous() {
                    return None;
                }
                self.count += 2;
                self.client = Some(words.client.clone());
                self.codes.push(words.into_tensor_arg());
                self.scales.push(scales.into_tensor_arg());
                Some(Access::Codes(self.codes.values.len() - 1, code))
            }
            (Data::Codes(_), _) => None,
            (Data::Values(tensor), kind) => {
                if kind == InputKind::One || dims == [1; 4] {
                    return self.one(tensor);
                }
                let tensor = tensor.clone().expand(dims);
                let tensor = tensor.try_into_primitive::<Cube>().ok()?;
                if tensor.dtype != DType::F32 {
                    return None;
                }
                let next = self.inputs.values.len();
                let access = match tensor.is_contiguous() {
                    true => Access::Same(next),
                    false => Access::Strided(next),
                };
                self.count += 1;
                self.client = Some(tensor.client.clone());
                self.inputs.push(tensor.into_tensor_arg());
                Some(access)
            }
        }
    }

    /// One element. Those that are in one buffer, as sums of all parameters are, are one buffer to the kernel.
    fn one(&mut self, tensor: &BurnTensor) -> Option<Access> {
        let mut tensor = tensor.clone().try_into_primitive::<Cube>().ok()?;
        if tensor.dtype != DType::F32 {
            return None;
        }
        let bytes = size_of::<f32>() as u64;
        let offset = tensor.handle.offset_start.unwrap_or(0) / bytes;
        self.offsets.push(usize::try_from(offset).ok()?);
        let place = self.offsets.len() - 1;
        let same =
            |handle: &Handle| handle.memory.descriptor() == tensor.handle.memory.descriptor();
        if let Some((_, known)) = self.ones.iter().find(|(handle, _)| same(handle)) {
            return Some(Access::One(*known, place));
        }
        let next = self.inputs.values.len();
        self.ones.push((tensor.handle.clone(), next));
        // All of the buffer.
        (tensor.handle.offset_start, tensor.handle.offset_end) = (None, None);
        tensor.meta.shape_mut()[3] = usize::try_from(tensor.handle.size() / bytes).ok()?;
        self.count += 1;
        self.client = Some(tensor.client.clone());
        self.inputs.push(tensor.into_tensor_arg());
        Some(Access::One(next, place))
    }

    /// Room for a result.
    fn output(&mut self, kind: OutputKind, dims: Dims, device: &Device) -> Option<Data> {
        match kind {
            OutputKind::Values => {
                let made: BurnTensor = Tensor::empty(dims, (device, DType::F32));
                let target = made.clone().try_into_primitive::<Cube>().ok()?;
                self.count += 1;
                self.outputs.push(target.into_tensor_arg());
                Some(Data::Values(made))
            }
            OutputKind::Codes(_) => {
                let elements: usize = dims.iter().product();
                let blocks = elements.div_ceil(BLOCK);
                let words: Tensor<1, Int> =
                    Tensor::empty([blocks * BLOCK / 4], (device, DType::I32));
                let scales = Tensor::<1>::empty([blocks], (device, DType::F32));
                let target = words.clone().try_into_primitive::<Cube>().ok()?;
                self.count += 2;
                self.coded.push(target.into_tensor_arg());
                let target = scales.clone().try_into_primitive::<Cube>().ok()?;
                self.scaled.push(target.into_tensor_arg());
                Some(Data::Codes(BurnBlocks::new(words, scales, elements)))
            }
        }
    }

    /// The values of the codes of either kind, then what is halfway between them.
    fn tables(&mut self, device: &Device) -> Option<()> {
        let mut tables = Vec::with_capacity(4 * BLOCK);
        for code in [Code::Signed, Code::Unsigned] {
            tables.extend(code.values());
        }
        for code in [Code::Signed, Code::Unsigned] {
            tables.extend(code.midpoints());
            tables.push(f32::MAX);
        }
        let data = TensorData::new(tables, [4 * BLOCK]);
        let tables = Tensor::<1>::from_data(data, (device, DType::F32));
        let tables = tables.try_into_primitive::<Cube>().ok()?;
        self.count += 1;
        self.tables.push(tables.into_tensor_arg());
        Some(())
    }

    fn launch(self, elements: usize, plan: Plan, numbers: Vec<f32>) -> Option<()> {
        let client = self.client?;
        let hardware = &client.properties().hardware;
        // A block of codes is a workgroup's.
        let codes = !self.coded.values.is_empty();
        let threads = match codes {
            true => CubeDim::new_1d(BLOCK as u32),
            false => CubeDim::new(&client, elements),
        };
        if self.count > hardware.max_bindings as usize
            || codes && (hardware.max_units_per_cube as usize) < BLOCK
        {
            return None;
        }
        kernel::perform::launch(
            &client,
            cubecl::calculate_cube_count_elemwise(&client, elements, threads),
            threads,
            self.inputs,
            self.codes,
            self.scales,
            self.tables,
            self.outputs,
            self.coded,
            self.scaled,
            self.offsets.into_iter().collect(),
            numbers.into_iter().collect(),
            elements,
            plan,
        );
        Some(())
    }
}

impl Plan {
    fn has_codes(&self) -> bool {
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
fn plan(program: &Program, inputs: Vec<Access>) -> Option<(Plan, Vec<f32>)> {
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

/// What runs on the device.
#[allow(missing_docs, clippy::wildcard_imports)] // `cube` writes functions that nobody calls by name
mod kernel {
    use cubecl::prelude::*;
    use lorasmith_abi::host::{Binary, Code, Unary};

    use super::{Access, Place, Plan, Step, Target};

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
                words.as_mut_slice()[block * 64 + unit] =
                    low + (bytes[first + 3] - 128) * 16_777_216;
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
}
