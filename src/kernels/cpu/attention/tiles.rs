//! Attention on a matrix unit: small squares of the score matrix, which never leave the second-level cache.
//!
//! Keys, values (and in the backward queries and output gradients) of a head are cut into parts and packed once. The
//! forward keeps a running maximum and sum per query (Dao et al. 2022, arXiv:2205.14135). The backward walks the
//! squares by keys first, so that the gradients of 512 keys and values stay in the cache while the queries go by
//! (Dao 2023, arXiv:2307.08691); `Σ p dp` of a query is `Σ o do` of its result.

use std::ops::Range;

use super::super::amx::{TileProduct, Tiles};
use super::super::gemm::Operand;
use super::super::pack::Strides;
use super::super::parts::{Count, LANES, PartPanels, STEP, Side, pack_parts};
use super::super::tile::Into;
use super::super::unit::{Line, room};
use super::super::{Shared, View, elementwise};
use super::{Inputs, QUERIES, Running, Shape};

/// Keys of a square.
const KEYS: usize = 512;
/// Distance of a square's rows: no power of two, of which the cache would hold few.
const PITCH: usize = KEYS + 16;

/// One side of products, cut into parts.
#[derive(Default)]
struct Packed {
    lines: Vec<Line>,
    panel: usize,
    panels: usize,
}

impl Packed {
    /// Lanes and depths of an operand.
    fn new(operand: &dyn Operand, lanes: usize, depth: usize, side: Side, parts: Count) -> Self {
        let mut packed = Self::default();
        let data = packed.room(lanes, depth, parts);
        operand.pack_parts(0..lanes, 0..depth, &mut PartPanels { data, side, parts });
        packed
    }

    /// Packs a part of a square again and again into the same memory.
    fn square(
        &mut self,
        square: &[f32],
        strides: Strides,
        size: [usize; 2],
        side: Side,
        parts: Count,
    ) {
        let data = self.room(size[0], size[1], parts);
        pack_parts(
            square,
            strides,
            size,
            [0, size[1]],
            &mut PartPanels { data, side, parts },
        );
    }

    fn room(&mut self, lanes: usize, depth: usize, parts: Count) -> &mut [u16] {
        self.panel = PartPanels::panel(depth, parts);
        self.panels = lanes.div_ceil(LANES);
        room(&mut self.lines, lanes, depth, parts)
    }

    /// All panels from a step on.
    fn all(&self, first_step: usize) -> Panels<'_> {
        self.some(0..self.panels, first_step)
    }

    fn some(&self, panels: Range<usize>, first_step: usize) -> Panels<'_> {
        assert!(panels.end <= self.panels);
        Panels {
            of: self,
            panels,
            first_step,
        }
    }
}

/// Some panels of a side, from a step on.
struct Panels<'a> {
    of: &'a Packed,
    panels: Range<usize>,
    first_step: usize,
}

impl Panels<'_> {
    fn each(&self, parts: Count) -> impl Iterator<Item = *const u16> {
        let step = PartPanels::panel(STEP, parts);
        let data: &[u16] = bytemuck::cast_slice(&self.of.lines);
        let (panel, first) = (self.of.panel, self.first_step * step);
        self.panels
            .clone()
            .map(move |index| data[index * panel + first..].as_ptr())
    }
}

/// A head's worker: the tiles of this thread and what it reuses from square to square.
struct Worker {
    tiles: Tiles,
    parts: Count,
}

impl Worker {
    /// `c = a b`, or `+=`, in whole tiles.
    fn multiply(
        &self,
        a: &Panels<'_>,
        b: &Panels<'_>,
        steps: usize,
        c: &mut [f32],
        ldc: usize,
        into: Into,
    ) {
        let (high, wide) = (a.panels.len() * LANES, b.panels.len() * LANES);
        assert!(wide <= ldc && high * ldc <= c.len());
        for panels in [a, b] {
            let step = PartPanels::panel(STEP, self.parts);
            assert!((panels.first_step + steps) * step <= panels.of.panel);
        }
        for (column, b) in b.each(self.parts).enumerate() {
            for (row, a) in a.each(self.parts).enumerate() {
                // SAFETY: panels hold so many steps and `c` so many tiles, as was just checked.
                unsafe {
                    self.tiles.multiply(&TileProduct {
                        steps,
                        a,
                        b,
                        c: c.as_mut_ptr().add(row * LANES * ldc + column * LANES),
                        ldc,
                        into,
                        half: false,
                    });
                }
            }
        }
    }
}

/// By rows of a square.
const BY_ROW: Strides = Strides {
    lane: PITCH,
    depth: 1,
};
/// By columns of a square.
const BY_COLUMN: Strides = Strides {
    lane: 1,
    depth: PITCH,
};

/// Keys and values of a head, packed for the forward.
pub struct Keys {
    k: Packed,
    v: Packed,
}

