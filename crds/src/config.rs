//! The worker's configuration: one struct that the operator writes and the worker reads.
//!
//! Unknown fields are refused. Secrets never stand in it, only paths of mounted files.

mod access;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names::{ModelRef, SubjectToken};
use crate::units::{Bytes, Span};
pub use access::{NatsConfig, StoreConfig, WebIdentityConfig};

/// Everything a worker needs to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkerConfig {
    /// Which model to run and where its files are.
    pub model: ModelConfig,
    /// How to reach the broker.
    pub nats: NatsConfig,
    /// The engine's sizes and numeric types.
    #[serde(default)]
    pub engine: EngineConfig,
    /// The job queue.
    #[serde(default)]
    pub queue: QueueConfig,
    /// The outcomes.
    #[serde(default)]
    pub results: ResultsConfig,
    /// Shutting down.
    #[serde(default)]
    pub drain: DrainConfig,
    /// Metrics and health.
    #[serde(default)]
    pub server: ServerConfig,
}

impl WorkerConfig {
    /// The address of the model on the wire.
    pub fn model_ref(&self) -> ModelRef {
        ModelRef { namespace: self.model.namespace.clone(), name: self.model.name.clone() }
    }
}

/// The model and its files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelConfig {
    /// The namespace of the InferenceModel.
    #[serde(default = "defaults::namespace")]
    pub namespace: SubjectToken,
    /// The name of the InferenceModel; part of every subject.
    pub name: SubjectToken,
    /// `s3://bucket/prefix` or `file:///path` of a folder in Hugging Face layout.
    pub uri: String,
    /// `sha256:` and 64 hex digits of the manifest; refused when the files say otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// How to reach the object store of `uri`.
    #[serde(default)]
    pub store: StoreConfig,
    /// Folder where pulled weights are kept; several workers may share it.
    #[serde(default = "defaults::cache_dir")]
    pub cache_dir: PathBuf,
    /// Largest total size of the model's files.
    #[serde(default = "defaults::model_bytes_max")]
    pub bytes_max: Bytes,
}

/// Numeric type of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// What the checkpoint holds; on a CPU bf16 where the processor has AVX-512, else f32.
    #[default]
    Auto,
    /// 32-bit IEEE floats: the reference.
    F32,
    /// 16-bit brain floats, accumulated in f32.
    Bf16,
}

/// Where the engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// A GPU where there is one, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU; refused where there is none.
    Cuda,
}

/// Quantisation of the linear layers at load time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// Weights as `dtype` says.
    #[default]
    None,
    /// 8-bit integer weights with a scale, activations quantised to 8 bits as they come.
    Int8,
    /// 4-bit integer weights of the layers in groups of 128, their activations as with `int8`; embedding and head are
    /// `int8`.
    Int4,
    /// 8-bit float weights of the layers with a scale a row.
    Fp8,
}

/// Numeric type of keys and values in the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum KvCacheDtype {
    /// What attention computes with: f32 where `dtype` is, else bf16.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// 16-bit brain floats; beside f32 weights it is refused.
    #[serde(rename = "bf16")]
    Bf16,
    /// 8-bit floats (e4m3, to 448) with the checkpoint's scales: twice the tokens of bf16 in the same memory.
    #[serde(rename = "fp8_e4m3")]
    Fp8E4m3,
}

/// For how much of a sequence's output blocks of the KV cache are set aside when it is admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputReserve {
    /// What outputs before it came to: the cache is full of sequences, and few are computed again.
    #[default]
    Learned,
    /// All that it may generate (`max_tokens`): none is ever computed again.
    Full,
    /// One token: as many sequences as have blocks, and many are computed again.
    None,
}

