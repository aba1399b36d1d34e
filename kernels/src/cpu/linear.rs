//! Matrix products: tiles of a few rows and panels, spread over the threads, and what follows each tile.
//!
//! A task is a group of rows times a few panels, so that a task's weights are read once from memory and its
//! rows stay in the cache. All input features are added in one go; a sum is never split, whatever the number
//! of rows and threads.

use std::f32::consts::LOG2_E;

use super::arena::{Activation, Rows};
use super::blocks::{Area, Block, Finished, Scales, TASK_ROWS, share};
use super::forms::Forms;
use super::grouped_product;
use super::lanes::{self, versions};
use super::pack::{Matrix, Panels};
use super::rows::ScatteredRows;
use super::source::PANEL;
use super::tile::{GROUPS_AHEAD, LANES, Sums, TILE_PANELS, TILE_SEGMENTS, Tile, WIDE_TILE_ROWS};
use crate::isa::Isa;
use crate::pool::{Pool, Scattered};

/// Pairs of panels of a task.
const TASK_PAIRS: usize = 2;
/// Tasks per thread, at least, so that a thread that is held up does not hold up the others for long.
const TASKS_PER_THREAD: usize = 2;

/// What becomes of a product's tiles.
pub trait Epilogue: Sync {
    /// Asks for the memory that [`Epilogue::finish`] writes; it has the time of a tile to arrive.
    fn prefetch(&self, area: Area);

    /// Takes the finished tile, on the given thread.
    fn finish(&self, thread: usize, area: Area, tile: &Finished<'_>);
}

/// Multiplies `rows` rows of `x` with the matrix and hands each finished tile to the epilogue. Tiles of more than
/// one panel start at an even panel.
pub fn product(
    pool: &mut Pool,
    forms: Forms,
    matrix: &Matrix,
    (x, rows): (&Activation, usize),
    epilogue: &impl Epilogue,
) {
    assert_eq!(x.width, matrix.columns, "width of an operand");
    // Pairs of panels, so that gate and up stay together.
    let pairs = matrix.panel_count().div_ceil(2);
    let threads = pool.threads();
    let columns = columns(pairs, rows, threads);
    let groups = rows.div_ceil(TASK_ROWS);
    pool.run(columns * groups, |thread, task| {
        let (group, turn) = (task / columns, task % columns);
        // Threads that take turns each go through a run of neighbouring panels.
        let column = if columns.is_multiple_of(threads) {
            turn % threads * (columns / threads) + turn / threads
        } else {
            turn
        };
        let (first, len) = share(pairs, columns, column);
        let block = Block {
            rows: (group * TASK_ROWS, rows.min((group + 1) * TASK_ROWS)),
            panels: (2 * first, matrix.panel_count().min(2 * (first + len))),
        };
        let sink = |area: Area, tile: Option<Finished<'_>>| match tile {
            None => epilogue.prefetch(area),
            Some(tile) => epilogue.finish(thread, area, &tile),
        };
        match &matrix.panels {
            Panels::Grouped(codes) => {
                grouped_product::multiply((forms, thread), (matrix, codes), x, block, sink)
            }
            _ => multiply(forms, matrix, x, block, sink),
        }
    });
}

/// Into how many tasks the pairs of panels are split: a multiple of the threads if there are enough. With few
/// rows the weights stream from memory, best in long runs.
fn columns(pairs: usize, rows: usize, threads: usize) -> usize {
    let columns =
        if rows <= WIDE_TILE_ROWS { TASKS_PER_THREAD * threads } else { pairs.div_ceil(TASK_PAIRS) };
    columns.next_multiple_of(threads).min(pairs)
}

