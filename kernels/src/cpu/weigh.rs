//! Between the two products of attention: scores become weights, with the running maximum and total of each row.

use super::lanes::{self, versions};
use super::scratch::{TILE_BLOCKS, TILE_TOKENS};
use super::tile::{LANES, TILE_ROWS};
use crate::isa::Isa;
use crate::ops::BLOCK_TOKENS;

/// A tile between its two products.
pub struct Weighing<'a> {
    pub blocks: usize,
    /// Per row, the lanes that it sees: from and up to.
    pub seen: &'a [(u32, u32)],
    /// Factor that makes exponents of two of scores.
    pub scale: f32,
    /// What exponents come no further from 0 than, if there is a cap.
    pub cap: Option<f32>,
    /// Factors of rows beside it.
    pub query_scales: &'a [f32; TILE_ROWS],
    pub scores: &'a mut [[[f32; LANES]; TILE_BLOCKS]; TILE_ROWS],
    pub maxima: &'a mut [f32; TILE_ROWS],
    pub totals: &'a mut [[f32; LANES]; TILE_ROWS],
    /// What was added up before, `[rows][panels]`; empty if nothing was.
    pub results: &'a mut [[f32; LANES]],
    pub panels: usize,
}

/// Weights of all rows relative to the running maxima; what was added up before is scaled to the new ones.
#[inline(always)]
fn weigh<T: Copy>(tile: Weighing<'_>, out: &mut [[T; TILE_TOKENS]; TILE_ROWS], convert: impl Fn(f32) -> T) {
    match tile.blocks {
        1 => weigh_blocks::<1, T>(tile, out, convert),
        2 => weigh_blocks::<2, T>(tile, out, convert),
        3 => weigh_blocks::<3, T>(tile, out, convert),
        _ => weigh_blocks::<TILE_BLOCKS, T>(tile, out, convert),
    }
}

#[inline(always)]
fn weigh_blocks<const BLOCKS: usize, T: Copy>(
    tile: Weighing<'_>,
    out: &mut [[T; TILE_TOKENS]; TILE_ROWS],
    convert: impl Fn(f32) -> T,
) {
    let Weighing { seen, scale, cap, query_scales, scores, maxima, totals, results, panels, .. } = tile;
    let mut shifts = [0.0; TILE_ROWS];
    for (row, &(low, high)) in seen.iter().enumerate() {
        let whole = low == 0 && high as usize == BLOCKS * BLOCK_TOKENS;
        let mut greatest = [f32::NEG_INFINITY; LANES];
        for (block, scores) in scores[row][..BLOCKS].iter_mut().enumerate() {
            let mut scaled = *scores;
            lanes::multiply(&mut scaled, scale * query_scales[row]);
            if let Some(cap) = cap {
                lanes::cap(&mut scaled, cap);
            }
            if !whole {
                for (lane, score) in scaled.iter_mut().enumerate() {
                    let token = (block * LANES + lane) as u32;
                    let visible = (token >= low) & (token < high);
                    *score = if visible { *score } else { f32::NEG_INFINITY };
                }
            }
            for lane in 0..LANES {
                greatest[lane] = if scaled[lane] > greatest[lane] { scaled[lane] } else { greatest[lane] };
            }
            *scores = scaled;
        }
        let before = maxima[row];
        let greatest = lanes::maximum(&greatest);
        let maximum = if greatest > before { greatest } else { before };
        maxima[row] = maximum;
        // Nothing seen yet, in no tile: any finite maximum keeps the arithmetic free of infinity minus infinity.
        shifts[row] = if maximum == f32::NEG_INFINITY { 0.0 } else { maximum };
        if before != maximum {
            let factor = lanes::exp2(before - shifts[row]);
            lanes::multiply(&mut totals[row], factor);
            if let Some(results) = results.get_mut(row * panels..(row + 1) * panels) {
                for result in results {
                    lanes::multiply(result, factor);
                }
            }
        }
    }
    for (row, &shift) in shifts.iter().enumerate().take(seen.len()) {
        let mut total = totals[row];
        let (out, _) = out[row].as_chunks_mut::<LANES>();
        for (scores, out) in scores[row][..BLOCKS].iter().zip(out) {
            for lane in 0..LANES {
                let weight = lanes::exp2(scores[lane] - shift);
                total[lane] += weight;
                out[lane] = convert(weight);
            }
        }
        totals[row] = total;
    }
}

#[inline(always)]
fn weigh_f32_body(tile: Weighing<'_>, out: &mut [[f32; TILE_TOKENS]; TILE_ROWS]) {
    weigh(tile, out, |weight| weight);
}

versions! {
    /// Weights in f32.
    pub fn weigh_f32(tile: Weighing<'_>, out: &mut [[f32; TILE_TOKENS]; TILE_ROWS]) = weigh_f32_body;
}

#[inline(always)]
fn weigh_bf16_body(tile: Weighing<'_>, out: &mut [[u16; TILE_TOKENS]; TILE_ROWS]) {
    weigh(tile, out, lanes::bf16_bits);
}

versions! {
    /// Weights in bf16.
    pub fn weigh_bf16(tile: Weighing<'_>, out: &mut [[u16; TILE_TOKENS]; TILE_ROWS]) = weigh_bf16_body;
}
