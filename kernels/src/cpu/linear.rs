//! Matrix products: tiles of a few rows and panels, spread over the threads, and what follows each tile.
//!
//! A task is a group of rows times a few panels, so that a task's weights are read once from memory and its
//! rows stay in the cache. All input features are added in one go; a sum is never split, whatever the number
//! of rows and threads.

use super::arena::{Activation, Rows};
use super::lanes::{self, versions};
use super::pack::{Matrix, PANEL, Panels};
use super::rows::Store;
use super::tile::{LANES, Sums, TILE_PANELS, TILE_SEGMENTS, Tile, TileFn, WIDE_TILE_ROWS};
use crate::isa::Isa;
use crate::pool::{Pool, Scattered};

/// Rows of a task: their operands (240 rows of 2,048 bytes) fill half of a second-level cache of 1 MiB.
const TASK_ROWS: usize = 240;
/// Panels of a task.
const TASK_PANELS: usize = 4;
/// Groups of a right operand that are fetched ahead when many rows use each: it comes from the second-level
/// cache, and the dozen other streams keep the processor from foreseeing it.
const GROUPS_AHEAD: usize = 8;
/// Tasks per thread, at least, so that a thread that is held up does not hold up the others for long.
const TASKS_PER_THREAD: usize = 2;

/// How tiles are computed here.
#[derive(Clone, Copy)]
pub struct Forms {
    /// Instructions of everything but the tile.
    pub isa: Isa,
    /// The tile product for the precision of weights.
    pub tile: TileFn,
    /// Most rows of that tile.
    pub tile_rows: usize,
    /// The tile product for the precision of the cache.
    pub cache_tile: TileFn,
}

impl std::fmt::Debug for Forms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forms").field("isa", &self.isa).finish_non_exhaustive()
    }
}

/// A finished tile: where it lies and its values.
pub struct Finished<'a> {
    /// First row.
    pub row: usize,
    /// First panel.
    pub panel: usize,
    /// Panels.
    pub panels: usize,
    /// `[rows][panels]` of lanes.
    pub sums: &'a mut [[f32; LANES]],
}

