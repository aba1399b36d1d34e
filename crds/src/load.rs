//! The load report that each worker publishes every second. The autoscaler reads it.

use serde::{Deserialize, Serialize};

use crate::names::SubjectToken;

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Pulling weights.
    Pulling,
    /// Loading weights and warming up.
    Loading,
    /// Taking jobs.
    Ready,
    /// Finishing what it has.
    Draining,
}

/// One worker's load, at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadReport {
    /// The worker.
    pub worker: SubjectToken,
    /// What it is doing.
    pub phase: Phase,
    /// Seconds since the process started.
    pub uptime_s: f64,
    /// KV blocks that sequences hold.
    pub kv_blocks_used: u64,
    /// KV blocks in all.
    pub kv_blocks_total: u64,
    /// Sequences in the running batch.
    pub sequences_running: u32,
    /// Sequences that wait for room.
    pub sequences_waiting: u32,
    /// Jobs held.
    pub jobs_held: u32,
    /// Prompt tokens a second, over the last report's interval.
    pub prompt_tokens_per_s: f64,
    /// Output tokens a second, over the last report's interval.
    pub output_tokens_per_s: f64,
    /// Jobs finished since the process started.
    pub jobs_finished: u64,
    /// Digest of the model's manifest; absent until it is loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// How long each phase of the cold start took; absent until it is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<ColdStart>,
}

/// How long each phase of a worker's start took, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ColdStart {
    /// From the process's start until the broker answered.
    pub connect_ms: f64,
    /// Weights from the object store to verified local files.
    pub pull_ms: f64,
    /// Files to the engine's memory.
    pub load_ms: f64,
    /// Until the warm-up step was through.
    pub warm_up_ms: f64,
    /// All of it, from the process's start until ready.
    pub total_ms: f64,
}
