//! Launching attention, as `attention.cuh` says.
//!
//! Spans of one row go to a decode kernel, longer ones to a prefill kernel; both read the same plan, and what finds
//! no work leaves at once. Few decodes go to the kernel whose CTAs share a split, many on Hopper to the one whose
//! warps walk runs of splits. All give a row the same bytes. A cache of 8-bit floats has kernels of its own; its
//! scales are factors on the scores and on the result. Where a block can have little shared memory, small kernels
//! run; capped scores have kernels of their own.

use std::f32::consts::LOG2_E;

use super::KernelSet;
use super::arena::{Activation, Arena, HEAD_DIMS, RowPlace};
use super::device::{CudaDevice, DeviceError, Kernel, Launch, arguments};
use super::plan;
use super::step::StepRun;
use crate::ops::{ArenaPlan, AttentionShape, KvDtype, KvScales};

/// As in `attention.cuh`.
const DECODE_THREADS: u32 = 224;
const RUN_THREADS: u32 = 32 * plan::RUN_WARPS as u32;
const RUN_SHARED_BYTES: u32 = 225 * 1024;
const PREFILL_WGMMA_THREADS: u32 = 384;
/// Largest heads that the kernel for runs is compiled for.
const RUN_HEAD_DIM_MAX: u32 = 128;
/// Sizes of heads that the Hopper kernel for prefills is compiled for.
const WGMMA_HEAD_DIMS: [u32; 2] = [64, 128];

/// Shared memory of a block: what the small kernels take, the others, and decodes where there is as much.
const SHARED_BYTES_SMALL: u32 = 96 * 1024;
const SHARED_BYTES: u32 = 160 * 1024;
const SHARED_BYTES_BEST: u32 = 224 * 1024;

/// Shared memory of a decode, where a block can have `limit` bytes.
fn decode_shared_bytes(limit: u32, small: bool) -> u32 {
    match limit {
        _ if small => SHARED_BYTES_SMALL,
        SHARED_BYTES_BEST.. => SHARED_BYTES_BEST,
        _ => SHARED_BYTES,
    }
}

fn tile_keys(head_dim: u32) -> u32 {
    if head_dim > 128 { 64 } else { 128 }
}

/// Whether there is a small kernel for prefills with heads of this size; others are small enough.
fn has_small_prefill(head_dim: u32) -> bool {
    head_dim > 64
}

/// Packed rows in a tile of a prefill, `prefill_tile_rows` and `prefill_small_tile_rows` in `attention.cuh`.
pub fn tile_rows(head_dim: u32, small: bool) -> u32 {
    match head_dim {
        129.. if small => 32,
        97..129 if small => 64,
        _ => tile_keys(head_dim),
    }
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
    cache_heads: u32,
    parts: u32,
    window: u32,
    items_max: u32,
    scale_log2: f32,
    value_scale: f32,
    cap: f32,
    cap_rate: f32,
}

/// The kernels for one size of heads and one type of cache.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    head_dim: u32,
    kv: KvDtype,
    /// Whether scores are capped.
    capped: bool,
    decode: Kernel,
    decode_shared_bytes: u32,
    /// Decode by runs of splits, on Hopper.
    runs: Option<Kernel>,
    prefill: Kernel,
    /// Whether `prefill` is the Hopper kernel.
    wgmma: bool,
    /// Whether the kernels are the small ones.
    small: bool,
}

/// The kernels of attention.
#[derive(Debug)]
pub struct Attend {
    kernels: Vec<Kernels>,
}

