//! The tile product with AVX-512 FP16: pairs of halves, summed in halves for a while, then in f32.
//!
//! `vfmadd..ph` does 32 products where f32 does 16, but its sums have 11 bits. So they are chains of [`CHAIN`] groups,
//! which are then added in f32; the elements of a pair have sums of their own, which meet at the end. The error of a
//! chain is below that of operands that are rounded to bf16. Operands are scaled by powers of two, exactly, to where
//! no chain overflows.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::tile::{LANES, LEFT_TOP, RIGHT_TOP, TILE_PANELS, Tile};
use super::tile_avx512::by_shape;

/// Groups that are added in halves: of 576 columns a third, of 1,536 an eighth.
const CHAIN: usize = 96;
const _: () = assert!(CHAIN as f32 * LEFT_TOP * RIGHT_TOP < 65504.0);

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
            let mut totals = Totals::<ROWS, PANELS>(MaybeUninit::uninit());
            let (mut a, mut later, mut done) = (tile.a, tile.later, 0);
            let all = tile.segments * tile.groups;
            loop {
                let (end, first) = (all.min(done + CHAIN), done == 0);
                let mut chains = [[_mm512_setzero_si512(); PANELS]; ROWS];
                while done < end {
                    let (segment, group) = (done / tile.groups, done % tile.groups);
                    let groups = (tile.groups - group).min(end - done);
                    let (b, next, mut offset) =
                        (&tile.b[segment], &tile.next[segment], group * tile.b_stride);
                    for _ in 0..groups {
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
                    done += groups;
                }
                for (row, chains) in chains.iter().enumerate() {
                    for (panel, &chain) in chains.iter().enumerate() {
                        totals.add((row, panel), chain, first);
                    }
                }
                if done == all {
                    break;
                }
                totals.keep();
            }
            totals.finish(tile, sums);
        }
    }
    // SAFETY: passed on.
    unsafe { by_shape!(fixed, tile, sums) }
}

/// Asks for what is needed next and later, as [`Tile`] says. A prefetch never faults, wherever it points.
#[inline(always)]
fn ask_for<const PANELS: usize>(next: &[*const u32; TILE_PANELS], offset: usize, later: &mut *const u32) {
    for next in &next[..PANELS] {
        let next = next.wrapping_add(offset).cast();
        // SAFETY: as said above.
        unsafe {
            if PANELS > 2 {
                _mm_prefetch::<_MM_HINT_T1>(next);
            } else if PANELS > 1 {
                _mm_prefetch::<_MM_HINT_T0>(next);
            }
        }
    }
    if PANELS == 2 {
        // SAFETY: as said above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>((*later).cast()) };
        *later = later.wrapping_add(LANES);
    }
}

/// Sums in f32 of chains that have ended: of lanes 0 to 7 and of 8 to 15, each of both elements of a pair.
struct Totals<const ROWS: usize, const PANELS: usize>(MaybeUninit<[[[__m512; 2]; PANELS]; ROWS]>);

impl<const ROWS: usize, const PANELS: usize> Totals<ROWS, PANELS> {
    /// Adds the sums of a chain; the first one's become the totals.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16")]
    unsafe fn add(&mut self, (row, panel): (usize, usize), chain: __m512i, first: bool) {
        let mut low = _mm512_cvtph_ps(_mm512_castsi512_si256(chain));
        let mut high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(chain));
        // SAFETY: the place is one of the array's, and has been written by the first chain.
        unsafe {
            let total = &raw mut (*self.0.as_mut_ptr())[row][panel];
            if !first {
                low = _mm512_add_ps((*total)[0], low);
                high = _mm512_add_ps((*total)[1], high);
            }
            total.write([low, high]);
        }
    }

    /// Keeps the sums in memory: the registers are the chains'.
    #[inline(always)]
    fn keep(&mut self) {
        // SAFETY: nothing is done.
        unsafe { asm!("/* {0} */", in(reg) &mut self.0, options(nostack, preserves_flags)) };
    }

    /// Adds the elements of pairs, and what was there before.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16")]
    unsafe fn finish(&self, tile: &Tile, sums: *mut [f32; LANES]) {
        // SAFETY: there has been a first chain.
        let totals = unsafe { self.0.assume_init_ref() };
        let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        for (row, totals) in totals.iter().enumerate() {
            for (panel, &[low, high]) in totals.iter().enumerate() {
                let first = _mm512_permutex2var_ps(low, even, high);
                let mut sum = _mm512_add_ps(first, _mm512_permutex2var_ps(low, odd, high));
                // SAFETY: the caller of the tile vouches for the sums.
                unsafe {
                    let to = sums.add(row * tile.sums_stride + panel).cast::<f32>();
                    if tile.accumulate {
                        sum = _mm512_add_ps(_mm512_loadu_ps(to), sum);
                    }
                    _mm512_storeu_ps(to, sum);
                }
            }
        }
    }
}
