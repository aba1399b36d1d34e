//! The tile product with AVX-512: one register per (row, panel), the left operand broadcast.
//!
//! Twelve rows of two panels keep 24 sums in flight, four times what the latency of `vdpbf16ps` needs; one row
//! takes four panels at a time, so that a single sequence streams weights on four chains. A group is added in one
//! step, or element by element where it is widened.

use std::arch::asm;
use std::arch::x86_64::*;

use super::tile::{LANES, TILE_PANELS, Tile};

/// Calls the form for a tile's rows and panels: all that [`Tile`] allows.
macro_rules! by_shape {
    ($form:ident, $tile:ident, $sums:ident) => {
        match ($tile.rows, $tile.panels) {
            (1, 1) => $form::<1, 1>($tile, $sums),
            (2, 1) => $form::<2, 1>($tile, $sums),
            (3, 1) => $form::<3, 1>($tile, $sums),
            (4, 1) => $form::<4, 1>($tile, $sums),
            (5, 1) => $form::<5, 1>($tile, $sums),
            (6, 1) => $form::<6, 1>($tile, $sums),
            (7, 1) => $form::<7, 1>($tile, $sums),
            (8, 1) => $form::<8, 1>($tile, $sums),
            (9, 1) => $form::<9, 1>($tile, $sums),
            (10, 1) => $form::<10, 1>($tile, $sums),
            (11, 1) => $form::<11, 1>($tile, $sums),
            (12, 1) => $form::<12, 1>($tile, $sums),
            (1, 2) => $form::<1, 2>($tile, $sums),
            (2, 2) => $form::<2, 2>($tile, $sums),
            (3, 2) => $form::<3, 2>($tile, $sums),
            (4, 2) => $form::<4, 2>($tile, $sums),
            (5, 2) => $form::<5, 2>($tile, $sums),
            (6, 2) => $form::<6, 2>($tile, $sums),
            (7, 2) => $form::<7, 2>($tile, $sums),
            (8, 2) => $form::<8, 2>($tile, $sums),
            (9, 2) => $form::<9, 2>($tile, $sums),
            (10, 2) => $form::<10, 2>($tile, $sums),
            (11, 2) => $form::<11, 2>($tile, $sums),
            (12, 2) => $form::<12, 2>($tile, $sums),
            (1, 4) => $form::<1, 4>($tile, $sums),
            (2, 4) => $form::<2, 4>($tile, $sums),
            (3, 4) => $form::<3, 4>($tile, $sums),
            (4, 4) => $form::<4, 4>($tile, $sums),
            (5, 4) => $form::<5, 4>($tile, $sums),
            (6, 4) => $form::<6, 4>($tile, $sums),
            (rows, panels) => unreachable!("a tile of {rows} rows and {panels} panels"),
        }
    };
}
pub(super) use by_shape;

