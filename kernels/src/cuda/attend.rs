//! Launching attention, as `attention.cuh` says.
//!
//! Spans of one row go to a decode kernel, longer ones to a prefill kernel; both read the same plan, and what finds
//! no work leaves at once. Few decodes go to the kernel whose CTAs share a split, many on Hopper to the one whose warps
//! walk runs of splits. All give a row the same bytes. A cache of 8-bit floats has kernels of its own; its scales
//! are factors on the scores and on the result.

use super::arena::{Activation, HEAD_DIMS, RowPlace};
use super::device::{CudaDevice, DeviceError, Kernel, Launch, arguments};
use super::plan;
use super::step::StepRun;
use crate::ops::{AttentionShape, KvDtype, KvPlan, KvScales};

/// As in `attention.cuh`.
const DECODE_THREADS: u32 = 224;
const RUN_THREADS: u32 = 32 * plan::RUN_WARPS as u32;
const RUN_SHARED_BYTES: u32 = 225 * 1024;
const PREFILL_WGMMA_THREADS: u32 = 384;
/// Largest heads that the kernel for runs is compiled for.
const RUN_HEAD_DIM_MAX: u32 = 128;
/// Sizes of heads that the Hopper kernel for prefills is compiled for.
const WGMMA_HEAD_DIMS: [u32; 2] = [64, 128];

/// Shared memory that a block of any of the kernels can do with, and what decodes take where there is more.
const SHARED_BYTES_MIN: u32 = 160 * 1024;
const SHARED_BYTES_BEST: u32 = 224 * 1024;

/// Shared memory of a decode, where a block can have `limit` bytes.
fn decode_shared_bytes(limit: u32) -> u32 {
    if limit >= SHARED_BYTES_BEST { SHARED_BYTES_BEST } else { SHARED_BYTES_MIN }
}

fn tile_keys(head_dim: u32) -> u32 {
    if head_dim > 128 { 64 } else { 128 }
}

fn tile_rows(head_dim: u32) -> u32 {
    tile_keys(head_dim)
}

/// As `AttentionArguments` in `attention.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct AttentionArguments {
    queries: u64,
    out: u64,
    cache: u64,
    spans: u64,
    tables: u64,
    decode_items: u64,
    decode_runs: u64,
    prefill_tiles: u64,
    counts: u64,
    partials: u64,
    counters: u64,
    query_stride: u32,
    out_stride: u32,
    kv_heads: u32,
    group: u32,
    window: u32,
    items_max: u32,
    scale_log2: f32,
    value_scale: f32,
}

/// The kernels for one size of heads and one type of cache.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    head_dim: u32,
    kv: KvDtype,
    decode: Kernel,
    /// Decode by runs of splits, on Hopper.
    runs: Option<Kernel>,
    prefill: Kernel,
    /// Whether `prefill` is the Hopper kernel.
    wgmma: bool,
}

/// The kernels of attention.
#[derive(Debug)]
pub struct Attend {
    kernels: Vec<Kernels>,
    decode_shared_bytes: u32,
}

impl Attend {
    /// Finds the kernels. `portable` takes those that every chip runs.
    ///
    /// # Errors
    /// When one is missing, or the chip's blocks have too little shared memory.
    pub fn new(device: &CudaDevice, portable: bool) -> Result<Self, DeviceError> {
        let (has, needed) = (device.shared_bytes_max, SHARED_BYTES_MIN);
        if has < needed {
            return Err(DeviceError::Shared { has, needed });
        }
        let decode_shared_bytes = decode_shared_bytes(device.shared_bytes_max);
        let mut kernels = Vec::new();
        for (kv, suffix) in [(KvDtype::Operand, ""), (KvDtype::Fp8E4m3, "_fp8")] {
            for head_dim in HEAD_DIMS.map(|head_dim| head_dim as u32) {
                let wgmma = device.hopper
                    && !portable
                    && kv == KvDtype::Operand
                    && WGMMA_HEAD_DIMS.contains(&head_dim);
                let walks = device.hopper && !portable && head_dim <= RUN_HEAD_DIM_MAX;
                let runs =
                    walks.then(|| device.kernel(&format!("attention_decode_runs{suffix}_h{head_dim}")));
                let prefill = if wgmma { "attention_prefill_wgmma" } else { "attention_prefill" };
                let entry = Kernels {
                    head_dim,
                    kv,
                    decode: device.kernel(&format!("attention_decode{suffix}_h{head_dim}"))?,
                    runs: runs.transpose()?,
                    prefill: device.kernel(&format!("{prefill}{suffix}_h{head_dim}"))?,
                    wgmma,
                };
                device.allow_shared(entry.decode, decode_shared_bytes)?;
                if let Some(runs) = entry.runs {
                    device.allow_shared(runs, RUN_SHARED_BYTES)?;
                }
                device.allow_shared(entry.prefill, entry.prefill_shared_bytes())?;
                kernels.push(entry);
            }
        }
        Ok(Self { kernels, decode_shared_bytes })
    }

