//! The instruction sets that the CPU's kernels are written for.

use std::fmt;

/// An instruction set that kernels are written for, from the plainest to the widest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable Rust: the reference that all others are tested against.
    Scalar,
    /// AVX2 with FMA (Haswell, Zen 1 and up). bf16 is widened to f32.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI (Cascade Lake and up). bf16 is widened to f32.
    Avx512,
    /// The same with AVX-512 BF16 (Zen 4 and up; Intel's processors have it too, but widening is faster there).
    Avx512Bf16,
    /// AVX-512 with FP16 (Sapphire Rapids and up): bf16 weights are multiplied as f16, 32 products at a time.
    Avx512Fp16,
    /// The same with AMX tiles for weights in bf16 and int8 (Sapphire Rapids and up); used only if a self-test
    /// against the portable form passes on this processor.
    Amx,
}

impl Isa {
    /// All of them, from the plainest to the widest.
    pub const ALL: [Isa; 6] =
        [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Avx512Fp16, Isa::Amx];

    /// Whether bf16 weights and cache are widened to f32 as they are multiplied; the left operands are f32 then.
    pub fn widens_bf16(self) -> bool {
        matches!(self, Isa::Avx2 | Isa::Avx512)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Avx512Fp16 => "avx512-fp16",
            Isa::Amx => "amx",
        })
    }
}
