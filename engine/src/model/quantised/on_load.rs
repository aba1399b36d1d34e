//! Weights quantised as they are loaded, without data to calibrate with.
//!
//! 4 bits: groups of 128 columns, each with a scale and a zero. The range is that of the group, shrunk by the factor
//! whose rounded weights lie closest to the weights (least squares), as in the clipping search of AWQ
//! (<https://arxiv.org/abs/2306.00978>) with the weights alone. 8-bit floats: a scale for each row.

use std::borrow::Cow;

use millrace_kernels::coded::{CodeKind, Coded, Zeros};
use millrace_kernels::e4m3;
use millrace_kernels::tensor::{HostTensor, LoadError};

/// Columns of a group of 4-bit codes.
pub const GROUP: usize = 128;
/// The greatest 4-bit code.
const CODE_MAX: f32 = 15.0;
/// Factors that ranges are shrunk by, in steps of [`SHRINK_STEP`] from 1 down.
const SHRINKS: usize = 12;
const SHRINK_STEP: f32 = 0.03;
/// Rows that a thread takes at a time, at least.
const ROWS_LEAST: usize = 16;

/// What matrices become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLoad {
    /// 4 bits in groups of [`GROUP`] columns.
    Int4,
    /// 8-bit floats with a scale a row.
    Fp8,
}

impl OnLoad {
    /// A matrix in that form.
    ///
    /// # Errors
    /// When it is no matrix.
    pub fn quantise(self, tensor: &HostTensor<'_>) -> Result<HostTensor<'static>, LoadError> {
        let (rows, columns) = tensor.matrix_shape()?;
        let (kind, group) = match self {
            OnLoad::Int4 => (CodeKind::Uint4, GROUP.min(columns)),
            OnLoad::Fp8 => (CodeKind::E4m3, columns),
        };
        let (row_bytes, groups) = (kind.row_bytes(columns), columns.div_ceil(group));
        let mut codes = vec![0_u8; rows * row_bytes];
        let mut scales = vec![0.0_f32; rows * groups];
        let mut zeros = vec![0_i16; rows * groups];
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = rows.div_ceil(threads).max(ROWS_LEAST);
        let parts = codes.chunks_mut(share * row_bytes).zip(scales.chunks_mut(share * groups));
        std::thread::scope(|scope| {
            for (part, ((codes, scales), zeros)) in parts.zip(zeros.chunks_mut(share * groups)).enumerate() {
                scope.spawn(move || {
                    let mut values = vec![0.0; columns];
                    let rows = codes.chunks_mut(row_bytes).zip(scales.chunks_mut(groups));
                    for (row, ((codes, scales), zeros)) in rows.zip(zeros.chunks_mut(groups)).enumerate() {
                        tensor.read_f32((part * share + row) * columns, &mut values);
                        for (index, values) in values.chunks(group).enumerate() {
                            let codes = &mut codes[kind.row_bytes(index * group)..];
                            match self {
                                OnLoad::Int4 => (scales[index], zeros[index]) = int4(values, codes),
                                OnLoad::Fp8 => scales[index] = fp8(values, codes),
                            }
                        }
                    }
                });
            }
        });
        let zeros = if self == OnLoad::Int4 { Zeros::Each(zeros) } else { Zeros::Same(0) };
        HostTensor::coded(Coded {
            kind,
            rows,
            columns,
            codes: Cow::Owned(codes),
            row_bytes,
            block: (1, group),
            scales,
            zeros,
            order: Vec::new(),
        })
    }
}

/// Nearest whole number, by adding and taking away 1.5 * 2^23.
fn rounded(value: f32) -> f32 {
    value + 12_582_912.0 - 12_582_912.0
}

/// A group's scale and zero for a range.
fn grid(low: f32, high: f32) -> (f32, f32) {
    let scale = (high - low) / CODE_MAX;
    // Scales that are not numbers stay so, and a group of zeros has any.
    let scale = if scale == 0.0 { 1.0 } else { scale };
    (scale, rounded(-low / scale).clamp(0.0, CODE_MAX))
}

fn code(value: f32, inverse: f32, zero: f32) -> f32 {
    (rounded(value * inverse) + zero).clamp(0.0, CODE_MAX)
}

/// Writes a group's codes, two a byte; gives its scale and zero.
fn int4(values: &[f32], codes: &mut [u8]) -> (f32, i16) {
    let least = values.iter().fold(0.0_f32, |least, &value| least.min(value));
    let greatest = values.iter().fold(0.0_f32, |greatest, &value| greatest.max(value));
    let mut best = (f32::INFINITY, grid(least, greatest));
    for step in 0..SHRINKS {
        let shrink = 1.0 - step as f32 * SHRINK_STEP;
        let (scale, zero) = grid(least * shrink, greatest * shrink);
        let inverse = 1.0 / scale;
        let error = |value: f32| (code(value, inverse, zero) - zero).mul_add(-scale, value);
        let squares: f32 = values.iter().map(|&value| error(value) * error(value)).sum();
        if squares < best.0 {
            best = (squares, (scale, zero));
        }
    }
    let (scale, zero) = best.1;
    for (pair, byte) in values.chunks(2).zip(codes) {
        let low = code(pair[0], 1.0 / scale, zero) as u8;
        let high = pair.get(1).map_or(0, |&value| code(value, 1.0 / scale, zero) as u8);
        *byte = low | high << 4;
    }
    (scale, zero as i16)
}

/// Writes a row's codes; gives its scale.
fn fp8(values: &[f32], codes: &mut [u8]) -> f32 {
    let greatest = values.iter().fold(0.0_f32, |greatest, value| greatest.max(value.abs()));
    let scale = if greatest > 0.0 { greatest / e4m3::GREATEST } else { 1.0 };
    for (&value, code) in values.iter().zip(codes) {
        *code = e4m3::encode(value / scale);
    }
    scale
}

#[cfg(test)]
mod tests {
    use millrace_kernels::tensor::DType;