/// The engine's sizes. All memory is taken at start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Where to compute.
    pub device: Device,
    /// Number of the GPU, among those that the process sees.
    pub device_index: u32,
    /// Numeric type of weights and activations.
    pub dtype: Dtype,
    /// Quantisation of the linear layers.
    pub quantization: Quantization,
    /// Numeric type of the KV cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// Longest prompt plus output, in tokens; the model's own limit when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
    /// Most sequences that run at once; when absent 256 on a GPU and 64 on a processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub max_sequences: Option<u32>,
    /// Most tokens in one step, prefill and decode together; when absent 8192 on a GPU and 512 on a processor,
    /// and never less than `maxSequences`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 65536))]
    pub max_batch_tokens: Option<u32>,
    /// Share of the free memory that KV blocks may take.
    pub kv_cache_fraction: f32,
    /// Size of the KV cache; overrides `kvCacheFraction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_bytes: Option<Bytes>,
    /// For how much of a sequence's output KV blocks are set aside when it is admitted.
    pub output_reserve: OutputReserve,
    /// Reuse the KV blocks of equal prompt prefixes.
    pub prefix_cache: bool,
    /// Threads of the CPU backend; all cores when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// End the process when a step takes longer than this; at most half of `queue.ackWait`.
    pub step_timeout: Span,
    /// Take special tokens that stand in a request's text for text, unless the request says `split_special_tokens`
    /// itself: callers' text then forges no turn of a chat.
    // Where it is off it is not written, so that workers of earlier resources go on as they are.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub split_special_tokens: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            device_index: 0,
            dtype: Dtype::Auto,
            quantization: Quantization::None,
            kv_cache_dtype: KvCacheDtype::Auto,
            max_model_len: None,
            max_sequences: None,
            max_batch_tokens: None,
            kv_cache_fraction: 0.5,
            kv_cache_bytes: None,
            output_reserve: OutputReserve::Learned,
            prefix_cache: true,
            threads: None,
            step_timeout: Span::seconds(30),
            split_special_tokens: false,
        }
    }
}

impl EngineConfig {
    /// Whether the engine computes on a GPU. What only the processor does stays there, unless the configuration
    /// demands a GPU; `present` is asked only where it matters.
    pub fn uses_gpu(&self, present: impl FnOnce() -> bool) -> bool {
        let integers = matches!(self.quantization, Quantization::Int8 | Quantization::Int4);
        let for_processor = integers || self.dtype == Dtype::F32 || self.threads.is_some();
        match self.device {
            Device::Cpu => false,
            Device::Cuda => true,
            Device::Auto => !for_processor && present(),
        }
    }

    /// The most that one step holds: what the configuration says, else what suits the device.
    pub fn step_limits(&self, gpu: bool) -> StepLimits {
        let suits = if gpu { StepLimits::GPU } else { StepLimits::PROCESSOR };
        let sequences = self.max_sequences.unwrap_or(suits.sequences);
        let tokens = self.max_batch_tokens.unwrap_or(suits.tokens.max(sequences));
        StepLimits { sequences, tokens }
    }
}

/// The most that one step of the engine holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Sequences.
    pub sequences: u32,
    /// Tokens, prefill and decode together.
    pub tokens: u32,
}

impl StepLimits {
    /// A GPU reads its weights once for all rows of a step, so it wants many.
    pub const GPU: Self = Self { sequences: 256, tokens: 8192 };
    /// A processor is busy with few rows, and more only make each step longer.
    pub const PROCESSOR: Self = Self { sequences: 64, tokens: 512 };
}

/// The job queue, as the streams and consumers are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct QueueConfig {
    /// Attempts before a job is dead.
    #[schemars(range(min = 1, max = 100))]
    pub max_deliver: u32,
    /// How long a silent worker keeps a job; at least twice `engine.stepTimeout`.
    pub ack_wait: Span,
    /// Delay before attempt 2, 3, ...; the last one repeats.
    #[schemars(length(min = 1, max = 16))]
    pub backoff: Vec<Span>,
    /// Most jobs in the queue; publishers are refused beyond it.
    #[schemars(range(min = 1))]
    pub max_jobs: u64,
    /// Most bytes in the queue.
    pub max_bytes: Bytes,
    /// Copies of each stream.
    #[schemars(range(min = 1, max = 5))]
    pub replicas: u32,
    /// Longest time that one attempt may run.
    pub attempt_timeout: Span,
    /// Shares of the classes under contention.
    pub weights: ClassWeights,
}

impl QueueConfig {
    /// Whether a worker whose steps take no longer than `step_timeout` keeps its jobs: a keep-alive goes out three
    /// times in an ack wait, and only if a step ended since the last one.
    pub fn outlasts(&self, step_timeout: Span) -> bool {
        self.ack_wait.0 >= step_timeout.0.saturating_mul(2)
    }
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            max_deliver: 5,
            ack_wait: Span::seconds(60),
            backoff: vec![Span::seconds(1), Span::seconds(5), Span::seconds(30)],
            max_jobs: 1_000_000,
            max_bytes: Bytes(4 << 30),
            replicas: 1,
            attempt_timeout: Span::seconds(3600),
            weights: ClassWeights::default(),
        }
    }
}

