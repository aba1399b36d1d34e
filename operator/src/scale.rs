//! The autoscaler: how many workers a model should have, and why.
//!
//! [`decide`] is pure: the clock is an argument, what was learned goes in and comes out as a [`Memory`], and
//! a [`Record`] of its inputs is enough to derive the decision again. It reads nothing and writes nothing.
//!
//! The rules, of which the largest wins:
//! - the workers with which each job starts within `targets.queueWait` ([`demand`]), starting workers counted
//!   from when they will be ready, new ones from the 90th percentile of the starts seen;
//! - the workers that bring KV utilisation under its target. While jobs are pending a full cache is what a
//!   busy worker looks like, and the wait decides; it counts when none is, or when sequences wait for blocks;
//! - the workers that the jobs in flight fill;
//! - the workers that are not worth stopping: one whose idle time until it is needed again costs less than
//!   its start would.
//!
//! Then stabilisation, `minReplicas`, `maxReplicas` and `maxStep` bound the change ([`bounds`]). What cannot
//! be read is not zero: the number holds. From zero, any backlog wakes a worker.

pub mod bounds;
pub mod decision;
pub mod demand;
pub mod inputs;
pub mod memory;

pub use self::decision::{Decision, Limit, Record, Term, Terms};
pub use self::inputs::{ClassReading, QueueReading, Reading, WorkerLoad, WorkerReading, WorkerState};
pub use self::memory::Memory;

use millrace_crds::scaling::{OnSignalLost, ScalingSpec};
use millrace_crds::units::Span;

use self::demand::Demand;

/// Share of the wait target that is planned with. The rest is for what the plan cannot see: the size of
/// the jobs that happen to come, and the time between decisions.
const PLANNED_SHARE: f64 = 0.85;
/// Share of the wait target that must suffice without a worker before it is stopped.
const RELEASE_SHARE: f64 = 0.5;

/// Decides. Returns the decision and what is known from now on.
pub fn decide(spec: &ScalingSpec, memory: &Memory, reading: &Reading) -> (Decision, Memory) {
    let mut next = memory.learn(spec, reading);
    let (terms, won, idle_hold) = want(spec, &next, reading);
    let wanted = terms.queue_wait.max(terms.kv).max(terms.held).max(terms.keep);
    let (replicas, mut limits) = match won {
        Term::SignalLost => on_signal_lost(spec, &mut next, reading),
        _ => bounds::apply(spec, &mut next, reading.at_ms, reading.replicas, wanted),
    };
    if idle_hold {
        limits.insert(0, Limit::IdleAfter);
    }
    let cold_start = Span(std::time::Duration::from_millis(next.cold_start_p90_ms()));
    let measured = !next.cold_starts_ms.is_empty();
    let mut decision = Decision {
        at_ms: reading.at_ms,
        before: reading.replicas,
        replicas,
        terms,
        won,
        limits,
        delete_first: delete_first(reading, replicas),
        sentence: String::new(),
        warning: measured.then(|| spec.idle_warning(cold_start)).flatten(),
    };
    decision.sentence = decision::sentence(&decision, reading, &next);
    (decision, next)
}

/// What each rule asks for, which one wins, and whether only `idleAfter` keeps the last worker.
fn want(spec: &ScalingSpec, memory: &Memory, reading: &Reading) -> (Terms, Term, bool) {
    let now = reading.replicas;
    let Some(queue) = &reading.queue else {
        return (Terms { keep: now, ..Terms::default() }, Term::SignalLost, false);
    };
    if queue.left() == 0 && now == 0 {
        return (Terms::default(), Term::Idle, false);
    }
    let kv = kv_term(spec, reading, queue);
    let held = match memory.jobs_held_full {
        full if full >= 1.0 => (queue.unacked() as f64 / full).ceil() as u32,
        _ => 1,
    };
    let held = if queue.left() > 0 { held.max(1) } else { 0 };
    let queue_wait_s = spec.targets.queue_wait.0.as_secs_f64();
    let Some(demand) = Demand::new(reading, queue, memory, queue_wait_s * PLANNED_SHARE) else {
        // No worker was ever busy: one is woken to learn from, and none is stopped before it has taught.
        let keep =
            if queue.left() > 0 || idle_for_ms(memory, reading) < idle_after_ms(spec) { now } else { 0 };
        let terms = Terms { queue_wait: 0, kv, held, keep };
        return (terms, winner(terms), queue.left() == 0 && keep > 0);
    };
    let new = demand.new_workers(demand.queue_wait_s + demand.lead_s);
    let queue_wait = if new > 0 { now.saturating_add(new) } else { 0 };
    let keep = if new > 0 { now } else { keep_term(spec, memory, reading, &demand) };
    let idle = queue.left() == 0 && keep > 0 && idle_for_ms(memory, reading) < idle_after_ms(spec);
    let terms = Terms { queue_wait, kv, held, keep };
    (terms, winner(terms), idle && keep == 1)
}

