//! Numbers as files store them, made tensors: 8 bits become 16 without loss, elements that lie apart are put together.

use burn::tensor::TensorData;
use half::{bf16, f16};
use safetensors::Dtype;

/// A tensor of stored bytes; `None` of a number format that no weights have. What `scale` multiplies becomes f32.
pub fn tensor(
    bytes: &[u8],
    dtype: Dtype,
    scale: Option<f32>,
    shape: &[usize],
) -> Option<TensorData> {
    // Files are little endian, and so is every machine that burn's backends run on. The copy is typed, because the data
    // section of a file is not aligned.
    let shape = shape.to_vec();
    let widened = |widen: fn(u8) -> f16| match scale {
        None => {
            let values: Vec<f16> = bytes.iter().map(|byte| widen(*byte)).collect();
            TensorData::new(values, shape.clone())
        }
        Some(scale) => {
            let values: Vec<f32> = bytes
                .iter()
                .map(|byte| widen(*byte).to_f32() * scale)
                .collect();
            TensorData::new(values, shape.clone())
        }
    };
    Some(match dtype {
        Dtype::F8_E4M3 => widened(from_e4m3),
        Dtype::F8_E5M2 => widened(from_e5m2),
        Dtype::F16 => TensorData::new(bytemuck::pod_collect_to_vec::<u8, f16>(bytes), shape),
        Dtype::BF16 => TensorData::new(bytemuck::pod_collect_to_vec::<u8, bf16>(bytes), shape),
        Dtype::F32 => TensorData::new(bytemuck::pod_collect_to_vec::<u8, f32>(bytes), shape),
        Dtype::F64 => TensorData::new(bytemuck::pod_collect_to_vec::<u8, f64>(bytes), shape),
        _ => return None,
    })
}

/// Whether a format has 8 bits.
pub fn is_fp8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2)
}

/// Bytes of an element in memory, of one that takes `stored` in the file.
pub fn held_bytes(dtype: Dtype, scaled: bool, stored: usize) -> usize {
    match dtype {
        Dtype::F8_E4M3 | Dtype::F8_E5M2 if scaled => 4 * stored,
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => 2 * stored,
        Dtype::F64 => stored / 2,
        _ => stored,
    }
}

/// Elements that lie apart, put together in the order of the last axis. Each axis is a number of elements and the step
/// between them; the caller has checked that all of them lie in `bytes`.
pub fn gather(bytes: &[u8], axes: &[(usize, usize)], element_bytes: usize) -> Vec<u8> {
    let count: usize = axes.iter().map(|(count, _)| count).product();
    let mut gathered = Vec::with_capacity(count * element_bytes);
    let mut index = vec![0; axes.len()];
    let mut at = 0;
    for _ in 0..count {
        gathered.extend_from_slice(&bytes[at * element_bytes..][..element_bytes]);
        for (index, (count, step)) in index.iter_mut().zip(axes).rev() {
            *index += 1;
            at += step;
            if *index < *count {
                break;
            }
            at -= step * count;
            *index = 0;
        }
    }
    gathered
}

/// 4 bits of exponent, 3 of fraction, no infinities (Micikevicius et al. 2022, arXiv:2209.05433): all within f16.
fn from_e4m3(byte: u8) -> f16 {
    let sign = u16::from(byte & 0x80) << 8;
    let (exponent, fraction) = (u16::from(byte >> 3 & 0xf), u16::from(byte & 7));
    let magnitude = match (exponent, fraction) {
        (15, 7) => f16::NAN.to_bits(),
        // Multiples of 2⁻⁹, which are not that small for an f16.
        (0, _) => f16::from_f32(f32::from(fraction) / 512.0).to_bits(),
        _ => (exponent + 8) << 10 | fraction << 7,
    };
    f16::from_bits(sign | magnitude)
}

/// 5 bits of exponent, 2 of fraction: the first byte of an f16.
fn from_e5m2(byte: u8) -> f16 {
    f16::from_bits(u16::from(byte) << 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_are_widened_exactly() {
        for (byte, expected) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125), // 2⁻⁹
            (0x07, 0.013_671_875),
            (0x08, 0.015_625), // 2⁻⁶, the smallest normal number
            (0x38, 1.0),
            (0xb8, -1.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(from_e4m3(byte).to_f32(), expected, "{byte:#x}");
        }
        assert!(from_e4m3(0x7f).is_nan() && from_e4m3(0xff).is_nan());
        assert_eq!(from_e4m3(0x80).to_bits(), 0x8000);
        for (byte, expected) in [(0x3c, 1.0), (0x7b, 57_344.0), (0x01, 2.0_f32.powi(-16))] {
            assert_eq!(from_e5m2(byte).to_f32(), expected, "{byte:#x}");
        }
        assert!(from_e5m2(0x7c).is_infinite() && from_e5m2(0x7f).is_nan());
        // By the formula, for all that are numbers.
        for byte in 0..=u8::MAX {
            let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
            let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
            if exponent == 15 && fraction == 0.875 {
                continue;
            }
            let value = match exponent {
                0 => fraction * 2.0_f32.powi(-6),
                _ => (1.0 + fraction) * 2.0_f32.powi(exponent - 7),
            };
            assert_eq!(from_e4m3(byte).to_f32(), sign * value, "{byte:#x}");
        }
    }

    #[test]
    fn elements_that_lie_apart_are_put_together() {
        let bytes: Vec<u8> = (0..12).collect();
        // The transpose of [2, 3] of elements of two bytes.
        let turned = gather(&bytes, &[(3, 1), (2, 3)], 2);
        assert_eq!(turned, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        // Every second column.
        assert_eq!(gather(&bytes, &[(2, 6), (2, 2)], 1), [0, 2, 6, 8]);
        assert_eq!(gather(&bytes[3..], &[], 1), [3]);
    }
}
