//! Products of 4-bit weights with rows in 8 bits.
//!
//! A row's sum over a group of columns is a whole number, exactly; it is multiplied with the group's scale and added
//! in the order of the groups: `sum = fma(whole number, scale, sum)`. So it does not matter to the bytes how the whole
//! numbers are found: with few rows straight from the codes (`tile_uint4.rs`), else from codes that are widened to 8
//! bits, a pair of panels at a time, and multiplied as 8-bit weights are. The scheme of whole-number groups is that of
//! llama.cpp's `Q4` products; 4-bit floats are doubled, which makes whole numbers of them.

use super::arena::Activation;
use super::forms::Forms;
use super::lanes::versions;
use super::linear::{Area, Block, Finished, Scales, TASK_ROWS, share};
use super::pack::{Matrix, MatrixSource, PANEL};
use super::tile::{LANES, Sums, TILE_PANELS, TILE_SEGMENTS, Tile};
#[cfg(target_arch = "x86_64")]
use super::tile_uint4;
use crate::coded::{CodeKind, Zeros, e2m1_doubled};
use crate::isa::Isa;
use crate::pool::{Pool, Scattered};
use crate::tensor::Aligned;

/// Columns of a word of 32 bits of a lane: byte `j` holds columns `j` and `4 + j`, the first in its low half.
pub const WORD_COLUMNS: usize = 8;
/// Bytes of a panel's word.
const WORD_BYTES: usize = 4 * LANES;
/// Greatest zero: a code less a zero has to fit into 8 bits.
const ZERO_MAX: i16 = 128;
/// Rows whose sums take little memory to clear.
const FEW_ROWS: usize = 24;
/// The scales of features, where those are in the sums already.
static ONES: [[f32; LANES]; TILE_PANELS] = [[1.0; LANES]; TILE_PANELS];

/// Whether these zeros can be packed.
pub fn takes(zeros: &Zeros) -> bool {
    let fits = |zero: &i16| (0..=ZERO_MAX).contains(zero);
    match zeros {
        Zeros::Same(zero) => fits(zero),
        Zeros::Each(zeros) => zeros.iter().all(fits),
    }
}

/// Panels of 4-bit codes.
#[derive(Debug)]
pub struct Grouped {
    /// [`CodeKind::Uint4`] or [`CodeKind::E2m1`].
    pub kind: CodeKind,
    /// Words in a group; all of a panel where there is one group.
    pub words: usize,
    /// Words in a panel.
    pub panel_words: usize,
    /// `[panels][words][16][4]`
    pub codes: Aligned<u8>,
    /// `[panels][groups][16]`; of 4-bit floats half of their scales.
    pub scales: Aligned<f32>,
    /// `[panels][groups][16]`
    pub zeros: Aligned<u8>,
}

impl Grouped {
    /// Packs the codes of a source, panel by panel on all threads. Padded rows and columns have the value zero.
    pub fn pack(
        pool: &mut Pool,
        source: &MatrixSource<'_, '_>,
        (rows, columns): (usize, usize),
        (kind, group): (CodeKind, usize),
    ) -> Self {
        let (panels, panel_words) = (rows.div_ceil(PANEL), columns.div_ceil(WORD_COLUMNS));
        let words = if group >= columns { panel_words } else { group / WORD_COLUMNS };
        let groups = panel_words.div_ceil(words);
        let mut packed = Self {
            kind,
            words,
            panel_words,
            codes: Aligned::zeroed(panels * panel_words * WORD_BYTES),
            scales: Aligned::zeroed(panels * groups * LANES),
            zeros: Aligned::zeroed(panels * groups * LANES),
        };
        let codes = Scattered::new(&mut packed.codes);
        let (scales, zeros) = (Scattered::new(&mut packed.scales), Scattered::new(&mut packed.zeros));
        let (size, side) = (panel_words * WORD_BYTES, groups * LANES);
        pool.run(panels, |_, panel| {
            let mut raw = vec![0_u8; columns];
            // SAFETY: each panel belongs to one task.
            let (codes, scales, zeros) = unsafe {
                let side = (scales.range(panel * side, side), zeros.range(panel * side, side));
                (codes.range(panel * size, size), side.0, side.1)
            };
            for lane in 0..PANEL {
                let Some((coded, row)) = source.codes_of(panel * PANEL + lane) else { continue };
                coded.read_codes(row, &mut raw);
                for group in 0..groups {
                    // A part of one group has the same scale in all.
                    let of = group.min(coded.groups() - 1);
                    let half = if kind == CodeKind::E2m1 { 0.5 } else { 1.0 };
                    scales[group * LANES + lane] = coded.scale(row, of) * half;
                    zeros[group * LANES + lane] = coded.zero(row, of) as u8;
                }
                for (word, raw) in raw.chunks(WORD_COLUMNS).enumerate() {
                    let out = &mut codes[word * WORD_BYTES + 4 * lane..][..4];
                    for (column, &code) in raw.iter().enumerate() {
                        out[column % 4] |= code << (column / 4 * 4);
                    }
                }
            }
        });
        packed
    }