/// Multiplies `rows` rows of `x` with the matrix and hands each finished tile to `sink`. Tiles of more than one
/// panel start at an even panel.
pub fn product(
    pool: &mut Pool,
    forms: Forms,
    matrix: &Matrix,
    (x, rows): (&Activation, usize),
    sink: impl Fn(Finished<'_>) + Sync,
) {
    assert_eq!(x.width, matrix.columns, "width of an operand");
    let panels = matrix.panel_count();
    let task_panels = task_panels(panels, rows, pool.threads());
    let columns = panels.div_ceil(task_panels);
    let groups = rows.div_ceil(TASK_ROWS);
    pool.run(columns * groups, |_, task| {
        let (group, column) = (task / columns, task % columns);
        let first_panel = column * task_panels;
        let block = Block {
            rows: (group * TASK_ROWS, rows.min((group + 1) * TASK_ROWS)),
            panels: (first_panel, panels.min(first_panel + task_panels)),
        };
        multiply(forms, matrix, x, block, &sink);
    });
}

/// Panels of a task, an even number. With few rows the weights stream from memory, best in long runs.
fn task_panels(panels: usize, rows: usize, threads: usize) -> usize {
    let even = panels.div_ceil(TASKS_PER_THREAD * threads).next_multiple_of(2);
    if rows <= WIDE_TILE_ROWS { even } else { TASK_PANELS.min(even) }
}

/// Rows and panels of a task, each as start and end.
struct Block {
    rows: (usize, usize),
    panels: (usize, usize),
}

fn multiply(
    forms: Forms,
    matrix: &Matrix,
    x: &Activation,
    block: Block,
    sink: &(impl Fn(Finished<'_>) + Sync),
) {
    let (a, b, group_shift) = operands(matrix, x);
    let groups = matrix.columns_padded >> group_shift;
    let a_stride = x.stride >> group_shift;
    let (start, end) = block.rows;
    let wide = end - start <= WIDE_TILE_ROWS;
    let mut sums = Sums::ZERO;
    let mut panel = block.panels.0;
    while panel < block.panels.1 {
        let panels = match block.panels.1 - panel {
            1 => 1,
            2 | 3 => 2,
            _ if wide => 4,
            _ => 2,
        };
        let mut pointers = [b; TILE_PANELS];
        for (index, pointer) in pointers.iter_mut().enumerate().take(panels) {
            // SAFETY: the panel is below the matrix' panel count.
            *pointer = unsafe { b.add((panel + index) * groups * LANES) };
        }
        // Blocks of nearly equal size: a last one of one or two rows would leave the multipliers idle.
        let count = (end - start).div_ceil(forms.tile_rows);
        let (size, larger) = ((end - start) / count, (end - start) % count);
        let mut row = start;
        for index in 0..count {
            let rows = size + usize::from(index < larger);
            let tile = Tile {
                // SAFETY: the row is one of the operand's rows.
                a: unsafe { a.add(row * a_stride) },
                a_stride,
                rows,
                b: [pointers; TILE_SEGMENTS],
                segments: 1,
                b_stride: LANES,
                panels,
                groups,
                accumulate: false,
                ahead: if panels == 4 { panels * groups * LANES } else { GROUPS_AHEAD * LANES },
            };
            // SAFETY: the operands span these rows and panels (asserted in `operands`), and the processor has
            // the form's instructions.
            unsafe { (forms.tile)(&tile, sums.0.as_mut_ptr()) };
            let sums = &mut sums.0[..rows * panels];
            dequantise(forms.isa, matrix, x, (row, panel, panels), sums);
            sink(Finished { row, panel, panels, sums });
            row += rows;
        }
        panel += panels;
    }
}

/// Both operands as groups of 32 bits, and the logarithm of the elements in a group.
fn operands(matrix: &Matrix, x: &Activation) -> (*const u32, *const u32, usize) {
    assert!(x.stride >= matrix.columns_padded, "operand rows hold the padding");
    match (&x.rows, &matrix.panels) {
        (Rows::F32(rows), Panels::F32(panels)) => (rows.as_ptr().cast(), panels.as_ptr().cast(), 0),
        (Rows::Bf16(rows), Panels::Bf16(panels)) => (rows.as_ptr().cast(), panels.as_ptr().cast(), 1),
        (Rows::Int8 { codes: rows, .. }, Panels::Int8 { codes, .. }) => {
            (rows.as_ptr().cast(), codes.as_ptr().cast(), 2)
        }
        _ => panic!("operand and matrix differ in precision"),
    }
}

fn dequantise(
    isa: Isa,
    matrix: &Matrix,
    x: &Activation,
    (row, panel, panels): (usize, usize, usize),
    sums: &mut [[f32; LANES]],
) {
    let (Panels::Int8 { scales, offsets, .. }, Rows::Int8 { scales: row_scales, .. }) =
        (&matrix.panels, &x.rows)
    else {
        return;
    };
    let rows = sums.len() / panels;
    let scales = &scales.as_chunks::<LANES>().0[panel..panel + panels];
    let offsets = &offsets.as_chunks::<LANES>().0[panel..panel + panels];
    lanes::dequantise(isa, sums, panels, offsets, scales, &row_scales[row..row + rows]);
}

/// Values that a product writes.
pub struct Values<'a> {
    /// The rows.
    pub out: Scattered<f32>,
    /// Elements from row to row.
    pub stride: usize,
    /// Add to what is there.
    pub add: bool,
    /// Added to each row.
    pub bias: Option<&'a [f32]>,
}

impl Values<'_> {
    /// Writes a tile; `features` is the number of output features in all.
    pub fn store(&self, isa: Isa, features: usize, tile: Finished<'_>) {
        let first = tile.panel * PANEL;
        let len = (tile.panels * PANEL).min(features - first);
        let rows = tile.sums.len() / tile.panels;
        let place = Place {
            out: self.out,
            first: tile.row * self.stride + first,
            stride: self.stride,
            len,
            add: self.add,
        };
        debug_assert!(rows > 0);
        let bias = self.bias.map_or(&[][..], |bias| &bias[first..first + len]);
        store(isa, tile.sums, tile.panels, bias, place);
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
fn store_body(sums: &[[f32; LANES]], panels: usize, bias: &[f32], place: Place) {
    for (index, sums) in sums.chunks_exact(panels).enumerate() {
        let values = &sums.as_flattened()[..place.len];
        // SAFETY: each (row, feature) belongs to one tile of the dispatch.
        let out = unsafe { place.out.range(place.first + index * place.stride, place.len) };
        let (out_lanes, out_rest) = out.as_chunks_mut::<LANES>();
        let (value_lanes, value_rest) = values.as_chunks::<LANES>();
        let (bias_lanes, bias_rest) = bias.as_chunks::<LANES>();
        for (panel, (out, values)) in out_lanes.iter_mut().zip(value_lanes).enumerate() {
            let mut values = *values;
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
        for (lane, (out, &value)) in out_rest.iter_mut().zip(value_rest).enumerate() {
            let value = value + bias_rest.get(lane).copied().unwrap_or(0.0);
            *out = if place.add { value + *out } else { value };
        }
    }
}

versions! {
    /// Writes the rows of a tile.
    fn store(sums: &[[f32; LANES]], panels: usize, bias: &[f32], place: Place) = store_body;
}

/// Operand or values that a gated product writes.
#[derive(Clone, Copy)]
pub struct Gated {
    /// The rows.
    pub store: Store,
    /// Elements from row to row, a multiple of the lanes.
    pub stride: usize,
}

impl Gated {
    /// Writes `silu(gate) * up` of a tile whose panels alternate between the two. Whole lanes are written:
    /// padded features are zero, and the rows are wide enough.
    pub fn store(&self, isa: Isa, tile: Finished<'_>) {
        let first = tile.row * self.stride + tile.panel / 2 * PANEL;
        match self.store {
            Store::F32(out) => gate_f32(isa, tile.sums, tile.panels, out, (first, self.stride)),
            Store::Bf16(out) => gate_bf16(isa, tile.sums, tile.panels, out, (first, self.stride)),
            Store::Int8(..) => panic!("a part of a quantised row cannot be written"),
        }
    }
}

#[inline(always)]
fn gate_rows<T: Copy>(
    sums: &[[f32; LANES]],
    panels: usize,
    out: Scattered<T>,
    (first, stride): (usize, usize),
    convert: impl Fn(f32) -> T,
) {
    for (index, sums) in sums.chunks_exact(panels).enumerate() {
        // SAFETY: each (row, feature) belongs to one tile of the dispatch.
        let out = unsafe { out.range(first + index * stride, panels / 2 * LANES) };
        for (out, pair) in out.chunks_exact_mut(LANES).zip(sums.as_chunks::<2>().0) {
            for lane in 0..LANES {
                let (gate, up) = (pair[0][lane], pair[1][lane]);
                out[lane] = convert(gate / (1.0 + lanes::exponential(-gate)) * up);
            }
        }
    }
}

#[inline(always)]
fn gate_f32_body(sums: &[[f32; LANES]], panels: usize, out: Scattered<f32>, place: (usize, usize)) {
    gate_rows(sums, panels, out, place, |value| value);
}

#[inline(always)]
fn gate_bf16_body(sums: &[[f32; LANES]], panels: usize, out: Scattered<u16>, place: (usize, usize)) {
    gate_rows(sums, panels, out, place, lanes::bf16_bits);
}

versions! {
    /// Gated values in f32.
    fn gate_f32(sums: &[[f32; LANES]], panels: usize, out: Scattered<f32>, place: (usize, usize)) = gate_f32_body;
}

versions! {
    /// Gated values in bf16.
    fn gate_bf16(
        sums: &[[f32; LANES]],
        panels: usize,
        out: Scattered<u16>,
        place: (usize, usize),
    ) = gate_bf16_body;
}
