//! Times the kernels of a matrix product side by side, as a step runs them: a graph of launches, each of which may
//! start before the one before it has ended, over weights that no cache holds, with the norms before or after. The
//! choice in `gemm.rs` is fitted to these times.

use std::time::Instant;

use super::Cuda;
use super::device::{DeviceError, Memory, arguments};
use super::gemm::{BatchMap, Choice, Epilogue, Heads, NormAfter, NormBefore, Output, Work};
use super::graph::capture;
use super::weights::tensor_map;

/// Launches of a graph.
const LAUNCHES: usize = 20;
/// Replays that are timed, after some that are not.
const REPLAYS: usize = 5;
/// Bytes of weights that no cache holds.
const WEIGHT_BYTES: usize = 256 << 20;
/// Key-value heads and head size of products that turn heads.
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;

/// A product to time.
#[derive(Debug, Clone, Copy)]
pub struct TimedProduct {
    /// How the sums leave.
    pub epilogue: Epilogue,
    /// Rows of the batch.
    pub rows: usize,
    /// Rows and columns of the matrix.
    pub matrix: (usize, usize),
    /// Parts of K; none are those of a step.
    pub splits: Option<usize>,
    /// Whether heads are normed.
    pub head_norms: bool,
}

/// What a kernel took.
#[derive(Debug, Clone)]
pub struct KernelTime {
    /// The kernel's kind and rows per tile.
    pub kernel: String,
    /// Time from launch to launch.
    pub microseconds: f64,
    /// Whether a step would take it.
    pub chosen: bool,
}

/// Memory of a timed product.
struct Bench {
    weights: Memory,
    copies: usize,
    matrix_bytes: usize,
    operand: Memory,
    output: Output,
    /// What `output` points to, kept for as long.
    _results: [Memory; 2],
}

impl Cuda {
    /// Times every kernel that can compute a product.
    ///
    /// # Errors
    /// When the device has too little memory, failed, or is none of Hopper's.
    pub fn time_products(&self, product: &TimedProduct) -> Result<Vec<KernelTime>, DeviceError> {
        self.device.bind()?;
        let mut work = Work::new(product.epilogue, product.rows, product.matrix);
        work.splits = product.splits.unwrap_or(work.splits);
        work.halves = product.head_norms;
        let bench = self.bench(product, &work)?;
        let chosen = self.gemm.choose(&work).kernel;
        let mut times = Vec::new();
        for variant in self.gemm.suitable(&work) {
            let choice = variant.choice(&work);
            let graph = capture(&self.device, || self.queue_products(&bench, &work, &choice))?;
            graph.launch()?;
            graph.launch()?;
            self.device.synchronize()?;
            let begun = Instant::now();
            for _ in 0..REPLAYS {
                graph.launch()?;
            }
            self.device.synchronize()?;
            times.push(KernelTime {
                kernel: variant.name(),
                microseconds: begun.elapsed().as_secs_f64() * 1e6 / (LAUNCHES * REPLAYS) as f64,
                chosen: choice.kernel == chosen,
            });
        }
        Ok(times)
    }

    fn bench(&self, product: &TimedProduct, work: &Work) -> Result<Bench, DeviceError> {
        let device = &self.device;
        let (rows, (features, columns)) = (product.rows, product.matrix);
        let matrix_bytes = features * columns * 2;
        let copies = (WEIGHT_BYTES / matrix_bytes + 1).min(LAUNCHES);
        let groups = features.max(columns).div_ceil(64).next_multiple_of(4);
        let memory = |bytes| Memory::zeroed(device, bytes);
        let (weights, operand) = (memory(copies * matrix_bytes)?, memory(rows * columns * 2)?);
        weights.fill_random()?;
        operand.fill_random()?;
        let values = memory((rows * features * 4).max(1 << 20))?;
        // Whatever else a product reads or writes: zeros that are overwritten with numbers.
        let other_bytes = (rows * features * 2).max(1 << 20) + rows * groups * 4;
        let other = memory(other_bytes)?;
        let squares = other.pointer() + (other_bytes - rows * groups * 4) as u64;
        let mut output =
            work.output(Output { out: values.pointer(), stride: features as i32, ..Output::default() });
        match product.epilogue {
            Epilogue::Add => {
                output.after = NormAfter {
                    weight: weights.pointer(),
                    out: other.pointer(),
                    squares,
                    out_stride: features as i32,
                    squares_stride: groups as i32,
                }
            }
            _ => output.before = NormBefore { squares, stride: columns.div_ceil(64) as i32, eps: 1e-5 },
        }
        if product.epilogue == Epilogue::Rope {
            let norm = if product.head_norms { weights.pointer() } else { 0 };
            output.heads = Heads {
                rows: squares,
                table: squares,
                q_norm: norm,
                k_norm: norm,
                queries: other.pointer(),
                cache: values.pointer(),
                heads: (features / HEAD_DIM - 2 * KV_HEADS) as i32,
                kv_heads: KV_HEADS as i32,
                head_dim: HEAD_DIM as i32,
                query_stride: features as i32,
                eps: 1e-5,
                key_factor: 1.0,
                value_factor: 1.0,
                fp8: 0,
            };
        }
        Ok(Bench { weights, copies, matrix_bytes, operand, output, _results: [values, other] })
    }

    fn queue_products(&self, bench: &Bench, work: &Work, choice: &Choice) -> Result<(), DeviceError> {
        let box_rows = if choice.map == BatchMap::Rows8 { 8 } else { 32 };
        let batch = tensor_map(bench.operand.pointer(), (work.rows, work.columns), work.columns, box_rows)?;
        let output = Output {
            batch_tiles: choice.batch_tiles as i32,
            feature_tiles: choice.feature_tiles as i32,
            ..bench.output
        };
        for launch in 0..LAUNCHES {
            let at = bench.weights.pointer() + (launch % bench.copies * bench.matrix_bytes) as u64;
            let matrix = tensor_map(at, (work.features, work.columns), work.columns, 64)?;
            // SAFETY: the arguments are those that the kernels declare; their memory is the bench's, which outlives the
            // graph's replays.
            unsafe { self.device.launch(choice.kernel, choice.launch, arguments![matrix, batch, output]) }?;
        }
        Ok(())
    }
}
