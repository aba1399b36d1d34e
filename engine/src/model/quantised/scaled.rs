//! Floats of 8 and 4 bits with scales beside them: of `quant_method: fp8` and of ModelOpt.

use millrace_kernels::coded::{CodeKind, Coded, Zeros};

use super::parts::borrowed;
use super::{Module, Read};
use crate::model::source::RawDtype;

/// Columns that share a scale in NVFP4.
pub const FP4_GROUP: usize = 16;

/// 8-bit floats: `weight` `[out, in]` and `weight_scale` or `weight_scale_inv`, which multiplies, whatever its name
/// says: one for all, one for each row, or one for each block.
pub fn fp8<'a>(module: Module<'a, '_>, block: Option<(usize, usize)>) -> Read<'a> {
    let (rows, columns) = module.shape;
    let codes = module.shaped("weight", RawDtype::F8E4m3, &[rows, columns])?;
    let part = if module.has("weight_scale_inv") { "weight_scale_inv" } else { "weight_scale" };
    let scales = module.scales(part, block)?;
    Ok(Coded {
        kind: CodeKind::E4m3,
        rows,
        columns,
        codes: borrowed(codes),
        row_bytes: columns,
        block: scales.block,
        scales: scales.values,
        zeros: Zeros::Same(0),
        order: Vec::new(),
    })
}

/// ModelOpt's NVFP4: `weight` u8 `[out, in / 2]`, `weight_scale` e4m3 `[out, in / 16]`, `weight_scale_2`.
pub fn modelopt_fp4<'a>(module: Module<'a, '_>) -> Read<'a> {
    let whole = module.number("weight_scale_2")?;
    fp4(module, "weight", FP4_GROUP, |scale| scale * whole)
}

/// 4-bit floats, two a byte, with a scale for each group of columns.
pub fn fp4<'a>(module: Module<'a, '_>, part: &str, group: usize, scale: impl Fn(f32) -> f32) -> Read<'a> {
    let (rows, columns) = module.shape;
    let row_bytes = columns.div_ceil(2);
    let codes = module.shaped(part, RawDtype::Uint8, &[rows, row_bytes])?;
    let scales = module.scales("weight_scale", Some((1, group)))?;
    Ok(Coded {
        kind: CodeKind::E2m1,
        rows,
        columns,
        codes: borrowed(codes),
        row_bytes,
        block: scales.block,
        scales: scales.values.into_iter().map(scale).collect(),
        zeros: Zeros::Same(0),
        order: Vec::new(),
    })
}
