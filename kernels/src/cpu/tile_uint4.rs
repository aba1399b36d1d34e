//! Few rows in 8 bits times 4-bit codes, with AVX-512 VNNI: the codes go from memory straight into products.
//!
//! The codes are the unsigned operand of `vpdpbusd` and the rows the signed one, so that nothing is added to either;
//! the sum of a row's own codes over a group, times the zeros, is subtracted. See `grouped.rs` for the order of sums.

use std::arch::x86_64::*;

use super::grouped::Grouped;
use super::tile::LANES;
use crate::coded::CodeKind;

/// Most rows.
pub const ROWS: usize = 4;
/// 4-bit floats, doubled, and 12 more: whole numbers from 0 on.
const FLOATS: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
/// What is subtracted from those.
const FLOATS_ZERO: i32 = 12;
/// Words of codes that are asked for ahead, of each panel.
const WORDS_AHEAD: usize = 16;

/// Multiplies rows (their first code, the bytes from row to row, how many) with panels (the first, how many: 1, 2 or
/// 4); writes sums as `[rows][panels]`.
///
/// # Safety
/// The processor has AVX-512 VNNI; the rows are as long as a panel's words; the matrix has the panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub unsafe fn tile(
    rows: (*const u8, usize, usize),
    codes: &Grouped,
    (panel, panels): (usize, usize),
    sums: &mut [[f32; LANES]],
) {
    assert!(sums.len() >= rows.2 * panels, "room for the sums");
    macro_rules! call {
        ($rows:literal, $panels:literal, $from:expr, $row:expr) => {
            match codes.kind {
                CodeKind::E2m1 => fixed::<$rows, $panels, true>($row, codes, $from.0, $from.1),
                _ => fixed::<$rows, $panels, false>($row, codes, $from.0, $from.1),
            }
        };
    }
    let (first, stride, count) = rows;
    // SAFETY: passed on.
    unsafe {
        if count == 1 {
            let from = (panel, &mut sums[..panels]);
            return match panels {
                1 => call!(1, 1, from, (first, stride)),
                2 => call!(1, 2, from, (first, stride)),
                _ => call!(1, 4, from, (first, stride)),
            };
        }
        // Two panels at a time leave registers for four rows.
        let mut pair = [[0.0; LANES]; 2 * ROWS];
        for start in (0..panels).step_by(2) {
            let wide = (panels - start).min(2);
            let from = (panel + start, &mut pair[..count * wide]);
            match (count, wide) {
                (2, 1) => call!(2, 1, from, (first, stride)),
                (3, 1) => call!(3, 1, from, (first, stride)),
                (4, 1) => call!(4, 1, from, (first, stride)),
                (2, 2) => call!(2, 2, from, (first, stride)),
                (3, 2) => call!(3, 2, from, (first, stride)),
                (4, 2) => call!(4, 2, from, (first, stride)),
                (rows, _) => unreachable!("{rows} rows"),
            }
            for row in 0..count {
                for index in 0..wide {
                    sums[row * panels + start + index] = pair[row * wide + index];
                }
            }
        }
    }
}

/// # Safety
/// As [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn fixed<const N: usize, const PANELS: usize, const FLOAT: bool>(
    (rows, stride): (*const u8, usize),
    codes: &Grouped,
    panel: usize,
    sums: &mut [[f32; LANES]],
) {
    let (groups, mask) = (codes.groups(), _mm512_set1_epi8(15));
    let ones = _mm512_set1_epi8(1);
    // SAFETY: the caller vouches for the rows, and for the panels of the matrix, whose lengths follow from its sizes.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(FLOATS.as_ptr().cast()));
        let take = |codes: __m512i| if FLOAT { _mm512_shuffle_epi8(table, codes) } else { codes };
        let size = codes.panel_words * 4 * LANES;
        let from = codes.codes.as_ptr().add(panel * size);
        let mut totals = [[_mm512_setzero_ps(); PANELS]; N];
        for group in 0..groups {
            let (start, end) = (group * codes.words, codes.panel_words.min((group + 1) * codes.words));
            let mut low = [[_mm512_setzero_si512(); PANELS]; N];
            let mut high = [[_mm512_setzero_si512(); PANELS]; N];
            let mut own = [_mm512_setzero_si512(); N];
            for word in start..end {
                let mut right = [[_mm512_setzero_si512(); 2]; PANELS];
                for (index, right) in right.iter_mut().enumerate() {
                    let place = from.add(index * size + word * 4 * LANES);
                    _mm_prefetch::<_MM_HINT_T0>(place.wrapping_add(WORDS_AHEAD * 4 * LANES).cast());
                    let pairs = _mm512_loadu_si512(place.cast());
                    let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), mask);
                    *right = [take(_mm512_and_si512(pairs, mask)), take(upper)];
                }
                for row in 0..N {
                    let left = rows.add(row * stride + 8 * word).cast::<u32>();
                    let a = [left.read_unaligned(), left.add(1).read_unaligned()];
                    let a = a.map(|a| _mm512_set1_epi32((a ^ 0x8080_8080).cast_signed()));
                    own[row] = _mm512_dpbusd_epi32(own[row], ones, a[0]);
                    own[row] = _mm512_dpbusd_epi32(own[row], ones, a[1]);
                    for index in 0..PANELS {
                        low[row][index] = _mm512_dpbusd_epi32(low[row][index], right[index][0], a[0]);
                        high[row][index] = _mm512_dpbusd_epi32(high[row][index], right[index][1], a[1]);
                    }
                }
            }
            for index in 0..PANELS {
                let at = ((panel + index) * groups + group) * LANES;
                let scale = _mm512_loadu_ps(codes.scales.as_ptr().add(at));
                let zero = if FLOAT {
                    _mm512_set1_epi32(FLOATS_ZERO)
                } else {
                    _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.zeros.as_ptr().add(at).cast()))
                };
                for row in 0..N {
                    let whole = _mm512_add_epi32(low[row][index], high[row][index]);
                    let whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(zero, own[row]));
                    totals[row][index] =
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, totals[row][index]);
                }
            }
        }
        for row in 0..N {
            for index in 0..PANELS {
                _mm512_storeu_ps(sums[row * PANELS + index].as_mut_ptr(), totals[row][index]);
            }
        }
    }
}
