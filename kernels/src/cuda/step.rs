//! A step as a list of commands, and how each becomes kernels.
//!
//! The ops only record. When a step's result is asked for, its commands run: one after the other, or as a graph that
//! was captured from the same commands. Both queue the same kernels with the same arguments.

use std::ffi::c_void;

use super::arena::{Activation, Arena, RowPlace};
use super::device::{CudaDevice, DeviceError, Kernel, Launch, arguments};
use super::gemm::{BatchMap, Gemm, ProductSize};
use super::output::{Epilogue, Heads, NormAfter, NormBefore, Output};
use super::plan::SectionLayout;
use super::weights::DeviceMatrix;
use super::{Attend, Weights};
use crate::ops::{AttentionShape, Buffer, KvDtype};

const NORM_THREADS: u32 = 256;
const ROPE_WARPS: usize = 8;

/// One op of a step. Weights are indices, buffers those of the plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StepCommand {
    /// Rows of a table times a factor, and what the norm after needs.
    Embed { table: usize, factor: f32, out: Buffer, after: Option<Following> },
    /// An RMS norm.
    RmsNorm { x: Buffer, weight: usize, eps: f32, out: Buffer },
    /// Values become an operand.
    Round { x: Buffer, out: Buffer },
    /// The RMS norm of a branch is added.
    NormAdd { x: Buffer, weight: usize, eps: f32, residual: Buffer },
    /// A branch times a factor is added.
    ScaledAdd { x: Buffer, factor: f32, residual: Buffer },
    /// Norms of all queries and of all keys that a product has left; weights and epsilon as in [`Turn`].
    NormHeads { qkv: Buffer, shape: AttentionShape, norms: (usize, usize, f32) },
    /// A matrix product.
    Product(Product),
    /// RoPE and the cache write of queries, keys and values that a product has left.
    RopeCache { qkv: Buffer, turn: Turn },
    /// Attention over the queries that RoPE has left.
    Attention { layer: usize, shape: AttentionShape, out: Buffer },
    /// Keeps the rows of a buffer that want logits.
    Narrow(Buffer),
    /// From here on there are only those rows.
    Narrowed,
    /// Logits of the rows.
    Head { matrix: usize, x: Buffer, before: Option<Preceding> },
    /// Tokens out of logits; with all kernels, or those of rows that only draw or take the greatest.
    Sample { all: bool },
}

/// A matrix product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Product {
    /// The matrix.
    pub matrix: usize,
    /// One number per feature.
    pub bias: Option<usize>,
    /// The operand.
    pub x: Buffer,
    /// The norm that the operand lacks the factors of.
    pub before: Option<Preceding>,
    /// What becomes of the sums.
    pub leaving: Leaving,
}

/// What becomes of a product's sums.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Leaving {
    /// They are written.
    Values(Buffer),
    /// They are added, and a norm may follow.
    Add(Buffer, Option<Following>),
    /// Gates and ups become an operand.
    SiluMul(Buffer),
    /// The same with GELU.
    GeluMul(Buffer),
    /// They are turned and go into the cache.
    Rope(Turn),
}

/// A norm that has left its weights in an operand; its factors come from the squares of the values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preceding {
    /// The values.
    pub values: Buffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// A norm of what is being written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Following {
    /// Its weight.
    pub weight: usize,
    /// The operand.
    pub out: Buffer,
}

/// A layer's RoPE and cache write.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Turn {
    /// The layer.
    pub layer: usize,
    /// Its attention.
    pub shape: AttentionShape,
    /// Norms of queries and keys, and their epsilon.
    pub norms: Option<(usize, usize, f32)>,
    /// Which position embedding, if any.
    pub rope: Option<usize>,
}

impl Leaving {
    fn epilogue(&self) -> Epilogue {
        match self {
            Self::Values(_) => Epilogue::Values,
            Self::Add(..) => Epilogue::Add,
            Self::SiluMul(_) | Self::GeluMul(_) => Epilogue::SiluMul,
            Self::Rope(_) => Epilogue::Rope,
        }
    }
}

