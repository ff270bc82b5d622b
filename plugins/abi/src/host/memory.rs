//! Reading and writing what a plugin points to: null, alignment, length and UTF-8 are checked, the rest is the
//! plugin's promise.
#![expect(unsafe_code, reason = "memory of a plugin is read and written")]

use super::{Fault, Shape};
use crate::{BAD_ARGUMENT, LsStr, MAX_RANK};

/// No text of a plugin is longer than this, in bytes.
const MAX_TEXT_BYTES: u64 = 1 << 22;

/// Copies a plugin's text.
///
/// # Safety
/// A non-null `text.ptr` points to `text.len` readable bytes.
pub unsafe fn text_from_plugin(text: LsStr, what: &str) -> Result<String, Fault> {
    if text.len == 0 {
        return Ok(String::new());
    }
    if text.ptr.is_null() || text.len > MAX_TEXT_BYTES {
        let message = format!("{what}: null, or longer than {MAX_TEXT_BYTES} bytes");
        return Err(Fault::new(BAD_ARGUMENT, message));
    }
    // SAFETY: not null, the length is bounded, and the caller vouches for the bytes.
    let bytes = unsafe { std::slice::from_raw_parts(text.ptr, text.len as usize) };
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(Fault::new(BAD_ARGUMENT, format!("{what}: not UTF-8"))),
    }
}

/// Writes a result.
///
/// # Safety
/// A non-null `out` is writable.
pub unsafe fn write_out<V>(out: *mut V, value: V) -> Result<(), Fault> {
    check_pointer(out)?;
    // SAFETY: not null and aligned; the caller vouches for the rest.
    unsafe { out.write(value) };
    Ok(())
}

/// Copies `len` values.
///
/// # Safety
/// A non-null `data` points to `len` readable values.
pub unsafe fn slice_from_plugin<V: Copy>(data: *const V, len: usize) -> Result<Vec<V>, Fault> {
    if len == 0 {
        return Ok(Vec::new());
    }
    check_pointer(data)?;
    // SAFETY: not null, aligned; the caller bounds `len` and vouches for the values.
    Ok(unsafe { std::slice::from_raw_parts(data, len) }.to_vec())
}

/// Copies values to the plugin's memory.
///
/// # Safety
/// A non-null `out` has room for `values.len()` values.
pub unsafe fn slice_to_plugin<V: Copy>(values: &[V], out: *mut V) -> Result<(), Fault> {
    check_pointer(out)?;
    // SAFETY: not null, aligned, room as the caller vouches; the plugin cannot point into a fresh host vector.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), out, values.len()) };
    Ok(())
}

/// Reads a shape.
///
/// # Safety
/// A non-null `shape` points to `rank` readable values.
pub unsafe fn shape_from_plugin(shape: *const u64, rank: u32) -> Result<Shape, Fault> {
    let rank = rank as usize;
    if rank > MAX_RANK {
        // Refused before the pointer is followed.
        return Shape::new(&[1; MAX_RANK + 1]);
    }
    // SAFETY: the rank is at most 4 and the caller vouches for the values.
    let dims = unsafe { slice_from_plugin(shape, rank)? };
    let dims: Vec<usize> = dims
        .into_iter()
        .map(|dim| usize::try_from(dim).unwrap_or(usize::MAX))
        .collect();
    Shape::new(&dims)
}

fn check_pointer<V>(pointer: *const V) -> Result<(), Fault> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(Fault::new(BAD_ARGUMENT, "a null or misaligned pointer"));
    }
    Ok(())
}
