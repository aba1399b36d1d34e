//! AWQ in its form `gemm`: `qweight` i32 `[in, out / 8]`, `qzeros` i32 `[groups, out / 8]`, `scales` `[groups, out]`.
//!
//! A word holds 8 output features in the order 0, 2, 4, 6, 1, 3, 5, 7; zeros too, and nothing is taken from them.

use std::borrow::Cow;

use millrace_kernels::coded::{CodeKind, Coded};

use super::gptq::same_or_each;
use super::parts::transposed;
use super::{Module, Read, unreadable};

/// The output feature of each field of a word.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The codes of a matrix.
pub fn matrix<'a>(module: Module<'a, '_>) -> Read<'a> {
    let (rows, columns) = module.shape;
    if !rows.is_multiple_of(8) || !columns.is_multiple_of(2) {
        let reason =
            format!("{rows} output features and {columns} input features; AWQ packs multiples of 8 and of 2");
        return unreadable(module.part_name("qweight"), reason);
    }
    let words = module.words("qweight", &[columns, rows / 8])?;
    let (scales, _) = module.numbers("scales")?;
    let groups = scales.len() / rows;
    if groups == 0 || groups * rows != scales.len() || !columns.is_multiple_of(groups) {
        let reason =
            format!("it has {} numbers; expected are {rows} for each group of columns", scales.len());
        return unreadable(module.part_name("scales"), reason);
    }
    let zero_words = module.words("qzeros", &[groups, rows / 8])?;
    let mut zeros = vec![0; groups * rows];
    for (word, zeros) in zero_words.iter().zip(zeros.as_chunks_mut::<8>().0) {
        for (field, &feature) in ORDER.iter().enumerate() {
            zeros[feature] = (word >> (4 * field) & 15) as i16;
        }
    }
    Ok(Coded {
        kind: CodeKind::Uint4,
        rows,
        columns,
        codes: Cow::Owned(codes(&words, (rows, columns))),
        row_bytes: columns / 2,
        block: (1, columns / groups),
        scales: transposed(&scales, (groups, rows)),
        zeros: same_or_each(transposed(&zeros, (groups, rows))),
        order: Vec::new(),
    })
}

/// `[in][out / 8]` words to `[out][in / 2]` bytes.
fn codes(words: &[u32], (rows, columns): (usize, usize)) -> Vec<u8> {
    let (width, row_bytes) = (rows / 8, columns / 2);
    let mut codes = vec![0; rows * row_bytes];
    for (place, features) in codes.chunks_exact_mut(8 * row_bytes).enumerate() {
        for pair in 0..row_bytes {
            let (even, odd) = (words[2 * pair * width + place], words[(2 * pair + 1) * width + place]);
            for (field, &feature) in ORDER.iter().enumerate() {
                let (low, high) = (even >> (4 * field) & 15, odd >> (4 * field) & 15);
                features[feature * row_bytes + pair] = (low | high << 4) as u8;
            }
        }
    }
    codes
}
