//! Optimizer states in 8 bits per element: in bytes on the CPU, four to a 32-bit integer on other devices.

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lorasmith_abi::host::blocks::{BLOCK, Quantized};
use lorasmith_abi::host::{Code, Dims};

use super::tensors::BurnTensor;

/// Codes of a 32-bit integer.
const PACKED: usize = 4;

/// The elements of a tensor in 8 bits each.
#[derive(Clone)]
pub enum BurnBlocks {
    /// In the process's memory.
    Host(Arc<Quantized>),
    /// On another device.
    Device(Box<Packed>),
    /// There, too, in a long one that holds those of other parameters.
    Part(BlocksPart),
}

/// Where codes are in a long tensor.
#[derive(Clone)]
pub struct BlocksPart {
    whole: Arc<Packed>,
    first_block: usize,
    elements: usize,
}

impl BlocksPart {
    fn packed(&self) -> Packed {
        let blocks = self.elements.div_ceil(BLOCK);
        let words = BLOCK / PACKED;
        let (
            first,
            Packed {
                words: all, absmax, ..
            },
        ) = (self.first_block, &*self.whole);
        Packed {
            words: all.clone().narrow(0, first * words, blocks * words),
            absmax: absmax.clone().narrow(0, first, blocks),
            elements: self.elements,
        }
    }
}

/// Codes on a device, padded to whole blocks.
#[derive(Clone)]
pub struct Packed {
    /// `[blocks · 256 / 4]`: the first code in the lowest byte; the highest byte less 128, so that nothing overflows.
    words: Tensor<1, Int>,
    /// `[blocks, 1]`
    absmax: Tensor<2>,
    /// Without the padding.
    elements: usize,
}

impl BurnBlocks {
    /// Codes that a kernel has made.
    pub fn new(words: Tensor<1, Int>, absmax: Tensor<1>, elements: usize) -> Self {
        let [blocks] = absmax.dims();
        Self::Device(Box::new(Packed {
            words,
            absmax: absmax.reshape([blocks, 1]),
            elements,
        }))
    }

    /// The codes, four to an integer as [`pack`] does it, and the scale of each block, where they are on a device:
    /// `[blocks · 64]` and `[blocks]`.
    pub fn on_device(&self) -> Option<(Tensor<1, Int>, Tensor<1>)> {
        let packed = match self {
            Self::Host(_) => return None,
            Self::Device(packed) => (**packed).clone(),
            Self::Part(part) => part.packed(),
        };
        let [blocks, _] = packed.absmax.dims();
        Some((packed.words, packed.absmax.reshape([blocks])))
    }

    /// Copies codes and scales to the host.
    pub fn read(&self) -> Result<Quantized, String> {
        match self {
            Self::Host(quantized) => Ok((**quantized).clone()),
            Self::Device(packed) => packed.read(),
            Self::Part(part) => part.packed().read(),
        }
    }

    /// The values of codes that are on a device.
    pub fn dequantize(&self, code: Code, dims: Dims) -> Result<BurnTensor, String> {
        match self {
            Self::Host(_) => Err("codes that are not on the device".to_owned()),
            Self::Device(packed) => Ok(packed.dequantize(code, dims)),
            Self::Part(part) => Ok(part.packed().dequantize(code, dims)),
        }
    }

    /// The codes of several tensors of a device behind one another, each filled up to whole blocks. Those that are
    /// parts of one already are not copied.
    pub fn join(all: &[&Self]) -> Result<Self, String> {
        if let Some(whole) = Self::whole_of(all) {
            return Ok(Self::Device(Box::new(whole)));
        }
        let (mut words, mut scales) = (Vec::new(), Vec::new());
        for blocks in all {
            let packed = match blocks {
                Self::Host(_) => return Err("codes that are not on the device".to_owned()),
                Self::Device(packed) => (**packed).clone(),
                Self::Part(part) => part.packed(),
            };
            words.push(packed.words);
            scales.push(packed.absmax);
        }
        let absmax = Tensor::cat(scales, 0);
        let [blocks, _] = absmax.dims();
        Ok(Self::Device(Box::new(Packed {
            words: Tensor::cat(words, 0),
            absmax,
            elements: blocks * BLOCK,
        })))
    }