/// The kernels that are not products.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    embed: Kernel,
    rms_norm: Kernel,
    round_rows: Kernel,
    norm_values: Kernel,
    scaled_add: Kernel,
    cap_rows: Kernel,
    rope_cache: Kernel,
    gather_rows: Kernel,
    logprobs: Kernel,
    adjust: Kernel,
    parts: Kernel,
    cut: Kernel,
    mass: Kernel,
    draw: Kernel,
    finish: Kernel,
}

impl Kernels {
    /// Finds them.
    ///
    /// # Errors
    /// When one is missing.
    pub fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        Ok(Self {
            embed: device.kernel("embed")?,
            rms_norm: device.kernel("rms_norm")?,
            round_rows: device.kernel("round_rows")?,
            norm_values: device.kernel("norm_values")?,
            scaled_add: device.kernel("scaled_add")?,
            cap_rows: device.kernel("cap_rows")?,
            rope_cache: device.kernel("rope_cache")?,
            gather_rows: device.kernel("gather_rows")?,
            logprobs: device.kernel("sample_logprobs")?,
            adjust: device.kernel("sample_adjust")?,
            parts: device.kernel("sample_parts")?,
            cut: device.kernel("sample_cut")?,
            mass: device.kernel("sample_mass")?,
            draw: device.kernel("sample_draw")?,
            finish: device.kernel("sample_finish")?,
        })
    }
}

/// Everything that commands need to run.
#[derive(Clone, Copy)]
pub struct StepRun<'a> {
    /// The device.
    pub device: &'a CudaDevice,
    /// Kernels.
    pub kernels: &'a Kernels,
    /// Products.
    pub gemm: &'a Gemm,
    /// Attention.
    pub attend: &'a Attend,
    /// Weights.
    pub weights: &'a Weights,
    /// Memory.
    pub arena: &'a Arena,
    /// Where the step's upload lies.
    pub layout: &'a SectionLayout,
    /// Rows that ops work on.
    pub rows: usize,
    /// Rows that want logits; all rows when `narrows` is not set.
    pub logits_rows: usize,
    /// Whether fewer rows want logits than there are.
    pub narrows: bool,
    /// Whether they have been narrowed.
    pub narrowed: bool,
}

fn int(value: usize) -> i32 {
    i32::try_from(value).expect("sizes were checked when the arena was made")
}

impl<'a> StepRun<'a> {
    /// Queues the kernels of all commands.
    ///
    /// # Errors
    /// When the driver refuses one.
    pub fn all(mut self, commands: &[StepCommand]) -> Result<(), DeviceError> {
        for command in commands {
            self.one(command)?;
        }
        Ok(())
    }

    fn one(&mut self, command: &StepCommand) -> Result<(), DeviceError> {
        match *command {
            StepCommand::Embed { table, factor, out, after } => self.embed((table, factor), out, after),
            StepCommand::RmsNorm { x, weight, eps, out } => self.rms_norm(x, (weight, eps), out),
            StepCommand::Round { x, out } => self.round(x, out),
            StepCommand::NormAdd { x, weight, eps, residual } => self.norm_add(x, (weight, eps), residual),
            StepCommand::ScaledAdd { x, factor, residual } => self.scaled_add(x, factor, residual),
            StepCommand::NormHeads { qkv, ref shape, norms } => self.norm_heads(qkv, shape, norms),
            StepCommand::Product(ref product) => self.product(product),
            StepCommand::RopeCache { qkv, ref turn } => self.rope_cache(qkv, turn),
            StepCommand::Attention { layer, ref shape, out } => {
                self.attend.queue(self, layer, shape, self.buffer(out))
            }
            StepCommand::Narrow(buffer) => self.narrow(buffer),
            StepCommand::Narrowed => {
                (self.narrowed, self.rows) = (self.narrows, self.logits_rows);
                Ok(())
            }
            StepCommand::Head { matrix, x, before } => self.head(matrix, x, before),
            StepCommand::Sample { all } => self.sample(all),
        }
    }

    /// An address in the step's upload.
    pub fn section(&self, words: usize) -> u64 {
        self.arena.step + (words * 4) as u64
    }

