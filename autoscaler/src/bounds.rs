//! Bounds and holds: what is wanted becomes what is done.
//!
//! Stabilisation first, then `minReplicas` and `maxReplicas`, then the step. The result lies within the bounds
//! whenever the current number does; from outside it walks in by steps.

use millrace_crds::scaling::ScalingSpec;

use super::decision::Limit;
use super::memory::{Change, Memory, Wanted};

/// The span in which `maxStep` counts. A wrong reading can thus do a bounded amount of harm.
pub const STEP_WINDOW_MS: u64 = 10_000;
/// Most entries in the history of what was wanted; beyond, the oldest two become their larger.
const WANTED_MAX: usize = 64;

/// Applies all of them and keeps the history that they need.
pub(super) fn apply(
    spec: &ScalingSpec,
    memory: &mut Memory,
    at_ms: u64,
    now: u32,
    wanted: u32,
) -> (u32, Vec<Limit>) {
    let mut limits = Vec::new();
    let mut replicas = stabilise(spec, memory, at_ms, now, wanted);
    if replicas != wanted {
        limits.push(if wanted > now { Limit::StabilizationUp } else { Limit::StabilizationDown });
    }
    if replicas < spec.min_replicas {
        replicas = spec.min_replicas;
        limits.push(Limit::Min);
    }
    if replicas > spec.max_replicas {
        replicas = spec.max_replicas;
        limits.push(Limit::Max);
    }
    let stepped = step(spec, memory, at_ms, now, replicas);
    if stepped != replicas {
        limits.push(Limit::Step);
    }
    (stepped, limits)
}

/// Up only to what was wanted during all of `up`, down only to the most that was wanted during `down`.
fn stabilise(spec: &ScalingSpec, memory: &mut Memory, at_ms: u64, now: u32, wanted: u32) -> u32 {
    if memory.wanted.last().is_none_or(|last| last.replicas != wanted) {
        memory.wanted.push(Wanted { at_ms, replicas: wanted });
    }
    let (up_ms, down_ms) = (spec.stabilization.up.0.as_millis(), spec.stabilization.down.0.as_millis());
    let within = |history: &[Wanted], span_ms: u128| {
        // An entry holds until the next one, so the last one before the window reaches into it.
        let since_ms = at_ms.saturating_sub(span_ms as u64);
        let before = history.iter().rposition(|entry| entry.at_ms <= since_ms);
        before.unwrap_or(0)
    };
    let up_from = within(&memory.wanted, up_ms);
    let down_from = within(&memory.wanted, down_ms);
    let since = |from: usize| memory.wanted.iter().skip(from).map(|entry| entry.replicas);
    let least = since(up_from).min().unwrap_or(wanted);
    let most = since(down_from).max().unwrap_or(wanted);
    // Without an entry as old as the window, what was wanted before is not known: the current number counts.
    let oldest_ms = memory.wanted.first().map_or(at_ms, |entry| entry.at_ms);
    let known = |span_ms: u128| u128::from(oldest_ms) + span_ms <= u128::from(at_ms);
    let least = if known(up_ms) { least } else { least.min(now) };
    let most = if known(down_ms) { most } else { most.max(now) };
    memory.wanted.drain(..up_from.min(down_from));
    while memory.wanted.len() > WANTED_MAX {
        let oldest = memory.wanted.remove(0);
        if let Some(next) = memory.wanted.first_mut() {
            *next = Wanted { at_ms: oldest.at_ms, replicas: next.replicas.max(oldest.replicas) };
        }
    }
    if wanted > now { least.clamp(now, wanted) } else { most.clamp(wanted, now) }
}

/// At most `maxStep` workers more, or fewer, within the step window.
fn step(spec: &ScalingSpec, memory: &mut Memory, at_ms: u64, now: u32, replicas: u32) -> u32 {
    memory.changes.retain(|change| change.at_ms + STEP_WINDOW_MS > at_ms);
    let up = replicas > now;
    let made: u64 = memory.changes.iter().filter(|c| (c.by > 0) == up).map(|c| c.by.unsigned_abs()).sum();
    let left = u64::from(spec.max_step).saturating_sub(made) as u32;
    let stepped =
        if up { replicas.min(now.saturating_add(left)) } else { replicas.max(now.saturating_sub(left)) };
    if stepped != now {
        memory.changes.push(Change { at_ms, by: i64::from(stepped) - i64::from(now) });
    }
    stepped
}