fn winner(terms: Terms) -> Term {
    let candidates = [
        (terms.queue_wait, Term::QueueWait),
        (terms.kv, Term::Kv),
        (terms.held, Term::Held),
        (terms.keep, Term::Keep),
    ];
    let most = candidates.iter().map(|&(replicas, _)| replicas).max().unwrap_or(0);
    match candidates.iter().find(|&&(replicas, _)| replicas == most) {
        Some(&(replicas, term)) if replicas > 0 => term,
        _ => Term::Idle,
    }
}

fn idle_after_ms(spec: &ScalingSpec) -> u64 {
    spec.idle_after.0.as_millis() as u64
}

fn idle_for_ms(memory: &Memory, reading: &Reading) -> u64 {
    memory.work_seen_ms.map_or(0, |seen_ms| reading.at_ms.saturating_sub(seen_ms))
}

/// Workers that bring KV utilisation under its target, or 0 where that is not the question.
fn kv_term(spec: &ScalingSpec, reading: &Reading, queue: &QueueReading) -> u32 {
    let loads = || reading.ready().filter_map(|worker| worker.load.as_ref());
    let waiting = loads().any(|load| load.sequences_waiting > 0);
    let (used, total) = loads().fold((0u64, 0u64), |(used, total), load| {
        (used.saturating_add(load.kv_blocks_used), total.saturating_add(load.kv_blocks_total))
    });
    if total == 0 || (queue.pending() > 0 && !waiting) {
        return 0;
    }
    let one = total as f64 / loads().count() as f64;
    let needed = used as f64 / (one * spec.targets.kv_utilization);
    (needed.ceil() as u32).min(millrace_crds::scaling::REPLICAS_LIMIT)
}

/// The workers that are not worth stopping. Only a worker that has nothing to do costs anything, so none is
/// stopped while there is a backlog. One fewer must still meet the target with a margin, and the idle
/// time saved until the deadlines ask for it again must be worth more than its start.
fn keep_term(spec: &ScalingSpec, memory: &Memory, reading: &Reading, demand: &Demand) -> u32 {
    let pending = demand.backlog.last().map_or(0.0, |due| due.jobs);
    let mut keep = reading.replicas;
    if pending > 0.0 {
        return keep;
    }
    let floor = u32::from(idle_for_ms(memory, reading) < idle_after_ms(spec));
    while keep > floor && worth_stopping(demand, keep - 1) {
        keep -= 1;
    }
    keep
}

/// Whether going down to `rest` workers saves more idle time than it costs to come back.
fn worth_stopping(demand: &Demand, rest: u32) -> bool {
    let arriving = demand.arriving_workers();
    let idle = (f64::from(rest) + 1.0 - arriving).clamp(0.0, 1.0);
    let growth = arriving - f64::from(rest);
    if growth <= 0.0 {
        return true;
    }
    // The backlog may grow until it is as long as the target allows, less the time that a start takes.
    let buffer_s = (demand.queue_wait_s * RELEASE_SHARE).max(demand.queue_wait_s - demand.lead_s);
    let needed_again_s = buffer_s * arriving / growth;
    idle * needed_again_s > demand.lead_s
}

/// The queue cannot be read: hold, or walk to the maximum.
fn on_signal_lost(spec: &ScalingSpec, memory: &mut Memory, reading: &Reading) -> (u32, Vec<Limit>) {
    let now = reading.replicas;
    let wanted = match spec.on_signal_lost {
        OnSignalLost::Hold => now,
        OnSignalLost::Max => spec.max_replicas,
    };
    let (replicas, mut limits) = bounds::apply(spec, memory, reading.at_ms, now, wanted);
    limits.insert(0, Limit::SignalLost);
    (replicas, limits)
}

/// The pods to delete first: those that start, youngest first, then the least loaded.
fn delete_first(reading: &Reading, replicas: u32) -> Vec<String> {
    let mut live: Vec<&WorkerReading> =
        reading.workers.iter().filter(|worker| worker.state != WorkerState::Draining).collect();
    live.sort_by_key(|worker| {
        let held = worker.load.map_or(0, |load| load.jobs_held);
        let starting = worker.state == WorkerState::Starting;
        (!starting, held, std::cmp::Reverse(worker.created_ms), worker.name.clone())
    });
    let surplus = reading.replicas.saturating_sub(replicas) as usize;
    live.into_iter().take(surplus).map(|worker| worker.name.clone()).collect()
}
