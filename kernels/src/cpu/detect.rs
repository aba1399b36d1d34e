//! Which instructions the processor has, and which of them are used.
//!
//! Detection happens once at start. A form that the processor lacks is refused, never tried.

#[cfg(target_arch = "x86_64")]
use super::tile_amx;
use crate::isa::Isa;

impl Isa {
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
            Isa::Amx => permit_amx().is_ok(),
        }
    }

    /// Why AMX is not used here; `None` where it is. For the log at start.
    pub fn amx_refusal() -> Option<&'static str> {
        #[cfg(target_arch = "x86_64")]
        return permit_amx().err();
        #[cfg(not(target_arch = "x86_64"))]
        Some("the processor is no x86-64")
    }

    /// Whether this processor (and its operating system) has it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Isa::Scalar
    }
}

/// Whether AMX may be used here; if not, why.
#[cfg(target_arch = "x86_64")]
fn permit_amx() -> Result<(), &'static str> {
    if !Isa::Avx512.is_available() {
        return Err("the processor lacks AVX-512, which attention needs beside AMX");
    }
    tile_amx::permit()
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