/// Multiplies a block, tile by tile; calls `sink` before each tile and with what it gave.
fn multiply(
    forms: Forms,
    matrix: &Matrix,
    x: &Activation,
    block: Block,
    sink: impl Fn(Area, Option<Finished<'_>>),
) {
    let (a, a_group, b, b_group) = operands(matrix, x);
    let (groups, a_stride, a_words) =
        (matrix.columns_padded / b_group, x.stride / a_group, b_group / a_group);
    let (start, end) = block.rows;
    let wide = end - start <= WIDE_TILE_ROWS;
    let (form, tile_rows) = match matrix.panels {
        Panels::Int8 { .. } => (forms.int8_tile, forms.int8_rows),
        _ => (forms.tile, forms.tile_rows),
    };
    // Blocks of nearly equal size: a last one of one or two rows would leave the multipliers idle.
    let count = (end - start).div_ceil(tile_rows);
    let tile_groups = if b_group == 4 { usize::MAX } else { forms.tile_groups };
    let mut sums = Sums::ZERO;
    let mut panel = block.panels.0;
    while panel < block.panels.1 {
        let panels = match block.panels.1 - panel {
            1 => 1,
            2 | 3 => 2,
            _ if wide => 4,
            _ => 2,
        };
        let ahead = if count == 1 { panels * groups } else { GROUPS_AHEAD };
        for index in 0..count {
            let (row, rows) = share(end - start, count, index);
            let area = Area { row: start + row, rows, panel, panels };
            sink(area, None);
            for first in (0..groups).step_by(tile_groups) {
                let mut pointers = [b; TILE_PANELS];
                for (index, pointer) in pointers.iter_mut().enumerate().take(panels) {
                    // SAFETY: the panel is below the matrix' panel count, the group below its groups.
                    *pointer = unsafe { b.add(((panel + index) * groups + first) * LANES) };
                }
                let tile = Tile {
                    // SAFETY: the row is one of the operand's rows, the group one of its groups.
                    a: unsafe { a.add(area.row * a_stride + first * a_words) },
                    a_stride,
                    rows,
                    b: [pointers; TILE_SEGMENTS],
                    segments: 1,
                    b_stride: LANES,
                    panels,
                    groups: tile_groups.min(groups - first),
                    sums_stride: panels,
                    accumulate: first > 0,
                    next: [pointers.map(|panel| panel.wrapping_add(ahead * LANES)); TILE_SEGMENTS],
                    // The first tiles ask for the panels after these, a panel each: they come from memory.
                    later: pointers[0].wrapping_add((panels + index.min(panels - 1)) * groups * LANES),
                };
                // SAFETY: the operands span these rows and panels (asserted in `operands`), and the processor has
                // the form's instructions.
                unsafe { form(&tile, sums.0.as_mut_ptr()) };
            }
            let scales = scales(matrix, x, area);
            sink(area, Some(Finished { sums: &sums.0[..rows * panels], panels, scales }));
        }
        panel += panels;
    }
}

/// Left and right operand as words of 32 bits, each with its elements in a word.
fn operands(matrix: &Matrix, x: &Activation) -> (*const u32, usize, *const u32, usize) {
    assert!(x.stride >= matrix.columns_padded, "operand rows hold the padding");
    match (&x.rows, &matrix.panels) {
        (Rows::F32(rows), Panels::F32(panels)) => (rows.as_ptr().cast(), 1, panels.as_ptr().cast(), 1),
        (Rows::F32(rows), Panels::Bf16(panels)) => (rows.as_ptr().cast(), 1, panels.as_ptr().cast(), 2),
        (Rows::Bf16(rows), Panels::Bf16(panels)) => (rows.as_ptr().cast(), 2, panels.as_ptr().cast(), 2),
        (Rows::F16 { halves: rows, .. }, Panels::F16 { halves, .. }) => {
            (rows.as_ptr().cast(), 2, halves.as_ptr().cast(), 2)
        }
        (_, Panels::Int8 { codes, .. }) => (x.codes().codes.as_ptr().cast(), 4, codes.as_ptr().cast(), 4),
        _ => panic!("operand and matrix differ in precision"),
    }
}

fn scales<'a>(matrix: &'a Matrix, x: &'a Activation, area: Area) -> Option<Scales<'a>> {
    let (offsets, scales, rows) = match (&matrix.panels, &x.rows) {
        (Panels::F16 { scales, .. }, Rows::F16 { scales: rows, .. }) => (None, scales, rows),
        (Panels::Int8 { scales, offsets, .. }, _) => {
            let offsets = &offsets.as_chunks().0[area.panel..area.panel + area.panels];
            (Some(offsets), scales, &x.codes().scales)
        }
        _ => return None,
    };
    Some(Scales {
        offsets,
        features: &scales.as_chunks().0[area.panel..area.panel + area.panels],
        rows: &rows[area.row..area.row + area.rows],
    })
}

/// Values that a product writes.
pub struct Values<'a> {
    /// Instructions.
    pub isa: Isa,
    /// The rows.
    pub out: Scattered<f32>,
    /// Elements from row to row.
    pub stride: usize,
    /// Output features in all.
    pub features: usize,
    /// Add to what is there.
    pub add: bool,
    /// Added to each row.
    pub bias: Option<&'a [f32]>,
}

