//! What the kernel reads and writes.

use burn::backend::Cube;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use cubecl::prelude::{Client, CubeDim, SequenceArg};
use cubecl::server::Handle;
use lorasmith_abi::host::blocks::BLOCK;
use lorasmith_abi::host::{Code, Dims};

use super::super::super::blocks::BurnBlocks;
use super::super::super::tensors::BurnTensor;
use super::super::Data;
use super::super::program::{InputKind, OutputKind};
use super::kernel::{self, Codes, Values};
use super::plan::{Access, Plan};

/// The arguments of the kernel.
#[derive(Default)]
pub struct Buffers {
    client: Option<Client>,
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
    /// An input of a program with results of `dims`.
    pub fn input(&mut self, input: &Data, kind: InputKind, dims: Dims) -> Option<Access> {
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
    pub fn output(&mut self, kind: OutputKind, dims: Dims, device: &Device) -> Option<Data> {
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
    pub fn tables(&mut self, device: &Device) -> Option<()> {
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

    /// Runs the kernel; `None` where the device cannot.
    pub fn launch(self, elements: usize, plan: Plan, numbers: Vec<f32>) -> Option<()> {
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
