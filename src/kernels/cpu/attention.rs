//! Attention by blocks of queries: the score matrix exists for one block at a time, in both directions.
//!
//! The backward computes each block's probabilities again from the saved logarithm of the row sums
//! (Dao et al. 2022, arXiv:2205.14135, without its online softmax: a block sees all keys).

mod registers;
mod squares;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::cell::RefCell;
use std::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::Shared;
use super::elementwise;
use super::gemm::{Matrix, Operand, Size, Start, multiply_into};
#[cfg(target_arch = "x86_64")]
use super::instructions::Level;
use super::pack::Strides;
use super::view::{View, tensor};
use crate::kernels::Precision;
use registers::Kernels;

/// Queries of a block.
const BLOCK: usize = 128;
/// Queries of a square.
const QUERIES: usize = 64;

/// Heads with their sizes.
#[derive(Clone, Copy)]
struct Shape {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    d: usize,
}

/// What both directions need.
struct Inputs {
    q: View<4>,
    k: View<4>,
    v: View<4>,
    shape: Shape,
    scale: f32,
    causal: bool,
    precision: Precision,
}

thread_local! {
    /// Scores, and their gradients, of one block.
    static SCORES: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Result `[batch, heads, queries, d]` (heads are neighbours in memory, as the next layer reads them) and
/// `ln Σ e^score` per row; none when a tensor is not on the CPU.
pub fn forward(
    [q, k, v]: [&Tensor<4>; 3],
    scale: f32,
    causal: bool,
    precision: Precision,
) -> Option<(Tensor<4>, Vec<f32>)> {
    let inputs = Inputs::new([q, k, v], scale, causal, precision)?;
    let Shape {
        batch,
        heads,
        queries,
        d,
        ..
    } = inputs.shape;
    let mut output = Vec::<f32>::with_capacity(batch * queries * heads * d);
    let mut sums = vec![0.0; batch * heads * queries];
    let to = Shared(output.as_mut_ptr());
    inputs.forward_heads(&mut sums, to);
    // SAFETY: the blocks have written every row of every head.
    unsafe { output.set_len(batch * queries * heads * d) };
    let output = tensor(output, [batch, queries, heads, d]).swap_dims(1, 2);
    Some((output, sums))
}

/// Gradients of queries, keys and values, from the forward's result and sums.
pub fn backward(
    [q, k, v]: [&Tensor<4>; 3],
    (output, sums): (&Tensor<4>, &[f32]),
    gradient: &Tensor<4>,
    scale: f32,
    causal: bool,
    precision: Precision,
) -> Option<[Tensor<4>; 3]> {
    let inputs = Inputs::new([q, k, v], scale, causal, precision)?;
    let gradient = View::of(gradient).filter(View::is_f32)?;
    let Shape {
        batch,
        heads,
        queries,
        keys,
        d,
    } = inputs.shape;
    let size = |rows: usize| batch * rows * heads * d;
    let room = |rows: usize| Vec::<f32>::with_capacity(size(rows));
    let (mut dq, mut dk, mut dv) = (room(queries), room(keys), room(keys));
    let to = [&mut dq, &mut dk, &mut dv].map(|values| Shared(values.as_mut_ptr()));
    let output = View::of(output).filter(View::is_f32)?;
    (0..batch * heads).into_par_iter().for_each(|head| {
        let outputs = [&output, &gradient];
        let of_head = &sums[head * queries..][..queries];
        #[cfg(target_arch = "x86_64")]
        if Level::best() == Level::Amx {
            return tiles::backward(&inputs, outputs, head, of_head, to);
        }
        if let Some(kernels) = Kernels::of(d) {
            return squares::backward(&inputs, kernels, outputs, head, of_head, to);
        }
        for first in (0..queries).step_by(BLOCK) {
            inputs.backward_block(head, first, &sums[head * queries..], &gradient, to);
        }
    });
    // SAFETY: the first block of a head writes all its keys, and each block its queries.
    unsafe {
        dq.set_len(size(queries));
        dk.set_len(size(keys));
        dv.set_len(size(keys));
    }
    let shaped = |values, rows| tensor(values, [batch, rows, heads, d]).swap_dims(1, 2);
    Some([shaped(dq, queries), shaped(dk, keys), shaped(dv, keys)])
}

impl Inputs {
    /// Every head: by squares, on a matrix unit where there is one; heads too large for squares by blocks of queries.
    fn forward_heads(&self, sums: &mut [f32], to: Shared<f32>) {
        #[cfg(target_arch = "x86_64")]
        if Level::best() == Level::Amx {
            let pack = |head| tiles::Keys::new(self, head);
            return self.forward_by_squares(sums, pack, |keys, [head, first], sums| {
                tiles::forward(self, keys, head, first, sums, to);
            });
        }
        if let Some(kernels) = Kernels::of(self.shape.d) {
            let pack = |head| squares::Keys::new(self, kernels, head);
            return self.forward_by_squares(sums, pack, |keys, [head, first], sums| {
                squares::forward(self, keys, head, first, sums, to);
            });
        }
        sums.par_chunks_mut(self.shape.queries)
            .enumerate()
            .flat_map(|(head, sums)| {
                sums.par_chunks_mut(BLOCK)
                    .enumerate()
                    .map(move |(block, sums)| (head, block, sums))
            })
            .for_each(|(head, block, sums)| {
                self.forward_block(head, block * BLOCK, sums, to);
            });
    }

    /// Packs the keys of each head once, and calls with them for some queries at a time.
    fn forward_by_squares<K: Sync>(
        &self,
        sums: &mut [f32],
        pack: impl Fn(usize) -> K + Sync,
        compute: impl Fn(&K, [usize; 2], &mut [f32]) + Sync,
    ) {
        sums.par_chunks_mut(self.shape.queries)
            .enumerate()
            .for_each(|(head, sums)| {
                let keys = pack(head);
                sums.par_chunks_mut(QUERIES)
                    .enumerate()
                    .for_each(|(block, sums)| compute(&keys, [head, block * QUERIES], sums));
            });
    }

    fn new(
        tensors: [&Tensor<4>; 3],
        scale: f32,
        causal: bool,
        precision: Precision,
    ) -> Option<Self> {
        let [q, k, v] = tensors.map(|tensor| View::of(tensor).filter(View::is_f32));
        let (q, k, v) = (q?, k?, v?);
        let [batch, heads, queries, d] = q.dims;
        let shape = Shape {
            batch,
            heads,
            queries,
            keys: k.dims[2],
            d,
        };
        Some(Self {
            q,
            k,
            v,
            shape,
            scale,
            causal,
            precision,
        })
    }

    /// Rows (queries or keys) from `first` on of a head.
    fn rows<'a>(&self, view: &'a View<4>, head: usize, first: usize) -> Rows<'a> {
        let [batch, heads, row, element] = view.strides;
        let (image, head) = (head / self.shape.heads, head % self.shape.heads);
        Rows {
            data: &view.f32()[image * batch + head * heads + first * row..],
            row,
            element,
        }
    }

    /// Where row `first` of a head lies in a result of `rows` rows.
    fn place(&self, to: Shared<f32>, head: usize, rows: usize, first: usize) -> *mut f32 {
        let Shape { heads, d, .. } = self.shape;
        let (image, head) = (head / heads, head % heads);
        to.at(((image * rows + first) * heads + head) * d)
    }

    /// Hides what lies behind a query from it.
    fn hide(&self, query: usize, keys: &Range<usize>, scores: &mut [f32]) {
        if self.causal && query + 1 < keys.end {
            scores[(query + 1).saturating_sub(keys.start)..].fill(-1e30);
        }
    }

    /// `Σ o do` of each query of a head, summed in f64: it is taken from every score's gradient alike.
    fn along(&self, [output, gradient]: [&View<4>; 2], head: usize) -> Vec<f32> {
        let (o, dy) = (self.rows(output, head, 0), self.rows(gradient, head, 0));
        let of = |rows: &Rows<'_>, row: usize, element: usize| {
            f64::from(rows.data[row * rows.row + element * rows.element])
        };
        (0..self.shape.queries)
            .map(|row| {
                let products = (0..self.shape.d).map(|i| of(&o, row, i) * of(&dy, row, i));
                products.sum::<f64>() as f32
            })
            .collect()
    }

    /// Divides rows `[…][width]` of queries from `first` on by their sums, and writes both.
    fn finish(
        &self,
        output: &mut [f32],
        width: usize,
        running: &Running,
        [head, first]: [usize; 2],
        sums: &mut [f32],
        to: Shared<f32>,
    ) {
        for (row, (values, sum)) in output.chunks_exact_mut(width).zip(&mut *sums).enumerate() {
            elementwise::scale(values, 1.0 / running.total[row]);
            *sum = running.most[row] + running.total[row].ln();
        }
        let rows = first..first + sums.len();
        self.write_rows(to, [head, self.shape.queries], rows, output, width);
    }

    /// Writes some of `all` rows of a head's result from `[…][width]`.
    fn write_rows(
        &self,
        to: Shared<f32>,
        [head, all]: [usize; 2],
        rows: Range<usize>,
        values: &[f32],
        width: usize,
    ) {
        let Shape { heads, d, .. } = self.shape;
        let to = self.place(to, head, all, rows.start);
        for (row, values) in values.chunks_exact(width).take(rows.len()).enumerate() {
            // SAFETY: rows of this head belong to one task.
            unsafe {
                to.add(row * heads * d)
                    .copy_from_nonoverlapping(values.as_ptr(), d);
            }
        }
    }

    /// The same, value by value.
    #[cfg(target_arch = "x86_64")]
    fn write(
        &self,
        to: Shared<f32>,
        [head, all]: [usize; 2],
        rows: Range<usize>,
        element: impl Fn(usize, usize) -> f32,
    ) {
        let Shape { heads, d, .. } = self.shape;
        let to = self.place(to, head, all, rows.start);
        for row in 0..rows.len() {
            for column in 0..d {
                // SAFETY: rows of this head belong to one task.
                unsafe { to.add(row * heads * d + column).write(element(row, column)) }
            }
        }
    }

    fn size(&self, first: usize) -> usize {
        BLOCK.min(self.shape.queries - first)
    }

    /// `q kᵀ` of a block, not yet scaled; what a causal mask hides is far below everything else.
    fn scores(&self, head: usize, first: usize, scores: &mut Vec<f32>) {
        let Shape { keys, d, .. } = self.shape;
        let rows = self.size(first);
        let q = self.rows(&self.q, head, first);
        let k = self.rows(&self.k, head, 0);
        into_block(scores, [rows, keys], d, &q.by_row(), &k.by_row());
        if self.causal {
            for (query, row) in scores.chunks_exact_mut(keys).enumerate() {
                let hidden = (first + query + 1).min(keys);
                row[hidden..].fill(-1e30);
            }
        }
    }

    fn forward_block(&self, head: usize, first: usize, sums: &mut [f32], to: Shared<f32>) {
        let Shape {
            heads,
            queries,
            keys,
            d,
            ..
        } = self.shape;
        let rows = self.size(first);
        SCORES.with_borrow_mut(|[scores, _]| {
            self.scores(head, first, scores);
            for (row, log_sum) in scores.chunks_exact_mut(keys).zip(sums) {
                let [max, sum] = elementwise::exponentials(row, self.scale);
                elementwise::scale(row, 1.0 / sum);
                *log_sum = max + sum.ln();
            }
            let p = Rows::of(scores, keys);
            let v = self.rows(&self.v, head, 0);
            let size = Size {
                rows,
                columns: d,
                depth: keys,
            };
            // SAFETY: these rows of the result belong to this block alone.
            unsafe {
                let to = self.place(to, head, queries, first);
                let (p, v) = (p.by_row(), v.by_column());
                multiply_into(size, &p, &v, to, heads * d, Start::Zero);
            }
        });
    }

    fn backward_block(
        &self,
        head: usize,
        first: usize,
        sums: &[f32],
        gradient: &View<4>,
        [dq, dk, dv]: [Shared<f32>; 3],
    ) {
        let Shape {
            heads,
            queries,
            keys,
            d,
            ..
        } = self.shape;
        let rows = self.size(first);
        let dy = self.rows(gradient, head, first);
        SCORES.with_borrow_mut(|[p, ds]| {
            self.scores(head, first, p);
            for (row, sum) in p.chunks_exact_mut(keys).zip(&sums[first..]) {
                elementwise::probabilities(row, self.scale, *sum);
            }
            let v = self.rows(&self.v, head, 0);
            into_block(ds, [rows, keys], d, &dy.by_row(), &v.by_row());
            for (p, ds) in p.chunks_exact(keys).zip(ds.chunks_exact_mut(keys)) {
                elementwise::softmax_backward(p, ds, self.scale);
            }
            let (p, ds) = (Rows::of(p, keys), Rows::of(ds, keys));
            let (q, k) = (self.rows(&self.q, head, first), self.rows(&self.k, head, 0));
            let of_queries = Size {
                rows,
                columns: d,
                depth: keys,
            };
            let of_keys = Size {
                rows: keys,
                columns: d,
                depth: rows,
            };
            let start = if first == 0 {
                Start::Zero
            } else {
                Start::Present
            };
            let stride = heads * d;
            // SAFETY: the task writes the rows of its own head alone, block after block.
            unsafe {
                let to = self.place(dq, head, queries, first);
                multiply_into(
                    of_queries,
                    &ds.by_row(),
                    &k.by_column(),
                    to,
                    stride,
                    Start::Zero,
                );
                let to = self.place(dk, head, keys, 0);
                multiply_into(of_keys, &ds.by_column(), &q.by_column(), to, stride, start);
                let to = self.place(dv, head, keys, 0);
                multiply_into(of_keys, &p.by_column(), &dy.by_column(), to, stride, start);
            }
        });
    }
}

