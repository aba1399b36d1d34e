//! The ops that a decoder's step consists of, and the shape of a step.
//!
//! A step is one ragged [`Batch`]: rows (tokens) of several sequences, each sequence's rows contiguous, prefill
//! chunks and decodes mixed. Model code calls the ops in order on numbered buffers of an arena that
//! [`Ops::allocate`] takes once; nothing allocates after it. Ops do not return values to the host before
//! [`Ops::collect`], so that an implementation may queue, capture and replay a whole step, and run it beside the
//! caller's thread. Steps run in the order in which they were queued; a row's token may be a choice of the step before
//! that the host does not know yet ([`Feed`]).
//!
//! Invariant of every implementation: a row's results depend, byte for byte, on its own sequence only. Broken
//! preconditions between engine and kernels are bugs and panic; a row whose logits are not numbers is reported
//! as [`Poisoned`](crate::sampling::Poisoned) and harms no other row.

use std::time::Duration;

use crate::sampling::{SampleRow, Sampled};
use crate::tensor::{HostTensor, LoadError};

/// Tokens in one KV block. Fixed: the memory layout of a block is that of a matrix operand of 16 columns.
pub const BLOCK_TOKENS: usize = 16;

/// Most steps that are queued and not collected: one that runs, and the next one.
pub const QUEUED_MAX: usize = 2;

/// An activation buffer: its index in [`ArenaPlan::buffers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer(pub usize);

/// What a buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BufferKind {
    /// Single-precision rows: the residual stream and what matrix products write.
    Values,
    /// Rows in the form that matrix products read (f32, bf16, or int8 with scales, as the backend computes).
    Operand,
}

/// One activation buffer of `rows_max` rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferPlan {
    /// Elements in a row.
    pub width: usize,
    /// What it holds.
    pub kind: BufferKind,
}

/// Number format of keys and values in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    /// What attention computes with: f32 beside f32 weights, else bf16.
    #[default]
    Operand,
    /// [`e4m3`](crate::e4m3) codes, a byte each, of values over the scales of [`AttentionShape`]. Attention computes
    /// with what it would without.
    Fp8E4m3,
}

/// The paged key-value cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvPlan {
    /// Layers of the model.
    pub layers: usize,
    /// Key-value heads per layer.
    pub kv_heads: usize,
    /// Elements in a head; even.
    pub head_dim: usize,
    /// Blocks of [`BLOCK_TOKENS`] tokens in the pool.
    pub blocks: usize,
    /// Number format of the elements.
    pub dtype: KvDtype,
}

/// Rotary position embedding by a table of inverse frequencies (the rotate-half convention of Hugging Face:
/// element `i` turns with element `i + len`). Any scaling rule is already in the table.
#[derive(Debug, Clone, PartialEq)]
pub struct RopePlan {
    /// One frequency per pair; twice as many elements of each head are turned, the rest stay.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on sine and cosine; 1 except for scaling rules that ask for one.
    pub amplitude: f32,
}

impl RopePlan {
    /// Checks it against the size of a head.
    ///
    /// # Errors
    /// When it turns more than that.
    pub fn check(&self, head_dim: usize) -> Result<(), PlanError> {
        let turned = self.inverse_frequencies.len() * 2;
        if turned <= head_dim { Ok(()) } else { Err(PlanError::Rope { turned, head_dim }) }
    }
}

/// Everything that is allocated, once.
#[derive(Debug, Clone, PartialEq)]
pub struct ArenaPlan {
    /// Most rows in a step.
    pub rows_max: usize,
    /// Most rows of a step that get logits.
    pub logits_rows_max: usize,
    /// Positions a sequence can have; RoPE tables and score scratch reach this far.
    pub positions_max: usize,
    /// Tokens in the vocabulary (rows of the head).
    pub vocabulary: usize,
    /// Query heads of a layer.
    pub heads: usize,
    /// Activation buffers; [`Buffer`] is an index into these.
    pub buffers: Vec<BufferPlan>,
    /// The cache.
    pub kv: KvPlan,
    /// The position embedding.
    pub rope: RopePlan,
    /// Scores of attention, their factor included, come no further from 0 than this: `cap * tanh(score / cap)`.
    pub score_cap: Option<f32>,
    /// The same of logits.
    pub logits_cap: Option<f32>,
}

