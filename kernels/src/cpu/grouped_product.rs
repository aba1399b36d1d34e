//! Products of 4-bit weights with rows in 8 bits.
//!
//! A row's sum over a group of columns is a whole number, exactly; it is multiplied with the group's scale and added
//! in the order of the groups: `sum = fma(whole number, scale, sum)`. So it does not matter to the bytes how the whole
//! numbers are found: with few rows straight from the codes (`tile_uint4.rs`), else from codes that are widened to 8
//! bits, a pair of panels at a time, and multiplied as 8-bit weights are. The scheme of whole-number groups is that of
//! llama.cpp's `Q4` products; 4-bit floats are doubled, which makes whole numbers of them.

use super::arena::Activation;
use super::blocks::{Area, Block, Finished, Scales, TASK_ROWS, share};
use super::forms::Forms;
use super::grouped::{Grouped, WORD_BYTES};
use super::lanes::versions;
use super::pack::Matrix;
use super::tile::{LANES, Sums, TILE_PANELS, TILE_SEGMENTS, Tile};
#[cfg(target_arch = "x86_64")]
use super::tile_uint4;
use crate::coded::{CodeKind, e2m1_doubled};
use crate::isa::Isa;

/// Rows whose sums take little memory to clear.
const FEW_ROWS: usize = 24;
/// The scales of features, where those are in the sums already.
static ONES: [[f32; LANES]; TILE_PANELS] = [[1.0; LANES]; TILE_PANELS];

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
