//! Where packed matrices come from: a host's tensors, stacked or gated, row by row.

use crate::coded::Coded;
use crate::tensor::{HostTensor, LoadError};

/// Output features in a panel: the f32 lanes of one AVX-512 register.
pub const PANEL: usize = 16;

/// Where the rows of a packed matrix come from.
pub enum MatrixSource<'a, 'b> {
    /// Parts one after the other.
    Stacked(&'a [HostTensor<'b>]),
    /// Sixteen rows of the gate, sixteen of the up projection, and so on; a last partial sixteen is padded
    /// with zeros, so that gate and up of a feature always lie in neighbouring panels.
    Gated(&'a HostTensor<'b>, &'a HostTensor<'b>),
}

impl MatrixSource<'_, '_> {
    /// Packed rows and columns.
    pub fn shape(&self) -> Result<(usize, usize), LoadError> {
        match self {
            MatrixSource::Stacked(parts) => {
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
            MatrixSource::Gated(gate, up) => {
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

    /// The part that a packed row is of, and its row there; none of padding.
    fn locate(&self, row: usize) -> Option<(&HostTensor<'_>, usize)> {
        match self {
            MatrixSource::Stacked(parts) => {
                let mut row = row;
                for part in *parts {
                    let rows = part.shape()[0];
                    if row < rows {
                        return Some((part, row));
                    }
                    row -= rows;
                }
                None
            }
            MatrixSource::Gated(gate, up) => {
                let part = if (row / PANEL).is_multiple_of(2) { gate } else { up };
                let feature = row / (2 * PANEL) * PANEL + row % PANEL;
                (feature < part.shape()[0]).then_some((*part, feature))
            }
        }
    }

    /// Reads a packed row; rows of padding are zero.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        match self.locate(row) {
            Some((part, row)) => part.read_f32(row * out.len(), out),
            None => out.fill(0.0),
        }
    }

    /// The codes that a packed row is of, and its row there; none of padding, or where the part has none.
    pub fn codes_of(&self, row: usize) -> Option<(&Coded<'_>, usize)> {
        let (part, row) = self.locate(row)?;
        part.as_coded().map(|(coded, first)| (coded, first + row))
    }

    /// Every part's codes; none where a part has none.
    pub fn coded(&self) -> Option<Vec<&Coded<'_>>> {
        let all = |parts: &mut dyn Iterator<Item = Option<_>>| parts.collect();
        match self {
            MatrixSource::Stacked(parts) => {
                all(&mut parts.iter().map(|part| part.as_coded().map(|(coded, _)| coded)))
            }
            MatrixSource::Gated(gate, up) => {
                all(&mut [gate, up].into_iter().map(|part| part.as_coded().map(|(coded, _)| coded)))
            }
        }
    }
}