/// Asks for what is needed next and later, as [`Tile`] says. A prefetch never faults, wherever it points.
#[inline(always)]
pub(super) fn ask_for<const PANELS: usize>(
    next: &[*const u32; TILE_PANELS],
    offset: usize,
    later: &mut *const u32,
) {
    for next in &next[..PANELS] {
        let next = next.wrapping_add(offset).cast();
        // SAFETY: as said above.
        unsafe {
            if PANELS > 2 {
                // Four panels of bf16 are more than a first-level cache holds.
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

/// Makes a form of the tile product from its types, what each step of a group takes of a right operand, and the step.
macro_rules! tile_form {
    ($(#[$doc:meta])* $name:ident, $features:literal, $sum:ty, $zero:ident, $broadcast:ident, $load:ident,
     $store:ident, [$(|$raw:ident| $part:expr),+], |$acc:ident, $a:ident, $b:ident| $step:expr) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As [`TileFn`](super::tile::TileFn).
        #[target_feature(enable = $features)]
        pub unsafe fn $name(tile: &Tile, sums: *mut [f32; LANES]) {
            #[target_feature(enable = $features)]
            unsafe fn fixed<const ROWS: usize, const PANELS: usize>(tile: &Tile, sums: *mut [f32; LANES]) {
                // SAFETY: the caller of the tile vouches for every address that it spans.
                unsafe {
                    let mut totals: [[$sum; PANELS]; ROWS] = [[$zero(); PANELS]; ROWS];
                    if tile.accumulate {
                        for row in 0..ROWS {
                            for panel in 0..PANELS {
                                totals[row][panel] = $load(sums.add(row * tile.sums_stride + panel).cast());
                            }
                        }
                    }
                    let mut a = tile.a;
                    let mut later = tile.later;
                    for (b, next) in tile.b[..tile.segments].iter().zip(&tile.next) {
                        let mut offset = 0;
                        for _ in 0..tile.groups {
                            ask_for::<PANELS>(next, offset, &mut later);
                            $(
                                let mut right: [$sum; PANELS] = [$zero(); PANELS];
                                for panel in 0..PANELS {
                                    let $raw = $load(b[panel].add(offset).cast());
                                    right[panel] = $part;
                                }
                                for row in 0..ROWS {
                                    let $a = $broadcast(a.add(row * tile.a_stride).cast::<i32>().read());
                                    for panel in 0..PANELS {
                                        let ($acc, $b) = (totals[row][panel], right[panel]);
                                        totals[row][panel] = $step;
                                    }
                                }
                                a = a.add(1);
                                // The address of the next step "depends" on the last sum of this one: the compiler
                                // would load the left operands of all steps first, and keep them on the stack.
                                asm!(
                                    "/* {0} {1} */",
                                    inout(reg) a,
                                    inout(zmm_reg) totals[ROWS - 1][PANELS - 1],
                                    options(pure, readonly, nostack, preserves_flags)
                                );
                            )+
                            offset += tile.b_stride;
                        }
                    }
                    for row in 0..ROWS {
                        for panel in 0..PANELS {
                            $store(sums.add(row * tile.sums_stride + panel).cast(), totals[row][panel]);
                        }
                    }
                }
            }
            // SAFETY: passed on.
            unsafe { by_shape!(fixed, tile, sums) }
        }
    };
}

#[target_feature(enable = "avx512f")]
unsafe fn zero_ps() -> __m512 {
    _mm512_setzero_ps()
}

#[target_feature(enable = "avx512f")]
unsafe fn zero_si() -> __m512i {
    _mm512_setzero_si512()
}

#[target_feature(enable = "avx512f")]
unsafe fn broadcast_ps(bits: i32) -> __m512 {
    _mm512_castsi512_ps(_mm512_set1_epi32(bits))
}

#[target_feature(enable = "avx512f")]
unsafe fn load_ps(from: *const f32) -> __m512 {
    // SAFETY: the caller vouches for the address.
    unsafe { _mm512_loadu_ps(from) }
}

#[target_feature(enable = "avx512f")]
unsafe fn store_ps(to: *mut f32, value: __m512) {
    // SAFETY: the caller vouches for the address.
    unsafe { _mm512_storeu_ps(to, value) }
}

tile_form!(
    /// f32 operands, fused multiply-add.
    f32, "avx512f", __m512, zero_ps, broadcast_ps, load_ps, store_ps, [|b| b],
    |sum, a, b| _mm512_fmadd_ps(a, b, sum)
);

tile_form!(
    /// bf16 operands with `vdpbf16ps`.
    bf16, "avx512f,avx512bf16", __m512, zero_ps, broadcast_ps, load_ps, store_ps, [|b| b],
    |sum, a, b| _mm512_dpbf16_ps(
        sum,
        std::mem::transmute::<__m512, __m512bh>(a),
        std::mem::transmute::<__m512, __m512bh>(b)
    )
);

tile_form!(
    /// f32 left and bf16 right operands, which are widened. Twelve rows of two panels do 48 products and widen 4
    /// registers on the same two units: 92 % of what they could do.
    bf16_widened, "avx512f,avx512dq", __m512, zero_ps, broadcast_ps, load_ps, store_ps,
    [|pairs| low(pairs), |pairs| high(pairs)],
    |sum, a, b| _mm512_fmadd_ps(a, b, sum)
);

tile_form!(
    /// u8 left and i8 right operands with `vpdpbusd`, which does not saturate.
    int8, "avx512f,avx512vnni", __m512i, zero_si, _mm512_set1_epi32, _mm512_loadu_si512, _mm512_storeu_si512,
    [|b| b], |sum, a, b| _mm512_dpbusd_epi32(sum, a, b)
);

#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn low(pairs: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(pairs)))
}

#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn high(pairs: __m512) -> __m512 {
    let mask = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), mask))
}
