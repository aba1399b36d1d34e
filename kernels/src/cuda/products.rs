//! Times the kernels of a matrix product side by side, as a step runs them: a graph of launches, each of which may
//! start before the one before it has ended, over weights that no cache holds, with the norms before or after. The
//! choice in `gemm.rs` is fitted to these times. Also compares what the kernels leave, byte for byte.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::CudaGraph;

use super::Cuda;
use super::device::{CudaDevice, DeviceError, DeviceMemory, Pinned, arguments};
use super::gemm::{BatchMap, GROUP_FEATURES, KernelChoice, ProductSize};
use super::graph::capture;
use super::output::{Epilogue, Heads, NormAfter, NormBefore, Output};
use super::weights::tensor_map;
use crate::ops::BLOCK_TOKENS;

/// Launches of a graph.
const LAUNCHES: usize = 20;
/// Replays that are timed, after some that are not.
const REPLAYS: usize = 5;
/// Bytes of weights that no cache holds.
const WEIGHT_BYTES: usize = 256 << 20;
/// Rows of the operand beyond the batch's, as a step's buffers have them: tiles that end beyond the tensor map take
/// up to twice as long, since the copy engine is slow to fill in zeros.
const ROWS_BEYOND: usize = 256;
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

/// What a kernel left.
#[derive(Debug, Clone)]
pub struct KernelResult {
    /// The kernel's kind and rows per tile.
    pub kernel: String,
    /// The bytes of each kind of result, in the order of the batch's rows; cache pages whole.
    pub results: Vec<Vec<u8>>,
}

/// Memory of a timed product.
struct Bench {
    weights: DeviceMemory,
    copies: usize,
    matrix_bytes: usize,
    operand: DeviceMemory,
    output: Output,
    /// What `output` writes to, and bytes of a row.
    results: Vec<(DeviceMemory, usize)>,
    /// What it reads, kept for as long.
    _read: Vec<DeviceMemory>,
}

impl Cuda {
    /// Times every kernel that can compute a product.
    ///
    /// # Errors
    /// When the device has too little memory, failed, or is none of Hopper's.
    pub fn time_products(&self, product: &TimedProduct) -> Result<Vec<KernelTime>, DeviceError> {
        let (work, bench) = self.bench(product)?;
        let chosen = self.gemm.choose(&work).kernel;
        let mut times = Vec::new();
        for variant in self.gemm.suitable(&work) {
            let choice = variant.choice(&work);
            let queue = |launch| self.queue_product(&bench, &work, &choice, launch);
            let graph = capture(&self.device, || (0..LAUNCHES).try_for_each(queue))?;
            let microseconds = self.time_launch(&graph)?;
            times.push(KernelTime { kernel: variant.name(), microseconds, chosen: choice.kernel == chosen });
        }
        Ok(times)
    }

    /// Microseconds of one of the `LAUNCHES` of which a graph consists.
    fn time_launch(&self, graph: &CudaGraph) -> Result<f64, DeviceError> {
        graph.launch()?;
        graph.launch()?;
        self.device.synchronize()?;
        let begun = Instant::now();
        for _ in 0..REPLAYS {
            graph.launch()?;
        }
        self.device.synchronize()?;
        Ok(begun.elapsed().as_secs_f64() * 1e6 / (LAUNCHES * REPLAYS) as f64)
    }

    /// Times products that follow each other, each by the kernel that a step takes: microseconds of all of them.
    ///
    /// # Errors
    /// As [`Self::time_products`].
    pub fn time_chain(&self, products: &[TimedProduct]) -> Result<f64, DeviceError> {
        let chain = products.iter().map(|product| self.bench(product)).collect::<Result<Vec<_>, _>>()?;
        let graph = capture(&self.device, || {
            for launch in 0..LAUNCHES {
                for (work, bench) in &chain {
                    self.queue_product(bench, work, &self.gemm.choose(work), launch)?;
                }
            }
            Ok(())
        })?;
        self.time_launch(&graph)
    }

    /// Computes a product once with every kernel that can, from the same random numbers; fewer rows are the first of
    /// more.
    ///
    /// # Errors
    /// As [`Self::time_products`].
    pub fn product_results(&self, product: &TimedProduct) -> Result<Vec<KernelResult>, DeviceError> {
        let (work, bench) = self.bench(product)?;
        let mut found = Vec::new();
        for variant in self.gemm.suitable(&work) {
            for (memory, _) in &bench.results {
                memory.fill_random()?;
            }
            self.queue_product(&bench, &work, &variant.choice(&work), 0)?;
            let mut results = Vec::new();
            for (memory, row_bytes) in &bench.results {
                let mut bytes = vec![0; product.rows * row_bytes];
                memory.download(0, &mut bytes)?;
                results.push(bytes);
            }
            found.push(KernelResult { kernel: variant.name(), results });
        }
        Ok(found)
    }

