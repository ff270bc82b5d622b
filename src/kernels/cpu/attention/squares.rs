//! Attention in vector registers: small squares of the score matrix, which never leave the second-level cache.
//!
//! The forward keeps a running maximum and sum per query (Dao et al. 2022, arXiv:2205.14135). The backward walks the
//! squares by keys first, so that the gradients of a square's keys and values stay in the cache while the queries go
//! by (Dao 2023, arXiv:2307.08691); `Σ p dp` of a query is `Σ o do` of its result.

use std::ops::Range;

use super::super::gemm::Operand as _;
use super::super::pack::Panels;
use super::super::tile::Into;
use super::super::{Shared, View, elementwise};
use super::registers::{Kernels, PANEL, PITCH, ROWS, Size};
use super::{Inputs, QUERIES, Rows, Running};

/// Keys of a square.
const KEYS: usize = 256;

/// Keys and values of a head, packed once.
pub struct Keys {
    kernels: Kernels,
    /// `[panel][d][PANEL]`
    k: Vec<f32>,
    /// `[keys][width]`
    v: Vec<f32>,
}

impl Keys {
    pub fn new(inputs: &Inputs, kernels: Kernels, head: usize) -> Self {
        let keys = inputs.shape.keys;
        Self {
            kernels,
            k: by_panel(&inputs.rows(&inputs.k, head, 0), keys, inputs.shape.d),
            v: by_row(
                &inputs.rows(&inputs.v, head, 0),
                keys,
                inputs.shape.d,
                kernels.width,
            ),
        }
    }
}

/// Result and `ln Σ e^score` of some queries of a head.
pub fn forward(
    inputs: &Inputs,
    keys: &Keys,
    head: usize,
    first: usize,
    sums: &mut [f32],
    to: Shared<f32>,
) {
    let (d, rows) = (inputs.shape.d, sums.len());
    let Kernels {
        width,
        scores,
        values,
        ..
    } = keys.kernels;
    let q = by_row(&inputs.rows(&inputs.q, head, first), rows, d, width);
    let mut square = vec![0.0_f32; QUERIES * PITCH];
    let mut output = vec![0.0_f32; rows.next_multiple_of(ROWS) * width];
    let mut running = Running::new();
    for chunk in chunks(inputs.shape.keys) {
        let size = Size {
            rows,
            columns: chunk.len(),
            depth: d,
        };
        let k = &keys.k[chunk.start * d..];
        // SAFETY: rows and panels are filled up with zeros, the square is as large as squares are.
        unsafe {
            scores(
                size,
                q.as_ptr(),
                k.as_ptr(),
                square.as_mut_ptr(),
                Into::Nothing,
            );
        };
        for (row, scores) in square.chunks_exact_mut(PITCH).take(rows).enumerate() {
            let scores = &mut scores[..chunk.len()];
            inputs.hide(first + row, &chunk, scores);
            let shrink = running.take(row, scores, inputs.scale);
            elementwise::scale(&mut output[row * width..][..width], shrink);
        }
        let size = Size {
            rows,
            columns: width,
            depth: chunk.len(),
        };
        let v = &keys.v[chunk.start * width..];
        // SAFETY: as above.
        unsafe {
            values(
                size,
                square.as_ptr(),
                v.as_ptr(),
                output.as_mut_ptr(),
                Into::Present,
            );
        };
    }
    inputs.finish(&mut output, width, &running, [head, first], sums, to);
}

