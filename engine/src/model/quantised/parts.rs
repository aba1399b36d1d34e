//! The tensors of one matrix: its parts by name, with types and shapes checked, and numbers out of them.

use std::borrow::Cow;

use millrace_kernels::e4m3;
use millrace_kernels::tensor::{DType, HostTensor};

use super::super::binding::{BindError, load_error};
use super::super::source::{RawDtype, RawTensor, StoredDtype};
use super::{Module, unreadable};

impl<'a> Module<'a, '_> {
    /// The name of a part.
    pub fn part_name(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    /// Whether there is such a part.
    pub fn has(&self, part: &str) -> bool {
        self.source.has(&self.part_name(part))
    }

    /// A part as it is stored.
    pub fn part(&self, part: &str) -> Result<RawTensor<'a>, BindError> {
        Ok(self.source.raw(&self.part_name(part))?)
    }

    /// A part of this type and shape.
    pub fn shaped(&self, part: &str, dtype: RawDtype, shape: &[usize]) -> Result<&'a [u8], BindError> {
        let found = self.part(part)?;
        self.must_be(part, found.dtype, dtype)?;
        if found.shape != shape {
            let (name, expected) = (self.part_name(part), shape.to_vec());
            return Err(BindError::Shape { name, found: found.shape, expected });
        }
        Ok(found.data)
    }

    /// Refuses a part of another type.
    fn must_be(&self, part: &str, found: RawDtype, expected: RawDtype) -> Result<(), BindError> {
        if found == expected {
            return Ok(());
        }
        unreadable(self.part_name(part), format!("it has type {found}; the format has {expected} there"))
    }

    /// 32-bit words of a part of this shape.
    pub fn words(&self, part: &str, shape: &[usize]) -> Result<Vec<u32>, BindError> {
        Ok(words(self.shaped(part, RawDtype::Int32, shape)?))
    }

    /// Numbers of a part, and its shape without dimensions of 1.
    pub fn numbers(&self, part: &str) -> Result<(Vec<f32>, Vec<usize>), BindError> {
        let tensor = self.part(part)?;
        let shape = tensor.shape.iter().copied().filter(|&extent| extent != 1).collect();
        let values = match tensor.dtype {
            RawDtype::Float(dtype) => {
                let dtype = match dtype {
                    StoredDtype::F32 => DType::F32,
                    StoredDtype::F16 => DType::F16,
                    StoredDtype::Bf16 => DType::Bf16,
                };
                let mut values = vec![0.0; tensor.data.len() / dtype.bytes()];
                HostTensor::new(dtype, &[values.len()], tensor.data)
                    .map_err(|source| load_error(&self.part_name(part), source))?
                    .read_f32(0, &mut values);
                values
            }
            RawDtype::F8E4m3 => tensor.data.iter().map(|&code| e4m3::decode(code)).collect(),
            // Powers of two, less 127.
            RawDtype::Uint8 | RawDtype::F8E8m0 => {
                tensor.data.iter().map(|&code| power_of_two(code)).collect()
            }
            other => {
                return unreadable(self.part_name(part), format!("it has type {other}; scales are floats"));
            }
        };
        Ok((values, shape))
    }

    /// One number.
    pub fn number(&self, part: &str) -> Result<f32, BindError> {
        match self.numbers(part)? {
            (values, _) if values.len() == 1 => Ok(values[0]),
            (_, found) => Err(BindError::Shape { name: self.part_name(part), found, expected: vec![1] }),
        }
    }

    /// Scales of a part, and the rows and columns of the block that each is of: one for all, one for each row, or as
    /// `block` says.
    pub fn scales(&self, part: &str, block: Option<(usize, usize)>) -> Result<BlockScales, BindError> {
        let (rows, columns) = self.shape;
        let (values, shape) = self.numbers(part)?;
        if values.len() == 1 {
            return Ok(BlockScales { values, block: (rows, columns) });
        }
        let (high, wide) = block.unwrap_or((1, columns));
        let (high, wide) = (high.clamp(1, rows), wide.clamp(1, columns));
        let expected = [rows.div_ceil(high), columns.div_ceil(wide)];
        if shape.iter().filter(|&&extent| extent != 1).eq(expected.iter().filter(|&&extent| extent != 1)) {
            return Ok(BlockScales { values, block: (high, wide) });
        }
        if shape == [rows] {
            return Ok(BlockScales { values, block: (1, columns) });
        }
        Err(BindError::Shape { name: self.part_name(part), found: shape, expected: expected.to_vec() })
    }

    /// For each column its group, as a part of that name says; empty where that is their natural order.
    pub fn order(&self, part: &str, group: usize) -> Result<Vec<u32>, BindError> {
        if !self.has(part) {
            return Ok(Vec::new());
        }
        let order = self.words(part, &[self.shape.1])?;
        let natural = |(column, &of): (usize, &u32)| of as usize == column / group;
        let absent = |&of: &u32| of == u32::MAX;
        if order.iter().enumerate().all(natural) || order.iter().all(absent) {
            return Ok(Vec::new());
        }
        Ok(order)
    }
}

/// Scales, row-major, each of a block of rows and columns.
pub struct BlockScales {
    pub values: Vec<f32>,
    pub block: (usize, usize),
}

/// Little-endian words.
pub fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
}

/// A number of the format E8M0: 2^(code - 127); 255 is not a number.
fn power_of_two(code: u8) -> f32 {
    match code {
        u8::MAX => f32::NAN,
        0 => f32::from_bits(1 << 22),
        code => f32::from_bits(u32::from(code) << 23),
    }
}

/// `[rows, columns]` to `[columns, rows]`, in squares that stay in the cache.
pub fn transposed<T: Copy + Default>(from: &[T], (rows, columns): (usize, usize)) -> Vec<T> {
    const SIDE: usize = 32;
    let mut to = vec![T::default(); rows * columns];
    for first_row in (0..rows).step_by(SIDE) {
        for first in (0..columns).step_by(SIDE) {
            for row in first_row..rows.min(first_row + SIDE) {
                for column in first..columns.min(first + SIDE) {
                    to[column * rows + row] = from[row * columns + column];
                }
            }
        }
    }
    to
}

/// The fields of `bits` bits of words, lowest first.
pub fn fields(words: &[u32], bits: usize) -> impl Iterator<Item = u32> + '_ {
    let mask = (1 << bits) - 1;
    words.iter().flat_map(move |word| (0..32 / bits).map(move |field| word >> (field * bits) & mask))
}

/// Codes as the file has them.
pub fn borrowed(data: &[u8]) -> Cow<'_, [u8]> {
    Cow::Borrowed(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_those_of_their_codes() {
        for code in 0..255_u8 {
            assert_eq!(f64::from(power_of_two(code)), 2_f64.powi(i32::from(code) - 127), "{code}");
        }
        assert!(power_of_two(255).is_nan());
    }

    #[test]
    fn transposing_twice_is_nothing() {
        let from: Vec<u32> = (0..37 * 70).collect();
        let to = transposed(&from, (37, 70));
        assert_eq!((to[1], to[37], to[36]), (70, 1, 36 * 70));
        assert_eq!(transposed(&to, (70, 37)), from);
    }
}
