//! From facts to a number of workers: feeds the autoscaler and keeps what it learned and said.
//!
//! Pure but for the state that it is given. The Deployment is the only truth about the number of workers asked
//! for; right after a change, while the cache still shows the old one, the change itself is.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use millrace_autoscaler::{Decision, Memory, Reading, WorkerState};
use millrace_crds::model::status::{
    ColdStartStatus, DecisionInputs, HISTORY_MAX, InferenceModelStatus, ScalingDecision, ScalingStatus,
    StartPhases,
};
use millrace_crds::scaling::ScalingSpec;

use crate::fetch::Facts;
use crate::validate::Sizing;
use crate::workers;

/// A cache that does not show a change after this time never will: somebody undid it.
const CACHE_LAG_MAX_MS: u64 = 10_000;

/// What is remembered of one model between reconciles. Lost with the operator; learned again.
#[derive(Debug, Clone, Default)]
pub struct ScalingState {
    memory: Memory,
    /// The last change of the number of workers: to, over which version of the Deployment, when.
    made: Option<(u32, Option<String>, u64)>,
    /// What the status shows.
    shown: ScalingStatus,
    last_start: Option<StartPhases>,
    starts_seen: u32,
}

/// The number of workers, and why.
#[derive(Debug, Clone)]
pub struct Sized {
    /// How many there should be.
    pub replicas: u32,
    /// How many were asked for until now.
    pub before: u32,
    /// The autoscaler's decision, where it decides.
    pub decision: Option<Decision>,
}

impl ScalingState {
    /// Starts with what an earlier operator wrote into the status.
    pub fn resume(status: Option<&InferenceModelStatus>) -> Self {
        let shown = status.and_then(|status| status.scaling.clone()).unwrap_or_default();
        let mut state = Self { shown, ..Self::default() };
        if let Some(starts) = status.and_then(|status| status.cold_start.as_ref()) {
            state.last_start = starts.last;
            state.starts_seen = starts.seen;
            if starts.seen > 0 {
                state.memory.cold_starts_ms = vec![starts.p50_ms, starts.p90_ms];
            }
        }
        state
    }

    /// Workers asked for now.
    fn replicas_now(&mut self, deployment: Option<&Arc<Deployment>>, at_ms: u64) -> u32 {
        let version = deployment.and_then(|found| found.resource_version());
        if let Some((replicas, over, since_ms)) = &self.made {
            if *over == version && at_ms.saturating_sub(*since_ms) < CACHE_LAG_MAX_MS {
                return *replicas;
            }
            self.made = None;
        }
        let spec = deployment.and_then(|found| found.spec.as_ref());
        spec.and_then(|spec| spec.replicas).map_or(0, |replicas| u32::try_from(replicas).unwrap_or(0))
    }

    /// Decides.
    pub fn size(&mut self, sizing: &Sizing, facts: &Facts) -> Sized {
        let before = self.replicas_now(facts.existing.deployment.as_ref(), facts.at_ms);
        self.learn_start(facts);
        let spec = match sizing {
            Sizing::Fixed(replicas) => {
                self.shown.last_decision = None;
                self.shown.in_force = None;
                self.shown.warning = None;
                return Sized { replicas: *replicas, before, decision: None };
            }
            Sizing::Follow(spec) => spec,
        };
        let reading = reading(facts, before);
        let (decision, memory) = millrace_autoscaler::decide(spec, &self.memory, &reading);
        self.memory = memory;
        self.show(spec, &reading, &decision);
        Sized { replicas: decision.replicas, before, decision: Some(decision) }
    }

    /// The number was written. `over` is the version of the Deployment that the cache showed.
    pub fn made(&mut self, replicas: u32, over: Option<String>, at_ms: u64) {
        self.made = Some((replicas, over, at_ms));
    }

    fn learn_start(&mut self, facts: &Facts) {
        let youngest = facts
            .pods
            .iter()
            .filter(|pod| workers::is_ready(pod))
            .max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        let Some(pod) = youngest else { return };
        if let Some(report) = facts.load.get(&pod.name_any())
            && let Some(phases) = workers::start_phases(pod, report)
        {
            self.last_start = Some(phases);
        }
    }

    /// The status shows a decision when it differs from the one before in more than its numbers: otherwise a
    /// model that only works would write all the time.
    fn show(&mut self, spec: &ScalingSpec, reading: &Reading, decision: &Decision) {
        let shown = shown(reading, decision);
        let differs = |last: &ScalingDecision| {
            shown.from != shown.to
                || last.to != shown.to
                || last.won != shown.won
                || last.limits != shown.limits
        };
        if self.shown.last_decision.as_ref().is_none_or(differs) {
            self.shown.last_decision = Some(shown.clone());
        }
        if shown.from != shown.to {
            self.shown.history.insert(0, shown);
            self.shown.history.truncate(HISTORY_MAX);
        }
        self.shown.in_force = Some(spec.clone());
        self.shown.warning = decision.warning.clone();
    }

    /// The part of the status that is about scaling.
    pub fn status(&self) -> Option<ScalingStatus> {
        (self.shown != ScalingStatus::default()).then(|| self.shown.clone())
    }

    /// The part of the status that is about cold starts.
    pub fn cold_start(&self) -> Option<ColdStartStatus> {
        let mut starts = self.memory.cold_starts_ms.clone();
        starts.sort_unstable();
        let at = |share: usize| {
            let rank = (starts.len() * share).div_ceil(100).max(1);
            starts.get(rank - 1).copied().unwrap_or(0)
        };
        if starts.is_empty() && self.last_start.is_none() {
            return None;
        }
        Some(ColdStartStatus {
            seen: u32::try_from(starts.len()).unwrap_or(u32::MAX).max(self.starts_seen),
            p50_ms: at(50),
            p90_ms: at(90),
            last: self.last_start,
        })
    }
}

fn reading(facts: &Facts, replicas: u32) -> Reading {
    let workers = facts.pods.iter().filter_map(|pod| workers::reading(pod, facts.load.get(&pod.name_any())));
    let mut workers: Vec<_> = workers.collect();
    workers.sort_by(|a, b| a.name.cmp(&b.name));
    Reading { at_ms: facts.at_ms, replicas, queue: facts.queue.as_ref().ok().cloned(), workers }
}

fn shown(reading: &Reading, decision: &Decision) -> ScalingDecision {
    let count = |state: WorkerState| {
        let workers = reading.workers.iter().filter(|worker| worker.state == state).count();
        u32::try_from(workers).unwrap_or(u32::MAX)
    };
    let queue = reading.queue.as_ref();
    let moment = Timestamp::from_millisecond(i64::try_from(decision.at_ms).unwrap_or(0)).unwrap_or_default();
    ScalingDecision {
        at: moment.to_string(),
        from: decision.before,
        to: decision.replicas,
        won: decision.won.to_string(),
        limits: decision.limits.iter().map(ToString::to_string).collect(),
        inputs: DecisionInputs {
            pending: queue.map(millrace_autoscaler::QueueReading::pending),
            in_flight: queue.map(millrace_autoscaler::QueueReading::unacked),
            oldest_age_ms: queue.and_then(millrace_autoscaler::QueueReading::oldest_age_ms),
            workers_ready: count(WorkerState::Ready),
            workers_starting: count(WorkerState::Starting),
            queue_wait: decision.terms.queue_wait,
            kv_utilization: decision.terms.kv,
            held: decision.terms.held,
            keep: decision.terms.keep,
        },
        sentence: decision.sentence.clone(),
    }
}
