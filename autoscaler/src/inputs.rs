//! What the autoscaler reads: one [`Reading`] of the clock, the queue and the workers.
//!
//! Whole numbers only, so that a reading that went through JSON is the reading that was decided upon.

use millrace_crds::load::LoadReport;
use millrace_crds::names::Class;
use serde::{Deserialize, Serialize};

/// Everything that one decision looks at, besides the spec and the [`Memory`](super::Memory).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reading {
    /// The clock, in milliseconds since any fixed moment; never goes back between readings.
    pub at_ms: u64,
    /// How many workers are asked for now.
    pub replicas: u32,
    /// The queue, or nothing when it could not be read. Nothing is not an empty queue.
    pub queue: Option<QueueReading>,
    /// The workers that exist, one a pod.
    pub workers: Vec<WorkerReading>,
}

/// The model's job stream and its consumers, as the consumers' leader reports them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct QueueReading {
    /// Jobs ever published: the last sequence of the stream.
    pub published: u64,
    /// One entry a class.
    pub classes: Vec<ClassReading>,
}

/// The backlog of one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClassReading {
    /// The class.
    pub class: Class,
    /// Jobs that no worker has pulled.
    pub pending: u64,
    /// Jobs that workers have pulled and not finished.
    pub unacked: u64,
    /// Age of the oldest pending job, where known.
    pub oldest_age_ms: Option<u64>,
}

impl QueueReading {
    /// Jobs of all classes that no worker has pulled.
    pub fn pending(&self) -> u64 {
        self.classes.iter().fold(0, |sum, class| sum.saturating_add(class.pending))
    }

    /// Jobs of all classes that workers hold.
    pub fn unacked(&self) -> u64 {
        self.classes.iter().fold(0, |sum, class| sum.saturating_add(class.unacked))
    }

    /// Jobs that are not finished.
    pub fn left(&self) -> u64 {
        self.pending().saturating_add(self.unacked())
    }

    /// Age of the oldest pending job of any class.
    pub fn oldest_age_ms(&self) -> Option<u64> {
        self.classes.iter().filter_map(|class| class.oldest_age_ms).max()
    }
}

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum WorkerState {
    /// Scheduled, pulling weights or warming up.
    Starting,
    /// Takes jobs.
    Ready,
    /// Told to go; finishes what it holds. No longer part of `replicas`.
    Draining,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerReading {
    /// The pod's name.
    pub name: String,
    /// Where it is in its life.
    pub state: WorkerState,
    /// When the pod was created, on the reading's clock.
    pub created_ms: u64,
    /// When it took its first job or could have.
    pub ready_ms: Option<u64>,
    /// Its last load report, unless that is stale.
    pub load: Option<WorkerLoad>,
}

/// The part of a load report that scaling looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerLoad {
    /// Jobs held.
    pub jobs_held: u32,
    /// Sequences that wait inside of the worker for KV blocks.
    pub sequences_waiting: u32,
    /// KV blocks in use.
    pub kv_blocks_used: u64,
    /// KV blocks in all.
    pub kv_blocks_total: u64,
    /// Jobs finished since the worker started.
    pub jobs_finished: u64,
}

impl From<&LoadReport> for WorkerLoad {
    fn from(report: &LoadReport) -> Self {
        Self {
            jobs_held: report.jobs_held,
            sequences_waiting: report.sequences_waiting,
            kv_blocks_used: report.kv_blocks_used,
            kv_blocks_total: report.kv_blocks_total,
            jobs_finished: report.jobs_finished,
        }
    }
}

impl Reading {
    /// The workers that take jobs.
    pub fn ready(&self) -> impl Iterator<Item = &WorkerReading> {
        self.workers.iter().filter(|worker| worker.state == WorkerState::Ready)
    }

    /// The workers that are on their way.
    pub fn starting(&self) -> impl Iterator<Item = &WorkerReading> {
        self.workers.iter().filter(|worker| worker.state == WorkerState::Starting)
    }
}
