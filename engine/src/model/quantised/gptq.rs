//! GPTQ: `qweight` i32 `[in * bits / 32, out]`, `qzeros` i32 `[groups, out * bits / 32]`, `scales` `[groups, out]`,
//! `g_idx` i32 `[in]`. The group of a column is that of `g_idx`, where it is not the natural one (`desc_act`).
//!
//! The first version of the format stores zeros less 1, taken from whole words, so that a zero of 0 borrows from its
//! neighbour; the second stores zeros. Labels of published checkpoints lie. Where all zeros are the middle, as they are
//! with symmetric codes, the data tell the versions apart; else the label decides.

use std::borrow::Cow;

use millrace_kernels::coded::{CodeKind, Coded, Zeros};

use super::parts::{fields, transposed};
use super::{Module, Read, unreadable};

/// What a configuration says of a GPTQ checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GptqForm {
    /// Columns of a group; all where absent.
    pub group: Option<usize>,
    /// Whether the label says that zeros are stored as they are.
    pub second_version: bool,
}

/// The word that holds `field` in each of its fields.
fn repeated(field: u32, bits: usize) -> u32 {
    (0..32 / bits).fold(0, |word, at| word | field << (at * bits))
}

/// Zeros as they are meant, of words of any version.
fn zeros(mut words: Vec<u32>, bits: usize, second_version: bool) -> Vec<u32> {
    let middle = 1 << (bits - 1);
    let all = |field| words.iter().all(|&word| word == repeated(field, bits));
    let first_version = all(middle - 1) || !all(middle) && !second_version;
    if first_version {
        // Of whole words: a zero of 0 was borrowed for.
        words.iter_mut().for_each(|word| *word = word.wrapping_add(repeated(1, bits)));
    }
    words
}

/// The codes of a matrix.
pub fn matrix<'a>(module: Module<'a, '_>, form: GptqForm) -> Read<'a> {
    let (rows, columns) = module.shape;
    let qweight = module.part("qweight")?;
    let packed_rows = qweight.shape.first().copied().unwrap_or(0);
    let bits = [4, 8].into_iter().find(|bits| columns * bits == packed_rows * 32);
    let Some(bits) = bits else {
        let reason = format!(
            "it has shape {:?}; {columns} input features make {} rows of 4 bits or {} of 8; no others are read",
            qweight.shape,
            columns / 8,
            columns / 4
        );
        return unreadable(module.part_name("qweight"), reason);
    };
    let codes = transposed(&module.words("qweight", &[packed_rows, rows])?, (packed_rows, rows));
    let (scales, shape) = module.numbers("scales")?;
    let groups = scales.len() / rows.max(1);
    let group = form.group.unwrap_or(columns).clamp(1, columns);
    // Rules for single modules may have changed the size of groups.
    let group = if columns.div_ceil(group) == groups { group } else { columns.div_ceil(groups.max(1)) };
    if groups * rows != scales.len() || columns.div_ceil(group.max(1)) != groups {
        let reason = format!("it has shape {shape:?}; expected are {rows} columns and a row for each group");
        return unreadable(module.part_name("scales"), reason);
    }
    let zero_words = module.words("qzeros", &[groups, rows * bits / 32])?;
    let zeros: Vec<i16> =
        fields(&zeros(zero_words, bits, form.second_version), bits).map(|zero| zero as i16).collect();
    Ok(Coded {
        kind: if bits == 4 { CodeKind::Uint4 } else { CodeKind::Uint8 },
        rows,
        columns,
        codes: Cow::Owned(codes.into_iter().flat_map(u32::to_le_bytes).collect()),
        row_bytes: packed_rows * 4,
        block: (1, group),
        scales: transposed(&scales, (groups, rows)),
        zeros: same_or_each(transposed(&zeros, (groups, rows))),
        order: module.order("g_idx", group)?,
    })
}

/// Zeros as one, where all are.
pub fn same_or_each(zeros: Vec<i16>) -> Zeros {
    match zeros.first() {
        Some(&first) if zeros.iter().all(|&zero| zero == first) => Zeros::Same(first),
        _ => Zeros::Each(zeros),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_read_by_what_the_data_say() {
        // All in the middle: the label does not count.
        for label in [false, true] {
            assert_eq!(zeros(vec![0x7777_7777], 4, label), [0x8888_8888]);
            assert_eq!(zeros(vec![0x8888_8888], 4, label), [0x8888_8888]);
            assert_eq!(zeros(vec![0x7F7F_7F7F], 8, label), [0x8080_8080]);
            assert_eq!(zeros(vec![0x8080_8080], 8, label), [0x8080_8080]);
        }
        // Zeros 0 and 5: the first version stores F and 3, for the 0 has borrowed from the 5.
        assert_eq!(zeros(vec![0x7777_773F], 4, false), [0x8888_8850]);
        assert_eq!(zeros(vec![0x8888_8850], 4, true), [0x8888_8850]);
    }
}
