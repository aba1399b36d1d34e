//! compressed-tensors: groups of modules, each with a scheme, and the parts that a module of a scheme has.
//!
//! | format | parts |
//! |---|---|
//! | `pack-quantized` | `weight_packed` i32 `[out, in * bits / 32]`, offset by the middle; `weight_scale` |
//! | - | where there are any: `weight_zero_point` i32, packed along `out`; `weight_g_idx` |
//! | `int-quantized`, `float-quantized`, `naive-quantized` | `weight` in 8 bits, `weight_scale`, `weight_zero_point` |
//! | `nvfp4-pack-quantized` | `weight_packed` u8, `weight_scale` e4m3, `weight_global_scale`, which divides |
//! | `mxfp4-pack-quantized` | `weight_packed` u8, `weight_scale` u8, powers of two |

use std::fmt;

use millrace_kernels::coded::{CodeKind, Coded, Zeros};

use super::gptq::same_or_each;
use super::modules::Modules;
use super::parts::{borrowed, fields, transposed, words};
use super::scaled::{FP4_GROUP, fp4};
use super::{Module, Read, unreadable};
use crate::model::source::RawDtype;

/// What stands for a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredCodes {
    /// Whole numbers of 4 or 8 bits in words.
    Packed {
        /// 4 or 8.
        bits: usize,
    },
    /// Whole numbers of 8 bits, one a byte.
    Int8,
    /// 8-bit floats.
    Fp8,
    /// 4-bit floats with scales of 8-bit floats.
    NvFp4,
    /// 4-bit floats with powers of two.
    MxFp4,
}

/// How the matrices of a group of modules are written.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheme {
    /// The modules.
    pub targets: Modules,
    /// The form; absent where the group's weights are floats.
    pub written: Option<StoredCodes>,
    /// Rows and columns of a block of weights that share a scale, where it is neither one for all nor one a row.
    pub block: Option<(usize, usize)>,
}

/// A checkpoint's schemes.
#[derive(Debug, Clone, PartialEq)]
pub struct Compressed {
    /// The first whose targets mean a module holds; one that names it comes before one that means its class.
    pub schemes: Vec<Scheme>,
    /// Modules that are stored as floats.
    pub ignored: Modules,
}

impl fmt::Display for Compressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, scheme) in self.schemes.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            let written = match scheme.written {
                None => "floats".to_owned(),
                Some(StoredCodes::Packed { bits }) => format!("{bits} bits"),
                Some(StoredCodes::Int8) => "8 bits".to_owned(),
                Some(StoredCodes::Fp8) => "8-bit floats".to_owned(),
                Some(StoredCodes::NvFp4 | StoredCodes::MxFp4) => "4-bit floats".to_owned(),
            };
            write!(f, "{comma}{written}")?;
            match scheme.block {
                Some((1, columns)) => write!(f, " in groups of {columns}")?,
                Some((rows, columns)) => write!(f, " in blocks of {rows} x {columns}")?,
                None => {}
            }
        }
        Ok(())
    }
}

impl Compressed {
    /// The codes of a matrix.
    pub(super) fn matrix<'a>(&self, module: Module<'a, '_>) -> Read<'a> {
        let named = |scheme: &&Scheme| scheme.targets.names(module.name);
        let meant = |scheme: &&Scheme| scheme.targets.mean(module.name);
        let scheme = self.schemes.iter().find(named).or_else(|| self.schemes.iter().find(meant));
        let weight = module.part_name("weight");
        if self.ignored.names(module.name) {
            return unreadable(
                weight,
                "it is missing or no floats, and the configuration ignores the module",
            );
        }
        let Some(scheme) = scheme else {
            return unreadable(
                weight,
                "it is missing or no floats, and no group of the configuration means it",
            );
        };
        match scheme.written {
            None => unreadable(weight, "it is missing or no floats, and its group has no scheme for weights"),
            Some(StoredCodes::Packed { bits }) => packed(module, bits, scheme.block),
            Some(StoredCodes::Int8) => plain(module, (CodeKind::Int8, RawDtype::Int8), scheme.block),
            Some(StoredCodes::Fp8) => plain(module, (CodeKind::E4m3, RawDtype::F8E4m3), scheme.block),
            Some(StoredCodes::NvFp4) => {
                let whole = module.number("weight_global_scale")?;
                fp4(module, "weight_packed", scheme.block.map_or(FP4_GROUP, |block| block.1), |scale| {
                    scale / whole
                })
            }
            Some(StoredCodes::MxFp4) => {
                fp4(module, "weight_packed", scheme.block.map_or(32, |block| block.1), |scale| scale)
            }
        }
    }
}

