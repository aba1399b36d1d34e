//! The one product that everything is made of: a few rows times a few panels.
//!
//! `sums[row][panel][lane] (+)= sum over groups of a[row][group] * b[panel][group][lane]`, the groups in one or
//! several segments that lie apart. The matrix products, the scores and the weighted values of attention are
//! all calls of it. Every form adds the groups of a (row,
//! lane) one after the other into a single sum, whatever `rows` and `panels` are: that is what makes a row's
//! bytes independent of its neighbours.

use super::Precision;
use crate::isa::Isa;
use crate::ops::KvDtype;

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

/// The form for an instruction set and a precision of the operands.
pub fn tile_fn(isa: Isa, precision: Precision) -> TileFn {
    #[cfg(target_arch = "x86_64")]
    match (isa, precision) {
        (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Avx512Fp16 | Isa::Amx, Precision::F32) => {
            return super::tile_avx512::f32;
        }
        (Isa::Amx, Precision::Bf16) => return super::tile_amx::bf16,
        (Isa::Amx, Precision::Int8) => return super::tile_amx::int8,
        (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Avx512Fp16, Precision::Int8) => {
            return super::tile_avx512::int8;
        }
        (Isa::Avx512, Precision::Bf16) => return super::tile_avx512::bf16_widened,
        (Isa::Avx512Bf16, Precision::Bf16) => return super::tile_avx512::bf16,
        (Isa::Avx512Fp16, Precision::Bf16) => return super::tile_fp16::f16,
        (Isa::Avx2, Precision::F32) => return super::tile_avx2::f32,
        (Isa::Avx2, Precision::Bf16) => return super::tile_avx2::bf16,
        (Isa::Avx2, Precision::Int8) => return super::tile_avx2::int8,
        (Isa::Scalar, _) => {}
    }
    let _ = isa;
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

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::sampling::uniform;

    /// Operands for every shape of a tile, in [`TILE_SEGMENTS`] segments.
    struct Operands {
        groups: usize,
        a: Vec<u32>,
        a_stride: usize,
        b: Vec<u32>,
    }

    /// A number in [-1, 1).
    fn number(seed: u64, at: usize) -> f32 {
        uniform(seed, at as u32) as f32 * 2.0 - 1.0
    }

    impl Operands {
        /// With `words` words of the left operand for each group.
        fn new(
            groups: usize,
            words: usize,
            left: impl Fn(usize) -> u32,
            right: impl Fn(usize) -> u32,
        ) -> Self {
            let a_stride = words * groups * TILE_SEGMENTS + 3;
            let a = (0..TILE_ROWS * a_stride).map(left).collect();
            let b = (0..TILE_SEGMENTS * TILE_PANELS * groups * LANES).map(right).collect();
            Self { groups, a, a_stride, b }
        }

        fn left(&self, row: usize, word: usize) -> u32 {
            self.a[row * self.a_stride + word]
        }

        /// The word of a lane, groups counted through all segments.
        fn right(&self, panel: usize, group: usize, lane: usize) -> u32 {
            let (segment, group) = (group / self.groups, group % self.groups);
            self.b[((segment * TILE_PANELS + panel) * self.groups + group) * LANES + lane]
        }

        /// Compares all shapes with `expected`, which is given row, panel, lane, groups and what was there before.
        fn check(&self, isa: Isa, form: TileFn, expected: impl Fn(usize, usize, usize, usize, f32) -> f32) {
            let panel = |segment: usize, panel: usize| {
                &self.b[(segment * TILE_PANELS + panel) * self.groups * LANES..]
            };
            let b = [0, 1, 2, 3].map(|segment| [0, 1, 2, 3].map(|index| panel(segment, index).as_ptr()));
            let shapes = (1..=TILE_ROWS).flat_map(|rows| [1, 2, 4].map(|panels| (rows, panels)));
            for (rows, panels) in shapes.filter(|&(rows, panels)| panels < 4 || rows <= WIDE_TILE_ROWS) {
                for (segments, accumulate) in [(1, false), (TILE_SEGMENTS, true)] {
                    let tile = Tile {
                        a: self.a.as_ptr(),
                        a_stride: self.a_stride,
                        rows,
                        b,
                        segments,
                        b_stride: LANES,
                        panels,
                        groups: self.groups,
                        sums_stride: panels,
                        accumulate,
                        next: b,
                        later: self.a.as_ptr(),
                    };
                    let mut sums = Sums([[0.5; LANES]; TILE_ROWS_MAX * 2]);
                    // SAFETY: the operands have these rows, panels and groups, and the processor the instructions.
                    unsafe { form(&tile, sums.0.as_mut_ptr()) };
                    for (index, lanes) in sums.0[..rows * panels].iter().enumerate() {
                        let (row, panel) = (index / panels, index % panels);
                        for (lane, &found) in lanes.iter().enumerate() {
                            let before = if accumulate { 0.5 } else { 0.0 };
                            let expected = expected(row, panel, lane, segments * self.groups, before);
                            assert_eq!(found, expected, "{isa} {rows}x{panels} row {row} panel {panel}");
                        }
                    }
                }
            }
        }
    }

    /// A form that widens bf16 adds exact f32 products in order, whatever the rows, panels and segments.
    #[test]
    fn widened_products_are_a_chain_of_fused_products() {
        let pair = |at| number(1, 2 * at).to_bits() >> 16 | number(1, 2 * at + 1).to_bits() & 0xFFFF_0000;
        let operands = Operands::new(5, 2, |at| number(2, at).to_bits(), pair);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available() && isa.widens_bf16()) {
            operands.check(isa, tile_fn(isa, Precision::Bf16), |row, panel, lane, groups, before| {
                let mut expected = before;
                for group in 0..groups {
                    let pair = operands.right(panel, group, lane);
                    for (half, b) in [pair << 16, pair & 0xFFFF_0000].into_iter().enumerate() {
                        let a = f32::from_bits(operands.left(row, 2 * group + half));
                        expected = a.mul_add(f32::from_bits(b), expected);
                    }
                }
                expected
            });
        }
    }

    /// Nearest f16: rounded to an odd f32 on the way, so that it is rounded once.
    fn nearest(value: f64) -> f16 {
        let near = value as f32;
        let below = if f64::from(near).abs() > value.abs() { near.to_bits() - 1 } else { near.to_bits() };
        f16::from_f32(f32::from_bits(below | u32::from(f64::from(near) != value)))
    }

    /// Chains of fused products in f16, of each element of a pair for itself, which are added at the end.
    #[test]
    fn halves_are_chains_of_fused_products_in_halves() {
        let halves =
            |pair: u32| [pair as u16, (pair >> 16) as u16].map(|bits| f64::from(f16::from_bits(bits)));
        let pair = |seed: u64, at| {
            let half = |at| u32::from(f16::from_f32(number(seed, at)).to_bits());
            half(2 * at) | half(2 * at + 1) << 16
        };
        for groups in [1, 8, CHAIN_GROUPS / TILE_SEGMENTS] {
            let operands = Operands::new(groups, 1, |at| pair(3, at), |at| pair(4, at));
            for isa in [Isa::Avx512Fp16].into_iter().filter(|isa| isa.is_available()) {
                operands.check(isa, tile_fn(isa, Precision::Bf16), |row, panel, lane, groups, before| {
                    let mut chains = [0.0, 0.0];
                    for group in 0..groups {
                        let a = halves(operands.left(row, group));
                        let b = halves(operands.right(panel, group, lane));
                        // Products of halves in [-1, 1), and sums with them, are exact in f64.
                        chains = [0, 1].map(|half| f64::from(nearest(a[half] * b[half] + chains[half])));
                    }
                    before + f32::from(nearest(chains[0] + chains[1]))
                });
            }
        }
    }
}
