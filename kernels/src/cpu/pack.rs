//! Weights packed for the matrix products, and taken apart again.
//!
//! A matrix of `rows` output features and `columns` input features becomes panels of [`PANEL`] rows. Inside a
//! panel, groups of columns (1 in f32, 2 in bf16 and f16, 4 in int8) lie next to each other for each row, which is the
//! operand that `vdpbf16ps`, `vpdpbusd` and the AMX tile products read. Missing rows and columns are zero.
//! Int8 weights are symmetric with one scale per output feature; f16 weights have a power of two. Codes that a
//! checkpoint brings are kept as they are where a product can read them (`keep`), and else packed by their values.

use half::f16;

use super::grouped::{self, Grouped};
use super::lanes;
use super::source::{MatrixSource, PANEL};
use super::tile::{Held, RIGHT_TOP};
use crate::coded::{CodeKind, Coded, Zeros};
use crate::pool::{Pool, Scattered};
use crate::tensor::{Aligned, LoadError};

/// A packed weight matrix.
#[derive(Debug)]
pub struct Matrix {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Input features per panel row, zero padding included.
    pub columns_padded: usize,
    /// The panels.
    pub panels: Panels,
}

/// Panels in one of the forms that weights are held in.
#[derive(Debug)]
pub enum Panels {
    /// `[rows / 16][columns][16]`
    F32(Aligned<f32>),
    /// `[rows / 16][columns / 2][16][2]`, bf16 bits
    Bf16(Aligned<u16>),
    /// Scaled.
    F16 {
        /// `[rows / 16][columns / 2][16][2]`, f16 bits
        halves: Aligned<u16>,
        /// Per output feature: weight = half * scale, a power of two.
        scales: Aligned<f32>,
    },
    /// Quantised.
    Int8 {
        /// `[rows / 16][columns / 4][16][4]`
        codes: Aligned<i8>,
        /// Per output feature: weight = code * scale.
        scales: Aligned<f32>,
        /// Per output feature: 128 times the sum of its codes, which an offset of 128 on the activations adds.
        offsets: Aligned<i32>,
    },
    /// 4-bit codes with scales for groups of columns.
    Grouped(Grouped),
}

impl Matrix {
    /// Bytes of weights that one use of the whole matrix reads.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => panels.len() * 4,
            Panels::Bf16(panels) => panels.len() * 2,
            Panels::F16 { halves, scales } => halves.len() * 2 + scales.len() * 4,
            Panels::Int8 { codes, scales, offsets } => codes.len() + scales.len() * 4 + offsets.len() * 4,
            Panels::Grouped(grouped) => grouped.bytes(),
        }
    }

    /// Panels of `PANEL` rows.
    pub fn panel_count(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Writes the weights of one output feature.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns, "row {row} of {}", self.rows);
        let elements = self.columns_padded * PANEL;
        let (start, lane) = (row / PANEL * elements, row % PANEL);
        match &self.panels {
            Panels::Grouped(grouped) => grouped.read_row(row, out),
            Panels::F32(panels) => {
                let panel = &panels[start..start + elements];
                out.iter_mut().zip(panel.chunks_exact(PANEL)).for_each(|(out, group)| *out = group[lane]);
            }
            Panels::Bf16(panels) => {
                let panel = &panels[start..start + elements];
                for (out, group) in out.chunks_mut(2).zip(panel.chunks_exact(2 * PANEL)) {
                    for (out, &bits) in out.iter_mut().zip(&group[2 * lane..]) {
                        *out = lanes::bf16_value(bits);
                    }
                }
            }
            Panels::F16 { halves, scales } => {
                let panel = &halves[start..start + elements];
                for (out, group) in out.chunks_mut(2).zip(panel.chunks_exact(2 * PANEL)) {
                    for (out, &bits) in out.iter_mut().zip(&group[2 * lane..]) {
                        *out = f16::from_bits(bits).to_f32() * scales[row];
                    }
                }
            }
            Panels::Int8 { codes, scales, .. } => {
                let panel = &codes[start..start + elements];
                for (out, group) in out.chunks_mut(4).zip(panel.chunks_exact(4 * PANEL)) {
                    for (out, &code) in out.iter_mut().zip(&group[4 * lane..]) {
                        *out = f32::from(code) * scales[row];
                    }
                }
            }
        }
    }
}

