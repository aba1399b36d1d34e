//! What the autoscaler says: a number of workers, and every reason for it.

use std::fmt;

use millrace_crds::scaling::ScalingSpec;
use serde::{Deserialize, Serialize};

use super::inputs::Reading;
use super::memory::Memory;

/// The number of workers that each rule asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Terms {
    /// So that each job starts within the wait target.
    pub queue_wait: u32,
    /// So that KV utilisation comes under its target, when sequences wait for blocks.
    pub kv: u32,
    /// So that work which is left finds a worker: one, or none without work.
    pub held: u32,
    /// So that no worker is stopped that works, or would soon be started again.
    pub keep: u32,
}

/// The rule that asked for the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Term {
    /// [`Terms::queue_wait`].
    QueueWait,
    /// [`Terms::kv`].
    Kv,
    /// [`Terms::held`].
    Held,
    /// [`Terms::keep`].
    Keep,
    /// None: there is no work.
    Idle,
    /// None: the queue could not be read.
    SignalLost,
}

/// A bound or a hold that changed the outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Limit {
    /// Raised to `minReplicas`.
    Min,
    /// Cut to `maxReplicas`.
    Max,
    /// Cut to `maxStep`.
    Step,
    /// Waits for `stabilization.up`.
    StabilizationUp,
    /// Waits for `stabilization.down`.
    StabilizationDown,
    /// Waits for `idleAfter`, or for as long as a restart takes.
    IdleAfter,
    /// Keeps what is there, because the queue could not be read.
    SignalLost,
}

/// One decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// When, on the reading's clock.
    pub at_ms: u64,
    /// How many workers there were.
    pub before: u32,
    /// How many there should be.
    pub replicas: u32,
    /// What each rule asked for.
    pub terms: Terms,
    /// The rule that won.
    pub won: Term,
    /// The bounds and holds that changed the outcome, in the order in which they were applied.
    pub limits: Vec<Limit>,
    /// The pods to delete first, when workers are removed: those that start, then the least loaded.
    pub delete_first: Vec<String>,
    /// The decision as a sentence.
    pub sentence: String,
    /// A warning about the spec, if any.
    pub warning: Option<String>,
}

/// A decision with all that it was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DecisionRecord {
    /// The spec.
    pub spec: ScalingSpec,
    /// What was known before.
    pub memory: Memory,
    /// What was read.
    pub reading: Reading,
    /// What was decided.
    pub decision: Decision,
}

impl DecisionRecord {
    /// Makes the decision again from what was logged. It equals the logged one, or the code has changed.
    pub fn derive_again(&self) -> Decision {
        super::decide(&self.spec, &self.memory, &self.reading).0
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Term::QueueWait => "the wait target",
            Term::Kv => "KV utilisation",
            Term::Held => "there is work",
            Term::Keep => "what is worth keeping",
            Term::Idle => "no work",
            Term::SignalLost => "the queue could not be read",
        })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::Min => "minReplicas",
            Limit::Max => "maxReplicas",
            Limit::Step => "maxStep",
            Limit::StabilizationUp => "stabilization.up",
            Limit::StabilizationDown => "stabilization.down",
            Limit::IdleAfter => "idleAfter",
            Limit::SignalLost => "onSignalLost",
        })
    }
}

/// Says a decision in words, with the numbers behind it.
pub(super) fn sentence(decision: &Decision, reading: &Reading, memory: &Memory) -> String {
    let verb = match decision.replicas.cmp(&decision.before) {
        std::cmp::Ordering::Greater => "up",
        std::cmp::Ordering::Less => "down",
        std::cmp::Ordering::Equal => "stays",
    };
    let (before, replicas) = (decision.before, decision.replicas);
    let mut text = match verb {
        "stays" => format!("Stays at {replicas}"),
        _ => format!("Goes {verb} from {before} to {replicas}"),
    };
    text += &format!(": {}", decision.won);
    if let Some(queue) = &reading.queue {
        text += &format!("; {} pending and {} in flight", queue.pending(), queue.unacked());
        if let Some(age_ms) = queue.oldest_age_ms() {
            text += &format!(", the oldest {:.1} s old", age_ms as f64 / 1e3);
        }
    }
    text += &match memory.rate() {
        Some(rate) => format!("; {rate:.2} jobs/s a worker",),
        None => "; the rate of a worker is not known yet".into(),
    };
    text += &format!(", {:.2} jobs/s arrive", memory.arrival_rate);
    text += &format!(", a start takes {:.1} s", memory.cold_start_p90_ms() as f64 / 1e3);
    if !decision.limits.is_empty() {
        let names: Vec<String> = decision.limits.iter().map(Limit::to_string).collect();
        text += &format!("; limited by {}", names.join(", "));
    }
    text + "."
}
