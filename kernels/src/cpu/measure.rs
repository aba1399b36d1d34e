//! Measures the rates of the processor; see [`crate::bounds`].

use std::time::Instant;

use super::forms::tile_fn;
use super::lanes;
use super::tile::{CHAIN_GROUPS, Held, LANES, Sums, TILE_PANELS, TILE_ROWS, TILE_SEGMENTS, Tile, left_held};
use crate::bounds::Bounds;
use crate::isa::Isa;
use crate::pool::Pool;
use crate::precision::Precision;
use crate::tensor::Aligned;

/// Bytes read: several times the last-level cache of common machines.
const READ_BYTES: usize = 256 << 20;
/// Bytes of a task of the read.
const READ_TASK_BYTES: usize = 1 << 20;
/// The best of this many rounds counts: what others on the host do only makes it slower.
const ROUNDS: usize = 5;
/// Groups of the measured tile: twelve rows and two panels of it fill the first-level cache to two thirds.
const GROUPS: usize = CHAIN_GROUPS;
/// Tiles per task and tasks per round: about a millisecond and twenty.
const TILES: usize = 500;
const TASKS: usize = 64;

/// Measures memory and tile product on all threads.
pub fn bounds(pool: &mut Pool, isa: Isa, precision: Precision) -> Bounds {
    Bounds { read_bytes_per_s: read_rate(pool, isa), operations_per_s: tile_rate(pool, isa, precision) }
}

/// Bytes read from memory per second.
fn read_rate(pool: &mut Pool, isa: Isa) -> f64 {
    let mut memory = Aligned::<u32>::zeroed(READ_BYTES / 4);
    // Pages that were never written may all be one page of zeros.
    memory.iter_mut().step_by(1024).for_each(|word| *word = 1);
    let mut best = 0.0_f64;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        pool.run(READ_BYTES / READ_TASK_BYTES, |_, task| {
            let words = READ_TASK_BYTES / 4;
            let mut sum = 0;
            total(isa, &memory[task * words..][..words], &mut sum);
            std::hint::black_box(sum);
        });
        best = best.max(READ_BYTES as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// Operations of the tile product per second.
fn tile_rate(pool: &mut Pool, isa: Isa, precision: Precision) -> f64 {
    let a = Aligned::<u32>::zeroed(TILE_ROWS * GROUPS);
    let b = Aligned::<u32>::zeroed(2 * GROUPS * LANES);
    // Of a form that widens, the products alone: what could be done if widening took no time.
    let held = left_held(isa, precision);
    let precision = if held == Held::F32 { Precision::F32 } else { precision };
    let form = tile_fn(isa, precision);
    let mut best = 0.0_f64;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        pool.run(TASKS, |_, _| {
            let mut sums = Sums::ZERO;
            let panels = [&b[..], &b[GROUPS * LANES..]].map(<[u32]>::as_ptr);
            const { assert!(TILE_PANELS == 4) };
            let b = [[panels[0], panels[1], panels[0], panels[0]]; TILE_SEGMENTS];
            let tile = Tile {
                a: a.as_ptr(),
                a_stride: GROUPS,
                rows: TILE_ROWS,
                b,
                segments: 1,
                b_stride: LANES,
                panels: 2,
                groups: GROUPS,
                sums_stride: 2,
                accumulate: false,
                next: b,
                later: a.as_ptr(),
            };
            for _ in 0..TILES {
                // SAFETY: both operands have the rows, panels and groups of the tile.
                unsafe { form(&tile, sums.0.as_mut_ptr()) };
                std::hint::black_box(&mut sums);
            }
        });
        let elements = GROUPS * held.group();
        let operations = 2.0 * (TASKS * TILES * TILE_ROWS * 2 * LANES * elements) as f64;
        best = best.max(operations / start.elapsed().as_secs_f64());
    }
    best
}

#[inline(always)]
fn total_body(words: &[u32], sum: &mut u32) {
    *sum = words.iter().fold(0_u32, |sum, &word| sum.wrapping_add(word));
}

lanes::versions! {
    /// Adds up words, to read them.
    fn total(words: &[u32], sum: &mut u32) = total_body;
}