/// Codes that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptCodes {
    /// 8 bits with a scale for each row.
    Int8,
    /// 4 bits of this kind, with a scale for each row and each group of this many columns.
    Grouped(CodeKind, usize),
}

/// Whether a product can read a source's codes as they are, multiplied with rows in 8 bits: all parts are of one form,
/// whole numbers of 8 bits with a scale a row, or 4 bits in groups of a multiple of 8 columns (as many as a row has).
pub fn keep(source: &MatrixSource<'_, '_>) -> Option<KeptCodes> {
    let parts = source.coded()?;
    let (kind, group) = parts.first().map(|first| (first.kind, first.block.1))?;
    let of_one_form = |part: &&Coded<'_>| {
        part.kind == kind && (part.block.1 == group || part.groups() == 1) && part.order.is_empty()
    };
    if !parts.iter().all(of_one_form) {
        return None;
    }
    let whole = parts.iter().all(|part| part.groups() == 1);
    let zeros_are = |zero: i16| parts.iter().all(|part| part.zeros == Zeros::Same(zero));
    let kept = match kind {
        CodeKind::Int8 if whole && zeros_are(0) => KeptCodes::Int8,
        CodeKind::Uint8 if whole && zeros_are(128) => KeptCodes::Int8,
        CodeKind::E2m1 if zeros_are(0) => KeptCodes::Grouped(kind, group),
        CodeKind::Uint4 if parts.iter().all(|part| grouped::takes(&part.zeros)) => {
            KeptCodes::Grouped(kind, group)
        }
        _ => return None,
    };
    let words = |columns: usize| columns.is_multiple_of(grouped::WORD_COLUMNS);
    let fits = kept == KeptCodes::Int8 || words(parts[0].columns) && (whole || words(group));
    fits.then_some(kept)
}

/// Packs kept codes.
///
/// # Errors
/// When the parts do not fit together.
pub fn pack_kept(
    pool: &mut Pool,
    source: &MatrixSource<'_, '_>,
    kept: KeptCodes,
) -> Result<Matrix, LoadError> {
    let (rows, columns) = source.shape()?;
    let rows_padded = rows.next_multiple_of(PANEL);
    let (kind, group) = match kept {
        KeptCodes::Grouped(kind, group) => (kind, group),
        KeptCodes::Int8 => {
            let columns_padded = columns.next_multiple_of(Held::Int8.group());
            let mut codes = Aligned::zeroed(rows_padded * columns_padded);
            let (mut scales, mut offsets) = (Aligned::zeroed(rows_padded), Aligned::zeroed(rows_padded));
            let (all, size) = (Scattered::new(&mut codes), columns_padded * PANEL);
            let (row_scales, row_offsets) = (Scattered::new(&mut scales), Scattered::new(&mut offsets));
            pool.run(rows.div_ceil(PANEL), |_, panel| {
                let mut raw = vec![0; columns];
                for row in panel * PANEL..rows.min((panel + 1) * PANEL) {
                    let Some((coded, at)) = source.codes_of(row) else { continue };
                    coded.read_codes(at, &mut raw);
                    let turn = if coded.kind == CodeKind::Uint8 { 128 } else { 0 };
                    raw.iter_mut().for_each(|code| *code ^= turn);
                    let sum: i32 = raw.iter().map(|code| i32::from(code.cast_signed())).sum();
                    // SAFETY: each panel and each row belongs to one task.
                    unsafe {
                        spread(&raw, all.range(panel * size, size), (row % PANEL, 4), |code| {
                            code.cast_signed()
                        });
                        row_scales.range(row, 1)[0] = coded.scale(at, 0);
                        row_offsets.range(row, 1)[0] = 128 * sum;
                    }
                }
            });
            return Ok(Matrix {
                rows,
                columns,
                columns_padded,
                panels: Panels::Int8 { codes, scales, offsets },
            });
        }
    };
    let grouped = Grouped::pack(pool, source, (rows, columns), (kind, group));
    let columns_padded = columns.next_multiple_of(grouped::WORD_COLUMNS);
    Ok(Matrix { rows, columns, columns_padded, panels: Panels::Grouped(grouped) })
}

