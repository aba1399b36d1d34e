//! A step as a list of commands, and how each becomes kernels.
//!
//! The ops only record. When a step's result is asked for, its commands run: one after the other, or as a graph that
//! was captured from the same commands. Both queue the same kernels with the same arguments.

use std::ffi::c_void;

use super::arena::{Activation, Arena, Place};
use super::device::{Device, DeviceError, Kernel, Launch, arguments};
use super::gemm::{BatchMap, Epilogue, Gemm, Output, splits};
use super::plan::Layout;
use super::weights::DeviceMatrix;
use super::{Attend, Weights};
use crate::ops::{AttentionShape, Buffer, KvDtype};

const NORM_THREADS: u32 = 256;
const ROPE_WARPS: usize = 8;

/// One op of a step. Weights are indices, buffers those of the plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Command {
    /// Rows of a table.
    Embed { table: usize, out: Buffer },
    /// An RMS norm.
    RmsNorm { x: Buffer, weight: usize, eps: f32, out: Buffer },
    /// A matrix product.
    Product { epilogue: Epilogue, matrix: usize, bias: Option<usize>, x: Buffer, out: Buffer },
    /// RoPE and the cache write; norms of queries and keys, and their epsilon.
    RopeCache { layer: usize, qkv: Buffer, shape: AttentionShape, norms: Option<(usize, usize, f32)> },
    /// Attention over the queries that RoPE has left.
    Attention { layer: usize, shape: AttentionShape, out: Buffer },
    /// Keeps the rows of a buffer that want logits.
    Narrow(Buffer),
    /// From here on there are only those rows.
    Narrowed,
    /// Logits of the rows.
    Head { matrix: usize, x: Buffer },
    /// Tokens out of logits; with all kernels, or those of rows that only draw or take the greatest.
    Sample { all: bool },
}