/// Why an arena cannot be allocated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A size is zero or above what the implementation can do.
    #[error("{field} is {value}; it must be from {least} to {most}")]
    Size {
        /// Which size.
        field: &'static str,
        /// Its value.
        value: usize,
        /// The least value.
        least: usize,
        /// The greatest value.
        most: usize,
    },
    /// Heads of a size that the implementation is not made for.
    #[error("head_dim is {value}; it must be one of {known:?}")]
    HeadDim {
        /// The size.
        value: usize,
        /// The sizes that there are.
        known: &'static [usize],
    },
    /// The device has too little memory, or failed.
    #[error("device: {0}")]
    Device(String),
    /// The RoPE table turns more elements than a head has.
    #[error("rope turns {turned} elements; a head has {head_dim}")]
    Rope {
        /// Elements that the table turns.
        turned: usize,
        /// Elements of a head.
        head_dim: usize,
    },
}

impl ArenaPlan {
    /// Checks what every device asks of a plan; `rows_most` and `blocks_most` are what this one can do.
    ///
    /// # Errors
    /// When a size is out of its bounds; the error names it.
    pub fn check(&self, rows_most: usize, blocks_most: usize) -> Result<(), PlanError> {
        bound("rows_max", self.rows_max, 1, rows_most)?;
        bound("logits_rows_max", self.logits_rows_max, 1, self.rows_max)?;
        bound("positions_max", self.positions_max, 1, 1 << 20)?;
        bound("vocabulary", self.vocabulary, 1, 1 << 24)?;
        bound("kv.layers", self.kv.layers, 1, 1 << 12)?;
        bound("kv.kv_heads", self.kv.kv_heads, 1, 1 << 10)?;
        bound("kv.blocks", self.kv.blocks, 1, blocks_most)?;
        for buffer in &self.buffers {
            bound("buffer width", buffer.width, 1, 1 << 20)?;
        }
        self.rope.check(self.kv.head_dim)
    }
}

/// A size of a plan within its bounds.
pub(crate) fn bound(field: &'static str, value: usize, least: usize, most: usize) -> Result<(), PlanError> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(PlanError::Size { field, value, least, most }) }
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSpan {
    /// First row.
    pub first_row: u32,
    /// Number of rows, at least one. Their positions are the last `rows` ones below `context`.
    pub rows: u32,
    /// Positions of the sequence that are in the cache once this step has written its own.
    pub context: u32,
    /// Where the sequence's block table starts in [`Batch::block_tables`]; it has
    /// `context.div_ceil(BLOCK_TOKENS)` entries.
    pub table: u32,
}

impl RowSpan {
    /// Position of the span's first row.
    pub fn first_position(&self) -> u32 {
        self.context - self.rows
    }
}

/// A row whose token is a choice of the step before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feed {
    /// The row.
    pub row: u32,
    /// Which of the rows that the step before sampled, in the order of its [`Batch::logits_rows`].
    pub choice: u32,
}

/// One step: every row of every sequence that takes part.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Token of each row; any token where the row is fed.
    pub tokens: &'a [u32],
    /// Rows that get their tokens from the step before. A poisoned choice feeds any token.
    pub feeds: &'a [Feed],
    /// The sequences; together they cover all rows, in order.
    pub spans: &'a [RowSpan],
    /// Block tables of all spans, one after the other.
    pub block_tables: &'a [u32],
    /// Rows whose next token is wanted, ascending.
    pub logits_rows: &'a [u32],
}

/// Why a step cannot run. The engine that made the batch, or the device, is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The batch does not fit the arena or contradicts itself.
    #[error("batch: {field} is {value}; the limit is {limit}")]
    Batch {
        /// Which part of the batch.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What was allowed.
        limit: usize,
    },
    /// The device failed.
    #[error("device: {0}")]
    Device(String),
}

impl Batch<'_> {
    /// Checks the batch against the arena and itself, so that no op has to.
    ///
    /// # Errors
    /// When an index or size is out of its bounds; the error names it.
    pub fn check(&self, plan: &ArenaPlan) -> Result<(), StepError> {
        let bound = |field, value: usize, limit: usize| {
            if value <= limit { Ok(()) } else { Err(StepError::Batch { field, value, limit }) }
        };
        bound("rows", self.tokens.len(), plan.rows_max)?;
        bound("logits rows", self.logits_rows.len(), plan.logits_rows_max)?;
        for &token in self.tokens {
            bound("token id", token as usize, plan.vocabulary - 1)?;
        }
        for feed in self.feeds {
            bound("fed row", feed.row as usize, self.tokens.len().saturating_sub(1))?;
            bound("choice fed", feed.choice as usize, plan.logits_rows_max - 1)?;
        }
        let mut row = 0;
        for span in self.spans {
            let (rows, context, table) = (span.rows as usize, span.context as usize, span.table as usize);
            if span.first_row as usize != row || rows == 0 {
                return Err(StepError::Batch { field: "first row of a span", value: row, limit: row });
            }
            bound("rows of a span", rows, context)?;
            bound("context", context, plan.positions_max)?;
            let blocks = context.div_ceil(BLOCK_TOKENS);
            bound("end of a block table", table + blocks, self.block_tables.len())?;
            for &block in &self.block_tables[table..table + blocks] {
                bound("block", block as usize, plan.kv.blocks - 1)?;
            }
            row += rows;
        }
        if row != self.tokens.len() {
            return Err(StepError::Batch {
                field: "rows of all spans",
                value: row,
                limit: self.tokens.len(),
            });
        }
        if !self.logits_rows.is_sorted_by(|a, b| a < b) {
            return Err(StepError::Batch { field: "order of logits rows", value: 0, limit: 0 });
        }
        if let Some(&last) = self.logits_rows.last() {
            bound("logits row", last as usize, row.saturating_sub(1))?;
        }
        Ok(())
    }
}