impl Values<'_> {
    fn place(&self, area: Area) -> Place {
        let first = area.panel * PANEL;
        Place {
            out: self.out,
            first: area.row * self.stride + first,
            stride: self.stride,
            len: (area.panels * PANEL).min(self.features - first),
            add: self.add,
        }
    }
}

impl Epilogue for Values<'_> {
    fn prefetch(&self, area: Area) {
        let place = self.place(area);
        self.out.prefetch(place.first, place.len, (area.rows, self.stride));
    }

    fn finish(&self, _: usize, area: Area, tile: &Finished<'_>) {
        let place = self.place(area);
        let first = area.panel * PANEL;
        let bias = self.bias.map_or(&[][..], |bias| &bias[first..first + place.len]);
        store(self.isa, tile, bias, place);
    }
}

/// Where a tile's values go.
#[derive(Clone, Copy)]
struct Place {
    out: Scattered<f32>,
    /// Element of the first row's first value.
    first: usize,
    /// Elements from row to row.
    stride: usize,
    /// Values of a row.
    len: usize,
    /// Add to what is there.
    add: bool,
}

#[inline(always)]
fn store_body(tile: &Finished<'_>, bias: &[f32], place: Place) {
    let (bias_lanes, bias_rest) = bias.as_chunks::<LANES>();
    for row in 0..tile.rows() {
        // SAFETY: each (row, feature) belongs to one tile of the dispatch.
        let out = unsafe { place.out.range(place.first + row * place.stride, place.len) };
        let (out_lanes, out_rest) = out.as_chunks_mut::<LANES>();
        let whole = out_lanes.len();
        for (panel, out) in out_lanes.iter_mut().enumerate() {
            let mut values = tile.values(row, panel);
            if let Some(bias) = bias_lanes.get(panel) {
                for lane in 0..LANES {
                    values[lane] += bias[lane];
                }
            }
            if place.add {
                for lane in 0..LANES {
                    values[lane] += out[lane];
                }
            }
            *out = values;
        }
        if !out_rest.is_empty() {
            let values = tile.values(row, whole);
            for (lane, out) in out_rest.iter_mut().enumerate() {
                let value = values[lane] + bias_rest.get(lane).copied().unwrap_or(0.0);
                *out = if place.add { value + *out } else { value };
            }
        }
    }
}

versions! {
    /// Writes the rows of a tile.
    fn store(tile: &Finished<'_>, bias: &[f32], place: Place) = store_body;
}

/// What a gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU with a hyperbolic tangent: `x * sigmoid(GELU_SLOPE * (x + GELU_CUBE * x^3))`.
    Gelu,
}

/// `2 * sqrt(2 / pi)`.
const GELU_SLOPE: f32 = 1.595_769;
const GELU_CUBE: f32 = 0.044_715;

/// Operand or values that a gated product writes: `gate(gate) * up`, the panels alternating between the two.
/// Whole lanes are written: padded features are zero, and the rows are wide enough.
#[derive(Clone, Copy)]
pub struct Gated {
    /// What the gate goes through.
    pub gate: Gate,
    /// Instructions.
    pub isa: Isa,
    /// The rows.
    pub store: ScatteredRows,
    /// Elements from row to row, a multiple of the lanes.
    pub stride: usize,
}

