//! The tile product with AVX2 and FMA: two registers per (row, panel), up to four rows at a time.
//!
//! bf16 weights are widened to f32, and their left operands are f32. Without VNNI, int8 is widened to 16 bits: the
//! one-step byte product saturates.

use std::arch::x86_64::*;

use super::tile::{LANES, Tile};

/// Rows at a time: eight sums, two halves of a panel and one left operand fit into 16 registers.
const ROWS: usize = 4;

/// Runs `ROWS` rows of a panel at a time, then the rest.
macro_rules! by_rows {
    ($tile:ident, $sums:ident, $fixed:ident) => {
        for panel in 0..$tile.panels {
            let mut row = 0;
            while row < $tile.rows {
                match $tile.rows - row {
                    1 => $fixed::<1>($tile, $sums, row, panel),
                    2 => $fixed::<2>($tile, $sums, row, panel),
                    3 => $fixed::<3>($tile, $sums, row, panel),
                    _ => $fixed::<ROWS>($tile, $sums, row, panel),
                }
                row += ROWS;
            }
        }
    };
}

/// f32 operands.
///
/// # Safety
/// As [`TileFn`](super::tile::TileFn).
#[target_feature(enable = "avx2,fma")]
pub unsafe fn f32(tile: &Tile, sums: *mut [f32; LANES]) {
    #[target_feature(enable = "avx2,fma")]
    unsafe fn fixed<const N: usize>(tile: &Tile, sums: *mut [f32; LANES], row: usize, panel: usize) {
        // SAFETY: the caller of the tile vouches for every address that it spans.
        unsafe {
            let mut totals = load_totals::<N>(tile, sums, row, panel);
            for index in 0..tile.segments * tile.groups {
                let (segment, group) = (index / tile.groups, index % tile.groups);
                let b = tile.b[segment][panel].add(group * tile.b_stride).cast::<f32>();
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (part, total) in totals.iter_mut().enumerate() {
                    let a = tile.a.add((row + part) * tile.a_stride + index);
                    let a = _mm256_set1_ps(f32::from_bits(a.read()));
                    total[0] = _mm256_fmadd_ps(a, b0, total[0]);
                    total[1] = _mm256_fmadd_ps(a, b1, total[1]);
                }
            }
            store_totals(tile, sums, row, panel, &totals);
        }
    }
    // SAFETY: passed on.
    unsafe { by_rows!(tile, sums, fixed) }
}

/// f32 left and bf16 right operands.
///
/// # Safety
/// As [`TileFn`](super::tile::TileFn).
#[target_feature(enable = "avx2,fma")]
pub unsafe fn bf16(tile: &Tile, sums: *mut [f32; LANES]) {
    #[target_feature(enable = "avx2,fma")]
    unsafe fn fixed<const N: usize>(tile: &Tile, sums: *mut [f32; LANES], row: usize, panel: usize) {
        let mask = _mm256_set1_epi32(0xFFFF_0000_u32.cast_signed());
        let low = |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
        let high = |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
        // SAFETY: the caller of the tile vouches for every address that it spans.
        unsafe {
            let mut totals = load_totals::<N>(tile, sums, row, panel);
            for index in 0..tile.segments * tile.groups {
                let (segment, group) = (index / tile.groups, index % tile.groups);
                let b = tile.b[segment][panel].add(group * tile.b_stride);
                let (b0, b1) = (_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(8).cast()));
                for (half, b) in [[low(b0), low(b1)], [high(b0), high(b1)]].into_iter().enumerate() {
                    for (part, total) in totals.iter_mut().enumerate() {
                        let a = tile.a.add((row + part) * tile.a_stride + 2 * index + half);
                        let a = _mm256_set1_ps(f32::from_bits(a.read()));
                        total[0] = _mm256_fmadd_ps(a, b[0], total[0]);
                        total[1] = _mm256_fmadd_ps(a, b[1], total[1]);
                    }
                }
            }
            store_totals(tile, sums, row, panel, &totals);
        }
    }
    // SAFETY: passed on.
    unsafe { by_rows!(tile, sums, fixed) }
}

/// u8 left and i8 right operands.
///
/// # Safety
/// As [`TileFn`](super::tile::TileFn).
#[target_feature(enable = "avx2,fma")]
pub unsafe fn int8(tile: &Tile, sums: *mut [f32; LANES]) {
    // SAFETY: the caller of the tile vouches for every address that it spans.
    unsafe {
        for row in 0..tile.rows {
            for panel in 0..tile.panels {
                // Each sum of four lanes holds the two halves of a lane's products next to each other.
                let mut totals = [_mm256_setzero_si256(); 4];
                for index in 0..tile.segments * tile.groups {
                    let (segment, group) = (index / tile.groups, index % tile.groups);
                    let a = tile.a.add(row * tile.a_stride + index).read();
                    let a = _mm256_cvtepu8_epi16(_mm_set1_epi32(a.cast_signed()));
                    let b = tile.b[segment][panel].add(group * tile.b_stride);
                    for (quarter, total) in totals.iter_mut().enumerate() {
                        let b = _mm256_cvtepi8_epi16(_mm_loadu_si128(b.add(4 * quarter).cast()));
                        *total = _mm256_add_epi32(*total, _mm256_madd_epi16(a, b));
                    }
                }
                let out = sums.add(row * tile.sums_stride + panel).cast::<i32>();
                for (quarter, total) in totals.into_iter().enumerate() {
                    let mut halves = [0_i32; 8];
                    _mm256_storeu_si256(halves.as_mut_ptr().cast(), total);
                    for lane in 0..4 {
                        let out = out.add(4 * quarter + lane);
                        let start = if tile.accumulate { out.read() } else { 0 };
                        out.write(start + halves[2 * lane] + halves[2 * lane + 1]);
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`TileFn`](super::tile::TileFn).
#[target_feature(enable = "avx2,fma")]
unsafe fn load_totals<const N: usize>(
    tile: &Tile,
    sums: *const [f32; LANES],
    row: usize,
    panel: usize,
) -> [[__m256; 2]; N] {
    let mut totals = [[_mm256_setzero_ps(); 2]; N];
    if tile.accumulate {
        for (index, total) in totals.iter_mut().enumerate() {
            // SAFETY: the caller of the tile vouches for the sums of every row and panel.
            unsafe {
                let from = sums.add((row + index) * tile.sums_stride + panel).cast::<f32>();
                *total = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
            }
        }
    }
    totals
}

/// # Safety
/// As [`TileFn`](super::tile::TileFn).
#[target_feature(enable = "avx2,fma")]
unsafe fn store_totals<const N: usize>(
    tile: &Tile,
    sums: *mut [f32; LANES],
    row: usize,
    panel: usize,
    totals: &[[__m256; 2]; N],
) {
    for (index, total) in totals.iter().enumerate() {
        // SAFETY: the caller of the tile vouches for the sums of every row and panel.
        unsafe {
            let to = sums.add((row + index) * tile.sums_stride + panel).cast::<f32>();
            _mm256_storeu_ps(to, total[0]);
            _mm256_storeu_ps(to.add(8), total[1]);
        }
    }
}
