//! The ops on an NVIDIA GPU, sm_80 and up, tuned for Hopper.
//!
//! Weights and operands are bf16, keys and values bf16 or 8-bit floats, sums and the residual stream f32. The ops
//! record a step, which is then queued: one upload, then kernels one by one, or a captured graph when every row is a
//! decode that is sampled. It runs while the host prepares the next one. The driver's library is loaded at run time,
//! and no other CUDA library is needed. Refused: chips before sm_80, head sizes that attention is not compiled for.
//! Invariant: kernels differ by the number of rows in speed alone, never in the order in which a row's numbers are
//! added.

mod arena;
mod attend;
mod device;
mod flight;
mod gemm;
mod graph;
mod measure;
pub mod modules;
mod ops;
mod output;
mod plan;
mod products;
mod record;
mod sampling;
mod step;
mod weights;

use std::sync::Arc;

use arena::Arena;
use attend::Attend;
use device::{CudaDevice, DeviceMemory};
pub use device::{DeviceError, is_present};
use gemm::Gemm;
use graph::Graphs;
pub use output::Epilogue;
use plan::{GRAPH_ROWS_MAX, PlanCapacity, SectionLayout, padded};
pub use products::{KernelTime, TimedProduct};
use record::Recording;
use sampling::{Adjustments, needs_all_kernels, write_parameters};
use step::{Kernels, StepCommand, StepRun};
use weights::{DeviceMatrix, Upload};

use crate::ops::{Batch, Feed, RowSpan, StepError};
use crate::sampling::SampleRow;
use crate::tensor::LoadError;

/// Which kernels run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelSet {
    /// The best that there are for the chip.
    Own,
    /// Those that every chip runs, to compare with.
    Portable,
    /// Of these, those for chips whose blocks have 99 KiB of shared memory.
    Small,
}

/// How to run on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaOptions {
    /// The device's number.
    pub index: usize,
    /// Which kernels run; a chip takes the small ones by itself where it needs them.
    pub kernels: KernelSet,
    /// Whether steps of decodes are captured.
    pub graphs: bool,
}

impl CudaOptions {
    /// A device at its best.
    pub fn new(index: usize) -> Self {
        Self { index, kernels: KernelSet::Own, graphs: true }
    }
}

/// All weights on the device.
#[derive(Debug, Default)]
struct Weights {
    matrices: Vec<DeviceMatrix>,
    /// With their lengths.
    vectors: Vec<(DeviceMemory, usize)>,
}

/// A matrix on the device.
#[derive(Debug)]
pub struct Matrix {
    index: usize,
    features: usize,
}

/// A vector on the device.
#[derive(Debug)]
pub struct Vector {
    index: usize,
    len: usize,
}

/// The batch at hand, and what is to be done with it.
#[derive(Debug, Default)]
struct Step {
    tokens: Vec<u32>,
    feeds: Vec<Feed>,
    spans: Vec<RowSpan>,
    block_tables: Vec<u32>,
    logits_rows: Vec<u32>,
    recording: Recording,
}

impl Step {
    fn batch(&self) -> Batch<'_> {
        Batch {
            tokens: &self.tokens,
            feeds: &self.feeds,
            spans: &self.spans,
            block_tables: &self.block_tables,
            logits_rows: &self.logits_rows,
        }
    }

    /// Whether every row is the one row of a sequence and is sampled.
    fn decodes_only(&self) -> bool {
        self.spans.len() == self.tokens.len() && self.logits_rows.len() == self.tokens.len()
    }
}

/// The ops on a GPU.
#[derive(Debug)]
pub struct Cuda {
    graphs: Option<Graphs>,
    kernels: Kernels,
    gemm: Gemm,
    attend: Attend,
    upload: Option<Upload>,
    step: Step,
    tile_order: Vec<(u32, u32, u32)>,
    adjustments: Adjustments,
    arena: Option<Arena>,
    weights: Weights,
    device: Arc<CudaDevice>,
}

fn broken(error: DeviceError) -> StepError {
    StepError::Device(error.to_string())
}

impl Cuda {
    /// Opens a device.
    ///
    /// # Errors
    /// When driver, device or kernels are missing, or the chip is too old.
    pub fn new(options: CudaOptions) -> Result<Self, DeviceError> {
        let device = CudaDevice::open(options.index)?;
        Ok(Self {
            graphs: options.graphs.then(Graphs::default),
            kernels: Kernels::new(&device)?,
            gemm: Gemm::new(&device, options.kernels)?,
            attend: Attend::new(&device, options.kernels)?,
            upload: Some(Upload::new(&device)?),
            step: Step::default(),
            tile_order: Vec::new(),
            adjustments: Adjustments::new(0),
            arena: None,
            weights: Weights::default(),
            device,
        })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.device.name
    }

    /// Bytes of the device's memory that are free.
    ///
    /// # Errors
    /// When the device failed.
    pub fn free_bytes(&self) -> Result<usize, DeviceError> {
        self.device.bind()?;
        Ok(self.device.memory()?.0)
    }

    fn arena(&self) -> &Arena {
        self.arena.as_ref().expect("allocate comes before any step")
    }

    fn load(
        &mut self,
        load: impl FnOnce(&mut Upload) -> Result<DeviceMatrix, LoadError>,
    ) -> Result<Matrix, LoadError> {
        let matrix = load(self.uploader()?)?;
        let features = matrix.features;
        self.weights.matrices.push(matrix);
        Ok(Matrix { index: self.weights.matrices.len() - 1, features })
    }

