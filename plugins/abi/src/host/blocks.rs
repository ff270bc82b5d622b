//! Blockwise dynamic quantisation to 8 bits: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
//! arXiv:2110.02861; the map is `create_dynamic_map` of bitsandbytes.
//!
//! An element is the code nearest to it, times the largest magnitude of its block of 256 elements.

use std::sync::OnceLock;

/// Elements that share a scale, in row-major order; the last block may be shorter.
pub const BLOCK: usize = 256;

/// Which 256 numbers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// -1 to 1.
    Signed,
    /// 0 to 1.
    Unsigned,
}

impl Code {
    /// The codes' values in ascending order.
    pub fn values(self) -> &'static [f32; 256] {
        static SIGNED: OnceLock<[f32; 256]> = OnceLock::new();
        static UNSIGNED: OnceLock<[f32; 256]> = OnceLock::new();
        match self {
            Self::Signed => SIGNED.get_or_init(|| dynamic_map(true)),
            Self::Unsigned => UNSIGNED.get_or_init(|| dynamic_map(false)),
        }
    }

    /// The number of the code whose value is zero.
    pub fn zero(self) -> u8 {
        self.nearest(0.0)
    }

    /// Halfway between neighbouring codes: a number above the `i`th is nearer to code `i + 1` than to code `i`.
    pub fn midpoints(self) -> &'static [f32; 255] {
        static SIGNED: OnceLock<[f32; 255]> = OnceLock::new();
        static UNSIGNED: OnceLock<[f32; 255]> = OnceLock::new();
        let middle = || {
            let values = self.values();
            std::array::from_fn(|i| f32::midpoint(values[i], values[i + 1]))
        };
        match self {
            Self::Signed => SIGNED.get_or_init(middle),
            Self::Unsigned => UNSIGNED.get_or_init(middle),
        }
    }

    /// The code nearest to a number; the first one for NaN.
    pub fn nearest(self, number: f32) -> u8 {
        self.nearest_from(self.beginnings(), number)
    }

    fn nearest_from(self, beginnings: &[u8], number: f32) -> u8 {
        let middles = self.midpoints();
        let mut code = usize::from(beginnings[(number.to_bits() >> 16) as usize]);
        while code < middles.len() && number > middles[code] {
            code += 1;
        }
        code as u8 // at most 255
    }

    /// A code that is not above that of any number with these upper 16 bits; the search goes on from there. Numbers
    /// that share them are close: there are one or two codes for them.
    fn beginnings(self) -> &'static [u8] {
        static SIGNED: OnceLock<Vec<u8>> = OnceLock::new();
        static UNSIGNED: OnceLock<Vec<u8>> = OnceLock::new();
        let begin = || {
            let middles = self.midpoints();
            let of = |upper: u32| {
                // The smallest of them: of negative numbers that with the most magnitude.
                let negative = upper >> 15 == 1;
                let bits = (upper << 16) | if negative { 0xFFFF } else { 0 };
                let smallest = f32::from_bits(bits);
                if smallest.is_infinite() {
                    return 0; // NaN begins with the same bits
                }
                middles.partition_point(|&middle| smallest > middle) as u8
            };
            (0..1 << 16).map(of).collect()
        };
        match self {
            Self::Signed => SIGNED.get_or_init(begin),
            Self::Unsigned => UNSIGNED.get_or_init(begin),
        }
    }

    /// Writes the code of each element of one block, and answers the scale.
    pub fn quantize_block(self, block: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = block
            .iter()
            .fold(0.0_f32, |max, value| max.max(value.abs()));
        let scale = if absmax > 0.0 { 1.0 / absmax } else { 0.0 };
        let beginnings = self.beginnings();
        for (code, value) in codes.iter_mut().zip(block) {
            *code = self.nearest_from(beginnings, value * scale);
        }
        absmax
    }

    /// Codes and scales of `values`.
    pub fn quantize(self, values: &[f32]) -> Quantized {
        let mut codes = vec![0; values.len()];
        let blocks = values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
        let absmax = blocks.map(|(block, codes)| self.quantize_block(block, codes));
        Quantized {
            absmax: absmax.collect(),
            codes,
        }
    }

    /// The values of codes.
    pub fn dequantize(self, quantized: &Quantized) -> Vec<f32> {
        let map = self.values();
        let blocks = quantized.codes.chunks(BLOCK).zip(&quantized.absmax);
        blocks
            .flat_map(|(codes, absmax)| {
                codes
                    .iter()
                    .map(move |&code| map[usize::from(code)] * absmax)
            })
            .collect()
    }
}

/// A tensor's elements in 8 bits each.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// The number of each element's code.
    pub codes: Vec<u8>,
    /// The largest magnitude of each block.
    pub absmax: Vec<f32>,
}

/// Seven decades, of which each has twice as many steps as the one below; zero and one.
fn dynamic_map(signed: bool) -> [f32; 256] {
    const DECADES: i32 = 7;
    let mut values = vec![0.0_f32, 1.0];
    for decade in 0..DECADES {
        let intervals = 1_usize << if signed { decade } else { decade + 1 };
        let scale = 10_f64.powi(decade + 1 - DECADES) as f32;
        let bounds = linspace(0.1, 1.0, intervals + 1);
        for pair in bounds.windows(2) {
            let value = scale * ((pair[0] + pair[1]) / 2.0);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
}

/// `torch.linspace` in f32: from both ends to the middle.
fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|i| {
            if i < count / 2 {
                start + step * i as f32
            } else {
                end - step * (count - 1 - i) as f32
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_ascend_and_hold_zero_and_one() {
        for code in [Code::Signed, Code::Unsigned] {
            let map = code.values();
            assert!(map.is_sorted_by(|a, b| a < b));
            assert_eq!(map[255], 1.0);
            assert_eq!(map[usize::from(code.zero())], 0.0);
        }
        assert_eq!(Code::Unsigned.zero(), 0);
        // The largest negative code: the middle of the last of 64 steps from 0.1 to 1.
        assert!((Code::Signed.values()[0] + (1.0 - 0.9 / 128.0)).abs() < 1e-6);
    }

    #[test]
    fn codes_come_back_as_they_are() {
        for code in [Code::Signed, Code::Unsigned] {
            for (number, &value) in code.values().iter().enumerate() {
                assert_eq!(usize::from(code.nearest(value)), number);
            }
        }
    }

    #[test]
    fn the_nearest_code_is_that_of_a_search_over_all() {
        for code in [Code::Signed, Code::Unsigned] {
            let middles = code.midpoints();
            let around = middles.iter().flat_map(|&middle| {
                let bits = middle.to_bits();
                [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].map(f32::from_bits)
            });
            let others = (0..=u32::MAX).step_by(99_991).map(f32::from_bits);
            for number in around.chain(others).chain([0.0, -0.0, 2.0, -2.0]) {
                let expected = middles.partition_point(|&middle| number > middle) as u8;
                assert_eq!(code.nearest(number), expected, "{number:e}");
            }
        }
    }

    #[test]
    fn blocks_have_scales_of_their_own() {
        let mut values = vec![0.0_f32; 300];
        values[3] = -4.0;
        values[299] = 0.001;
        let quantized = Code::Signed.quantize(&values);
        assert_eq!(quantized.absmax, [4.0, 0.001]);
        let back = Code::Signed.dequantize(&quantized);
        assert_eq!(back[299], 0.001);
        assert!((back[3] + 4.0).abs() < 0.03, "{}", back[3]);
        assert!(
            back.iter()
                .enumerate()
                .all(|(i, &x)| x == 0.0 || i == 3 || i == 299)
        );
    }
}