impl Keys {
    pub fn new(inputs: &Inputs, head: usize) -> Self {
        let parts = inputs.precision.parts();
        let Shape { keys, d, .. } = inputs.shape;
        let k = inputs.rows(&inputs.k, head, 0);
        let v = inputs.rows(&inputs.v, head, 0);
        Self {
            k: Packed::new(&k.by_row(), keys, d, Side::Right, parts),
            v: Packed::new(&v.by_column(), d, keys, Side::Right, parts),
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
    let parts = inputs.precision.parts();
    let d = inputs.shape.d;
    let rows = sums.len();
    let width = d.next_multiple_of(LANES);
    let worker = Worker {
        tiles: Tiles::configure([parts; 2]),
        parts,
    };
    let q = inputs.rows(&inputs.q, head, first);
    let q = Packed::new(&q.by_row(), rows, d, Side::Left, parts);
    let (mut square, mut p) = (vec![0.0_f32; QUERIES * PITCH], Packed::default());
    let mut output = vec![0.0_f32; QUERIES * width];
    let mut running = Running::new();
    for chunk in chunks(inputs.shape.keys) {
        let k = keys.k.some(panels(&chunk), 0);
        worker.multiply(
            &q.all(0),
            &k,
            d.div_ceil(STEP),
            &mut square,
            PITCH,
            Into::Nothing,
        );
        for (row, scores) in square.chunks_exact_mut(PITCH).take(rows).enumerate() {
            let scores = &mut scores[..chunk.len()];
            inputs.hide(first + row, &chunk, scores);
            let shrink = running.take(row, scores, inputs.scale);
            elementwise::scale(&mut output[row * width..][..width], shrink);
        }
        p.square(&square, BY_ROW, [rows, chunk.len()], Side::Left, parts);
        let steps = chunk.len().div_ceil(STEP);
        let v = keys.v.all(chunk.start / STEP);
        worker.multiply(&p.all(0), &v, steps, &mut output, width, Into::Present);
    }
    inputs.finish(&mut output, width, &running, [head, first], sums, to);
}

/// Gradients of queries, keys and values of a head.
pub fn backward(
    inputs: &Inputs,
    [output, gradient]: [&View<4>; 2],
    head: usize,
    sums: &[f32],
    [dq_to, dk_to, dv_to]: [Shared<f32>; 3],
) {
    let parts = inputs.precision.parts();
    let Shape {
        queries, keys, d, ..
    } = inputs.shape;
    let width = d.next_multiple_of(LANES);
    let worker = Worker {
        tiles: Tiles::configure([parts; 2]),
        parts,
    };
    let pack = |view: &View<4>, lanes: usize, side: Side| {
        let rows = inputs.rows(view, head, 0);
        Packed::new(&rows.by_row(), lanes, d, side, parts)
    };
    let turn = |view: &View<4>, depth: usize, side: Side| {
        let rows = inputs.rows(view, head, 0);
        Packed::new(&rows.by_column(), d, depth, side, parts)
    };
    let q = pack(&inputs.q, queries, Side::Left);
    let q_turned = turn(&inputs.q, queries, Side::Left);
    let dy = pack(gradient, queries, Side::Left);
    let dy_turned = turn(gradient, queries, Side::Left);
    let k = pack(&inputs.k, keys, Side::Right);
    let k_turned = turn(&inputs.k, keys, Side::Right);
    let v = pack(&inputs.v, keys, Side::Right);
    let along = inputs.along([output, gradient], head);

    let square = || vec![0.0_f32; QUERIES * PITCH];
    let (mut p, mut ds) = (square(), square());
    let mut packed = Packed::default();
    let mut dq = vec![0.0_f32; queries.next_multiple_of(QUERIES) * width];
    let (mut dk, mut dv) = (vec![0.0_f32; width * PITCH], vec![0.0_f32; width * PITCH]);
    let depth = d.div_ceil(STEP);
    for chunk in chunks(keys) {
        let steps = chunk.len().div_ceil(STEP);
        for first in (0..queries).step_by(QUERIES) {
            let rows = QUERIES.min(queries - first);
            let into = if first == 0 {
                Into::Nothing
            } else {
                Into::Present
            };
            let (lanes, of_rows) = (panels(&(first..first + rows)), rows.div_ceil(STEP));
            let (q, dy) = (q.some(lanes.clone(), 0), dy.some(lanes, 0));
            let (k, v) = (k.some(panels(&chunk), 0), v.some(panels(&chunk), 0));
            worker.multiply(&q, &k, depth, &mut p, PITCH, Into::Nothing);
            worker.multiply(&dy, &v, depth, &mut ds, PITCH, Into::Nothing);
            for row in 0..rows {
                let p = &mut p[row * PITCH..][..chunk.len()];
                inputs.hide(first + row, &chunk, p);
                elementwise::probabilities(p, inputs.scale, sums[first + row]);
                let ds = &mut ds[row * PITCH..][..chunk.len()];
                elementwise::scores_backward(p, ds, inputs.scale, along[first + row]);
            }
            let size = [chunk.len(), rows];
            let (qs, dys) = (q_turned.all(first / STEP), dy_turned.all(first / STEP));
            packed.square(&p, BY_COLUMN, size, Side::Right, parts);
            worker.multiply(&dys, &packed.all(0), of_rows, &mut dv, PITCH, into);
            packed.square(&ds, BY_COLUMN, size, Side::Right, parts);
            worker.multiply(&qs, &packed.all(0), of_rows, &mut dk, PITCH, into);
            packed.square(&ds, BY_ROW, [rows, chunk.len()], Side::Left, parts);
            let (dq, ks) = (&mut dq[first * width..], k_turned.all(chunk.start / STEP));
            worker.multiply(&packed.all(0), &ks, steps, dq, width, Into::Present);
        }
        for (turned, to) in [(&dk, dk_to), (&dv, dv_to)] {
            let element = |row: usize, column: usize| turned[column * PITCH + row];
            inputs.write(to, [head, keys], chunk.clone(), element);
        }
    }
    inputs.write_rows(dq_to, [head, queries], 0..queries, &dq, width);
}

fn chunks(keys: usize) -> impl Iterator<Item = Range<usize>> {
    (0..keys)
        .step_by(KEYS)
        .map(move |first| first..keys.min(first + KEYS))
}

/// The panels that hold these lanes.
fn panels(lanes: &Range<usize>) -> Range<usize> {
    lanes.start / LANES..lanes.end.div_ceil(LANES)
}
