//! Starting an engine: sizes from the configuration, weights onto the device, memory taken, thread running.
//!
//! [`Engine`] is also the library's front: [`Engine::generate`], [`Engine::generate_stream`] and
//! [`Engine::generate_batch`] on tokens. All memory is taken here; a configuration that cannot work is refused
//! with the field, its value and the limit.

use std::num::NonZeroUsize;
use std::path::Path;
use std::thread::JoinHandle;

use millrace_crds::config::{Dtype, EngineConfig, KvCacheDtype, Quantization, StepLimits};
use millrace_kernels::bounds::Bounds;
use millrace_kernels::cpu::{Cpu, CpuOptions, Precision, Unsupported};
use millrace_kernels::isa::Isa;
use millrace_kernels::ops::{BLOCK_TOKENS, KvDtype, Ops, PlanError};

use crate::memory::available_bytes;
use crate::model::binding::BindError;
use crate::model::config::{DecoderConfig, ModelConfigError};
use crate::model::decoder::{ArenaSizes, Decoder, allocate, kv_plan};
use crate::model::files::{Files, FilesError};
use crate::model::quantised::on_load::OnLoad;
use crate::model::source::{StoredDtype, TensorSource};
use crate::schedule::blocks::Blocks;
use crate::schedule::handle::{EngineHandle, Generation, Limits, channel};
use crate::schedule::request::{Event, Finish, Refusal, Request, SequenceUsage, Token};
use crate::schedule::runner::Runner;
use crate::schedule::scheduler::{Scheduler, SchedulerPolicy};
use crate::schedule::{Core, Observer};

mod gpu;

/// Most bytes of a name that the system shows for a thread are 15.
const THREAD_NAME: &str = "millrace-engine";

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The model's configuration.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    /// The model's files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The model's weights.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The processor.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The GPU.
    #[cfg(feature = "cuda")]
    #[error("engine.device: {0}")]
    Device(#[from] millrace_kernels::cuda::DeviceError),
    /// The sizes, as the device sees them.
    #[error("engine: {0}")]
    Plan(#[from] PlanError),
    /// A field of the engine's configuration.
    #[error("engine.{field} is {value}; it must be {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: String,
    },
    /// The KV cache cannot hold one sequence of the longest length.
    #[error(
        "the KV cache of {cache_bytes} bytes holds {tokens} tokens; one sequence of engine.maxModelLen needs \
         {needed}. Raise kvCacheBytes or kvCacheFraction, or lower maxModelLen"
    )]
    Cache {
        /// Bytes of the cache.
        cache_bytes: u64,
        /// Tokens that these hold.
        tokens: usize,
        /// Tokens of the longest sequence.
        needed: usize,
    },
    /// The thread could not be started.
    #[error("the engine's thread: {0}")]
    Thread(std::io::Error),
}

/// Choices that the worker's configuration does not show: for tests, and for bulk runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// See [`SchedulerPolicy::longest_first_window`].
    pub longest_first_window: usize,
    /// Instructions to use; the widest that the processor has when absent.
    pub isa: Option<Isa>,
    /// Whether a GPU captures steps of decodes.
    pub graphs: bool,
    /// Whether a GPU runs the kernels for chips with little shared memory, whatever it has.
    pub small_gpu: bool,
    /// Whether the next step is queued while one runs; by default where steps run beside the engine's thread.
    pub overlap: Option<bool>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { longest_first_window: 1, isa: None, graphs: true, small_gpu: false, overlap: None }
    }
}

/// An engine that runs. It ends when this and all its handles are dropped.
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
    info: Info,
}

/// What steps run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hardware {
    /// The processor.
    Cpu {
        /// Instructions in use.
        isa: Isa,
        /// Threads that work on a step.
        threads: usize,
    },
    /// A GPU.
    Cuda {
        /// Its number.
        index: usize,
        /// Its name.
        name: String,
    },
}

impl std::fmt::Display for Hardware {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Hardware::Cpu { isa, threads } => write!(formatter, "{isa}, {threads} threads"),
            Hardware::Cuda { index, name } => write!(formatter, "{name}, device {index}"),
        }
    }
}