    /// Groups of a panel.
    pub fn groups(&self) -> usize {
        self.panel_words.div_ceil(self.words)
    }

    /// Bytes that one use of the whole matrix reads.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.len() * 4 + self.zeros.len()
    }

    /// Writes the weights of one output feature.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        for (column, out) in out.iter_mut().enumerate() {
            let (word, inside) = (column / WORD_COLUMNS, column % WORD_COLUMNS);
            let byte = self.codes[(panel * self.panel_words + word) * WORD_BYTES + 4 * lane + inside % 4];
            let code = byte >> (inside / 4 * 4) & 15;
            let at = (panel * self.groups() + word / self.words) * LANES + lane;
            let whole = match self.kind {
                CodeKind::E2m1 => i32::from(e2m1_doubled(code)),
                _ => i32::from(code) - i32::from(self.zeros[at]),
            };
            *out = whole as f32 * self.scales[at];
        }
    }
}

/// Multiplies a block, tile by tile; calls `sink` before each tile and with what it gave.
pub fn multiply(
    (forms, thread): (Forms, usize),
    (matrix, codes): (&Matrix, &Grouped),
    x: &Activation,
    block: Block,
    sink: impl Fn(Area, Option<Finished<'_>>),
) {
    #[cfg(target_arch = "x86_64")]
    if block.rows.1 - block.rows.0 <= tile_uint4::ROWS && forms.isa >= Isa::Avx512 {
        return multiply_few((matrix, codes), x, &block, sink);
    }
    let product = Widened { forms, matrix, codes, x };
    let len = forms.widened_len;
    // SAFETY: the memory is this thread's.
    let widened = unsafe { forms.widened.range(thread * len, len) };
    let mut panel = block.panels.0;
    while panel < block.panels.1 {
        let panels = (block.panels.1 - panel).min(2);
        for index in 0..panels {
            let size = codes.panel_words * 2 * WORD_BYTES;
            product.widen(panel + index, &mut widened[index * size..][..size]);
        }
        let pair = (panel, panels);
        if block.rows.1 - block.rows.0 <= FEW_ROWS {
            product.pair::<{ 2 * FEW_ROWS }>(pair, widened, block.rows, &sink);
        } else {
            product.pair::<{ 2 * TASK_ROWS }>(pair, widened, block.rows, &sink);
        }
        panel += panels;
    }
}

/// Few rows: straight from the codes.
#[cfg(target_arch = "x86_64")]
fn multiply_few(
    (matrix, codes): (&Matrix, &Grouped),
    x: &Activation,
    block: &Block,
    sink: impl Fn(Area, Option<Finished<'_>>),
) {
    let left = x.codes();
    assert!(x.stride >= matrix.columns_padded, "operand rows hold the padding");
    let (start, end) = block.rows;
    let mut sums = Sums::ZERO;
    let mut panel = block.panels.0;
    while panel < block.panels.1 {
        let panels = match block.panels.1 - panel {
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let area = Area { row: start, rows: end - start, panel, panels };
        sink(area, None);
        // SAFETY: the processor has the instructions (asked before), and the operands these rows and panels.
        unsafe {
            let rows = left.codes.as_ptr().add(start * x.stride);
            tile_uint4::tile((rows, x.stride, end - start), codes, (panel, panels), &mut sums.0);
        }
        let scales = Scales { offsets: None, features: &ONES[..panels], rows: &left.scales[start..end] };
        sink(area, Some(Finished { sums: &sums.0[..(end - start) * panels], panels, scales: Some(scales) }));
        panel += panels;
    }
}

/// A product whose codes are widened.
struct Widened<'a> {
    forms: Forms,
    matrix: &'a Matrix,
    codes: &'a Grouped,
    x: &'a Activation,
}

impl Widened<'_> {
    /// Widens a panel to `[words * 2][16][4]`.
    fn widen(&self, panel: usize, out: &mut [i8]) {
        let Grouped { words, panel_words, .. } = *self.codes;
        let groups = self.codes.groups();
        let codes = &self.codes.codes[panel * panel_words * WORD_BYTES..][..panel_words * WORD_BYTES];
        let zeros = &self.codes.zeros[panel * groups * LANES..][..groups * LANES];
        let isa = self.forms.isa;
        for (group, zeros) in zeros.as_chunks::<LANES>().0.iter().enumerate() {
            let from = group * words * WORD_BYTES;
            let codes = &codes[from..codes.len().min(from + words * WORD_BYTES)];
            let out = &mut out[2 * from..][..2 * codes.len()];
            match self.codes.kind {
                CodeKind::E2m1 => widen_floats(isa, codes, out),
                _ => widen_codes(isa, codes, zeros, out),
            }
        }
    }

    /// Multiplies all rows with a pair of panels, group by group; `SUMS` is at least the panels of all rows.
    fn pair<const SUMS: usize>(
        &self,
        (panel, panels): (usize, usize),
        widened: &[i8],
        (start, end): (usize, usize),
        sink: &impl Fn(Area, Option<Finished<'_>>),
    ) {
        let left = self.x.codes();
        assert!(self.x.stride >= self.matrix.columns_padded, "operand rows hold the padding");
        let count = (end - start).div_ceil(self.forms.int8_rows);
        let groups = self.codes.groups();
        let scales = self.codes.scales.as_chunks::<LANES>().0;
        let tiles = || (0..count).map(|index| share(end - start, count, index));
        let mut totals = [[0.0; LANES]; SUMS];
        for group in 0..groups {
            let (mut sums, mut offsets) = (Sums::ZERO, Sums::ZERO);
            self.group(widened, (group, panels), (ONES_128.0.as_ptr().cast(), 1), &mut offsets);
            let scales = [panel * groups + group, (panel + panels - 1) * groups + group].map(|at| scales[at]);
            for (row, rows) in tiles() {
                let a = left.codes[(start + row) * self.x.stride..].as_ptr().cast();
                self.group(widened, (group, panels), (a, rows), &mut sums);
                let totals = &mut totals[row * panels..][..rows * panels];
                add(self.forms.isa, totals, &sums.0, (&offsets.0, &scales[..panels]));
            }
        }
        for (row, rows) in tiles() {
            let area = Area { row: start + row, rows, panel, panels };
            sink(area, None);
            let rows_scales = &left.scales[area.row..area.row + rows];
            let scales = Scales { offsets: None, features: &ONES[..panels], rows: rows_scales };
            let sums = &totals[row * panels..][..rows * panels];
            sink(area, Some(Finished { sums, panels, scales: Some(scales) }));
        }
    }

    /// Whole sums of a group, in pieces that the row of ones is long enough for.
    fn group(
        &self,
        widened: &[i8],
        (group, panels): (usize, usize),
        (a, rows): (*const u32, usize),
        sums: &mut Sums,
    ) {
        let (panel_words, words) = (2 * self.codes.panel_words, 2 * self.codes.words);
        let (first, end) = (group * words, panel_words.min((group + 1) * words));
        let of_ones = std::ptr::eq(a, ONES_128.0.as_ptr().cast());
        for start in (first..end).step_by(ONES_WORDS) {
            let mut pointers = [widened.as_ptr().cast::<u32>(); TILE_PANELS];
            for (index, pointer) in pointers.iter_mut().enumerate().take(panels) {
                *pointer = widened[(index * panel_words + start) * WORD_BYTES..].as_ptr().cast();
            }
            let tile = Tile {
                a: if of_ones { a } else { a.wrapping_add(start) },
                a_stride: self.x.stride / 4,
                rows,
                b: [pointers; TILE_SEGMENTS],
                segments: 1,
                b_stride: LANES,
                panels,
                groups: ONES_WORDS.min(end - start),
                sums_stride: panels,
                accumulate: start > first,
                next: [pointers; TILE_SEGMENTS],
                later: pointers[0],
            };
            // SAFETY: the operands span these rows, panels and words, and the processor has the instructions.
            unsafe { (self.forms.int8_tile)(&tile, sums.0.as_mut_ptr()) };
        }
    }
}

/// Words of 32 bits of the row of ones.
const ONES_WORDS: usize = 64;

/// A row whose codes are all 128: its product is what the offset of 128 adds.
#[repr(align(64))]
struct Row([u8; 4 * ONES_WORDS]);

static ONES_128: Row = Row([128; 4 * ONES_WORDS]);

#[inline(always)]
fn widen_codes_body(codes: &[u8], zeros: &[u8; LANES], out: &mut [i8]) {
    let mut less = [0_u8; WORD_BYTES];
    for (index, less) in less.iter_mut().enumerate() {
        *less = zeros[index / 4];
    }
    let codes = codes.as_chunks::<WORD_BYTES>().0;
    for (codes, out) in codes.iter().zip(out.as_chunks_mut::<{ 2 * WORD_BYTES }>().0) {
        let (low, high) = out.split_at_mut(WORD_BYTES);
        for index in 0..WORD_BYTES {
            low[index] = (codes[index] & 15).wrapping_sub(less[index]).cast_signed();
            high[index] = (codes[index] >> 4).wrapping_sub(less[index]).cast_signed();
        }
    }
}

versions! {
    /// Codes less zeros, of words `[16][4]` of pairs.
    fn widen_codes(codes: &[u8], zeros: &[u8; LANES], out: &mut [i8]) = widen_codes_body;
}

#[inline(always)]
fn widen_floats_body(codes: &[u8], out: &mut [i8]) {
    let codes = codes.as_chunks::<WORD_BYTES>().0;
    for (codes, out) in codes.iter().zip(out.as_chunks_mut::<{ 2 * WORD_BYTES }>().0) {
        let (low, high) = out.split_at_mut(WORD_BYTES);
        for index in 0..WORD_BYTES {
            low[index] = e2m1_doubled(codes[index] & 15);
            high[index] = e2m1_doubled(codes[index] >> 4);
        }
    }
}

versions! {
    /// Twice the values of 4-bit floats.
    fn widen_floats(codes: &[u8], out: &mut [i8]) = widen_floats_body;
}

#[inline(always)]
fn add_body(totals: &mut [[f32; LANES]], sums: &[[f32; LANES]], (offsets, scales): Group<'_>) {
    for (index, (total, sum)) in totals.iter_mut().zip(sums).enumerate() {
        let panel = index % scales.len();
        for lane in 0..LANES {
            let whole = sum[lane].to_bits().wrapping_sub(offsets[panel][lane].to_bits()).cast_signed();
            total[lane] = (whole as f32).mul_add(scales[panel][lane], total[lane]);
        }
    }
}

/// What an offset of 128 adds to the whole numbers of a group, and its scales, panel by panel.
type Group<'a> = (&'a [[f32; LANES]], &'a [[f32; LANES]]);

versions! {
    /// Adds a group's whole numbers, scaled.
    fn add(totals: &mut [[f32; LANES]], sums: &[[f32; LANES]], group: Group<'_>) = add_body;
}
