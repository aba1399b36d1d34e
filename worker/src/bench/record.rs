//! The steps of a run: how long each took and what it consisted of.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use millrace_kernels::bounds::{Bounds, ModelShape, StepWork};
use millrace_kernels::cpu::Precision;
use millrace_kernels::ops::KvDtype;
use serde_json::{Map, Value, json};

use millrace_engine::schedule::{Moment, Observer, StepShape};

/// One step.
#[derive(Debug, Clone, Copy)]
struct Step {
    shape: StepShape,
    /// From the decision to the result.
    compute: Duration,
    /// On a device beside the engine's thread.
    device: Option<Duration>,
    /// The turn of the engine's loop that collected it, and those before that collected nothing.
    turn: Duration,
}

impl Step {
    /// Time without computing. Where steps overlap, a turn and what the device was busy in it are not of quite the same
    /// step: only sums count, and a single one may be negative.
    fn host_s(&self) -> f64 {
        self.turn.as_secs_f64() - self.device.unwrap_or(self.compute).as_secs_f64()
    }
}

/// Steps of one run.
#[derive(Debug, Default)]
pub(super) struct Steps(Vec<Step>);

/// Records steps from the engine's thread.
#[derive(Debug, Clone, Default)]
pub(super) struct Recorder {
    steps: Arc<Mutex<Vec<Step>>>,
    begun: Option<Instant>,
    /// Steps that were decided and not computed, oldest first.
    scheduled: VecDeque<(Instant, StepShape)>,
    computed: Option<(StepShape, Duration, Option<Duration>)>,
}

impl Recorder {
    /// What was recorded since the last call.
    pub fn take(&self) -> Steps {
        Steps(std::mem::take(&mut *self.steps.lock().expect("nobody panics with the lock held")))
    }
}

impl Observer for Recorder {
    fn observe(&mut self, moment: Moment) {
        match moment {
            // A turn that collects nothing is part of the next one.
            Moment::Begun if !self.scheduled.is_empty() && self.begun.is_some() => {}
            Moment::Begun => self.begun = Some(Instant::now()),
            Moment::Scheduled(shape) => self.scheduled.push_back((Instant::now(), shape)),
            Moment::Computed(device) => {
                let oldest = self.scheduled.pop_front();
                self.computed = oldest.map(|(at, shape)| (shape, at.elapsed(), device));
            }
            Moment::Reported => {
                if let Some((shape, compute, device)) = self.computed.take()
                    && let Some(begun) = self.begun.take()
                {
                    let step = Step { shape, compute, device, turn: begun.elapsed() };
                    self.steps.lock().expect("nobody panics with the lock held").push(step);
                }
            }
        }
    }
}

/// What all steps would have taken at the machine's limits, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Share {
    /// Each step at the slower of its two limits.
    pub least_s: f64,
    /// Reading alone.
    pub read_s: f64,
    /// Computing alone.
    pub compute_s: f64,
}

impl Steps {
    /// The least time of all steps, with weights and a cache of these types.
    pub fn share(&self, shape: &ModelShape, (precision, kv): (Precision, KvDtype), bounds: &Bounds) -> Share {
        let mut share = Share::default();
        for step in &self.0 {
            let cost = shape.cost(&work(&step.shape), precision, kv);
            share.least_s += bounds.least_s(&cost);
            share.read_s += cost.bytes / bounds.read_bytes_per_s;
            share.compute_s += cost.operations / bounds.operations_per_s;
        }
        share
    }

    /// Speed of the steps that hold decodes alone; `None` without such steps.
    pub fn decode_tokens_per_s(&self) -> Option<f64> {
        let decodes: Vec<&Step> = self.0.iter().filter(|step| kind(step) == "decode").collect();
        let time: f64 = decodes.iter().map(|step| step.turn.as_secs_f64()).sum();
        let tokens: usize = decodes.iter().map(|step| step.shape.decode_rows).sum();
        (time > 0.0).then(|| tokens as f64 / time)
    }

