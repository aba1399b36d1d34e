//! A thread's memory for attention, and the sizes that it is made for.

use super::fp8;
use super::tile::{LANES, TILE_ROWS};
use crate::isa::Isa;
use crate::ops::BLOCK_TOKENS;
use crate::tensor::Aligned;

/// Positions of a tile of attention.
pub const TILE_TOKENS: usize = 64;
/// Blocks of a tile of attention.
pub const TILE_BLOCKS: usize = TILE_TOKENS / BLOCK_TOKENS;
/// Most elements of a head.
pub const HEAD_DIM_MAX: usize = 256;
const HEAD_PANELS: usize = HEAD_DIM_MAX / LANES;

/// Rows of a left operand; one of the two is used, as the form says.
#[repr(C, align(64))]
pub struct Left<const WIDTH: usize> {
    pub f32: [[f32; WIDTH]; TILE_ROWS],
    /// bf16 or f16.
    pub paired: [[u16; WIDTH]; TILE_ROWS],
}

/// A thread's memory for attention.
#[repr(C, align(64))]
pub struct AttentionScratch {
    pub queries: Left<HEAD_DIM_MAX>,
    /// What makes values of queries in f16; 1 for others.
    pub query_scales: [f32; TILE_ROWS],
    /// The softmax' numerators of a tile.
    pub weights: Left<TILE_TOKENS>,
    pub scores: [[[f32; LANES]; TILE_BLOCKS]; TILE_ROWS],
    /// Sums of weighted values, `[rows][dim / 16]`.
    pub results: [[f32; LANES]; TILE_ROWS * HEAD_PANELS],
    /// Greatest score of each row so far, in units of log 2.
    pub maxima: [f32; TILE_ROWS],
    /// Sums of weights, lane by lane.
    pub totals: [[f32; LANES]; TILE_ROWS],
    pub widened: Widened,
}

impl std::fmt::Debug for AttentionScratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AttentionScratch")
    }
}

impl<const WIDTH: usize> Left<WIDTH> {
    const ZERO: Self = Self { f32: [[0.0; WIDTH]; TILE_ROWS], paired: [[0; WIDTH]; TILE_ROWS] };

    /// The rows as words of 32 bits, each of `group` elements, and the words from row to row.
    pub fn operand(&self, group: usize) -> (*const u32, usize) {
        match group {
            1 => (self.f32.as_ptr().cast(), WIDTH),
            _ => (self.paired.as_ptr().cast(), WIDTH / 2),
        }
    }
}

impl AttentionScratch {
    /// All zero, on the heap.
    pub fn new(widened: Widened) -> Box<Self> {
        Box::new(Self {
            queries: Left::ZERO,
            query_scales: [1.0; TILE_ROWS],
            weights: Left::ZERO,
            scores: [[[0.0; LANES]; TILE_BLOCKS]; TILE_ROWS],
            results: [[0.0; LANES]; TILE_ROWS * HEAD_PANELS],
            maxima: [0.0; TILE_ROWS],
            totals: [[0.0; LANES]; TILE_ROWS],
            widened,
        })
    }
}

/// The keys, then the values, of a tile whose cache holds codes of 8 bits, in what attention multiplies.
pub enum Widened {
    /// The cache is multiplied where it lies.
    Nothing,
    /// `[blocks of a tile][16 * dim]` in f32.
    F32(Aligned<f32>),
    /// The same as bf16 bits.
    Bf16(Aligned<u16>),
}

impl Widened {
    /// Room for heads of `dim` elements in f32.
    pub fn f32(dim: usize) -> Self {
        Self::F32(Aligned::zeroed(TILE_TOKENS * dim))
    }

    /// Room for heads of `dim` elements in bf16.
    pub fn bf16(dim: usize) -> Self {
        Self::Bf16(Aligned::zeroed(TILE_TOKENS * dim))
    }

    /// Widens the codes of the tile's block of that number. Returns where it lies then.
    pub fn block(&mut self, isa: Isa, index: usize, codes: &[u8]) -> *const u32 {
        let place = index * codes.len()..(index + 1) * codes.len();
        match self {
            Self::Nothing => panic!("the arena has room for codes of its own cache"),
            Self::F32(all) => {
                fp8::to_f32(isa, codes, &mut all[place.clone()]);
                all[place].as_ptr().cast()
            }
            Self::Bf16(all) => {
                fp8::to_bf16(isa, codes, &mut all[place.clone()]);
                all[place].as_ptr().cast()
            }
        }
    }
}
