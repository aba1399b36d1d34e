//! Which instructions the processor has, and which of them the CPU implementation uses.
//!
//! Detection happens once at start. A form that the processor lacks is refused, never tried.

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

    /// The widest form that this processor has, but for one that is slower than the next: on Intel's cores
    /// `vdpbf16ps`, 32 products, takes two cycles, in which two units do 64 products of f32 or 128 of f16; elsewhere it
    /// takes one, and its sums are in f32. The vendor decides, not a clock: processors of one kind have to give the
    /// same bytes.
    pub fn detect() -> Isa {
        Self::choose(is_intel(), Isa::is_available)
    }

    fn choose(intel: bool, available: impl Fn(Isa) -> bool) -> Isa {
        let pays = |isa| match isa {
            Isa::Avx512Bf16 => !intel,
            Isa::Avx512Fp16 => intel,
            _ => true,
        };
        let mut all = Self::ALL.into_iter().rev();
        all.find(|&isa| available(isa) && pays(isa)).unwrap_or(Isa::Scalar)
    }

    /// Whether bf16 weights and cache are widened to f32 as they are multiplied; the left operands are f32 then.
    pub fn widens_bf16(self) -> bool {
        matches!(self, Isa::Avx2 | Isa::Avx512)
    }

    /// Whether this processor (and its operating system) has it.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            Isa::Avx512Fp16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512fp16"),
            Isa::Amx => crate::cpu::tile_amx::permit().is_ok(),
        }
    }

    /// Why AMX is not used here; `None` where it is. For the log at start.
    pub fn amx_refusal() -> Option<&'static str> {
        #[cfg(target_arch = "x86_64")]
        return crate::cpu::tile_amx::permit().err();
        #[cfg(not(target_arch = "x86_64"))]
        Some("the processor is no x86-64")
    }

    /// Whether this processor (and its operating system) has it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Isa::Scalar
    }
}

/// Whether the processor is one of Intel's.
fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0);
        let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        vendor.as_flattened() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_bf16_are_multiplied_where_that_is_fast() {
        let up_to = |widest: Isa| move |isa: Isa| isa <= widest;
        for intel in [false, true] {
            for isa in [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx] {
                assert_eq!(Isa::choose(intel, up_to(isa)), isa);
            }
        }
        assert_eq!(Isa::choose(false, up_to(Isa::Avx512Bf16)), Isa::Avx512Bf16);
        assert_eq!(Isa::choose(true, up_to(Isa::Avx512Bf16)), Isa::Avx512);
        assert_eq!(Isa::choose(false, up_to(Isa::Avx512Fp16)), Isa::Avx512Bf16);
        assert_eq!(Isa::choose(true, up_to(Isa::Avx512Fp16)), Isa::Avx512Fp16);
        assert!(Isa::detect().is_available());
    }
}