/// Packs a matrix, panel by panel on all threads.
///
/// # Errors
/// When the parts do not fit together.
pub fn pack(pool: &mut Pool, source: &MatrixSource<'_, '_>, held: Held) -> Result<Matrix, LoadError> {
    let (rows, columns) = source.shape()?;
    let columns_padded = columns.next_multiple_of(held.group());
    let rows_padded = rows.next_multiple_of(PANEL);
    let elements = rows_padded * columns_padded;
    let mut panels = match held {
        Held::F32 => Panels::F32(Aligned::zeroed(elements)),
        Held::Bf16 => Panels::Bf16(Aligned::zeroed(elements)),
        Held::F16 => Panels::F16 { halves: Aligned::zeroed(elements), scales: Aligned::zeroed(rows_padded) },
        Held::Int8 => Panels::Int8 {
            codes: Aligned::zeroed(elements),
            scales: Aligned::zeroed(rows_padded),
            offsets: Aligned::zeroed(rows_padded),
        },
    };
    let size = columns_padded * PANEL;
    let mut each =
        |fill: &(dyn Fn(usize, usize, &[f32]) + Sync)| each_row(pool, source, (rows, columns), fill);
    match &mut panels {
        Panels::Grouped(_) => unreachable!("they are packed by `pack_kept`"),
        Panels::F32(panels) => each(&plain(Scattered::new(panels), (size, 1), |value| value)),
        Panels::Bf16(panels) => each(&plain(Scattered::new(panels), (size, 2), lanes::bf16_bits)),
        Panels::F16 { halves, scales } => {
            let (halves, scales) = (Scattered::new(halves), Scattered::new(scales));
            let fill = |panel: usize, row: usize, values: &[f32]| {
                let (scale, inverse) = lanes::binary_scale(values, RIGHT_TOP);
                let half = |value: f32| lanes::f16_bits(value * inverse);
                // SAFETY: each panel and each row belongs to one task.
                unsafe {
                    spread(values, halves.range(panel * size, size), (row % PANEL, 2), half);
                    scales.range(row, 1)[0] = scale;
                }
            };
            each(&fill);
        }
        Panels::Int8 { codes, scales, offsets } => {
            let (codes, scales, offsets) =
                (Scattered::new(codes), Scattered::new(scales), Scattered::new(offsets));
            let fill = |panel: usize, row: usize, values: &[f32]| {
                let maximum = values.iter().fold(0.0_f32, |a, &b| a.max(b.abs()));
                let inverse = if maximum > 0.0 { 127.0 / maximum } else { 0.0 };
                // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
                let code = |value: f32| (value * inverse + 12_582_912.0).to_bits() as i8;
                // SAFETY: each panel and each row belongs to one task.
                unsafe {
                    spread(values, codes.range(panel * size, size), (row % PANEL, 4), code);
                    scales.range(row, 1)[0] = maximum / 127.0;
                    offsets.range(row, 1)[0] =
                        values.iter().map(|&value| i32::from(code(value))).sum::<i32>() * 128;
                }
            };
            each(&fill);
        }
    }
    Ok(Matrix { rows, columns, columns_padded, panels })
}

/// Calls `fill` with each row's panel, number and values, panel by panel on all threads.
fn each_row(
    pool: &mut Pool,
    source: &MatrixSource<'_, '_>,
    (rows, columns): (usize, usize),
    fill: &(dyn Fn(usize, usize, &[f32]) + Sync),
) {
    pool.run(rows.div_ceil(PANEL), |_, panel| {
        let mut values = vec![0.0_f32; columns];
        for row in panel * PANEL..rows.min((panel + 1) * PANEL) {
            source.read_row(row, &mut values);
            fill(panel, row, &values);
        }
    });
}

/// Fills panels of `size` elements without scales.
fn plain<T: Send>(
    panels: Scattered<T>,
    (size, group): (usize, usize),
    convert: impl Fn(f32) -> T + Sync,
) -> impl Fn(usize, usize, &[f32]) + Sync {
    move |panel, row, values| {
        // SAFETY: each panel belongs to one task.
        let panel = unsafe { panels.range(panel * size, size) };
        spread(values, panel, (row % PANEL, group), &convert);
    }
}

/// Writes a row of values into its lane of a panel with `group` adjacent columns.
fn spread<V: Copy, T>(
    values: &[V],
    panel: &mut [T],
    (lane, group): (usize, usize),
    convert: impl Fn(V) -> T,
) {
    for (values, out) in values.chunks(group).zip(panel.chunks_exact_mut(group * PANEL)) {
        for (&value, out) in values.iter().zip(&mut out[group * lane..]) {
            *out = convert(value);
        }
    }
}
