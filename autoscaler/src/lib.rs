//! The autoscaler: how many workers a model should have, and why.
//!
//! [`decide`] is pure: the clock is an argument, what was learned goes in and comes out as a [`Memory`], and
//! a [`DecisionRecord`] of its inputs is enough to derive the decision again. It reads nothing and writes nothing.
//!
//! The rules, of which the largest wins:
//! - `queue_wait`: the workers with which each job starts within `targets.queueWait` ([`demand`]). New ones are
//!   ordered as late as the target allows, because a backlog is what keeps a worker from idling;
//! - `kv`: while sequences wait for KV blocks inside of workers, those that bring KV utilisation under its
//!   target. Otherwise a full cache is what a busy worker looks like, and the wait decides;
//! - `held`: one worker while any job is unfinished, so that any backlog wakes a model at zero;
//! - `keep`: what is there while jobs are pending; then those that the arrivals keep busy, and the last one
//!   until it has idled for `idleAfter` and for as long as its restart would take.
//!
//! Then stabilisation, `minReplicas`, `maxReplicas` and `maxStep` bound the change ([`bounds`]). What cannot
//! be read is not zero: the number holds.
//!
//! The operator calls it at each look at a queue, the simulation at each look in virtual time.

#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod bounds;
pub mod decision;
pub mod demand;
pub mod inputs;
pub mod memory;

pub use self::decision::{Decision, DecisionRecord, Limit, Term, Terms};
pub use self::inputs::{ClassReading, QueueReading, Reading, WorkerLoad, WorkerReading, WorkerState};
pub use self::memory::Memory;

use millrace_crds::scaling::{OnSignalLost, ScalingSpec};
use millrace_crds::units::Span;

use self::demand::Demand;

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

/// What each rule asks for, which one wins, and whether only the last worker's hold keeps it.
fn want(spec: &ScalingSpec, memory: &Memory, reading: &Reading) -> (Terms, Term, bool) {
    let now = reading.replicas;
    let Some(queue) = &reading.queue else {
        return (Terms { keep: now, ..Terms::default() }, Term::SignalLost, false);
    };
    let queue_wait_s = spec.targets.queue_wait.0.as_secs_f64();
    let demand = Demand::new(reading, queue, memory, queue_wait_s);
    let new = demand.as_ref().map_or(0, Demand::new_workers);
    let holds_last = now > 0 && idle_for_ms(memory, reading) < idle_hold_ms(spec, memory);
    let keep = match (&demand, queue.pending()) {
        (Some(demand), 0) => demand.busy_workers(now).max(u32::from(holds_last)),
        // Without a measured rate no worker is stopped before it has taught, or idled.
        (None, 0) if queue.left() == 0 && !holds_last => 0,
        _ => now,
    };
    let terms = Terms {
        queue_wait: if new > 0 { now.saturating_add(new) } else { 0 },
        kv: memory.kv_wanted.map_or(0, |wanted| wanted.replicas),
        held: u32::from(queue.left() > 0),
        keep,
    };
    (terms, winner(terms), holds_last && queue.left() == 0 && keep > 0)
}

fn winner(terms: Terms) -> Term {
    let candidates = [
        (terms.queue_wait, Term::QueueWait),
        (terms.kv, Term::Kv),
        (terms.keep, Term::Keep),
        (terms.held, Term::Held),
    ];
    let most = candidates.iter().map(|&(replicas, _)| replicas).max().unwrap_or(0);
    match candidates.iter().find(|&&(replicas, _)| replicas == most) {
        Some(&(replicas, term)) if replicas > 0 => term,
        _ => Term::Idle,
    }
}

/// How long the last worker idles before it goes: no shorter than its restart would take. Whoever pays for
/// idling until that equals the price of a restart never pays more than twice what foresight would
/// (ski rental; Karlin, Manasse, Rudolph, Sleator 1988).
fn idle_hold_ms(spec: &ScalingSpec, memory: &Memory) -> u64 {
    (spec.idle_after.0.as_millis() as u64).max(memory.cold_start_p90_ms())
}

fn idle_for_ms(memory: &Memory, reading: &Reading) -> u64 {
    memory.work_seen_ms.map_or(0, |seen_ms| reading.at_ms.saturating_sub(seen_ms))
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
