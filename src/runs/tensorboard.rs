//! The series and pictures of a run as TensorBoard reads them: event messages (Protocol Buffers) in TFRecord frames.
//!
//! The messages are those of `tensorflow/core/util/event.proto` and `framework/summary.proto`, of which a few fields are
//! enough; the numbers below are theirs.

use crate::store::runs::{Metric, Sample};

/// Added to a checksum after its rotation, so that data which hold checksums have a good one, too.
const MASK: u32 = 0xa282_ead8;

/// What a file begins with. With this version nothing is dropped when steps do not rise.
pub fn head(wall_time_s: f64) -> Vec<u8> {
    let mut event = event(wall_time_s, 0);
    bytes(&mut event, 3, b"brain.Event:2"); // file_version
    record(&event)
}

/// The numbers of one step, those that are there.
pub fn scalars(wall_time_s: f64, metric: &Metric) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in tags(metric) {
        let Some(value) = value else { continue };
        let mut one = Vec::new();
        bytes(&mut one, 1, tag.as_bytes()); // tag
        key(&mut one, 2, 5); // simple_value
        one.extend((value as f32).to_le_bytes());
        bytes(&mut summary, 1, &one); // value
    }
    let mut event = event(wall_time_s, metric.step);
    bytes(&mut event, 5, &summary); // summary
    record(&event)
}

/// A preview picture.
pub fn picture(wall_time_s: f64, sample: &Sample, png: &[u8]) -> Vec<u8> {
    let mut image = Vec::new();
    number(&mut image, 1, sample.height_px.into());
    number(&mut image, 2, sample.width_px.into());
    number(&mut image, 3, 3); // colorspace: RGB
    bytes(&mut image, 4, png); // encoded_image_string
    let mut one = Vec::new();
    bytes(
        &mut one,
        1,
        format!("samples/{}", sample.prompt_index).as_bytes(),
    );
    bytes(&mut one, 4, &image); // image
    let mut summary = Vec::new();
    bytes(&mut summary, 1, &one);
    let mut event = event(wall_time_s, sample.step);
    bytes(&mut event, 5, &summary);
    record(&event)
}

fn tags(metric: &Metric) -> [(&'static str, Option<f64>); 13] {
    let size = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
    [
        ("loss/step", metric.loss),
        ("loss/average", metric.loss_average),
        ("loss/validation", metric.validation_loss),
        ("loss/validation_error", metric.validation_error),
        ("lr/unet", metric.lr_unet),
        ("lr/text_encoder", metric.lr_text_encoder),
        ("grad_norm/all", metric.grad_norm),
        ("grad_norm/unet", metric.grad_norm_unet),
        ("grad_norm/text_encoder", metric.grad_norm_text_encoder),
        ("speed/step_time_s", metric.step_time_s),
        ("speed/images_per_s", metric.images_per_s),
        ("memory/process_bytes", size(metric.memory_bytes)),
        ("memory/device_bytes", size(metric.device_memory_bytes)),
    ]
}

/// An event with its time and step.
fn event(wall_time_s: f64, step: u64) -> Vec<u8> {
    let mut event = Vec::new();
    key(&mut event, 1, 1); // wall_time
    event.extend(wall_time_s.to_le_bytes());
    number(&mut event, 2, step);
    event
}

/// A frame: length, its checksum, data, their checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(checksum(&length).to_le_bytes());
    record.extend(data);
    record.extend(checksum(data).to_le_bytes());
    record
}

fn checksum(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(MASK)
}

/// A field's number and how its value is written.
fn key(message: &mut Vec<u8>, field: u64, wire_type: u64) {
    varint(message, field << 3 | wire_type);
}

fn number(message: &mut Vec<u8>, field: u64, value: u64) {
    key(message, field, 0);
    varint(message, value);
}

fn bytes(message: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(message, field, 2);
    varint(message, value.len() as u64);
    message.extend(value);
}

/// Seven bits at a time, the lowest first; the eighth says that there are more.
fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_what_tensorflow_writes() {
        let head = head(1.5);
        let length = u64::from_le_bytes(head[..8].try_into().expect("eight bytes"));
        assert_eq!(length as usize, head.len() - 16);
        let event = &head[12..head.len() - 4];
        assert_eq!(event[..9], [&[9][..], &1.5_f64.to_le_bytes()].concat());
        assert_eq!(event[9..], *b"\x10\x00\x1a\x0dbrain.Event:2");
        // CRC-32C of RFC 3720's 32 zeros is 0x8a9136aa.
        let crc = 0x8a91_36aa_u32;
        assert_eq!(checksum(&[0; 32]), crc.rotate_right(15).wrapping_add(MASK));
    }

    #[test]
    fn long_numbers_take_more_bytes() {
        let mut message = Vec::new();
        varint(&mut message, 300);
        varint(&mut message, 127);
        assert_eq!(message, [0xac, 0x02, 0x7f]);
    }
}