    use super::*;

    fn values(len: usize) -> Vec<f32> {
        (0..len).map(|index| ((index * index) as f32 * 0.37).sin().powi(3) * 0.1).collect()
    }

    fn back(form: OnLoad, values: &[f32], rows: usize) -> Vec<f32> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = HostTensor::new(DType::F32, &[rows, values.len() / rows], &bytes).unwrap();
        let mut back = vec![0.0; values.len()];
        form.quantise(&tensor).unwrap().read_f32(0, &mut back);
        back
    }

    #[test]
    fn weights_come_back_close() {
        // 300 columns: two whole groups and a partial one; 40 rows: several threads.
        let values = values(40 * 300);
        let error = |form| -> f32 {
            let back = back(form, &values, 40);
            values.iter().zip(back).map(|(value, back)| (value - back).powi(2)).sum::<f32>()
        };
        let all: f32 = values.iter().map(|value| value * value).sum();
        assert!(error(OnLoad::Int4) < all * 6e-3, "{}", error(OnLoad::Int4) / all);
        assert!(error(OnLoad::Fp8) < all * 1e-3, "{}", error(OnLoad::Fp8) / all);
    }

    #[test]
    fn shrinking_never_loses_against_the_whole_range() {
        let values = values(GROUP);
        let (least, greatest) =
            (values.iter().copied().fold(0.0, f32::min), values.iter().copied().fold(0.0, f32::max));
        let (scale, zero) = grid(least, greatest);
        let plain: f32 = values
            .iter()
            .map(|&value| ((code(value, 1.0 / scale, zero) - zero) * scale - value).powi(2))
            .sum();
        let back = back(OnLoad::Int4, &values, 1);
        let found: f32 = values.iter().zip(back).map(|(value, back)| (value - back).powi(2)).sum();
        assert!(found <= plain * 1.0001, "{found} against {plain}");
    }

    #[test]
    fn zeros_stay_zeros_and_poison_stays_poison() {
        for form in [OnLoad::Int4, OnLoad::Fp8] {
            assert_eq!(back(form, &[0.0; 256], 2), [0.0; 256]);
            let mut values = values(256);
            values[3] = f32::INFINITY;
            assert!(back(form, &values, 2)[..128].iter().any(|value| !value.is_finite()), "{form:?}");
        }
    }
}
