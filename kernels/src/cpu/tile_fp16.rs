//! The tile product with AVX-512 FP16: pairs of halves, summed in halves.
//!
//! `vfmadd..ph` does 32 products where f32 does 16, but its sums have 11 bits. So a tile is a chain of at most
//! [`CHAIN_GROUPS`] groups, for each element of a pair; the two meet at its end, and what they sum up to is added in
//! f32 to what is there. The error of a chain is below that of operands that are rounded to bf16. Operands are scaled
//! by powers of two, exactly, to where no chain overflows.

use std::arch::asm;
use std::arch::x86_64::*;

use super::tile::{CHAIN_GROUPS, LANES, Tile};
use super::tile_avx512::{ask_for, by_shape};

/// f16 operands.
///
/// # Safety
/// As [`TileFn`](super::tile::TileFn).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16")]
pub unsafe fn f16(tile: &Tile, sums: *mut [f32; LANES]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16")]
    unsafe fn fixed<const ROWS: usize, const PANELS: usize>(tile: &Tile, sums: *mut [f32; LANES]) {
        // SAFETY: the caller of the tile vouches for every address that it spans.
        unsafe {
            let mut chains = [[_mm512_setzero_si512(); PANELS]; ROWS];
            let (mut a, mut later) = (tile.a, tile.later);
            for (b, next) in tile.b[..tile.segments].iter().zip(&tile.next) {
                let mut offset = 0;
                for _ in 0..tile.groups {
                    ask_for::<PANELS>(next, offset, &mut later);
                    let mut right = [_mm512_setzero_ph(); PANELS];
                    for (right, b) in right.iter_mut().zip(b) {
                        *right = _mm512_castsi512_ph(_mm512_loadu_si512(b.add(offset).cast()));
                    }
                    for (row, chains) in chains.iter_mut().enumerate() {
                        let pair = a.add(row * tile.a_stride).cast::<i32>().read();
                        let left = _mm512_castsi512_ph(_mm512_set1_epi32(pair));
                        for (chain, &right) in chains.iter_mut().zip(&right) {
                            let sum = _mm512_fmadd_ph(left, right, _mm512_castsi512_ph(*chain));
                            *chain = _mm512_castph_si512(sum);
                        }
                    }
                    a = a.add(1);
                    // As in `tile_avx512`: else the left operands of all rows are loaded first.
                    asm!(
                        "/* {0} {1} */",
                        inout(reg) a,
                        inout(zmm_reg) chains[ROWS - 1][PANELS - 1],
                        options(pure, readonly, nostack, preserves_flags)
                    );
                    offset += tile.b_stride;
                }
            }
            for (row, chains) in chains.iter().enumerate() {
                for (panel, &chain) in chains.iter().enumerate() {
                    let to = sums.add(row * tile.sums_stride + panel).cast::<f32>();
                    let sum = pair_sums(chain);
                    let sum = if tile.accumulate { _mm512_add_ps(_mm512_loadu_ps(to), sum) } else { sum };
                    _mm512_storeu_ps(to, sum);
                }
            }
        }
    }
    assert!(tile.segments * tile.groups <= CHAIN_GROUPS, "groups of a chain of halves");
    // SAFETY: passed on.
    unsafe { by_shape!(fixed, tile, sums) }
}

/// The two elements of each pair added, in f16, as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16")]
fn pair_sums(pairs: __m512i) -> __m512 {
    let seconds = _mm512_castsi512_ph(_mm512_srli_epi32::<16>(pairs));
    let sums = _mm512_castph_si512(_mm512_add_ph(_mm512_castsi512_ph(pairs), seconds));
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(sums))
}
