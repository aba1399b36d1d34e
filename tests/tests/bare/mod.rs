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

/// The largest difference over the largest logit of the reference.
///
/// # Panics
/// When the lengths differ, or a logit is not finite.
pub fn error(ours: &[f32], reference: &[f32]) -> f32 {
    assert_eq!(ours.len(), reference.len());
    assert!(ours.iter().chain(reference).all(|logit| logit.is_finite()));
    let largest = reference.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
    let difference = ours.iter().zip(reference).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
    difference / largest
}
