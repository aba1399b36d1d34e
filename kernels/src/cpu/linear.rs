//! Matrix products: tiles of a few rows and panels, spread over the threads, and what follows each tile.
//!
//! A task is a group of rows times a few panels, so that a task's weights are read once from memory and its
//! rows stay in the cache. All input features are added in one go; a sum is never split, whatever the number
//! of rows and threads.

use super::arena::{Activation, Rows};
use super::lanes;
use super::pack::{Matrix, PANEL, Panels};
use super::tile::{LANES, Sums, TILE_PANELS, TILE_ROWS, Tile, TileFn, WIDE_TILE_ROWS};
use crate::isa::Isa;
use crate::pool::{Pool, Scattered};

/// Rows of a task: their operands (240 rows of 2,048 bytes) fill half of a second-level cache of 1 MiB.
const TASK_ROWS: usize = 240;
/// Panels of a task.
const TASK_PANELS: usize = 4;

/// How tiles are computed here.
#[derive(Clone, Copy)]
pub struct Forms {
    /// Instructions of everything but the tile.
    pub isa: Isa,
    /// The tile product for the precision of weights.
    pub tile: TileFn,
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
    let columns = panels.div_ceil(TASK_PANELS);
    let groups = rows.div_ceil(TASK_ROWS);
    pool.run(columns * groups, |_, task| {
        let (group, column) = (task / columns, task % columns);
        let first_panel = column * TASK_PANELS;
        let block = Block {
            rows: (group * TASK_ROWS, rows.min((group + 1) * TASK_ROWS)),
            panels: (first_panel, panels.min(first_panel + TASK_PANELS)),
        };
        multiply(forms, matrix, x, block, &sink);
    });
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
        let count = (end - start).div_ceil(TILE_ROWS);
        for index in 0..count {
            let row = start + (end - start) * index / count;
            let rows = start + (end - start) * (index + 1) / count - row;
            let tile = Tile {
                // SAFETY: the row is one of the operand's rows.
                a: unsafe { a.add(row * a_stride) },
                a_stride,
                rows,
                b: pointers,
                b_stride: LANES,
                panels,
                groups,
                accumulate: false,
            };
            // SAFETY: the operands span these rows and panels (asserted in `operands`), and the processor has
            // the form's instructions.
            unsafe { (forms.tile)(&tile, sums.0.as_mut_ptr()) };
            let sums = &mut sums.0[..rows * panels];
            dequantise(forms.isa, matrix, x, (row, panel, panels), sums);
            sink(Finished { row, panel, panels, sums });
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
        for (index, sums) in tile.sums.chunks_exact_mut(tile.panels).enumerate() {
            let first = tile.panel * PANEL;
            let len = (tile.panels * PANEL).min(features - first);
            let sums = &mut sums.as_flattened_mut()[..len];
            // SAFETY: each (row, feature) belongs to one tile of the dispatch.
            let out = unsafe { self.out.range((tile.row + index) * self.stride + first, len) };
            if let Some(bias) = self.bias {
                lanes::add(isa, &bias[first..first + len], sums);
            }
            if self.add { lanes::add(isa, sums, out) } else { out.copy_from_slice(sums) }
        }
    }
}
