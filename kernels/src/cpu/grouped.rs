//! 4-bit codes with scales for groups of columns, packed into panels.

use super::source::{MatrixSource, PANEL};
use super::tile::LANES;
use crate::coded::{CodeKind, Zeros, e2m1_doubled};
use crate::pool::{Pool, Scattered};
use crate::tensor::Aligned;

/// Columns of a word of 32 bits of a lane: byte `j` holds columns `j` and `4 + j`, the first in its low half.
pub const WORD_COLUMNS: usize = 8;
/// Bytes of a panel's word.
pub const WORD_BYTES: usize = 4 * LANES;
/// Greatest zero: a code less a zero has to fit into 8 bits.
const ZERO_MAX: i16 = 128;
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