    fn uploader(&mut self) -> Result<&mut Upload, LoadError> {
        if self.upload.is_none() {
            let upload = Upload::new(&self.device).map_err(|error| LoadError::Device(error.to_string()))?;
            self.upload = Some(upload);
        }
        Ok(self.upload.as_mut().expect("it was made a moment ago"))
    }

    /// Writes the batch for the device, at `rows` rows or exactly as it is.
    fn write_batch(&mut self, graph_rows: Option<usize>) -> SectionLayout {
        let arena = self.arena.as_mut().expect("allocate comes before any step");
        let (packing, batch) = (arena.packing, self.step.batch());
        let capacity = match graph_rows {
            Some(rows) => PlanCapacity::of_decodes(rows, arena.plan.positions_max),
            None => PlanCapacity::of(&batch, packing),
        };
        let run_splits = self.attend.run_splits(arena, capacity.decodes, self.device.multiprocessors);
        let layout = SectionLayout::new(capacity, run_splits);
        let staging = arena.flights.next_mut().staging.words_mut();
        layout.write(&batch, packing, staging, &mut self.tile_order);
        layout
    }

    /// Writes the rows' sampling parameters; returns the number of adjustments.
    fn write_parameters(
        &mut self,
        rows: &[SampleRow<'_>],
        layout: &SectionLayout,
    ) -> Result<usize, StepError> {
        let arena = self.arena.as_mut().expect("allocate comes before any step");
        let flight = arena.flights.next_mut();
        let (start, words) = (layout.parameters, plan::PARAMETER_WORDS);
        let mut adjusted = 0;
        for (index, row) in rows.iter().enumerate() {
            let mut count = 0;
            if row.adjusts() {
                let written = self.adjustments.write(row, adjusted, flight.adjustments.words_mut());
                count = written.ok_or(StepError::Batch {
                    field: "tokens with bias or penalty",
                    value: adjusted,
                    limit: arena.sampling.adjustments_max,
                })?;
            }
            let into = &mut flight.staging.words_mut()[start + index * words..][..words];
            write_parameters(row, (adjusted, count), into);
            adjusted += count;
        }
        flight.staging.words_mut()[start + rows.len() * words..start + layout.capacity.logits_rows * words]
            .fill(0);
        flight.logprobs.clear();
        flight.logprobs.extend(rows.iter().map(|row| row.logprobs));
        Ok(adjusted)
    }

    fn run_commands(&mut self, layout: &SectionLayout, graph_rows: Option<usize>) -> Result<(), DeviceError> {
        let arena = self.arena.as_ref().expect("allocate comes before any step");
        arena.upload_step(layout.words(self.step.block_tables.len()))?;
        let rows = graph_rows.unwrap_or(self.step.tokens.len());
        let logits_rows = graph_rows.unwrap_or(self.step.logits_rows.len());
        let run = StepRun {
            device: &self.device,
            kernels: &self.kernels,
            gemm: &self.gemm,
            attend: &self.attend,
            weights: &self.weights,
            arena,
            layout,
            rows,
            logits_rows,
            narrows: logits_rows != rows,
            narrowed: false,
        };
        let commands = self.step.recording.commands();
        match (graph_rows, &mut self.graphs) {
            (Some(rows), Some(graphs)) => graphs.launch(&self.device, (rows, commands), || run.all(commands)),
            _ => run.all(commands),
        }
    }

    /// Runs what was recorded, for a step whose results stay on the device.
    fn flush(&mut self) -> Result<(), StepError> {
        if self.step.recording.commands().is_empty() {
            return Ok(());
        }
        self.device.bind().map_err(broken)?;
        let layout = self.write_batch(None);
        self.run_commands(&layout, None).map_err(broken)?;
        self.step.recording.clear();
        // The next step is written where this one was.
        self.device.synchronize().map_err(broken)
    }

    /// Queues what was recorded, and the choice of a token for each row that wants one.
    fn queue_sampled(&mut self, rows: &[SampleRow<'_>]) -> Result<(), StepError> {
        self.device.bind().map_err(broken)?;
        let count = self.step.tokens.len();
        let captures = self.step.decodes_only() && count <= GRAPH_ROWS_MAX;
        let graph_rows = captures.then(|| padded(count));
        let layout = self.write_batch(graph_rows);
        let adjusted = self.write_parameters(rows, &layout)?;
        let all = rows.iter().any(needs_all_kernels);
        if !rows.is_empty() {
            self.step.recording.push(StepCommand::Sample { all });
        }
        let bytes = self.arena().sampling.result_bytes(rows.len(), all);
        let queued = self.queue_written((&layout, graph_rows), adjusted, bytes);
        self.step.recording.clear();
        queued.map_err(broken)
    }

    /// Queues the next flight: uploads, the commands, and the download of this many bytes of results.
    fn queue_written(
        &mut self,
        (layout, graph_rows): (&SectionLayout, Option<usize>),
        adjusted: usize,
        result_bytes: usize,
    ) -> Result<(), DeviceError> {
        let arena = self.arena();
        arena.flights.next().begin(&self.device)?;
        if adjusted > 0 {
            arena.upload_adjustments(adjusted)?;
        }
        self.run_commands(layout, graph_rows)?;
        let arena = self.arena.as_mut().expect("allocate comes before any step");
        if result_bytes > 0 {
            let results = &mut arena.flights.next_mut().results;
            // SAFETY: they are read when the flight has ended.
            unsafe { results.queue_download(arena.sampling.results, result_bytes) }?;
        }
        arena.flights.queued(&self.device)
    }
}

#[cfg(test)]
mod tests;