/// What an engine settled on.
#[derive(Debug, Clone)]
pub struct Info {
    /// The model.
    pub model: DecoderConfig,
    /// What matrix products compute with.
    pub precision: Precision,
    /// What steps run on.
    pub hardware: Hardware,
    /// What the KV cache holds.
    pub kv_dtype: KvDtype,
    /// Bytes of the weights on the device.
    pub weight_bytes: u64,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: u64,
    /// Sizes.
    pub limits: Limits,
    /// Most tokens in one step.
    pub max_batch_tokens: usize,
}

impl Info {
    /// Measures what the hardware at hand could do at most, beside which an engine's speed is a share.
    ///
    /// # Errors
    /// When the device does not allow it.
    pub fn measure(&self) -> Result<Bounds, StartError> {
        match self.hardware {
            Hardware::Cpu { isa, threads } => {
                let threads = NonZeroUsize::new(threads);
                Ok(Cpu::new(CpuOptions { precision: self.precision, threads, isa: Some(isa) })?.measure())
            }
            Hardware::Cuda { index, .. } => gpu::measure(index),
        }
    }
}

/// A finished sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub finish: Finish,
    /// What it cost.
    pub usage: SequenceUsage,
}

/// Why a sequence has no end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GenerateError {
    /// It never began.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The engine failed on it alone.
    #[error("the engine failed on the sequence: {0}")]
    Failed(String),
}

impl Engine {
    /// Loads a model folder in Hugging Face layout and starts.
    ///
    /// # Errors
    /// When the folder, the configuration or the machine does not allow it.
    pub fn load(folder: &Path, config: &EngineConfig) -> Result<Self, StartError> {
        let model = DecoderConfig::read(folder)?;
        Self::start(&model, &Files::read(folder)?, config, Tuning::default(), Box::new(()))
    }

    /// Starts with weights from any source. The observer hears of every step, on the engine's thread.
    ///
    /// # Errors
    /// When a tensor, the configuration or the machine does not allow it.
    pub fn start(
        model: &DecoderConfig,
        source: &dyn TensorSource,
        config: &EngineConfig,
        tuning: Tuning,
        observer: Box<dyn Observer>,
    ) -> Result<Self, StartError> {
        // An instruction set is the processor's.
        let gpu = config.uses_gpu(|| tuning.isa.is_none() && gpu::is_present());
        let step = config.step_limits(gpu);
        check(config, step)?;
        let setup = Setup { model, source, config, step, tuning, observer };
        if gpu { setup.on_gpu() } else { setup.on_cpu() }
    }

    /// The engine from outside, for async callers.
    pub fn handle(&self) -> &EngineHandle {
        &self.handle
    }

    /// What the engine settled on.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Runs one sequence to its end.
    ///
    /// # Errors
    /// When it can never run, or its logits are not numbers.
    pub fn generate(&self, request: Request) -> Result<Generated, GenerateError> {
        collect(self.generate_stream(request)?)
    }

    /// Runs one sequence, token by token. Dropping the generation cancels it.
    ///
    /// # Errors
    /// When it can never run.
    pub fn generate_stream(&self, request: Request) -> Result<Generation, Refusal> {
        self.handle.submit_blocking(request)
    }

    /// Runs sequences together; the answers are in the order of the requests. One that fails harms no other.
    pub fn generate_batch(&self, requests: Vec<Request>) -> Vec<Result<Generated, GenerateError>> {
        let running: Vec<_> = requests.into_iter().map(|request| self.generate_stream(request)).collect();
        running.into_iter().map(|generation| collect(generation?)).collect()
    }

    /// Waits until the engine's thread has ended, once all other handles are dropped.
    pub fn join(mut self) {
        let thread = self.thread.take();
        drop(self);
        if let Some(Err(panic)) = thread.map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

/// What an engine is started from.
struct Setup<'a> {
    model: &'a DecoderConfig,
    source: &'a dyn TensorSource,
    config: &'a EngineConfig,
    step: StepLimits,
    tuning: Tuning,
    observer: Box<dyn Observer>,
}

impl Setup<'_> {
    fn on_cpu(self) -> Result<Engine, StartError> {
        let isa = self.tuning.isa.unwrap_or_else(Isa::detect);
        let precision = precision(self.config, self.model, self.source, isa)?;
        let threads = self.config.threads.and_then(|threads| NonZeroUsize::new(threads as usize));
        let mut ops = Cpu::new(CpuOptions { precision, threads, isa: Some(isa) })?;
        // f32 that was asked for is the reference; f32 that suits the processor is for what has no codes.
        ops.keep_codes(self.config.dtype != Dtype::F32);
        let hardware = Hardware::Cpu { isa, threads: ops.threads() };
        self.run(ops, (precision, hardware), |_| available_bytes())
    }

