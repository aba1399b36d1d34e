//! Weight matrices as codes with scales: what every quantised checkpoint becomes before a device takes it.
//!
//! `weight[row][column] = (value of the code - zero) * scale`, with one scale (and zero) for each block of rows and
//! columns. Checkpoints differ in packing and names; those are the engine's business, and kernels see this form alone.

use std::borrow::Cow;

use crate::e4m3;
use crate::tensor::LoadError;

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeKind {
    /// 0 to 15, two a byte: the even column is the low half.
    Uint4,
    /// The 4-bit float of the Open Compute Project (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two a byte.
    E2m1,
    /// -128 to 127.
    Int8,
    /// 0 to 255.
    Uint8,
    /// The 8-bit float of [`crate::e4m3`].
    E4m3,
}

impl CodeKind {
    /// Bytes of a row of this many codes.
    pub fn row_bytes(self, columns: usize) -> usize {
        match self {
            CodeKind::Uint4 | CodeKind::E2m1 => columns.div_ceil(2),
            CodeKind::Int8 | CodeKind::Uint8 | CodeKind::E4m3 => columns,
        }
    }

    /// The number that a code stands for, of the lowest bits of `code`.
    #[inline(always)]
    pub fn value(self, code: u8) -> f32 {
        match self {
            CodeKind::Uint4 | CodeKind::Uint8 => f32::from(code),
            CodeKind::E2m1 => e2m1(code),
            CodeKind::Int8 => f32::from(code.cast_signed()),
            CodeKind::E4m3 => e4m3::decode(code),
        }
    }
}

/// The value of a 4-bit float.
#[inline(always)]
fn e2m1(code: u8) -> f32 {
    f32::from(e2m1_doubled(code)) / 2.0
}

/// Twice the value of a 4-bit float, a whole number from -12 to 12.
#[inline(always)]
pub fn e2m1_doubled(code: u8) -> i8 {
    let low = (code & 7) as i8;
    let magnitude = if low < 4 {
        low
    } else if low < 6 {
        2 * low - 4
    } else {
        4 * low - 16
    };
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// What is subtracted from codes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Zeros {
    /// The same from all.
    Same(i16),
    /// One for each scale, in their order.
    Each(Vec<i16>),
}

/// A matrix of codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Coded<'a> {
    /// What a code stands for.
    pub kind: CodeKind,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// `[rows][row_bytes]`
    pub codes: Cow<'a, [u8]>,
    /// Bytes from row to row.
    pub row_bytes: usize,
    /// Rows and columns that share a scale; the last blocks may be partial.
    pub block: (usize, usize),
    /// `[rows / block.0][columns / block.1]`, both rounded up.
    pub scales: Vec<f32>,
    /// What is subtracted from codes before they are scaled.
    pub zeros: Zeros,
    /// For each column, which of a row's scales it has; empty where they follow each other by `block`.
    pub order: Vec<u32>,
}