/// Shape of a layer's attention. A row of the QKV buffer holds `heads` queries, then `kv_heads` keys, then
/// `kv_heads` values, each of `head_dim` elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements in a head.
    pub head_dim: usize,
    /// Factor on the scores, usually `head_dim^-0.5`.
    pub scale: f32,
    /// A row sees only this many positions up to its own; none is unlimited.
    pub sliding_window: Option<u32>,
    /// Scales of a cache in 8 bits.
    pub kv_scales: KvScales,
}

/// What an 8-bit code of the cache is multiplied with: a value `x` is kept as the code nearest to `x / scale`. A cache
/// of another type has no scales and these are not read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvScales {
    /// Of keys, above 0.
    pub key: f32,
    /// Of values, above 0.
    pub value: f32,
}

impl KvScales {
    /// Values are kept as they are.
    pub const ONE: Self = Self { key: 1.0, value: 1.0 };
}

/// RMS norms of each query and key head before RoPE (Qwen3).
#[derive(Debug)]
pub struct QkNorm<'a, V> {
    /// Weight for queries, `head_dim` elements.
    pub q: &'a V,
    /// Weight for keys, `head_dim` elements.
    pub k: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

impl<V> Clone for QkNorm<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for QkNorm<'_, V> {}

/// What happens to queries and keys before the cache.
#[derive(Debug)]
pub struct HeadWork<'a, V> {
    /// Norms, if any.
    pub norms: Option<QkNorm<'a, V>>,
    /// The norms are over all heads of a row at once, with weights as wide as these (OLMo 2).
    pub whole: bool,
    /// Which position embedding: 0 is the plan's, the others those of [`Ops::add_rope`] in their order.
    pub rope: Option<usize>,
}

/// The ops of a decoder on one device.
pub trait Ops {
    /// A weight matrix as the device multiplies with it.
    type Matrix: Send + Sync;
    /// A weight vector on the device.
    type Vector: Send + Sync;
    /// Whether steps run beside the calling thread, so that it pays to queue the next one while one runs.
    const BESIDE: bool;

