//! Which form of the tile product computes what, by instruction set, precision and cache.

use super::tile::{Held, TileFn, cache_isa, left_held, tile_groups, tile_rows, weights_held};
use super::tile_portable;
#[cfg(target_arch = "x86_64")]
use super::{tile_amx, tile_avx2, tile_avx512, tile_fp16};
use crate::isa::Isa;
use crate::ops::KvDtype;
use crate::pool::Scattered;
use crate::precision::Precision;

/// How tiles are computed here.
#[derive(Clone, Copy)]
pub struct Forms {
    /// Instructions of everything but the tile.
    pub isa: Isa,
    /// The tile product for the precision of weights.
    pub tile: TileFn,
    /// Most rows of that tile.
    pub tile_rows: usize,
    /// Most groups of that tile.
    pub tile_groups: usize,
    /// The tile product for weights in 8 bits, and for those in 4 that are widened to 8.
    pub int8_tile: TileFn,
    /// Most rows of that tile.
    pub int8_rows: usize,
    /// Each thread's memory for a pair of panels that is widened to 8 bits.
    pub widened: Scattered<i8>,
    /// Elements of each thread.
    pub widened_len: usize,
    /// The tile product for the cache.
    pub cache_tile: TileFn,
    /// What the cache holds, or its codes are widened to.
    pub cache: Held,
    /// What the left operands of that are held in.
    pub cache_left: Held,
}

impl Forms {
    /// Those of an instruction set for weights of a precision and a cache.
    pub fn new(isa: Isa, precision: Precision, dtype: KvDtype) -> Self {
        let cache = if precision == Precision::F32 { Precision::F32 } else { Precision::Bf16 };
        let cache_isa = cache_isa(isa, dtype);
        Self {
            isa,
            tile: tile_fn(isa, precision),
            tile_rows: tile_rows(isa, precision),
            tile_groups: tile_groups(isa, precision),
            int8_tile: tile_fn(isa, Precision::Int8),
            int8_rows: tile_rows(isa, Precision::Int8),
            widened: Scattered::new(&mut []),
            widened_len: 0,
            cache_tile: tile_fn(cache_isa, cache),
            cache: weights_held(cache_isa, cache),
            cache_left: left_held(cache_isa, cache),
        }
    }
}

impl std::fmt::Debug for Forms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forms").field("isa", &self.isa).finish_non_exhaustive()
    }
}

/// The form for an instruction set and a precision of the operands.
pub fn tile_fn(isa: Isa, precision: Precision) -> TileFn {
    #[cfg(target_arch = "x86_64")]
    match (isa, precision) {
        (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Avx512Fp16 | Isa::Amx, Precision::F32) => {
            return tile_avx512::f32;
        }
        (Isa::Amx, Precision::Bf16) => return tile_amx::bf16,
        (Isa::Amx, Precision::Int8) => return tile_amx::int8,
        (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Avx512Fp16, Precision::Int8) => {
            return tile_avx512::int8;
        }
        (Isa::Avx512, Precision::Bf16) => return tile_avx512::bf16_widened,
        (Isa::Avx512Bf16, Precision::Bf16) => return tile_avx512::bf16,
        (Isa::Avx512Fp16, Precision::Bf16) => return tile_fp16::f16,
        (Isa::Avx2, Precision::F32) => return tile_avx2::f32,
        (Isa::Avx2, Precision::Bf16) => return tile_avx2::bf16,
        (Isa::Avx2, Precision::Int8) => return tile_avx2::int8,
        (Isa::Scalar, _) => {}
    }
    let _ = isa;
    tile_portable::form(precision)
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::cpu::tile::{
        CHAIN_GROUPS, LANES, Sums, TILE_PANELS, TILE_ROWS, TILE_ROWS_MAX, TILE_SEGMENTS, Tile, WIDE_TILE_ROWS,
    };
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