impl Gated {
    fn first(&self, area: Area) -> usize {
        area.row * self.stride + area.panel / 2 * PANEL
    }
}

impl Epilogue for Gated {
    fn prefetch(&self, area: Area) {
        let (first, len) = (self.first(area), area.panels / 2 * PANEL);
        match self.store {
            ScatteredRows::F32(out) => out.prefetch(first, len, (area.rows, self.stride)),
            ScatteredRows::Bf16(out) => out.prefetch(first, len, (area.rows, self.stride)),
            ScatteredRows::F16(..) | ScatteredRows::Int8(..) => {}
        }
    }

    fn finish(&self, _: usize, area: Area, tile: &Finished<'_>) {
        let place = (self.first(area), self.stride);
        match self.store {
            ScatteredRows::F32(out) if self.gate == Gate::Silu => silu_f32(self.isa, tile, out, place),
            ScatteredRows::F32(out) => gelu_f32(self.isa, tile, out, place),
            ScatteredRows::Bf16(out) if self.gate == Gate::Silu => silu_bf16(self.isa, tile, out, place),
            ScatteredRows::Bf16(out) => gelu_bf16(self.isa, tile, out, place),
            ScatteredRows::F16(..) | ScatteredRows::Int8(..) => {
                panic!("a part of a scaled row cannot be written")
            }
        }
    }
}

/// Writes the gated values; `exponent` is that of two in the sigmoid's denominator.
#[inline(always)]
fn gate_rows<T: Copy>(
    tile: &Finished<'_>,
    out: Scattered<T>,
    (first, stride): (usize, usize),
    convert: impl Fn(f32) -> T,
    exponent: impl Fn(f32) -> f32,
) {
    for row in 0..tile.rows() {
        // SAFETY: each (row, feature) belongs to one tile of the dispatch.
        let out = unsafe { out.range(first + row * stride, tile.panels() / 2 * LANES) };
        for (pair, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let (gate, up) = (tile.values(row, 2 * pair), tile.values(row, 2 * pair + 1));
            for lane in 0..LANES {
                let exponential = lanes::exp2(exponent(gate[lane]));
                out[lane] = convert(gate[lane] * up[lane] / (1.0 + exponential));
            }
        }
    }
}

#[inline(always)]
fn silu(gate: f32) -> f32 {
    gate * -LOG2_E
}

#[inline(always)]
fn gelu(gate: f32) -> f32 {
    (gate + GELU_CUBE * gate * gate * gate) * (-LOG2_E * GELU_SLOPE)
}

#[inline(always)]
fn silu_f32_body(tile: &Finished<'_>, out: Scattered<f32>, place: (usize, usize)) {
    gate_rows(tile, out, place, |value| value, silu);
}

#[inline(always)]
fn silu_bf16_body(tile: &Finished<'_>, out: Scattered<u16>, place: (usize, usize)) {
    gate_rows(tile, out, place, lanes::bf16_bits, silu);
}

#[inline(always)]
fn gelu_f32_body(tile: &Finished<'_>, out: Scattered<f32>, place: (usize, usize)) {
    gate_rows(tile, out, place, |value| value, gelu);
}

#[inline(always)]
fn gelu_bf16_body(tile: &Finished<'_>, out: Scattered<u16>, place: (usize, usize)) {
    gate_rows(tile, out, place, lanes::bf16_bits, gelu);
}

versions! {
    /// Values gated with SiLU in f32.
    fn silu_f32(tile: &Finished<'_>, out: Scattered<f32>, place: (usize, usize)) = silu_f32_body;
}

versions! {
    /// Values gated with SiLU in bf16.
    fn silu_bf16(tile: &Finished<'_>, out: Scattered<u16>, place: (usize, usize)) = silu_bf16_body;
}

versions! {
    /// Values gated with GELU in f32.
    fn gelu_f32(tile: &Finished<'_>, out: Scattered<f32>, place: (usize, usize)) = gelu_f32_body;
}

versions! {
    /// Values gated with GELU in bf16.
    fn gelu_bf16(tile: &Finished<'_>, out: Scattered<u16>, place: (usize, usize)) = gelu_bf16_body;
}
