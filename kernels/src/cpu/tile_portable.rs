//! The tile product in portable Rust: the reference of the other forms.

use super::tile::{LANES, Tile, TileFn};
use crate::precision::Precision;

/// The form for a precision of the operands.
pub fn form(precision: Precision) -> TileFn {
    match precision {
        Precision::F32 => f32,
        Precision::Bf16 => bf16,
        Precision::Int8 => int8,
    }
}

/// Adds up one row of one panel with `step`, which takes a group of the left operand and one of a lane.
///
/// # Safety
/// As [`TileFn`].
unsafe fn portable<T: Copy>(tile: &Tile, sums: *mut [T; LANES], zero: T, step: impl Fn(T, u32, u32) -> T) {
    for row in 0..tile.rows {
        for panel in 0..tile.panels {
            // SAFETY: the caller vouches for the sums of every row and panel.
            let out = unsafe { &mut *sums.add(row * tile.sums_stride + panel) };
            let mut lanes = if tile.accumulate { *out } else { [zero; LANES] };
            for index in 0..tile.segments * tile.groups {
                let (segment, group) = (index / tile.groups, index % tile.groups);
                // SAFETY: the caller vouches for every address that the tile spans.
                let (a, b) = unsafe {
                    let b = tile.b[segment][panel].add(group * tile.b_stride);
                    (*tile.a.add(row * tile.a_stride + index), &*b.cast::<[u32; LANES]>())
                };
                for lane in 0..LANES {
                    lanes[lane] = step(lanes[lane], a, b[lane]);
                }
            }
            *out = lanes;
        }
    }
}

/// # Safety
/// As [`TileFn`].
unsafe fn f32(tile: &Tile, sums: *mut [f32; LANES]) {
    // SAFETY: passed on.
    unsafe { portable(tile, sums, 0.0, |sum, a, b| sum + f32::from_bits(a) * f32::from_bits(b)) }
}

/// # Safety
/// As [`TileFn`].
unsafe fn bf16(tile: &Tile, sums: *mut [f32; LANES]) {
    let low = |pair: u32| f32::from_bits(pair << 16);
    let high = |pair: u32| f32::from_bits(pair & 0xFFFF_0000);
    // SAFETY: passed on.
    unsafe { portable(tile, sums, 0.0, |sum, a, b| (sum + low(a) * low(b)) + high(a) * high(b)) }
}

/// # Safety
/// As [`TileFn`].
unsafe fn int8(tile: &Tile, sums: *mut [f32; LANES]) {
    let dot = |sum: i32, a: u32, b: u32| {
        let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
        sum + products.map(|(a, b)| i32::from(a) * i32::from(b.cast_signed())).sum::<i32>()
    };
    // SAFETY: passed on; integers have the size and alignment of the floats.
    unsafe { portable(tile, sums.cast::<[i32; LANES]>(), 0, dot) }
}
