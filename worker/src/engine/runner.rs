//! A step on the device: the scheduler's chunks become one ragged batch, the batch one token per sampled row.
//!
//! The buffers are taken at start, for the largest step; a step allocates nothing in proportion to its size.

use std::time::Duration;

use millrace_kernels::ops::{Batch, Ops, Span, StepError};
use millrace_kernels::sampling::{SampleRow, Sampled};

use super::sampler;
use super::scheduler::{Chunk, Scheduler};
use crate::model::decoder::Decoder;

/// A model on its device, and the batch in the making.
pub struct Runner<O: Ops> {
    ops: O,
    decoder: Decoder<O>,
    tokens: Vec<u32>,
    spans: Vec<Span>,
    block_tables: Vec<u32>,
    logits_rows: Vec<u32>,
    sampled: Vec<Sampled>,
}

impl<O: Ops> Runner<O> {
    /// Takes a loaded model whose arena is allocated, and room for steps of `rows_max` rows.
    pub fn new(ops: O, decoder: Decoder<O>, rows_max: usize) -> Self {
        Self {
            ops,
            decoder,
            tokens: Vec::with_capacity(rows_max),
            spans: Vec::with_capacity(rows_max),
            block_tables: Vec::new(),
            logits_rows: Vec::with_capacity(rows_max),
            sampled: Vec::with_capacity(rows_max),
        }
    }

    /// Computes a step. The tokens are in the order of the chunks that sample.
    ///
    /// # Errors
    /// When the device failed or engine and device disagree about its sizes: the engine is then broken.
    pub fn run(&mut self, scheduler: &Scheduler, step: &[Chunk]) -> Result<&mut Vec<Sampled>, StepError> {
        self.gather(scheduler, step);
        let batch = Batch {
            tokens: &self.tokens,
            spans: &self.spans,
            block_tables: &self.block_tables,
            logits_rows: &self.logits_rows,
        };
        self.decoder.forward(&mut self.ops, &batch)?;
        self.sampled.clear();
        if !self.logits_rows.is_empty() {
            let sampling = step.iter().filter(|chunk| chunk.samples);
            let rows: Vec<SampleRow<'_>> =
                sampling.map(|chunk| sampler::row(scheduler.sequence(chunk.slot))).collect();
            self.decoder.sample(&mut self.ops, &rows, &mut self.sampled)?;
            assert_eq!(self.sampled.len(), rows.len(), "one choice per sampled row");
        }
        Ok(&mut self.sampled)
    }

    /// What the last step took on a device that works beside this thread.
    pub fn device_time(&self) -> Option<Duration> {
        self.ops.device_time()
    }

    /// Gives the memory of [`Self::run`]'s answer back for the next one.
    pub fn give_back(&mut self, sampled: Vec<Sampled>) {
        self.sampled = sampled;
    }

    fn gather(&mut self, scheduler: &Scheduler, step: &[Chunk]) {
        self.tokens.clear();
        self.spans.clear();
        self.block_tables.clear();
        self.logits_rows.clear();
        let block_tokens = scheduler.blocks().block_tokens();
        for chunk in step {
            let sequence = scheduler.sequence(chunk.slot);
            let end = chunk.start + chunk.rows;
            self.spans.push(Span {
                first_row: self.tokens.len() as u32,
                rows: chunk.rows as u32,
                context: end as u32,
                table: self.block_tables.len() as u32,
            });
            self.tokens.extend_from_slice(&sequence.tokens()[chunk.start..end]);
            self.block_tables.extend_from_slice(&sequence.table()[..end.div_ceil(block_tokens)]);
            if chunk.samples {
                self.logits_rows.push(self.tokens.len() as u32 - 1);
            }
        }
    }
}