    /// Loads the weights, takes the memory, and starts the thread.
    fn run<O: Ops + Send + 'static>(
        self,
        mut ops: O,
        (precision, hardware): (Precision, Hardware),
        available: impl FnOnce(&O) -> Option<u64>,
    ) -> Result<Engine, StartError> {
        let Self { model, source, config, step, tuning, observer } = self;
        let kv_dtype = kv_dtype(config, precision)?;
        let decoder = Decoder::load_as(model, source, &mut ops, (kv_dtype, on_load(config)))?;
        let block_bytes = ops.kv_block_bytes(&kv_plan(model, 1, kv_dtype));
        let sizes = sizes(model, config, step, (kv_dtype, block_bytes), available(&ops))?;
        let limits = sizes.limits;
        allocate(&mut ops, model, sizes.arena)?;
        let info = Info {
            model: model.clone(),
            precision,
            hardware,
            kv_dtype,
            weight_bytes: ops.weight_bytes(),
            kv_cache_bytes: sizes.cache_bytes,
            limits,
            max_batch_tokens: step.tokens as usize,
        };
        let policy = SchedulerPolicy {
            max_sequences: step.sequences as usize,
            max_batch_tokens: step.tokens as usize,
            output_reserve: config.output_reserve,
            longest_first_window: tuning.longest_first_window,
        };
        let blocks = Blocks::new(sizes.arena.kv_blocks, BLOCK_TOKENS, config.prefix_cache);
        let (handle, inbox) = channel(limits);
        let runner = Runner::new(ops, decoder, step.tokens as usize);
        let overlap = tuning.overlap.unwrap_or(O::BESIDE);
        let core = Core::new(Scheduler::new(policy, blocks), runner, inbox, overlap, observer);
        let thread = std::thread::Builder::new()
            .name(THREAD_NAME.to_owned())
            .spawn(move || core.run())
            .map_err(StartError::Thread)?;
        Ok(Engine { handle, thread: Some(thread), info })
    }
}

fn collect(mut generation: Generation) -> Result<Generated, GenerateError> {
    let mut tokens = Vec::new();
    loop {
        match generation.next_blocking() {
            Some(Event::Token(token)) => tokens.push(token),
            Some(Event::Finished(finish, usage)) => return Ok(Generated { tokens, finish, usage }),
            Some(Event::Failed(reason)) => return Err(GenerateError::Failed(reason)),
            None => return Err(Refusal::Stopped.into()),
        }
    }
}

fn refuse<T>(
    field: &'static str,
    value: impl ToString,
    expected: impl Into<String>,
) -> Result<T, StartError> {
    Err(StartError::Field { field, value: value.to_string(), expected: expected.into() })
}

fn check(config: &EngineConfig, step: StepLimits) -> Result<(), StartError> {
    if !(1..=4096).contains(&step.sequences) {
        return refuse("maxSequences", step.sequences, "from 1 to 4096");
    }
    if !(16..=65_536).contains(&step.tokens) {
        return refuse("maxBatchTokens", step.tokens, "from 16 to 65536");
    }
    if step.tokens < step.sequences {
        let expected = format!("at least maxSequences, {}", step.sequences);
        return refuse("maxBatchTokens", step.tokens, expected);
    }
    if !(config.kv_cache_fraction > 0.0 && config.kv_cache_fraction < 1.0) {
        return refuse("kvCacheFraction", config.kv_cache_fraction, "above 0 and below 1");
    }
    match config.threads {
        Some(threads) if !(1..=1024).contains(&threads) => refuse("threads", threads, "from 1 to 1024"),
        _ => Ok(()),
    }
}

