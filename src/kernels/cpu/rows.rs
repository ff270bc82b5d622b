//! Results that are filled in parallel, a row at a time.

use rayon::prelude::*;

/// Elements below which a task is not worth handing to another thread.
const TASK: usize = 16 << 10;

/// `count` rows of `length` elements; `fill` writes every element of a row without reading it first.
pub fn rows(count: usize, length: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let total = count * length;
    let mut values = Vec::<f32>::with_capacity(total);
    // SAFETY: the memory is reserved; it holds no invalid f32, and `fill` writes each before anyone reads it.
    let all = unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr(), total) };
    if length > 0 && total <= TASK {
        for (index, row) in all.chunks_exact_mut(length).enumerate() {
            fill(index, row);
        }
    } else if length > 0 {
        all.par_chunks_exact_mut(length)
            .enumerate()
            .with_min_len((TASK / length).max(1))
            .for_each(|(index, row)| fill(index, row));
    }
    // SAFETY: all rows have been filled.
    unsafe { values.set_len(total) };
    values
}
