//! A step on the device: the scheduler's chunks become one ragged batch, the batch one token per sampled row. A token
//! that is awaited is fed to its row on the device.
//!
//! The buffers are taken at start, for the largest step; a step allocates nothing in proportion to its size.

use std::time::Duration;

use millrace_kernels::ops::{Batch, Feed, Ops, RowSpan, StepError};
use millrace_kernels::sampling::{SampleRow, Sampled};

use super::sampler;
use super::scheduler::{Chunk, Scheduler};
use crate::model::decoder::Decoder;

/// A model on its device, and the batch in the making.
pub struct Runner<O: Ops> {
    ops: O,
    decoder: Decoder<O>,
    tokens: Vec<u32>,
    feeds: Vec<Feed>,
    spans: Vec<RowSpan>,
    block_tables: Vec<u32>,
    logits_rows: Vec<u32>,
}

impl<O: Ops> Runner<O> {
    /// Takes a loaded model whose arena is allocated, and room for steps of `rows_max` rows.
    pub fn new(ops: O, decoder: Decoder<O>, rows_max: usize) -> Self {
        Self {
            ops,
            decoder,
            tokens: Vec::with_capacity(rows_max),
            feeds: Vec::with_capacity(rows_max),
            spans: Vec::with_capacity(rows_max),
            block_tables: Vec::new(),
            logits_rows: Vec::with_capacity(rows_max),
        }
    }

    /// Queues a step, to run after the one that is in flight.
    ///
    /// # Errors
    /// When the device failed or engine and device disagree about its sizes: the engine is then broken.
    pub fn queue(&mut self, scheduler: &Scheduler, step: &[Chunk]) -> Result<(), StepError> {
        self.gather(scheduler, step);
        let batch = Batch {
            tokens: &self.tokens,
            feeds: &self.feeds,
            spans: &self.spans,
            block_tables: &self.block_tables,
            logits_rows: &self.logits_rows,
        };
        self.decoder.forward(&mut self.ops, &batch)?;
        let sampling = step.iter().filter(|chunk| chunk.samples);
        let rows: Vec<SampleRow<'_>> =
            sampling.map(|chunk| sampler::row(scheduler.sequence(chunk.slot))).collect();
        self.decoder.sample(&mut self.ops, &rows)
    }

    /// Waits for the oldest queued step. Its tokens are in the order of the chunks that sample; the time is what it
    /// took on a device that works beside this thread.
    ///
    /// # Errors
    /// When the device failed.
    pub fn collect(&mut self, sampled: &mut Vec<Sampled>) -> Result<Option<Duration>, StepError> {
        self.ops.collect(sampled)
    }

    fn gather(&mut self, scheduler: &Scheduler, step: &[Chunk]) {
        self.tokens.clear();
        self.feeds.clear();
        self.spans.clear();
        self.block_tables.clear();
        self.logits_rows.clear();
        let block_tokens = scheduler.blocks().block_tokens();
        for chunk in step {
            let sequence = scheduler.sequence(chunk.slot);
            let end = chunk.start + chunk.rows;
            self.spans.push(RowSpan {
                first_row: self.tokens.len() as u32,
                rows: chunk.rows as u32,
                context: end as u32,
                table: self.block_tables.len() as u32,
            });
            let known = sequence.tokens();
            self.tokens.extend_from_slice(&known[chunk.start..end.min(known.len())]);
            if end > known.len() {
                let choice = sequence.awaited().expect("tokens are known or awaited");
                self.feeds.push(Feed { row: self.tokens.len() as u32, choice });
                self.tokens.push(0);
            }
            self.block_tables.extend_from_slice(&sequence.table()[..end.div_ceil(block_tokens)]);
            if chunk.samples {
                self.logits_rows.push(self.tokens.len() as u32 - 1);
            }
        }
    }
}