    fn bench(&self, product: &TimedProduct) -> Result<(ProductSize, Bench), DeviceError> {
        self.device.bind()?;
        let device = &self.device;
        let (rows, (features, columns)) = (product.rows, product.matrix);
        let mut work = ProductSize::new(product.epilogue, rows, product.matrix);
        work.halves = product.head_norms;
        let random = |bytes| -> Result<DeviceMemory, DeviceError> {
            let memory = DeviceMemory::zeroed(device, bytes)?;
            memory.fill_random()?;
            Ok(memory)
        };
        let matrix_bytes = features * columns * 2;
        let copies = (WEIGHT_BYTES / matrix_bytes + 1).min(LAUNCHES);
        let (weights, operand) =
            (random(copies * matrix_bytes)?, random((rows + ROWS_BEYOND) * columns * 2)?);
        let results_of = |row_bytes: &[usize]| -> Result<Vec<(DeviceMemory, usize)>, DeviceError> {
            let padded = rows.next_multiple_of(BLOCK_TOKENS);
            row_bytes.iter().map(|&bytes| Ok((random(padded * bytes)?, bytes))).collect()
        };
        let groups = |width: usize| width.div_ceil(GROUP_FEATURES).next_multiple_of(4);
        let (results, mut read) = match product.epilogue {
            Epilogue::Values => (results_of(&[features * 4])?, Vec::new()),
            Epilogue::SiluMul => (results_of(&[features * 2])?, Vec::new()),
            Epilogue::Add => (results_of(&[features * 4, features * 2, groups(features) * 4])?, vec![]),
            Epilogue::Rope => {
                let places = upload(device, rows * 4, |i| match i % 4 {
                    1 | 2 => i as u32 / 4,
                    word => {
                        if word == 3 {
                            u32::MAX
                        } else {
                            0
                        }
                    }
                })?;
                let row_bytes = [(features - 2 * KV_HEADS * HEAD_DIM) * 2, 2 * KV_HEADS * HEAD_DIM * 2];
                (results_of(&row_bytes)?, vec![places, random(rows * HEAD_DIM * 4)?])
            }
        };
        // Mean squares of the size of a sum, so that the factors bring sums to about unit size.
        let squares = upload(device, rows * groups(columns), |i| {
            let spread = (i as u32).wrapping_mul(2_654_435_761) >> 8;
            (128.0 * columns as f32 * (0.5 + spread as f32 / (1 << 24) as f32)).to_bits()
        })?;
        read.push(squares);
        let mut output = Output { out: results[0].0.pointer(), stride: features as i32, ..Output::default() };
        if product.epilogue == Epilogue::Add {
            output.after = NormAfter {
                weight: weights.pointer(),
                out: results[1].0.pointer(),
                squares: results[2].0.pointer(),
                out_stride: features as i32,
                squares_stride: groups(features) as i32,
            };
        } else {
            let squares = read[read.len() - 1].pointer();
            output.before = NormBefore { squares, stride: groups(columns) as i32, eps: 1e-5 };
        }
        if product.epilogue == Epilogue::Rope {
            let norm = if product.head_norms { weights.pointer() } else { 0 };
            output.heads = heads(features, norm, [&read[0], &read[1]], [&results[0].0, &results[1].0]);
        }
        Ok((work, Bench { weights, copies, matrix_bytes, operand, output, results, _read: read }))
    }

    /// Queues a product with the weights of this launch.
    fn queue_product(
        &self,
        bench: &Bench,
        work: &ProductSize,
        choice: &KernelChoice,
        launch: usize,
    ) -> Result<(), DeviceError> {
        let box_rows = if choice.map == BatchMap::Rows8 { 8 } else { 32 };
        let size = (work.rows + ROWS_BEYOND, work.columns);
        let batch = tensor_map(bench.operand.pointer(), size, work.columns, box_rows)?;
        let at = bench.weights.pointer() + (launch % bench.copies * bench.matrix_bytes) as u64;
        let matrix = tensor_map(at, (work.features, work.columns), work.columns, 64)?;
        let output = choice.output(work, bench.output);
        // SAFETY: the arguments are those that the kernels declare; their memory is the bench's, which outlives the
        // graph's replays.
        unsafe { self.device.launch(choice.kernel, choice.launch, arguments![matrix, batch, output]) }
    }
}

/// What a product does with heads: row `i` stands at position and slot `i`.
fn heads(features: usize, norm: u64, read: [&DeviceMemory; 2], written: [&DeviceMemory; 2]) -> Heads {
    let heads = features / HEAD_DIM - 2 * KV_HEADS;
    Heads {
        rows: read[0].pointer(),
        table: read[1].pointer(),
        q_norm: norm,
        k_norm: norm,
        queries: written[0].pointer(),
        cache: written[1].pointer(),
        heads: heads as i32,
        kv_heads: KV_HEADS as i32,
        head_dim: HEAD_DIM as i32,
        query_stride: (heads * HEAD_DIM) as i32,
        eps: 1e-5,
        key_factor: 1.0,
        value_factor: 1.0,
        fp8: 0,
    }
}

/// New memory of `count` words.
fn upload(
    device: &Arc<CudaDevice>,
    count: usize,
    word: impl Fn(usize) -> u32,
) -> Result<DeviceMemory, DeviceError> {
    let memory = DeviceMemory::zeroed(device, count * 4)?;
    let mut pinned = Pinned::zeroed(device, count * 4)?;
    for (i, target) in pinned.words_mut().iter_mut().enumerate() {
        *target = word(i);
    }
    // SAFETY: the source is not written before the wait.
    unsafe { memory.upload(0, pinned.as_slice()) }?;
    device.synchronize()?;
    Ok(memory)
}