/// Gradients of queries, keys and values of a head.
pub fn backward(
    inputs: &Inputs,
    kernels: Kernels,
    [output, gradient]: [&View<4>; 2],
    head: usize,
    sums: &[f32],
    [dq_to, dk_to, dv_to]: [Shared<f32>; 3],
) {
    let (queries, keys, d) = (inputs.shape.queries, inputs.shape.keys, inputs.shape.d);
    let width = kernels.width;
    let rows_of =
        |view: &View<4>, count: usize| by_row(&inputs.rows(view, head, 0), count, d, width);
    let q = rows_of(&inputs.q, queries);
    let dy = rows_of(gradient, queries);
    let k = rows_of(&inputs.k, keys);
    let [k_panels, v_panels] =
        [&inputs.k, &inputs.v].map(|view| by_panel(&inputs.rows(view, head, 0), keys, d));
    let along = inputs.along([output, gradient], head);

    let square = || vec![0.0_f32; QUERIES * PITCH];
    let (mut p, mut ds) = (square(), square());
    let mut dq = vec![0.0_f32; queries.next_multiple_of(ROWS) * width];
    let (mut dk, mut dv) = (vec![0.0_f32; KEYS * width], vec![0.0_f32; KEYS * width]);
    for chunk in chunks(keys) {
        for first in (0..queries).step_by(QUERIES) {
            let rows = QUERIES.min(queries - first);
            let into = if first == 0 {
                Into::Nothing
            } else {
                Into::Present
            };
            let to_square = Size {
                rows,
                columns: chunk.len(),
                depth: d,
            };
            let of_queries = Size {
                rows,
                columns: width,
                depth: chunk.len(),
            };
            let of_keys = Size {
                rows: chunk.len(),
                columns: width,
                depth: rows,
            };
            let [q, dy] = [&q, &dy].map(|rows| rows[first * width..].as_ptr());
            let [k_panels, v_panels] =
                [&k_panels, &v_panels].map(|panels| panels[chunk.start * d..].as_ptr());
            // SAFETY: rows and panels are filled up with zeros, squares and gradients as large as they get.
            unsafe {
                (kernels.scores)(to_square, q, k_panels, p.as_mut_ptr(), Into::Nothing);
                (kernels.scores)(to_square, dy, v_panels, ds.as_mut_ptr(), Into::Nothing);
            }
            for row in 0..rows {
                let p = &mut p[row * PITCH..][..chunk.len()];
                inputs.hide(first + row, &chunk, p);
                elementwise::probabilities(p, inputs.scale, sums[first + row]);
                let ds = &mut ds[row * PITCH..][..chunk.len()];
                elementwise::scores_backward(p, ds, inputs.scale, along[first + row]);
            }
            let k = k[chunk.start * width..].as_ptr();
            let dq = dq[first * width..].as_mut_ptr();
            // SAFETY: as above.
            unsafe {
                (kernels.keys)(of_keys, p.as_ptr(), dy, dv.as_mut_ptr(), into);
                (kernels.keys)(of_keys, ds.as_ptr(), q, dk.as_mut_ptr(), into);
                (kernels.values)(of_queries, ds.as_ptr(), k, dq, Into::Present);
            }
        }
        for (rows, to) in [(&dk, dk_to), (&dv, dv_to)] {
            inputs.write_rows(to, [head, keys], chunk.clone(), rows, width);
        }
    }
    inputs.write_rows(dq_to, [head, queries], 0..queries, &dq, width);
}

/// Rows filled up to a width, and to whole tiles, with zeros.
fn by_row(rows: &Rows<'_>, count: usize, d: usize, width: usize) -> Vec<f32> {
    let mut data = vec![0.0; count.next_multiple_of(ROWS) * width];
    let mut to = Panels {
        data: &mut data,
        width,
        stride: count * width,
    };
    rows.by_column().pack(0..d, 0..count, &mut to);
    data
}

/// Rows side by side.
fn by_panel(rows: &Rows<'_>, count: usize, d: usize) -> Vec<f32> {
    let mut data = vec![0.0; count.next_multiple_of(PANEL) * d];
    let mut to = Panels {
        data: &mut data,
        width: PANEL,
        stride: PANEL * d,
    };
    rows.by_row().pack(0..count, 0..d, &mut to);
    data
}

fn chunks(keys: usize) -> impl Iterator<Item = Range<usize>> {
    (0..keys)
        .step_by(KEYS)
        .map(move |first| first..keys.min(first + KEYS))
}