/// What matrix products compute with. `auto` follows the checkpoint: 16-bit weights stay bf16 where the
/// processor multiplies bf16, everything else is f32.
fn precision(
    config: &EngineConfig,
    model: &DecoderConfig,
    source: &dyn TensorSource,
    isa: Isa,
) -> Result<Precision, StartError> {
    let integers = match config.quantization {
        Quantization::Int8 => Some("int8"),
        Quantization::Int4 => Some("int4"),
        Quantization::None | Quantization::Fp8 => None,
    };
    if let Some(integers) = integers {
        if config.dtype == Dtype::F32 {
            return refuse("quantization", integers, "none or fp8 with dtype f32; integers run beside bf16");
        }
        return Ok(Precision::Int8);
    }
    let stored = source.tensor("model.norm.weight").ok().map(|tensor| tensor.dtype).or(model.stored);
    Ok(match config.dtype {
        Dtype::F32 => Precision::F32,
        Dtype::Bf16 => Precision::Bf16,
        Dtype::Auto if stored == Some(StoredDtype::F32) || isa < Isa::Avx512 => Precision::F32,
        Dtype::Auto => Precision::Bf16,
    })
}

/// What the matrices of layers become, where a device does not do it itself.
fn on_load(config: &EngineConfig) -> Option<OnLoad> {
    match config.quantization {
        Quantization::None | Quantization::Int8 => None,
        Quantization::Int4 => Some(OnLoad::Int4),
        Quantization::Fp8 => Some(OnLoad::Fp8),
    }
}

/// What the cache holds. `bf16` is what it holds anyway beside weights of 16 or 8 bits.
fn kv_dtype(config: &EngineConfig, precision: Precision) -> Result<KvDtype, StartError> {
    match config.kv_cache_dtype {
        KvCacheDtype::Bf16 if precision == Precision::F32 => {
            refuse("kvCacheDtype", "bf16", "auto or fp8_e4m3 where the engine computes in f32")
        }
        KvCacheDtype::Auto | KvCacheDtype::Bf16 => Ok(KvDtype::Operand),
        KvCacheDtype::Fp8E4m3 => Ok(KvDtype::Fp8E4m3),
    }
}

struct Sizes {
    arena: ArenaSizes,
    limits: Limits,
    cache_bytes: u64,
}

/// Sizes of the cache and what follows from them. Without `maxModelLen` the model's own limit holds, or what
/// the cache can take if that is less.
fn sizes(
    model: &DecoderConfig,
    config: &EngineConfig,
    step: StepLimits,
    (kv_dtype, block_bytes): (KvDtype, usize),
    available: Option<u64>,
) -> Result<Sizes, StartError> {
    let longest = match config.max_model_len {
        None => model.positions_max as usize,
        Some(len) if len >= 2 && len <= model.positions_max => len as usize,
        Some(len) => {
            let expected = format!("from 2 to the model's max_position_embeddings, {}", model.positions_max);
            return refuse("maxModelLen", len, expected);
        }
    };
    let sequences = step.sequences as usize;
    // More blocks than all sequences can hold at their longest would never be used.
    let useful = sequences.saturating_mul(longest.div_ceil(BLOCK_TOKENS));
    let bytes = match config.kv_cache_bytes {
        Some(bytes) => bytes.0,
        None => match available {
            Some(bytes) => (bytes as f64 * f64::from(config.kv_cache_fraction)) as u64,
            None => {
                return refuse("kvCacheBytes", "absent", "given, for the free memory is unknown");
            }
        },
    };
    let kv_blocks = usize::try_from(bytes / block_bytes as u64).unwrap_or(usize::MAX).min(useful);
    let tokens = kv_blocks * BLOCK_TOKENS;
    let needed = if config.max_model_len.is_some() { longest } else { longest.min(BLOCK_TOKENS) };
    if tokens < needed || kv_blocks == 0 {
        return Err(StartError::Cache { cache_bytes: bytes, tokens, needed });
    }
    let longest = longest.min(tokens);
    let limits = Limits {
        max_model_len: longest as u32,
        max_sequences: step.sequences,
        block_tokens: BLOCK_TOKENS as u32,
        kv_blocks: kv_blocks as u32,
        vocabulary: model.vocabulary as u32,
    };
    let arena = ArenaSizes {
        rows_max: step.tokens as usize,
        logits_rows_max: sequences,
        positions_max: longest,
        kv_blocks,
        kv_dtype,
    };
    Ok(Sizes { arena, limits, cache_bytes: (kv_blocks * block_bytes) as u64 })
}
