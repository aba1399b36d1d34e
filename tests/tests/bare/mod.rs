//! The engine's model without the scheduler: logits of one sequence, in any numeric type and instruction set.

use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::Result;
use millrace_engine::model::config::DecoderConfig;
use millrace_engine::model::decoder::{ArenaSizes, Decoder, allocate};
use millrace_engine::model::files::Files;
use millrace_kernels::cpu::{Cpu, CpuOptions, Precision};
use millrace_kernels::isa::Isa;
use millrace_kernels::ops::{BLOCK_TOKENS, Batch, KvDtype, RowSpan};

/// What matrix products compute with, and what the cache holds.
pub type Types = (Precision, KvDtype);

/// All in f32.
pub const F32: Types = (Precision::F32, KvDtype::Operand);
/// All in bf16.
pub const BF16: Types = (Precision::Bf16, KvDtype::Operand);
/// Products in int8, the cache in bf16.
pub const INT8: Types = (Precision::Int8, KvDtype::Operand);
/// Products in bf16, the cache in 8 bits.
pub const FP8_KV: Types = (Precision::Bf16, KvDtype::Fp8E4m3);

/// A decoder on a processor.
pub struct Bare {
    cpu: Cpu,
    decoder: Decoder<Cpu>,
    vocabulary: usize,
    table: Vec<u32>,
}

impl Bare {
    /// Loads a folder for sequences of up to `positions`.
    ///
    /// # Errors
    /// When the folder is refused.
    #[allow(dead_code, reason = "not every test loads by the folder's own configuration")]
    pub fn load(folder: &Path, kind: (Types, Isa), positions: usize) -> Result<Self> {
        Self::of(&DecoderConfig::read(folder)?, folder, kind, positions)
    }

    /// As [`Bare::load`], by another configuration than the folder's.
    ///
    /// # Errors
    /// When the weights are not those of the configuration.
    pub fn of(
        config: &DecoderConfig,
        folder: &Path,
        ((precision, kv_dtype), isa): (Types, Isa),
        positions: usize,
    ) -> Result<Self> {
        let mut cpu = Cpu::new(CpuOptions { precision, threads: NonZeroUsize::new(2), isa: Some(isa) })?;
        let decoder = Decoder::load(config, &Files::read(folder)?, &mut cpu, kv_dtype)?;
        let kv_blocks = positions.div_ceil(BLOCK_TOKENS) + 3;
        let sizes = ArenaSizes {
            rows_max: positions,
            logits_rows_max: positions,
            positions_max: positions,
            kv_blocks,
            kv_dtype,
        };
        allocate(&mut cpu, config, sizes)?;
        // Blocks lie anywhere in the pool: 5 has no divisor in common with any number of blocks here.
        let table = (0..kv_blocks as u32 - 3).map(|block| (block * 5 + 2) % kv_blocks as u32).collect();
        Ok(Self { cpu, decoder, vocabulary: config.vocabulary, table })
    }

    /// The logits that follow each token, computed in chunks of these sizes.
    ///
    /// # Errors
    /// When the sequence is too long.
    pub fn logits(&mut self, tokens: &[u32], chunks: &[usize]) -> Result<Vec<Vec<f32>>> {
        anyhow::ensure!(chunks.iter().sum::<usize>() == tokens.len(), "chunks cover the tokens");
        let (mut all, mut start) = (Vec::new(), 0);
        for &rows in chunks {
            let end = start + rows;
            let logits_rows: Vec<u32> = (0..rows as u32).collect();
            let batch = Batch {
                tokens: &tokens[start..end],
                feeds: &[],
                spans: &[RowSpan { first_row: 0, rows: rows as u32, context: end as u32, table: 0 }],
                block_tables: &self.table[..end.div_ceil(BLOCK_TOKENS)],
                logits_rows: &logits_rows,
            };
            self.decoder.forward(&mut self.cpu, &batch)?;
            let mut out = vec![0.0; rows * self.vocabulary];
            self.decoder.logits(&mut self.cpu, &mut out)?;
            all.extend(out.chunks(self.vocabulary).map(<[f32]>::to_vec));
            start = end;
        }
        Ok(all)
    }
}

/// How far logits are from those of a reference.
#[derive(Debug, Clone, Copy)]
pub struct Error {
    /// The largest difference over the largest logit of the reference.
    pub most: f32,
    /// The root of the mean square of the differences, over that of the reference.
    pub mean: f32,
}

impl std::fmt::Display for Error {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "error {:.1e}, in the mean {:.1e}", self.most, self.mean)
    }
}

impl Error {
    /// Whether both are small enough.
    pub fn within(&self, bound: Bound) -> bool {
        self.most <= bound.most && self.mean <= bound.mean
    }
}

/// Largest errors on tiny random weights.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// Of [`Error::most`].
    pub most: f32,
    /// Of [`Error::mean`].
    pub mean: f32,
}

impl Bound {
    /// That of numeric types. In f32 and bf16 they follow from the arithmetic; int8 (seven bits and a sign on either
    /// side of every product) and keys and values in 8 bits (three bits of mantissa) have in the mean twice what was
    /// measured.
    pub fn of(types: Types) -> Self {
        let (most, mean) = match types {
            F32 => (1e-4, 2e-5),
            BF16 => (2e-2, 2e-2),
            INT8 => (1e-1, 1e-1),
            _ => (2e-1, 1.5e-1),
        };
        Self { most, mean }
    }
}

/// Compares logits with those of a reference.
///
/// # Panics
/// When the lengths differ, or a logit is not finite.
pub fn error(ours: &[f32], reference: &[f32]) -> Error {
    assert_eq!(ours.len(), reference.len());
    assert!(ours.iter().chain(reference).all(|logit| logit.is_finite()));
    let largest = reference.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
    let difference = ours.iter().zip(reference).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
    let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|n| f64::from(n).powi(2)).sum::<f64>();
    let apart = squares(&mut ours.iter().zip(reference).map(|(a, b)| a - b));
    let mean = (apart / squares(&mut reference.iter().copied())).sqrt() as f32;
    Error { most: difference / largest, mean }
}
