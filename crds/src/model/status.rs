//! What the operator found: the status of an InferenceModel.
//!
//! Only the operator writes it. Numbers are whole, moments are RFC 3339 texts, and lists are bounded.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::reason::{ConditionType, Reason};
use crate::scaling::ScalingSpec;

/// Decisions kept in [`ScalingStatus::history`].
pub const HISTORY_MAX: usize = 10;

/// What the operator found.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct InferenceModelStatus {
    /// The generation of the spec that this status is about.
    pub observed_generation: i64,
    /// Workers that exist.
    pub replicas: u32,
    /// Workers that take jobs.
    pub ready_replicas: u32,
    /// Workers asked for.
    pub desired_replicas: u32,
    /// Ready and desired workers, as `1/2`.
    pub workers: String,
    /// Label selector of the workers' pods.
    pub selector: String,
    /// Jobs without an outcome: pending and in flight, all classes. Absent while it could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u64>,
    /// Jobs without an outcome, by class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<ClassBacklogs>,
    /// Share of the KV blocks in use, in percent, over all workers. Absent without a worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_utilization: Option<u32>,
    /// Hash of what the workers run with; a change rolls them out.
    pub revision_hash: String,
    /// How long starts of this model take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<ColdStartStatus>,
    /// What the autoscaler does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<ScalingStatus>,
    /// The state in conditions.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Jobs without an outcome, by class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ClassBacklogs {
    /// Class `high`.
    pub high: u64,
    /// Class `normal`.
    pub normal: u64,
    /// Class `low`.
    pub low: u64,
}

/// How long starts take, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ColdStartStatus {
    /// Starts seen.
    pub seen: u32,
    /// Median, from the pod's creation until it took jobs.
    pub p50_ms: u64,
    /// 90th percentile. The autoscaler plans with it.
    pub p90_ms: u64,
    /// The last start, phase by phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<StartPhases>,
}

/// One start, phase by phase, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StartPhases {
    /// From the pod's creation until it had a node.
    pub schedule_ms: u64,
    /// From then until the worker's process started: image, volumes, container.
    pub container_ms: u64,
    /// Until the broker answered.
    pub connect_ms: u64,
    /// Weights from the object store to verified local files.
    pub pull_ms: u64,
    /// Files to the engine's memory.
    pub load_ms: u64,
    /// Until the warm-up step was through.
    pub warm_up_ms: u64,
}

/// What the autoscaler does.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScalingStatus {
    /// The last decision that differs from the one before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_decision: Option<ScalingDecision>,
    /// The last decisions that changed the number of workers, newest first.
    #[schemars(length(max = 10))]
    pub history: Vec<ScalingDecision>,
    /// The bounds and targets in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_force: Option<ScalingSpec>,
    /// What the spec should say instead, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// One decision on the number of workers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScalingDecision {
    /// When.
    pub at: String,
    /// Workers before.
    pub from: u32,
    /// Workers after.
    pub to: u32,
    /// The rule that asked for the most.
    pub won: String,
    /// The bounds and holds that changed the outcome.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
    /// What was read and what each rule asked for.
    pub inputs: DecisionInputs,
    /// The decision in words.
    pub sentence: String,
}

/// What a decision was made from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DecisionInputs {
    /// Jobs that no worker had pulled; absent when the queue could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<u64>,
    /// Jobs that workers held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<u64>,
    /// Age of the oldest pending job, in milliseconds, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_age_ms: Option<u64>,
    /// Workers that took jobs.
    pub workers_ready: u32,
    /// Workers on their way.
    pub workers_starting: u32,
    /// Workers that `targets.queueWait` asked for.
    pub queue_wait: u32,
    /// Workers that `targets.kvUtilization` asked for.
    pub kv_utilization: u32,
    /// Workers that the jobs in flight asked for.
    pub held: u32,
    /// Workers not worth stopping.
    pub keep: u32,
}

/// One condition, in the form that Kubernetes' own resources use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: ConditionType,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// The generation of the spec that it is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// When `status` changed last.
    pub last_transition_time: String,
    /// Why, from a closed set; the runbook has a section for each.
    pub reason: Reason,
    /// Why, in words.
    pub message: String,
}

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// It could not be found out.
    Unknown,
}