/// Shares of the classes under contention, in sequences pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClassWeights {
    /// Share of class `high`.
    #[schemars(range(min = 1, max = 1000))]
    pub high: u32,
    /// Share of class `normal`.
    #[schemars(range(min = 1, max = 1000))]
    pub normal: u32,
    /// Share of class `low`.
    #[schemars(range(min = 1, max = 1000))]
    pub low: u32,
}

impl Default for ClassWeights {
    fn default() -> Self {
        Self { high: 16, normal: 4, low: 1 }
    }
}

/// The outcomes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ResultsConfig {
    /// How long an outcome is kept, from its creation; a job's cancel marker and ledger as long, once it has one.
    pub ttl: Span,
    /// Most bytes of outcomes, markers and ledgers; beyond it answers wait in their workers.
    pub max_bytes: Bytes,
    /// How long dead letters are kept, and cancel markers and ledgers of jobs that have no outcome yet.
    pub dead_ttl: Span,
    /// Most bytes of dead letters; beyond it dead jobs stay in the queue.
    pub dead_max_bytes: Bytes,
    /// Outcomes larger than this go to `objectStore`, or are refused without one.
    pub inline_bytes_max: Bytes,
    /// Where large outcomes go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object_store: Option<ObjectStoreConfig>,
}

impl Default for ResultsConfig {
    fn default() -> Self {
        Self {
            ttl: Span::seconds(7 * 86_400),
            max_bytes: Bytes(4 << 30),
            dead_ttl: Span::seconds(90 * 86_400),
            dead_max_bytes: Bytes(512 << 20),
            inline_bytes_max: Bytes(768 << 10),
            object_store: None,
        }
    }
}

/// A folder in an object store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ObjectStoreConfig {
    /// `s3://bucket/prefix`. Claim checks of jobs must lie under it too.
    pub uri: String,
    /// How to reach it.
    #[serde(default)]
    pub store: StoreConfig,
}

/// Shutting down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct DrainConfig {
    /// After SIGTERM, how long running jobs may take to finish; the rest is handed back.
    pub timeout: Span,
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self { timeout: Span::seconds(120) }
    }
}

/// The worker's own HTTP server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address of `/metrics`, `/healthz` and `/readyz`.
    pub listen: std::net::SocketAddr,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self { listen: ([0, 0, 0, 0], 9090).into() }
    }
}

mod defaults {
    use std::path::PathBuf;

    use crate::names::SubjectToken;
    use crate::units::Bytes;

    pub fn namespace() -> SubjectToken {
        "default".parse().expect("a constant that is a token")
    }
    pub fn cache_dir() -> PathBuf {
        PathBuf::from("/var/cache/millrace")
    }
    pub fn model_bytes_max() -> Bytes {
        Bytes(1 << 40)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_limits_suit_the_device_unless_they_are_set() {
        let engine = |yaml: &str| -> EngineConfig { serde_yaml::from_str(yaml).unwrap() };
        let cases = [
            ("{}", false, (64, 512)),
            ("{}", true, (256, 8192)),
            ("{maxSequences: 8}", true, (8, 8192)),
            ("{maxBatchTokens: 32}", false, (64, 32)),
            ("{maxSequences: 1000}", false, (1000, 1000)),
            ("{maxSequences: 1000}", true, (1000, 8192)),
        ];
        for (yaml, gpu, (sequences, tokens)) in cases {
            assert_eq!(engine(yaml).step_limits(gpu), StepLimits { sequences, tokens }, "{yaml} {gpu}");
        }
        // (configuration, without a GPU, with one)
        let devices = [
            ("{}", false, true),
            ("{device: cpu}", false, false),
            ("{device: cuda}", true, true),
            ("{quantization: int8}", false, false),
            ("{quantization: int4}", false, false),
            ("{dtype: f32}", false, false),
            ("{threads: 2}", false, false),
            ("{device: cuda, threads: 2}", true, true),
        ];
        for (yaml, without, with) in devices {
            let uses = |present: bool| engine(yaml).uses_gpu(|| present);
            assert_eq!((uses(false), uses(true)), (without, with), "{yaml}");
        }
    }
}