    fn kernels(&self, kv: KvDtype, head_dim: usize) -> &Kernels {
        let fits = |entry: &&Kernels| entry.head_dim as usize == head_dim && entry.kv == kv;
        self.kernels.iter().find(fits).expect("the arena refuses other sizes of heads")
    }

    /// Splits of a run for a step with this many spans of one row; none where the CTAs share each split.
    pub fn run_splits(&self, kv: &KvPlan, decodes: usize, multiprocessors: u32) -> Option<usize> {
        self.kernels(kv.dtype, kv.head_dim).runs?;
        plan::run_splits(decodes, kv.kv_heads, multiprocessors as usize)
    }

    /// Queues a layer's attention.
    ///
    /// # Errors
    /// When the driver refuses a kernel.
    pub fn queue(
        &self,
        run: &StepRun<'_>,
        layer: usize,
        shape: &AttentionShape,
        (out, place): (&Activation, &RowPlace),
    ) -> Result<(), DeviceError> {
        let (arena, layout, kv) = (run.arena, run.layout, run.arena.plan.kv.dtype);
        let scales = if kv == KvDtype::Fp8E4m3 { shape.kv_scales } else { KvScales::ONE };
        let attention = AttentionArguments {
            queries: arena.queries,
            out: place.pointer,
            cache: run.cache(layer),
            spans: run.section(layout.spans),
            tables: run.section(layout.tables),
            decode_items: run.section(layout.items),
            decode_runs: run.section(layout.runs),
            prefill_tiles: run.section(layout.tiles),
            counts: run.section(layout.counts),
            partials: arena.partials,
            counters: arena.counters,
            query_stride: arena.query_width() as u32,
            out_stride: out.stride as u32,
            kv_heads: shape.kv_heads as u32,
            group: arena.packing().group as u32,
            window: shape.sliding_window.unwrap_or(0),
            items_max: arena.items_max as u32,
            scale_log2: shape.scale * scales.key * std::f32::consts::LOG2_E,
            value_scale: scales.value,
        };
        let kernels = self.kernels(kv, shape.head_dim);
        let multiprocessors = run.device.multiprocessors;
        if layout.capacity.items > 0 {
            let (kernel, threads, shared_bytes) = match layout.run_splits.and(kernels.runs) {
                Some(runs) => (runs, RUN_THREADS, RUN_SHARED_BYTES),
                None => (kernels.decode, DECODE_THREADS, self.decode_shared_bytes),
            };
            let launch = Launch { shared_bytes, ..Launch::grid([multiprocessors, 1, 1], threads) };
            // SAFETY: the argument is the one that the kernel declares; its memory is the arena's.
            unsafe { run.device.launch(kernel, launch, arguments![attention]) }?;
        }
        if layout.capacity.tiles > 0 {
            let tiles = layout.capacity.tiles as u32;
            let launch = kernels.prefill_launch(multiprocessors, attention.kv_heads, tiles);
            // SAFETY: as above.
            unsafe { run.device.launch(kernels.prefill, launch, arguments![attention]) }?;
        }
        Ok(())
    }
}

impl Kernels {
    fn prefill_launch(&self, multiprocessors: u32, kv_heads: u32, tiles: u32) -> Launch {
        let shared_bytes = self.prefill_shared_bytes();
        let launch = if self.wgmma {
            Launch::grid([multiprocessors, 1, 1], PREFILL_WGMMA_THREADS)
        } else {
            Launch::grid([kv_heads, tiles, 1], 2 * tile_rows(self.head_dim))
        };
        Launch { shared_bytes, ..launch }
    }

    fn prefill_shared_bytes(&self) -> u32 {
        let head_dim = self.head_dim;
        if self.wgmma {
            2 * 1024 + 128 * head_dim * (2 + 4 * 2 + 4)
        } else {
            head_dim * (tile_rows(head_dim) * (2 + 4) + tile_keys(head_dim) * 2 * 2)
        }
    }
}
