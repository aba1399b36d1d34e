//! The one product that everything is made of: a few rows times a few panels.
//!
//! `sums[row][panel][lane] (+)= sum over groups of a[row][group] * b[panel][group][lane]`, the groups in one or
//! several segments that lie apart. The matrix products, the scores and the weighted values of attention are all
//! calls of it. Every form adds the groups of a (row, lane) one after the other into a single sum, whatever `rows` and
//! `panels` are: that is what makes a row's bytes independent of its neighbours. Here is what the forms share; each
//! instruction set has its own in `tile_*.rs`, and `forms.rs` chooses among them.

use crate::isa::Isa;
use crate::ops::KvDtype;
use crate::precision::Precision;

/// Most rows of a tile, but for AMX ([`tile_rows`]).
pub const TILE_ROWS: usize = 12;
/// Most rows of a tile in any form.
pub const TILE_ROWS_MAX: usize = 16;
/// Most panels of a tile.
pub const TILE_PANELS: usize = 4;
/// Most segments of a tile.
pub const TILE_SEGMENTS: usize = 4;
/// Most rows that a tile of more than two panels may have: sums, right operands and one left operand have to
/// fit into 32 registers.
pub const WIDE_TILE_ROWS: usize = 6;
/// Lanes of a panel.
pub const LANES: usize = 16;
/// Groups of a right operand that are fetched ahead when many rows use each: it comes from the second-level
/// cache, and the dozen other streams keep the processor from foreseeing it.
pub const GROUPS_AHEAD: usize = 8;
/// Groups that are added in f16: those of a head of 256 elements.
pub const CHAIN_GROUPS: usize = 128;
/// Rows of left operands in f16 are scaled to lie below this.
pub const LEFT_TOP: f32 = 16.0;
/// The same for queries, whose keys are not scaled: keys below 250 cannot overflow.
pub const QUERY_TOP: f32 = 1.0;
/// Output features of right operands in f16 are scaled to lie below this.
pub const RIGHT_TOP: f32 = 8.0;
// Both elements of the pairs of a chain, each at its greatest.
const _: () = assert!(2.0 * CHAIN_GROUPS as f32 * LEFT_TOP * RIGHT_TOP < 65504.0);

/// Sums of a tile: `[rows][panels]` of lanes, rows [`Tile::sums_stride`] apart. Int8 sums are integers as bits.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Sums(pub [[f32; LANES]; TILE_ROWS_MAX * 2]);

impl Sums {
    /// All zero.
    pub const ZERO: Sums = Sums([[0.0; LANES]; TILE_ROWS_MAX * 2]);
}

/// Operands of a tile.
#[derive(Clone, Copy)]
pub struct Tile {
    /// First row of the left operand: a word of 32 bits for each group, or an f32 for each of its elements where the
    /// form widens bf16 ([`left_held`]).
    pub a: *const u32,
    /// Words from row to row.
    pub a_stride: usize,
    /// Rows, 1 to [`tile_rows`] (or [`WIDE_TILE_ROWS`] with more than two panels).
    pub rows: usize,
    /// First group of each panel in each segment; the first `segments` and `panels` entries are used.
    pub b: [[*const u32; TILE_PANELS]; TILE_SEGMENTS],
    /// 1 to [`TILE_SEGMENTS`]; the left operand goes on without a gap.
    pub segments: usize,
    /// From group to group of a panel, in elements of 32 bits.
    pub b_stride: usize,
    /// 1, 2 or 4.
    pub panels: usize,
    /// Groups of a segment.
    pub groups: usize,
    /// Panels from row to row of the sums, at least `panels`.
    pub sums_stride: usize,
    /// Start from the sums that are there instead of zero.
    pub accumulate: bool,
    /// What is needed next: with each group of a right operand the memory at the same distance from here is
    /// asked for: with AVX-512 into the first-level cache, or the second where a tile has four panels. Any address will
    /// do; nothing is read from it.
    pub next: [[*const u32; TILE_PANELS]; TILE_SEGMENTS],
    /// What is needed after that: with each group of a tile of two panels, a line of 64 bytes from here on is
    /// asked for, into the second-level cache.
    pub later: *const u32,
}

/// A form of the tile product.
///
/// # Safety
/// The processor has the form's instructions; every address that the tile spans may be read; `sums` has
/// `panels` entries for each of `rows` rows, `sums_stride` apart and aligned to 64 bytes.
pub type TileFn = unsafe fn(&Tile, sums: *mut [f32; LANES]);

/// Most rows of a tile for weights of a precision. The other forms, attention's among them, have [`TILE_ROWS`].
pub fn tile_rows(isa: Isa, precision: Precision) -> usize {
    if isa == Isa::Amx && precision != Precision::F32 { TILE_ROWS_MAX } else { TILE_ROWS }
}

/// Most groups of a tile for weights of a precision, over all segments: where sums are halves, as many as a chain has.
pub fn tile_groups(isa: Isa, precision: Precision) -> usize {
    if weights_held(isa, precision) == Held::F16 { CHAIN_GROUPS } else { usize::MAX }
}

/// What attention multiplies with: not AMX, whose processors multiply f32 faster than pairs of bf16, and not halves
/// where the cache holds codes, which are widened to bf16.
pub fn cache_isa(isa: Isa, dtype: KvDtype) -> Isa {
    match (isa, dtype) {
        (Isa::Amx, _) | (Isa::Avx512Fp16, KvDtype::Fp8E4m3) => Isa::Avx512,
        _ => isa,
    }
}

/// What the elements of an operand are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    F32,
    Bf16,
    /// With a power of two for each row, or each output feature, as scale.
    F16,
    /// With a scale for each row or each output feature.
    Int8,
}

impl Held {
    /// Adjacent columns in a packed operand: as many as make 32 bits.
    pub const fn group(self) -> usize {
        match self {
            Held::F32 => 1,
            Held::Bf16 | Held::F16 => 2,
            Held::Int8 => 4,
        }
    }
}

/// What weights are held in.
pub fn weights_held(isa: Isa, precision: Precision) -> Held {
    match precision {
        Precision::F32 => Held::F32,
        Precision::Bf16 if isa == Isa::Avx512Fp16 => Held::F16,
        Precision::Bf16 => Held::Bf16,
        Precision::Int8 => Held::Int8,
    }
}

/// What left operands are held in. A form that widens bf16 has them in f32, unrounded.
pub fn left_held(isa: Isa, precision: Precision) -> Held {
    match weights_held(isa, precision) {
        Held::Bf16 if isa.widens_bf16() => Held::F32,
        held => held,
    }
}