impl Attend {
    /// Finds the kernels.
    ///
    /// # Errors
    /// When one is missing, or the chip's blocks have too little shared memory.
    pub fn new(device: &CudaDevice, set: KernelSet) -> Result<Self, DeviceError> {
        let has = device.shared_bytes_max;
        if has < SHARED_BYTES_SMALL {
            return Err(DeviceError::Shared { has, needed: SHARED_BYTES_SMALL });
        }
        let small = set == KernelSet::Small || has < SHARED_BYTES;
        let hopper = device.hopper && set == KernelSet::Own;
        let mut kernels = Vec::new();
        let kinds = [(KvDtype::Operand, ""), (KvDtype::Fp8E4m3, "_fp8")];
        for ((kv, suffix), capped) in kinds.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
            let (small, hopper) = (small || capped, hopper && !capped);
            let decode_shared_bytes = decode_shared_bytes(has, small);
            for head_dim in HEAD_DIMS.map(|head_dim| head_dim as u32) {
                let kernel = |name: &str| device.kernel(&format!("attention_{name}{suffix}_h{head_dim}"));
                let wgmma = hopper && kv == KvDtype::Operand && WGMMA_HEAD_DIMS.contains(&head_dim);
                let walks = hopper && head_dim <= RUN_HEAD_DIM_MAX;
                let prefill = match (wgmma, small && has_small_prefill(head_dim)) {
                    _ if capped => "prefill_capped",
                    (true, _) => "prefill_wgmma",
                    (_, true) => "prefill_small",
                    _ => "prefill",
                };
                let decode = match small {
                    _ if capped => "decode_capped",
                    true => "decode_small",
                    false => "decode",
                };
                let entry = Kernels {
                    head_dim,
                    kv,
                    capped,
                    decode: kernel(decode)?,
                    decode_shared_bytes,
                    runs: walks.then(|| kernel("decode_runs")).transpose()?,
                    prefill: kernel(prefill)?,
                    wgmma,
                    small,
                };
                device.allow_shared(entry.decode, entry.decode_shared_bytes)?;
                if let Some(runs) = entry.runs {
                    device.allow_shared(runs, RUN_SHARED_BYTES)?;
                }
                device.allow_shared(entry.prefill, entry.prefill_shared_bytes())?;
                kernels.push(entry);
            }
        }
        Ok(Self { kernels })
    }

    /// The kernels of a plan; `None` for heads of other sizes, which the arena refuses.
    fn kernels(&self, plan: &ArenaPlan) -> Option<&Kernels> {
        let fits = |entry: &&Kernels| {
            entry.head_dim as usize == plan.kv.head_dim
                && entry.kv == plan.kv.dtype
                && entry.capped == plan.score_cap.is_some()
        };
        self.kernels.iter().find(fits)
    }

    /// Whether the kernels of a plan are the small ones.
    pub fn is_small(&self, plan: &ArenaPlan) -> bool {
        self.kernels(plan).is_some_and(|kernels| kernels.small)
    }

    /// Splits of a run for a step with this many spans of one row; none where the CTAs share each split.
    pub fn run_splits(&self, arena: &Arena, decodes: usize, multiprocessors: u32) -> Option<usize> {
        let kv = &arena.plan.kv;
        self.kernels(&arena.plan)?.runs?;
        plan::run_splits(decodes, kv.kv_heads * arena.decode_parts().0, multiprocessors as usize)
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
        let (scale, cap) = (shape.scale * scales.key, arena.plan.score_cap);
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
            group: arena.packing.group as u32,
            cache_heads: shape.kv_heads as u32,
            parts: 1,
            window: shape.sliding_window.unwrap_or(0),
            items_max: arena.items_max as u32,
            scale_log2: if cap.is_some() { LOG2_E } else { scale * LOG2_E },
            value_scale: scales.value,
            cap: cap.unwrap_or_default(),
            cap_rate: cap.map_or(0.0, |cap| 2.0 * LOG2_E * scale / cap),
        };
        let kernels = self.kernels(&arena.plan).expect("the arena refuses other sizes of heads");
        let multiprocessors = run.device.multiprocessors;
        if layout.capacity.items > 0 {
            // Each part of a group is a key-value head of its own, which reads the pages of the group's.
            let (parts, group) = arena.decode_parts();
            let attention = AttentionArguments {
                kv_heads: attention.kv_heads * parts as u32,
                group: group as u32,
                parts: parts as u32,
                ..attention
            };
            let (kernel, threads, shared_bytes) = match layout.run_splits.and(kernels.runs) {
                Some(runs) => (runs, RUN_THREADS, RUN_SHARED_BYTES),
                None => (kernels.decode, DECODE_THREADS, kernels.decode_shared_bytes),
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
            Launch::grid([kv_heads, tiles, 1], 2 * tile_rows(self.head_dim, self.small))
        };
        Launch { shared_bytes, ..launch }
    }

    fn prefill_shared_bytes(&self) -> u32 {
        let head_dim = self.head_dim;
        if self.wgmma {
            2 * 1024 + 128 * head_dim * (2 + 4 * 2 + 4)
        } else {
            // Keys and values have one place in turn in the small kernels.
            let places = if self.small && has_small_prefill(head_dim) { 1 } else { 2 };
            head_dim * (tile_rows(head_dim, self.small) * (2 + 4) + tile_keys(head_dim) * 2 * places)
        }
    }
}