impl Coded<'_> {
    /// Scales of a row.
    pub fn groups(&self) -> usize {
        self.columns.div_ceil(self.block.1.max(1))
    }

    /// Checks every length against every other.
    ///
    /// # Errors
    /// When one does not fit; the error names it.
    pub fn check(&self) -> Result<(), LoadError> {
        let (rows, columns) = (self.rows, self.columns);
        if rows == 0 || columns == 0 {
            return Err(LoadError::Rank { shape: vec![rows, columns], wanted: "matrix" });
        }
        let must = |field, found: usize, expected: usize| {
            if found == expected { Ok(()) } else { Err(LoadError::Codes { field, found, expected }) }
        };
        must("rows of a block", self.block.0, self.block.0.clamp(1, rows))?;
        must("columns of a block", self.block.1, self.block.1.clamp(1, columns))?;
        let least = self.kind.row_bytes(columns);
        must("bytes of a row", self.row_bytes, self.row_bytes.max(least))?;
        must("bytes of all codes", self.codes.len(), rows.saturating_mul(self.row_bytes))?;
        let scales = rows.div_ceil(self.block.0) * self.groups();
        must("number of scales", self.scales.len(), scales)?;
        if let Zeros::Each(zeros) = &self.zeros {
            must("number of zeros", zeros.len(), scales)?;
        }
        if !self.order.is_empty() {
            must("length of the columns' order", self.order.len(), columns)?;
            let groups = self.groups() as u32;
            if let Some(&beyond) = self.order.iter().find(|&&group| group >= groups) {
                must("a column's group", beyond as usize, groups as usize - 1)?;
            }
        }
        Ok(())
    }

    /// The code at a place, in the lowest bits.
    #[inline(always)]
    fn code(&self, row: &[u8], column: usize) -> u8 {
        match self.kind {
            CodeKind::Uint4 | CodeKind::E2m1 => row[column / 2] >> (column % 2 * 4) & 15,
            _ => row[column],
        }
    }

    /// A row's codes.
    fn codes_of(&self, row: usize) -> &[u8] {
        &self.codes[row * self.row_bytes..][..self.row_bytes]
    }

    /// Writes a row's codes, one a byte.
    pub fn read_codes(&self, row: usize, out: &mut [u8]) {
        let codes = self.codes_of(row);
        for (column, out) in out.iter_mut().enumerate() {
            *out = self.code(codes, column);
        }
    }

    /// What is subtracted from the codes of a row in a group.
    pub fn zero(&self, row: usize, group: usize) -> i16 {
        match &self.zeros {
            Zeros::Same(zero) => *zero,
            Zeros::Each(zeros) => zeros[row / self.block.0 * self.groups() + group],
        }
    }

    /// The scale of a row's codes in a group.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales[row / self.block.0 * self.groups() + group]
    }

    /// Writes the weights of a row from a column on.
    pub fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let codes = self.codes_of(row);
        if !self.order.is_empty() {
            for (column, out) in (first..).zip(out) {
                let group = self.order[column] as usize;
                let zero = f32::from(self.zero(row, group));
                *out = (self.kind.value(self.code(codes, column)) - zero) * self.scale(row, group);
            }
            return;
        }
        let (mut column, mut rest) = (first, out);
        while !rest.is_empty() {
            let group = column / self.block.1;
            let (zero, scale) = (f32::from(self.zero(row, group)), self.scale(row, group));
            let len = rest.len().min((group + 1) * self.block.1 - column);
            let (part, others) = rest.split_at_mut(len);
            for (column, out) in (column..).zip(part) {
                *out = (self.kind.value(self.code(codes, column)) - zero) * scale;
            }
            (column, rest) = (column + len, others);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coded() -> Coded<'static> {
        Coded {
            kind: CodeKind::Uint4,
            rows: 2,
            columns: 5,
            codes: Cow::Owned(vec![0x21, 0x43, 0x05, 0xA9, 0xCB, 0x0D]),
            row_bytes: 3,
            block: (1, 2),
            scales: vec![1.0, 10.0, 100.0, 2.0, 20.0, 200.0],
            zeros: Zeros::Each(vec![0, 1, 2, 8, 8, 8]),
            order: Vec::new(),
        }
    }

    #[test]
    fn weights_are_codes_less_zeros_times_scales() {
        let mut row = [0.0; 5];
        coded().check().unwrap();
        coded().read(0, 0, &mut row);
        assert_eq!(row, [1.0, 2.0, 20.0, 30.0, 300.0]);
        coded().read(1, 0, &mut row);
        assert_eq!(row, [2.0, 4.0, 60.0, 80.0, 1000.0]);
        let mut part = [0.0; 3];
        coded().read(1, 1, &mut part);
        assert_eq!(part, [4.0, 60.0, 80.0]);
        let ordered = Coded { order: vec![2, 1, 0, 0, 1], ..coded() };
        ordered.check().unwrap();
        ordered.read(0, 0, &mut row);
        assert_eq!(row, [-100.0, 10.0, 3.0, 4.0, 40.0]);
    }

    #[test]
    fn four_bit_floats_have_their_values() {
        let values: Vec<f32> = (0..16).map(|code| CodeKind::E2m1.value(code)).collect();
        let positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        assert_eq!(values[..8], positive);
        assert_eq!(values[8..], positive.map(|value| -value));
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let broken = [
            Coded { row_bytes: 2, ..coded() },
            Coded { scales: vec![1.0; 5], ..coded() },
            Coded { zeros: Zeros::Each(vec![0; 7]), ..coded() },
            Coded { order: vec![0; 4], ..coded() },
            Coded { order: vec![0, 0, 0, 0, 3], ..coded() },
            Coded { block: (1, 6), ..coded() },
            Coded { block: (0, 2), ..coded() },
            Coded { rows: 3, ..coded() },
            Coded { columns: 0, ..coded() },
        ];
        for broken in broken {
            assert!(broken.check().is_err(), "{broken:?}");
        }
    }
}