    fn whole_of(all: &[&Self]) -> Option<Packed> {
        let mut whole: Option<&Arc<Packed>> = None;
        let mut next = 0;
        for blocks in all {
            let Self::Part(part) = blocks else {
                return None;
            };
            let first = *whole.get_or_insert(&part.whole);
            if !Arc::ptr_eq(first, &part.whole) || part.first_block != next {
                return None;
            }
            next += part.elements.div_ceil(BLOCK);
        }
        let whole = whole?;
        (whole.elements == next * BLOCK).then(|| Packed::clone(whole))
    }

    /// The codes of tensors that lie behind one another, each filled up to whole blocks.
    pub fn parts(self, elements: impl Iterator<Item = usize>) -> Result<Vec<Self>, String> {
        let Self::Device(packed) = self else {
            return Err("codes that are not on the device".to_owned());
        };
        let whole = Arc::new(*packed);
        let mut first_block = 0;
        let parts = elements.map(|elements| {
            let part = BlocksPart {
                whole: Arc::clone(&whole),
                first_block,
                elements,
            };
            first_block += elements.div_ceil(BLOCK);
            Self::Part(part)
        });
        Ok(parts.collect())
    }

    /// Takes codes and scales to a device that is not the CPU.
    pub fn upload(quantized: &Quantized, device: &Device) -> Self {
        let blocks = quantized.absmax.len();
        let mut codes = quantized.codes.clone();
        codes.resize(blocks * BLOCK, 0);
        let (chunks, _) = codes.as_chunks::<PACKED>();
        let words: Vec<i32> = chunks.iter().map(|&codes| pack(codes)).collect();
        let words = TensorData::new(words, [blocks * BLOCK / PACKED]);
        let absmax = TensorData::new(quantized.absmax.clone(), [blocks, 1]);
        Self::Device(Box::new(Packed {
            words: Tensor::from_data(words, (device, DType::I32)),
            absmax: Tensor::from_data(absmax, (device, DType::F32)),
            elements: quantized.codes.len(),
        }))
    }

    /// Rounds to codes on a device that is not the CPU.
    pub fn quantize(a: &BurnTensor, code: Code) -> Self {
        let device = a.device();
        let elements = a.dims().iter().product::<usize>();
        let blocks = elements.div_ceil(BLOCK);
        let mut flat: Tensor<1> = a.clone().reshape([elements]);
        if elements < blocks * BLOCK {
            let padding = [blocks * BLOCK - elements];
            let zeros = Tensor::full(padding, 0.0, (&device, DType::F32));
            flat = Tensor::cat(vec![flat, zeros], 0);
        }
        let rows: Tensor<2> = flat.reshape([blocks, BLOCK]);
        let absmax = rows.clone().abs().max_dim(1); // [blocks, 1]
        // A block of zeros stays one.
        let scale = absmax.clone().clamp_min(f32::MIN_POSITIVE).recip();
        let normed: Tensor<1> = (rows * scale).reshape([blocks * BLOCK]);

        // Binary search: the number of midpoints that are below.
        let mut midpoints = code.midpoints().to_vec();
        midpoints.push(f32::MAX);
        let midpoints =
            Tensor::<1>::from_data(TensorData::new(midpoints, [BLOCK]), (&device, DType::F32));
        let mut below: Tensor<1, Int> = Tensor::zeros([blocks * BLOCK], (&device, DType::I32));
        for bit in (0..u8::BITS).rev().map(|shift| 1_i32 << shift) {
            let last = below.clone().add_scalar(bit - 1);
            let more = normed.clone().greater(midpoints.clone().select(0, last));
            below = below.clone().mask_where(more, below.add_scalar(bit));
        }

        let quads: Tensor<2, Int> = below.reshape([blocks * BLOCK / PACKED, PACKED]);
        let weights = TensorData::new(vec![1_i32, 1 << 8, 1 << 16, 1 << 24], [1, PACKED]);
        let weights = Tensor::<2, Int>::from_data(weights, (&device, DType::I32));
        let less = TensorData::new(vec![0_i32, 0, 0, 128], [1, PACKED]);
        let less = Tensor::<2, Int>::from_data(less, (&device, DType::I32));
        let words = ((quads - less) * weights).sum_dim(1);
        Self::Device(Box::new(Packed {
            words: words.reshape([blocks * BLOCK / PACKED]),
            absmax,
            elements,
        }))
    }
}

