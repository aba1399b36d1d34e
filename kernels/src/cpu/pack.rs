//! Weights packed for the matrix products, and taken apart again.
//!
//! A matrix of `rows` output features and `columns` input features becomes panels of [`PANEL`] rows. Inside a
//! panel, groups of columns (1 in f32, 2 in bf16, 4 in int8) lie next to each other for each row, which is the
//! operand that `vdpbf16ps`, `vpdpbusd` and the AMX tile products read. Missing rows and columns are zero.
//! Int8 weights are symmetric with one scale per output feature.

use half::bf16;

use super::Precision;
use crate::tensor::{Aligned, HostTensor, LoadError};

/// Output features in a panel: the f32 lanes of one AVX-512 register.
pub const PANEL: usize = 16;

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

/// Panels in one of the three precisions.
#[derive(Debug)]
pub enum Panels {
    /// `[rows / 16][columns][16]`
    F32(Aligned<f32>),
    /// `[rows / 16][columns / 2][16][2]`, bf16 bits
    Bf16(Aligned<u16>),
    /// Quantised.
    Int8 {
        /// `[rows / 16][columns / 4][16][4]`
        codes: Aligned<i8>,
        /// Per output feature: weight = code * scale.
        scales: Aligned<f32>,
        /// Per output feature: 128 times the sum of its codes, which an offset of 128 on the activations adds.
        offsets: Aligned<i32>,
    },
}

/// Position of an element in panels with `group` adjacent columns.
pub fn index(row: usize, column: usize, columns_padded: usize, group: usize) -> usize {
    let panel = (row / PANEL) * columns_padded * PANEL;
    panel + (column / group) * PANEL * group + (row % PANEL) * group + column % group
}

impl Matrix {
    /// Bytes of weights that one use of the whole matrix reads.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => panels.len() * 4,
            Panels::Bf16(panels) => panels.len() * 2,
            Panels::Int8 { codes, scales, offsets } => codes.len() + scales.len() * 4 + offsets.len() * 4,
        }
    }

    /// Panels of [`PANEL`] rows.
    pub fn panel_count(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Writes the weights of one output feature.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns, "row {row} of {}", self.rows);
        for (column, out) in out.iter_mut().enumerate() {
            *out = match &self.panels {
                Panels::F32(panels) => panels[index(row, column, self.columns_padded, 1)],
                Panels::Bf16(panels) => {
                    bf16::from_bits(panels[index(row, column, self.columns_padded, 2)]).to_f32()
                }
                Panels::Int8 { codes, scales, .. } => {
                    f32::from(codes[index(row, column, self.columns_padded, 4)]) * scales[row]
                }
            };
        }
    }
}

/// Where the rows of a packed matrix come from.
pub enum Source<'a, 'b> {
    /// Parts one after the other.
    Stacked(&'a [HostTensor<'b>]),
    /// Sixteen rows of the gate, sixteen of the up projection, and so on; a last partial sixteen is padded
    /// with zeros, so that gate and up of a feature always lie in neighbouring panels.
    Gated(&'a HostTensor<'b>, &'a HostTensor<'b>),
}

impl Source<'_, '_> {
    /// Packed rows and columns.
    pub fn shape(&self) -> Result<(usize, usize), LoadError> {
        match self {
            Source::Stacked(parts) => {
                let (mut rows, columns) = parts.first().ok_or(LoadError::Empty)?.matrix_shape()?;
                for part in &parts[1..] {
                    let (more, found) = part.matrix_shape()?;
                    if found != columns {
                        return Err(LoadError::Columns { expected: columns, found });
                    }
                    rows += more;
                }
                Ok((rows, columns))
            }
            Source::Gated(gate, up) => {
                let (gate_rows, columns) = gate.matrix_shape()?;
                let (up_rows, found) = up.matrix_shape()?;
                if found != columns {
                    return Err(LoadError::Columns { expected: columns, found });
                }
                if gate_rows != up_rows {
                    return Err(LoadError::Gate { gate: gate_rows, up: up_rows });
                }
                Ok((gate_rows.next_multiple_of(PANEL) * 2, columns))
            }
        }
    }

    /// Reads a packed row; rows of padding are zero.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Source::Stacked(parts) => {
                let mut row = row;
                for part in *parts {
                    let rows = part.shape()[0];
                    if row < rows {
                        return part.read_f32(row * out.len(), out);
                    }
                    row -= rows;
                }
                unreachable!("row is below the sum of the parts' rows");
            }
            Source::Gated(gate, up) => {
                let part = if (row / PANEL).is_multiple_of(2) { gate } else { up };
                let feature = row / (2 * PANEL) * PANEL + row % PANEL;
                if feature < part.shape()[0] {
                    part.read_f32(feature * out.len(), out);
                } else {
                    out.fill(0.0);
                }
            }
        }
    }
}

/// Packs a matrix.
///
/// # Errors
/// When the parts do not fit together.
pub fn pack(source: &Source<'_, '_>, precision: Precision) -> Result<Matrix, LoadError> {
    let (rows, columns) = source.shape()?;
    let group = precision.group();
    let columns_padded = columns.next_multiple_of(group);
    let elements = rows.next_multiple_of(PANEL) * columns_padded;
    let mut row_values = vec![0.0_f32; columns];
    let panels = match precision {
        Precision::F32 => {
            let mut panels = Aligned::<f32>::zeroed(elements);
            for row in 0..rows {
                source.read_row(row, &mut row_values);
                for (column, &value) in row_values.iter().enumerate() {
                    panels[index(row, column, columns_padded, group)] = value;
                }
            }
            Panels::F32(panels)
        }
        Precision::Bf16 => {
            let mut panels = Aligned::<u16>::zeroed(elements);
            for row in 0..rows {
                source.read_row(row, &mut row_values);
                for (column, &value) in row_values.iter().enumerate() {
                    panels[index(row, column, columns_padded, group)] = bf16::from_f32(value).to_bits();
                }
            }
            Panels::Bf16(panels)
        }
        Precision::Int8 => {
            let rows_padded = rows.next_multiple_of(PANEL);
            let mut codes = Aligned::<i8>::zeroed(elements);
            let mut scales = Aligned::<f32>::zeroed(rows_padded);
            let mut offsets = Aligned::<i32>::zeroed(rows_padded);
            for row in 0..rows {
                source.read_row(row, &mut row_values);
                let maximum = row_values.iter().fold(0.0_f32, |a, &b| a.max(b.abs()));
                let inverse = if maximum > 0.0 { 127.0 / maximum } else { 0.0 };
                let mut sum = 0_i32;
                for (column, &value) in row_values.iter().enumerate() {
                    let code = (value * inverse).round_ties_even() as i8;
                    codes[index(row, column, columns_padded, group)] = code;
                    sum += i32::from(code);
                }
                scales[row] = maximum / 127.0;
                offsets[row] = sum * 128;
            }
            Panels::Int8 { codes, scales, offsets }
        }
    };
    Ok(Matrix { rows, columns, columns_padded, panels })
}
