//! The greatest logit of each row, found while the head is multiplied: logits that nobody else asks for are never
//! written.
//!
//! Each thread keeps the greatest value of every lane and the panel that it came from; of equals the lowest token
//! wins. A row with a logit that is not a number, or whose greatest one is infinite, is poisoned.

use super::blocks::{Area, Finished};
use super::lanes::versions;
use super::linear::Epilogue;
use super::source::PANEL;
use super::tile::LANES;
use crate::isa::Isa;
use crate::pool::Scattered;
use crate::sampling::{ChosenToken, Poisoned, Sampled};

/// What one thread has seen of a row.
#[repr(C, align(64))]
#[derive(Debug, Clone)]
pub struct Best {
    values: [f32; LANES],
    panels: [u32; LANES],
    /// Not zero where a value was not a number.
    poison: [u32; LANES],
}

impl Best {
    /// Nothing seen.
    pub const NOTHING: Best =
        Best { values: [f32::NEG_INFINITY; LANES], panels: [0; LANES], poison: [0; LANES] };
}

/// Finds the greatest of each row.
pub struct Greedy {
    isa: Isa,
    /// `[threads][rows]`
    best: Scattered<Best>,
    rows: usize,
    features: usize,
}

impl Greedy {
    /// Starts from nothing; `best` has room for `threads * rows` entries.
    pub fn new(isa: Isa, best: &mut [Best], rows: usize, features: usize) -> Self {
        best.fill(Best::NOTHING);
        Self { isa, best: Scattered::new(best), rows, features }
    }
}

impl Epilogue for Greedy {
    fn prefetch(&self, _: Area) {}

    fn finish(&self, thread: usize, area: Area, tile: &Finished<'_>) {
        // SAFETY: each thread has entries of its own.
        let best = unsafe { self.best.range(thread * self.rows + area.row, area.rows) };
        take(self.isa, tile, (area.panel, self.features), best);
    }
}

#[inline(always)]
fn take_body(tile: &Finished<'_>, (first, features): (usize, usize), best: &mut [Best]) {
    for (row, best) in best.iter_mut().enumerate() {
        for index in 0..tile.panels() {
            let mut values = tile.values(row, index);
            let panel = first + index;
            // What lies beyond the last token is padding.
            for value in values.iter_mut().skip(features - (panel * PANEL).min(features)) {
                *value = f32::NEG_INFINITY;
            }
            for (lane, value) in values.into_iter().enumerate() {
                best.poison[lane] |= u32::from(value.is_nan());
                let earlier = (panel as u32) < best.panels[lane];
                let better = (value > best.values[lane]) | ((value == best.values[lane]) & earlier);
                best.values[lane] = if better { value } else { best.values[lane] };
                best.panels[lane] = if better { panel as u32 } else { best.panels[lane] };
            }
        }
    }
}

versions! {
    /// Compares the rows of a tile with the best so far.
    fn take(tile: &Finished<'_>, place: (usize, usize), best: &mut [Best]) = take_body;
}

/// The token of a row, from what each thread saw of it.
pub fn choose<'a>(seen: impl Iterator<Item = &'a Best>) -> Sampled {
    let (mut token, mut maximum) = (u32::MAX, f32::NEG_INFINITY);
    for best in seen {
        for lane in 0..LANES {
            if best.poison[lane] != 0 {
                return Err(Poisoned);
            }
            let (value, candidate) = (best.values[lane], best.panels[lane] * PANEL as u32 + lane as u32);
            if value > maximum || (value == maximum && candidate < token) {
                (token, maximum) = (candidate, value);
            }
        }
    }
    if maximum.is_finite() { Ok(ChosenToken { token, logprobs: None }) } else { Err(Poisoned) }
}