    /// Loads a matrix of `[output features, input features]`, the parts stacked by rows (for example Q, K, V).
    ///
    /// # Errors
    /// When a part is no matrix or the columns differ.
    fn matrix(&mut self, parts: &[HostTensor<'_>]) -> Result<Self::Matrix, LoadError>;

    /// Loads the projections of queries, keys and values, stacked, for a product that [`Ops::heads_cache`] follows at
    /// once with a position embedding that turns whole heads and without norms over all of them; the product's values
    /// are not for anything else.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    fn qkv_matrix(&mut self, parts: &[HostTensor<'_>], head_dim: usize) -> Result<Self::Matrix, LoadError>;

    /// Loads a gate and an up projection for [`Ops::linear_silu_mul`].
    ///
    /// # Errors
    /// When their shapes differ or they are no matrices.
    fn gated_matrix(&mut self, gate: &HostTensor<'_>, up: &HostTensor<'_>)
    -> Result<Self::Matrix, LoadError>;

    /// Loads a vector, the parts one after the other (for example the biases of Q, K, V).
    ///
    /// # Errors
    /// When a part is no vector.
    fn vector(&mut self, parts: &[HostTensor<'_>]) -> Result<Self::Vector, LoadError>;

    /// Bytes of the cache that one block takes, over all layers. Does not read `kv.blocks`.
    fn kv_block_bytes(&self, kv: &KvPlan) -> usize;

    /// Takes all memory that steps need.
    ///
    /// # Errors
    /// When a size is out of bounds.
    fn allocate(&mut self, plan: ArenaPlan) -> Result<(), PlanError>;

    /// Starts a step; the ops that follow work on all its rows.
    ///
    /// # Errors
    /// When the batch does not fit the arena.
    fn begin(&mut self, batch: &Batch<'_>) -> Result<(), StepError>;

    /// Bytes of the matrices that were loaded, as the device holds them.
    fn weight_bytes(&self) -> u64;

    /// `out[row] = table[token of row]`. `out` holds values.
    fn embed(&mut self, table: &Self::Matrix, out: Buffer);

    /// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row; values to operand.
    fn rms_norm(&mut self, x: Buffer, weight: &Self::Vector, eps: f32, out: Buffer);

    /// `out = x * matrix^T + bias`; operand to values.
    fn linear(&mut self, matrix: &Self::Matrix, bias: Option<&Self::Vector>, x: Buffer, out: Buffer);

    /// `residual += x * matrix^T + bias`; operand to values.
    fn linear_add(&mut self, matrix: &Self::Matrix, bias: Option<&Self::Vector>, x: Buffer, residual: Buffer);

    /// `out = silu(x * gate^T) * (x * up^T)`; operand to operand. The matrix is a [`Ops::gated_matrix`].
    fn linear_silu_mul(&mut self, gate_up: &Self::Matrix, x: Buffer, out: Buffer);

    /// [`Ops::linear_silu_mul`] with GELU, by its approximation with a hyperbolic tangent.
    fn linear_gelu_mul(&mut self, gate_up: &Self::Matrix, x: Buffer, out: Buffer);

    /// Adds a position embedding after [`Ops::allocate`].
    ///
    /// # Errors
    /// When it turns more than a head, or the device has too little memory.
    fn add_rope(&mut self, rope: &RopePlan) -> Result<(), PlanError>;

    /// Norms (if asked) and turns queries and keys, leaves the queries in the QKV buffer, and writes keys and
    /// values of this step's rows into the cache of `layer`.
    fn heads_cache(
        &mut self,
        layer: usize,
        qkv: Buffer,
        shape: &AttentionShape,
        work: HeadWork<'_, Self::Vector>,
    );

    /// [`Ops::heads_cache`] with the plan's position embedding.
    fn rope_cache(
        &mut self,
        layer: usize,
        qkv: Buffer,
        shape: &AttentionShape,
        norms: Option<QkNorm<'_, Self::Vector>>,
    ) {
        self.heads_cache(layer, qkv, shape, HeadWork { norms, whole: false, rope: Some(0) });
    }

    /// `x *= factor`, of what [`Ops::embed`] has just left; values.
    fn scale(&mut self, x: Buffer, factor: f32);

    /// `out = x`; values to operand.
    fn round(&mut self, x: Buffer, out: Buffer);

    /// `residual += norm(x) * weight`, the norm as in [`Ops::rms_norm`]; values, those of `x` are lost.
    fn norm_add(&mut self, x: Buffer, weight: &Self::Vector, eps: f32, residual: Buffer);

    /// `residual += factor * x`; values.
    fn scaled_add(&mut self, x: Buffer, factor: f32, residual: Buffer);

    /// Causal attention of the buffer's queries over the cache of `layer`; values to operand.
    fn attention(&mut self, layer: usize, qkv: Buffer, shape: &AttentionShape, out: Buffer);

    /// Keeps only the rows that want logits in the given buffers; the ops that follow work on those rows
    /// alone. Once per step, after the last attention.
    fn narrow(&mut self, buffers: &[Buffer]);

    /// Logits of the narrowed rows: `out[row * vocabulary + token]`. For tests and scoring; waits for the
    /// device.
    ///
    /// # Errors
    /// When the device failed.
    fn logits(&mut self, head: &Self::Matrix, x: Buffer, out: &mut [f32]) -> Result<(), StepError>;

    /// Queues the step, with logits of the narrowed rows and from them the next token of each; `rows` are in the
    /// order of the batch's `logits_rows`, and none ends a step that samples nothing. At most [`QUEUED_MAX`] steps
    /// are queued.
    ///
    /// # Errors
    /// When the device failed.
    fn sample(&mut self, head: &Self::Matrix, x: Buffer, rows: &[SampleRow<'_>]) -> Result<(), StepError>;

    /// Waits for the queued step that is oldest. Clears `out` and writes one entry per sampled row; says what the step
    /// took on a device that works beside this thread, and nothing where the thread computes.
    ///
    /// # Errors
    /// When the device failed. A row whose logits are not numbers is an entry of `out`, not an error.
    fn collect(&mut self, out: &mut Vec<Sampled>) -> Result<Option<Duration>, StepError>;
}