/// Largest score so far, and the sum of exponentials relative to it, of the queries of a square.
struct Running {
    most: [f32; QUERIES],
    total: [f32; QUERIES],
}

impl Running {
    fn new() -> Self {
        Self {
            most: [f32::NEG_INFINITY; QUERIES],
            total: [0.0; QUERIES],
        }
    }

    /// Takes more scores of a query, which become exponentials, and tells by what earlier ones have to be multiplied.
    fn take(&mut self, row: usize, scores: &mut [f32], scale: f32) -> f32 {
        let max = self.most[row].max(elementwise::maximum(scores) * scale);
        let shrink = (self.most[row] - max).exp();
        elementwise::probabilities(scores, scale, max);
        self.total[row] = self.total[row] * shrink + elementwise::total(scores);
        self.most[row] = max;
        shrink
    }
}

/// Rows of a matrix in memory.
struct Rows<'a> {
    data: &'a [f32],
    row: usize,
    element: usize,
}

impl<'a> Rows<'a> {
    fn of(data: &'a [f32], length: usize) -> Self {
        Self {
            data,
            row: length,
            element: 1,
        }
    }

    /// Rows are lanes, their elements are summed over.
    fn by_row(&self) -> Matrix<'a, f32> {
        Matrix {
            data: self.data,
            strides: Strides {
                lane: self.row,
                depth: self.element,
            },
        }
    }

    /// Elements are lanes, rows are summed over.
    fn by_column(&self) -> Matrix<'a, f32> {
        Matrix {
            data: self.data,
            strides: Strides {
                lane: self.element,
                depth: self.row,
            },
        }
    }
}

/// `a b` in `block`, whose memory is kept from block to block.
fn into_block(
    block: &mut Vec<f32>,
    [rows, columns]: [usize; 2],
    depth: usize,
    a: &dyn Operand,
    b: &dyn Operand,
) {
    block.clear();
    block.reserve(rows * columns);
    let size = Size {
        rows,
        columns,
        depth,
    };
    // SAFETY: all elements are written.
    unsafe {
        multiply_into(size, a, b, block.as_mut_ptr(), columns, Start::Zero);
        block.set_len(rows * columns);
    }
}