impl Packed {
    fn read(&self) -> Result<Quantized, String> {
        let failed = |error: &dyn std::fmt::Display| format!("reading codes: {error}");
        let words = self.words.clone().into_data().try_into_vec_as::<i32>();
        let absmax = self.absmax.clone().into_data().try_into_vec_as::<f32>();
        let words = words.map_err(|error| failed(&error))?;
        let mut codes: Vec<u8> = words.into_iter().flat_map(unpack).collect();
        codes.truncate(self.elements);
        Ok(Quantized {
            codes,
            absmax: absmax.map_err(|error| failed(&error))?,
        })
    }

    fn dequantize(&self, code: Code, dims: Dims) -> BurnTensor {
        let device = self.words.device();
        let words: Tensor<2, Int> = self.words.clone().unsqueeze_dim(1); // [words, 1]
        let byte = |shift: i32| {
            words
                .clone()
                .bitwise_right_shift_scalar(shift)
                .bitwise_and_scalar(255)
        };
        let top = byte(24).add_scalar(128).bitwise_and_scalar(255);
        let codes = Tensor::cat(vec![byte(0), byte(8), byte(16), top], 1); // [words, 4]
        let [words, _] = codes.dims();
        let codes: Tensor<1, Int> = codes.reshape([words * PACKED]);
        let map = TensorData::new(code.values().to_vec(), [256]);
        let map = Tensor::<1>::from_data(map, (&device, DType::F32));
        let values: Tensor<2> = map
            .select(0, codes)
            .reshape([words * PACKED / BLOCK, BLOCK]);
        let values: Tensor<1> = (values * self.absmax.clone()).reshape([words * PACKED]);
        values.narrow(0, 0, self.elements).reshape(dims)
    }
}

fn pack([a, b, c, d]: [u8; PACKED]) -> i32 {
    i32::from_le_bytes([a, b, c, d.wrapping_sub(128)])
}

fn unpack(word: i32) -> [u8; PACKED] {
    let [a, b, c, d] = word.to_le_bytes();
    [a, b, c, d.wrapping_add(128)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What other devices do, done by the CPU's backend, against the loops of the ABI's own quantisation.
    #[test]
    fn packed_codes_are_those_of_the_loops() {
        let values: Vec<f32> = (0..600)
            .map(|i| (i as f32 * 0.37).sin() * 10_f32.powi(i % 7 - 5))
            .collect();
        let dims = [1, 1, 3, 200];
        let tensor = Tensor::from_data(TensorData::new(values.clone(), dims), &Device::flex());
        for code in [Code::Signed, Code::Unsigned] {
            let values: Vec<f32> = match code {
                Code::Signed => values.clone(),
                Code::Unsigned => values.iter().map(|value| value.abs()).collect(),
            };
            let tensor = match code {
                Code::Signed => tensor.clone(),
                Code::Unsigned => tensor.clone().abs(),
            };
            let expected = code.quantize(&values);
            let blocks = BurnBlocks::quantize(&tensor, code);
            let found = blocks.read().expect("codes");
            assert_eq!(found, expected);
            let uploaded = BurnBlocks::upload(&expected, &Device::flex());
            assert_eq!(uploaded.read().expect("codes"), expected);
            let BurnBlocks::Device(packed) = &uploaded else {
                panic!("on the device");
            };
            let back = packed.dequantize(code, dims);
            let back = back.into_data().try_into_vec_as::<f32>().expect("floats");
            assert_eq!(back, code.dequantize(&expected));
        }
    }
}