    /// Time of a step in which nothing is computed, on average: a turn without what a device was busy, or without the
    /// call that computes.
    pub fn host_us_per_step(&self) -> f64 {
        let host: f64 = self.0.iter().map(Step::host_s).sum();
        host.max(0.0) * 1e6 / self.0.len().max(1) as f64
    }

    /// Share of the time of steps of decodes in which the device has nothing to do; `None` without a device.
    pub fn device_idle_share(&self) -> Option<f64> {
        let steps: Vec<&Step> =
            self.0.iter().filter(|step| kind(step) == "decode" && step.device.is_some()).collect();
        let turns: f64 = steps.iter().map(|step| step.turn.as_secs_f64()).sum();
        let idle: f64 = steps.iter().map(|step| step.host_s()).sum();
        (turns > 0.0).then(|| idle.max(0.0) / turns)
    }

    /// Number, rows and times of the steps of each kind.
    pub fn summary(&self) -> Value {
        let mut kinds = Map::new();
        for name in ["prefill", "mixed", "decode"] {
            let steps: Vec<&Step> = self.0.iter().filter(|step| kind(step) == name).collect();
            if steps.is_empty() {
                continue;
            }
            let rows: usize = steps.iter().map(|step| step.shape.decode_rows + step.shape.prefill_rows).sum();
            let mut times: Vec<f64> = steps.iter().map(|step| step.turn.as_secs_f64() * 1e3).collect();
            times.sort_by(f64::total_cmp);
            let total_s = times.iter().sum::<f64>() / 1e3;
            let entry = json!({
                "count": steps.len(),
                "rows": rows as f64 / steps.len() as f64,
                "p50_ms": quantile(&times, 0.5),
                "p99_ms": quantile(&times, 0.99),
                "total_s": total_s,
            });
            kinds.insert(name.to_owned(), entry);
        }
        Value::Object(kinds)
    }
}

/// The nearest-rank quantile of sorted values, of which there is at least one.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

fn kind(step: &Step) -> &'static str {
    match (step.shape.decode_rows, step.shape.prefill_rows) {
        (_, 0) => "decode",
        (0, _) => "prefill",
        _ => "mixed",
    }
}

fn work(shape: &StepShape) -> StepWork {
    StepWork {
        steps: 1.0,
        rows: (shape.decode_rows + shape.prefill_rows) as f64,
        logits_rows: shape.sampled_rows as f64,
        attended: shape.attended as f64,
        cached: shape.cached as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((quantile(&values, 0.5), quantile(&values, 0.99)), (50.0, 99.0));
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
    }

    #[test]
    fn steps_are_sorted_by_kind_and_take_their_limit_at_least() {
        let step = |decode_rows, prefill_rows| Step {
            shape: StepShape { decode_rows, prefill_rows, sampled_rows: 1, attended: 10, cached: 10 },
            compute: Duration::from_millis(1),
            device: None,
            turn: Duration::from_millis(2),
        };
        let steps = Steps(vec![step(2, 0), step(0, 8), step(1, 8), step(4, 0)]);
        let summary = steps.summary();
        assert_eq!(summary["decode"]["count"], 2);
        assert_eq!(summary["mixed"]["rows"], 9.0);
        assert_eq!(summary["prefill"]["p50_ms"], 2.0);
        assert_eq!(steps.decode_tokens_per_s(), Some(6.0 / 0.004));
        assert!((steps.host_us_per_step() - 1000.0).abs() < 1e-6);
        assert_eq!(steps.device_idle_share(), None);
        let beside = Step { device: Some(Duration::from_micros(1500)), ..step(3, 0) };
        assert_eq!(Steps(vec![beside]).device_idle_share(), Some(0.25));
        let shape =
            ModelShape { layers: 1, hidden: 4, heads: 1, kv_heads: 1, head_dim: 4, ffn: 4, vocabulary: 8 };
        let bounds = Bounds { read_bytes_per_s: 1e3, operations_per_s: 1e3 };
        let share = steps.share(&shape, (Precision::F32, KvDtype::Operand), &bounds);
        assert!(share.least_s >= share.read_s.max(share.compute_s));
    }
}
