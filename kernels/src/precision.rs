//! What the CPU's matrix products compute with.

/// What matrix products compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32 weights, operands and cache.
    F32,
    /// bf16 weights and cache, f32 sums; operands are bf16, or f32 where weights are widened ([`Isa::widens_bf16`]), or
    /// both are f16, exactly scaled ([`Isa::Avx512Fp16`]).
    ///
    /// [`Isa::widens_bf16`]: crate::isa::Isa::widens_bf16
    /// [`Isa::Avx512Fp16`]: crate::isa::Isa::Avx512Fp16
    Bf16,
    /// int8 weights and operands, int32 sums; bf16 cache.
    Int8,
}