/// Codes of one byte each.
fn plain<'a>(
    module: Module<'a, '_>,
    (kind, dtype): (CodeKind, RawDtype),
    block: Option<(usize, usize)>,
) -> Read<'a> {
    let (rows, columns) = module.shape;
    let codes = module.shaped("weight", dtype, &[rows, columns])?;
    let scales = module.scales("weight_scale", block)?;
    let zeros = if kind == CodeKind::Int8 && module.has("weight_zero_point") {
        let found = module.part("weight_zero_point")?;
        if found.dtype != RawDtype::Int8 || found.data.len() != scales.values.len() {
            let reason = format!(
                "{} of shape {:?}; expected are {} numbers of 8 bits",
                found.dtype,
                found.shape,
                scales.values.len()
            );
            return unreadable(module.part_name("weight_zero_point"), reason);
        }
        same_or_each(found.data.iter().map(|zero| i16::from(zero.cast_signed())).collect())
    } else {
        Zeros::Same(0)
    };
    Ok(Coded {
        kind,
        rows,
        columns,
        codes: borrowed(codes),
        row_bytes: columns,
        block: scales.block,
        scales: scales.values,
        zeros,
        order: Vec::new(),
    })
}

/// Codes in words along the input features.
fn packed<'a>(module: Module<'a, '_>, bits: usize, block: Option<(usize, usize)>) -> Read<'a> {
    let (rows, columns) = module.shape;
    let width = (columns * bits).div_ceil(32);
    let codes = module.shaped("weight_packed", RawDtype::Int32, &[rows, width])?;
    if module.has("weight_shape") {
        let shape = module.part("weight_shape")?;
        let numbers: Vec<u64> = match shape.dtype {
            RawDtype::Int64 => {
                shape.data.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
            }
            _ => words(shape.data).into_iter().map(u64::from).collect(),
        };
        if numbers != [rows as u64, columns as u64] {
            let reason = format!("it says {numbers:?}; config.json implies [{rows}, {columns}]");
            return unreadable(module.part_name("weight_shape"), reason);
        }
    }
    let scales = module.scales("weight_scale", block)?;
    let groups = columns.div_ceil(scales.block.1);
    let zeros = if module.has("weight_zero_point") {
        let packed_rows = (rows * bits).div_ceil(32);
        let words = module.words("weight_zero_point", &[packed_rows, groups])?;
        // Each word holds neighbouring rows of one group.
        let by_group = transposed(&words, (packed_rows, groups));
        let of_group = by_group.chunks_exact(packed_rows);
        let zeros: Vec<i16> =
            of_group.flat_map(|words| fields(words, bits).take(rows).map(|zero| zero as i16)).collect();
        same_or_each(transposed(&zeros, (groups, rows)))
    } else {
        Zeros::Same(1 << (bits - 1))
    };
    Ok(Coded {
        kind: if bits == 4 { CodeKind::Uint4 } else { CodeKind::Uint8 },
        rows,
        columns,
        codes: borrowed(codes),
        row_bytes: width * 4,
        block: scales.block,
        order: module.order("weight_g_idx", scales.block.1)?,
        scales: scales.values,
        zeros,
    })
}