/// The kernels that are not products.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    embed: Kernel,
    rms_norm: Kernel,
    rope_cache: Kernel,
    rope_cache_fp8: Kernel,
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
    pub fn new(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self {
            embed: device.kernel("embed")?,
            rms_norm: device.kernel("rms_norm")?,
            rope_cache: device.kernel("rope_cache")?,
            rope_cache_fp8: device.kernel("rope_cache_fp8")?,
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

/// As `RopeShape` in `rows.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RopeShape {
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    pairs: i32,
    qkv_stride: i32,
    query_stride: i32,
    eps: f32,
    key_factor: f32,
    value_factor: f32,
}

/// Everything that commands need to run.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// The device.
    pub device: &'a Device,
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
    pub layout: &'a Layout,
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

impl<'a> Run<'a> {
    /// Queues the kernels of all commands.
    ///
    /// # Errors
    /// When the driver refuses one.
    pub fn all(mut self, commands: &[Command]) -> Result<(), DeviceError> {
        for command in commands {
            self.one(command)?;
        }
        Ok(())
    }

    fn one(&mut self, command: &Command) -> Result<(), DeviceError> {
        match *command {
            Command::Embed { table, out } => self.embed(table, out),
            Command::RmsNorm { x, weight, eps, out } => self.rms_norm(x, (weight, eps), out),
            Command::Product { epilogue, matrix, bias, x, out } => {
                self.product(epilogue, (matrix, bias), x, out)
            }
            Command::RopeCache { layer, qkv, ref shape, norms } => self.rope_cache(layer, qkv, shape, norms),
            Command::Attention { layer, ref shape, out } => {
                self.attend.queue(self, layer, shape, self.buffer(out))
            }
            Command::Narrow(buffer) => self.narrow(buffer),
            Command::Narrowed => {
                (self.narrowed, self.rows) = (self.narrows, self.logits_rows);
                Ok(())
            }
            Command::Head { matrix, x } => self.head(matrix, x),
            Command::Sample { all } => self.sample(all),
        }
    }

    /// An address in the step's upload.
    pub fn section(&self, words: usize) -> u64 {
        self.arena.step + (words * 4) as u64
    }

    fn buffer(&self, buffer: Buffer) -> (&'a Activation, &'a Place) {
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

    fn embed(&self, table: usize, out: Buffer) -> Result<(), DeviceError> {
        let table = &self.weights.matrices[table];
        let (buffer, place) = self.buffer(out);
        let (pointer, stride) = (table.pointer(), int(table.stride));
        let (rows, fed) = (self.section(self.layout.rows), self.arena.sampling.fed);
        let (width, out_stride) = (int(buffer.width), int(buffer.stride));
        let arguments = arguments![pointer, stride, rows, fed, place.pointer, width, out_stride];
        self.launch(self.kernels.embed, self.row_grid(), arguments)
    }

    fn rms_norm(&self, x: Buffer, (weight, eps): (usize, f32), out: Buffer) -> Result<(), DeviceError> {
        let ((x, from), (out, to)) = (self.buffer(x), self.buffer(out));
        let weight = self.weights.vectors[weight].0.pointer();
        let (x_stride, out_stride, width) = (int(x.stride), int(out.stride), int(x.width));
        let arguments = arguments![from.pointer, x_stride, weight, eps, to.pointer, out_stride, width];
        self.launch(self.kernels.rms_norm, self.row_grid(), arguments)
    }

    fn product(
        &self,
        epilogue: Epilogue,
        (matrix, bias): (usize, Option<usize>),
        x: Buffer,
        out: Buffer,
    ) -> Result<(), DeviceError> {
        let matrix = &self.weights.matrices[matrix];
        let (out, to) = self.buffer(out);
        let bias = bias.map_or(0, |bias| self.weights.vectors[bias].0.pointer());
        self.multiply(epilogue, matrix, self.buffer(x), (to.pointer, bias, out.stride))
    }

    fn multiply(
        &self,
        epilogue: Epilogue,
        matrix: &DeviceMatrix,
        (x, from): (&Activation, &Place),
        (out, bias, stride): (u64, u64, usize),
    ) -> Result<(), DeviceError> {
        assert_eq!(x.width, matrix.columns, "width of an operand");
        let choice = self.gemm.choose(epilogue, self.rows, (matrix.features, matrix.columns));
        let output = Output {
            out,
            bias,
            stride: int(stride),
            rows: int(self.rows),
            features: int(matrix.features),
            columns: int(matrix.columns),
            splits: int(splits(epilogue, matrix.features, matrix.columns)),
            batch_tiles: int(choice.batch_tiles),
            feature_tiles: int(choice.feature_tiles),
        };
        if choice.map == BatchMap::None {
            let (pointer, matrix_stride) = (matrix.pointer(), int(matrix.stride));
            let (batch, batch_stride) = (from.pointer, int(x.stride));
            let arguments = arguments![pointer, matrix_stride, batch, batch_stride, output];
            return self.launch(choice.kernel, choice.launch, arguments);
        }
        let map = from.maps.expect("products read operands")[usize::from(choice.map == BatchMap::Rows32)];
        self.launch(choice.kernel, choice.launch, arguments![matrix.map, map, output])
    }

    fn rope_cache(
        &self,
        layer: usize,
        qkv: Buffer,
        shape: &AttentionShape,
        norms: Option<(usize, usize, f32)>,
    ) -> Result<(), DeviceError> {
        let (qkv, from) = self.buffer(qkv);
        let weight = |index: usize| self.weights.vectors[index].0.pointer();
        let (q_norm, k_norm, eps) = norms.map_or((0, 0, 0.0), |(q, k, eps)| (weight(q), weight(k), eps));
        let numbers = RopeShape {
            heads: int(shape.heads),
            kv_heads: int(shape.kv_heads),
            head_dim: int(shape.head_dim),
            pairs: int(self.arena.plan.rope.inverse_frequencies.len()),
            qkv_stride: int(qkv.stride),
            query_stride: int(self.arena.query_width()),
            eps,
            key_factor: 1.0 / shape.kv_scales.key,
            value_factor: 1.0 / shape.kv_scales.value,
        };
        let kernel = match self.arena.plan.kv.dtype {
            KvDtype::Operand => self.kernels.rope_cache,
            KvDtype::Fp8E4m3 => self.kernels.rope_cache_fp8,
        };
        let heads = (shape.heads + 2 * shape.kv_heads).div_ceil(ROPE_WARPS) as u32;
        let launch = Launch::grid([self.rows as u32, heads, 1], 32 * ROPE_WARPS as u32);
        let (rows, queries, cache) = (self.section(self.layout.rows), self.arena.queries, self.cache(layer));
        let table = self.arena.rope;
        let arguments = arguments![from.pointer, rows, table, q_norm, k_norm, queries, cache, numbers];
        self.launch(kernel, launch, arguments)
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

    fn head(&self, matrix: usize, x: Buffer) -> Result<(), DeviceError> {
        let matrix = &self.weights.matrices[matrix];
        let out = (self.arena.logits, 0, self.arena.logits_stride);
        self.multiply(Epilogue::Values, matrix, self.buffer(x), out)
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