    fn buffer(&self, buffer: Buffer) -> (&'a Activation, &'a RowPlace) {
        let activation = &self.arena.buffers[buffer.0];
        (activation, if self.narrowed { &activation.narrowed } else { &activation.rows })
    }

    fn launch(
        &self,
        kernel: Kernel,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError> {
        // SAFETY: each caller below gives the arguments that its kernel declares; their memory is the arena's.
        unsafe { self.device.launch(kernel, launch, arguments) }
    }

    fn row_grid(&self) -> Launch {
        Launch::grid([self.rows as u32, 1, 1], NORM_THREADS)
    }

    fn embed(
        &self,
        (table, factor): (usize, f32),
        out: Buffer,
        after: Option<Following>,
    ) -> Result<(), DeviceError> {
        let table = &self.weights.matrices[table];
        let (buffer, place) = self.buffer(out);
        let (pointer, stride) = (table.pointer(), int(table.stride));
        let (rows, fed) = (self.section(self.layout.rows), self.arena.sampling.fed);
        let (width, out_stride) = (int(buffer.width), int(buffer.stride));
        let after = self.following(after, (buffer, place));
        let arguments =
            arguments![pointer, stride, factor, rows, fed, place.pointer, width, out_stride, after];
        self.launch(self.kernels.embed, self.row_grid(), arguments)
    }

    fn weight(&self, vector: usize) -> u64 {
        self.weights.vectors[vector].0.pointer()
    }

    /// The norm after values that are being written.
    fn following(&self, after: Option<Following>, (values, place): (&Activation, &RowPlace)) -> NormAfter {
        after.map_or_else(NormAfter::default, |after| {
            let (operand, to) = self.buffer(after.out);
            NormAfter {
                weight: self.weight(after.weight),
                out: to.pointer,
                squares: place.squares,
                out_stride: int(operand.stride),
                squares_stride: int(values.squares_stride()),
            }
        })
    }

    /// The norm before an operand that is being read.
    fn preceding(&self, before: Option<Preceding>) -> NormBefore {
        before.map_or_else(NormBefore::default, |before| {
            let (values, place) = self.buffer(before.values);
            NormBefore { squares: place.squares, stride: int(values.squares_stride()), eps: before.eps }
        })
    }

    fn rms_norm(&self, x: Buffer, (weight, eps): (usize, f32), out: Buffer) -> Result<(), DeviceError> {
        let ((x, from), (out, to)) = (self.buffer(x), self.buffer(out));
        let weight = self.weight(weight);
        let (x_stride, out_stride, width) = (int(x.stride), int(out.stride), int(x.width));
        let arguments = arguments![from.pointer, x_stride, weight, eps, to.pointer, out_stride, width];
        self.launch(self.kernels.rms_norm, self.row_grid(), arguments)
    }

    fn round(&self, x: Buffer, out: Buffer) -> Result<(), DeviceError> {
        let ((x, from), (out, to)) = (self.buffer(x), self.buffer(out));
        let (x_stride, out_stride, width) = (int(x.stride), int(out.stride), int(x.width));
        let arguments = arguments![from.pointer, x_stride, to.pointer, out_stride, width];
        self.launch(self.kernels.round_rows, self.row_grid(), arguments)
    }

    fn norm_add(&self, x: Buffer, (weight, eps): (usize, f32), residual: Buffer) -> Result<(), DeviceError> {
        let ((x, from), (out, to)) = (self.buffer(x), self.buffer(residual));
        let (weight, add) = (self.weight(weight), 1);
        let (x_stride, out_stride, width) = (int(x.stride), int(out.stride), int(x.width));
        let arguments = arguments![from.pointer, x_stride, weight, eps, to.pointer, out_stride, width, add];
        self.launch(self.kernels.norm_values, self.row_grid(), arguments)
    }

    fn scaled_add(&self, x: Buffer, factor: f32, residual: Buffer) -> Result<(), DeviceError> {
        let ((x, from), (out, to)) = (self.buffer(x), self.buffer(residual));
        let (x_stride, out_stride, width) = (int(x.stride), int(out.stride), int(x.width));
        let arguments = arguments![from.pointer, x_stride, factor, to.pointer, out_stride, width];
        self.launch(self.kernels.scaled_add, self.row_grid(), arguments)
    }

    /// Norms all queries of a row, and all of its keys, where they lie.
    fn norm_heads(
        &self,
        qkv: Buffer,
        shape: &AttentionShape,
        (q, k, eps): (usize, usize, f32),
    ) -> Result<(), DeviceError> {
        let (qkv, from) = self.buffer(qkv);
        let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        for (first, width, weight) in [(0, queries, q), (queries, keys, k)] {
            let at = from.pointer + (first * qkv.element_bytes()) as u64;
            let (stride, width, weight, add) = (int(qkv.stride), int(width), self.weight(weight), 0);
            let arguments = arguments![at, stride, weight, eps, at, stride, width, add];
            self.launch(self.kernels.norm_values, self.row_grid(), arguments)?;
        }
        Ok(())
    }

    fn product(&self, product: &Product) -> Result<(), DeviceError> {
        let matrix = &self.weights.matrices[product.matrix];
        let mut output = Output {
            bias: product.bias.map_or(0, |bias| self.weight(bias)),
            before: self.preceding(product.before),
            ..Output::default()
        };
        match product.leaving {
            Leaving::Values(out) | Leaving::SiluMul(out) | Leaving::GeluMul(out) => {
                let (buffer, place) = self.buffer(out);
                (output.out, output.stride) = (place.pointer, int(buffer.stride));
                output.gelu = i32::from(matches!(product.leaving, Leaving::GeluMul(_)));
            }
            Leaving::Add(out, after) => {
                let (buffer, place) = self.buffer(out);
                (output.out, output.stride) = (place.pointer, int(buffer.stride));
                output.after = self.following(after, (buffer, place));
            }
            Leaving::Rope(ref turn) => output.heads = self.heads(turn),
        }
        self.multiply(product.leaving.epilogue(), matrix, self.buffer(product.x), output)
    }

    /// Computes a product; `output` says where its sums go, and the rest of it is filled in here.
    fn multiply(
        &self,
        epilogue: Epilogue,
        matrix: &DeviceMatrix,
        (x, from): (&Activation, &RowPlace),
        output: Output,
    ) -> Result<(), DeviceError> {
        assert_eq!(x.width, matrix.columns, "width of an operand");
        let halves = output.heads.q_norm != 0 && output.heads.head_dim == 128;
        let work = ProductSize {
            halves,
            ..ProductSize::new(epilogue, self.rows, (matrix.features, matrix.columns))
        };
        let choice = self.gemm.choose(&work);
        let output = choice.output(&work, output);
        if choice.map == BatchMap::None {
            let (pointer, matrix_stride) = (matrix.pointer(), int(matrix.stride));
            let (batch, batch_stride) = (from.pointer, int(x.stride));
            let arguments = arguments![pointer, matrix_stride, batch, batch_stride, output];
            return self.launch(choice.kernel, choice.launch, arguments);
        }
        let map = from.maps.expect("products read operands")[usize::from(choice.map == BatchMap::Rows32)];
        let matrix_map = matrix.map.expect("the kernel is Hopper's");
        self.launch(choice.kernel, choice.launch, arguments![matrix_map, map, output])
    }

    fn heads(&self, turn: &Turn) -> Heads {
        let (shape, kv) = (&turn.shape, &self.arena.plan.kv);
        let (q_norm, k_norm, eps) =
            turn.norms.map_or((0, 0, 0.0), |(q, k, eps)| (self.weight(q), self.weight(k), eps));
        Heads {
            rows: self.section(self.layout.rows),
            table: turn.rope.map_or(0, |rope| self.arena.ropes[rope].pointer()),
            q_norm,
            k_norm,
            queries: self.arena.queries,
            cache: self.cache(turn.layer),
            heads: int(shape.heads),
            kv_heads: int(shape.kv_heads),
            head_dim: int(shape.head_dim),
            query_stride: int(self.arena.query_width()),
            eps,
            key_factor: 1.0 / shape.kv_scales.key,
            value_factor: 1.0 / shape.kv_scales.value,
            fp8: i32::from(kv.dtype == KvDtype::Fp8E4m3),
        }
    }

    fn rope_cache(&self, qkv: Buffer, turn: &Turn) -> Result<(), DeviceError> {
        let (qkv, from) = self.buffer(qkv);
        let heads = self.heads(turn);
        let pairs = turn.rope.map_or(0, |rope| self.arena.ropes[rope].pairs);
        let (stride, pairs) = (int(qkv.stride), int(pairs));
        let count = (turn.shape.heads + 2 * turn.shape.kv_heads).div_ceil(ROPE_WARPS) as u32;
        let launch = Launch::grid([self.rows as u32, count, 1], 32 * ROPE_WARPS as u32);
        self.launch(self.kernels.rope_cache, launch, arguments![from.pointer, stride, pairs, heads])
    }

    /// Where a layer's pages start.
    pub fn cache(&self, layer: usize) -> u64 {
        self.arena.cache + (layer * self.arena.layer_bytes) as u64
    }

    fn narrow(&mut self, buffer: Buffer) -> Result<(), DeviceError> {
        if !self.narrows {
            return Ok(());
        }
        let activation = &self.arena.buffers[buffer.0];
        let index = self.section(self.layout.logits_rows);
        let words = int(activation.stride * activation.element_bytes() / 4);
        let launch = Launch::grid([self.logits_rows as u32, 1, 1], NORM_THREADS);
        let (from, to) = (activation.rows.pointer, activation.narrowed.pointer);
        self.launch(self.kernels.gather_rows, launch, arguments![from, index, to, words])
    }

    fn head(&self, matrix: usize, x: Buffer, before: Option<Preceding>) -> Result<(), DeviceError> {
        let output = Output {
            out: self.arena.logits,
            stride: int(self.arena.logits_stride),
            before: self.preceding(before),
            ..Output::default()
        };
        self.multiply(Epilogue::Values, &self.weights.matrices[matrix], self.buffer(x), output)?;
        let Some(cap) = self.arena.plan.logits_cap else { return Ok(()) };
        let (stride, vocabulary) = (int(self.arena.logits_stride), int(self.arena.plan.vocabulary));
        self.launch(
            self.kernels.cap_rows,
            self.row_grid(),
            arguments![self.arena.logits, stride, cap, vocabulary],
        )
    }

    fn sample(&self, all: bool) -> Result<(), DeviceError> {
        let (kernels, places, logits) = (self.kernels, &self.arena.sampling, self.arena.logits);
        let (stride, vocabulary) = (int(self.arena.logits_stride), int(self.arena.plan.vocabulary));
        let (parts, parameters) = (int(places.parts), self.section(self.layout.parameters));
        let rows = |threads| Launch::grid([self.rows as u32, 1, 1], threads);
        let shared = Launch::grid([places.parts as u32, self.rows as u32, 1], 256);
        let logprobs = places.results + places.logprobs_offset as u64;
        let (maxima, masses, results, fed) = (places.maxima, places.masses, places.results, places.fed);
        let (adjustments, thresholds) = (places.adjustments, places.thresholds);
        if all {
            let arguments = arguments![logits, stride, vocabulary, parameters, logprobs];
            self.launch(kernels.logprobs, rows(1024), arguments)?;
            let arguments = arguments![logits, stride, vocabulary, parameters, adjustments];
            self.launch(kernels.adjust, rows(256), arguments)?;
        }
        let arguments = arguments![logits, stride, vocabulary, parameters, maxima, masses];
        self.launch(kernels.parts, shared, arguments)?;
        if all {
            let arguments = arguments![logits, stride, vocabulary, parameters, maxima, parts, thresholds];
            self.launch(kernels.cut, rows(1024), arguments)?;
            let arguments = arguments![logits, stride, vocabulary, parameters, maxima, thresholds, masses];
            self.launch(kernels.mass, shared, arguments)?;
        }
        let arguments = arguments![
            logits, stride, vocabulary, parameters, maxima, thresholds, masses, parts, results, fed
        ];
        self.launch(kernels.draw, rows(256), arguments)?;
        if all {
            let arguments =
                arguments![logits, stride, vocabulary, parameters, adjustments, results, logprobs];
            self.launch(kernels.finish, rows(32), arguments)?;
        }
        Ok(())
    }
}
