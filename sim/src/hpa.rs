//! The HorizontalPodAutoscaler's behaviour (`autoscaling/v2`), and its rule on utilisation as a policy.
//!
//! From the controller's documented algorithm and defaults: a sync each 15 s, a tolerance of 10 %, at most
//! four pods or 100 % more each 15 s, and 300 s of stabilisation downwards.

use super::cluster::{PolicyView, ScalingPolicy, SimWorker};

/// Time between two syncs of the controller: `--horizontal-pod-autoscaler-sync-period`.
pub const SYNC_MS: u64 = 15_000;
/// Relative error that is let stand: `--horizontal-pod-autoscaler-tolerance`.
pub const TOLERANCE: f64 = 0.1;
/// Pods that may be added within 15 s in any case; beyond, the number may double.
const UP_PODS: u32 = 4;

/// `spec.behavior` of an HPA and its bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Behavior {
    /// Fewest pods; the HPA itself knows no zero.
    pub min: u32,
    /// Most pods.
    pub max: u32,
    /// Stabilisation upwards.
    pub up_window_ms: u64,
    /// Stabilisation downwards; 300 s by default.
    pub down_window_ms: u64,
}

/// The recommendations of the past, for stabilisation.
#[derive(Debug, Clone, Default)]
pub struct Stabilizer {
    recommended: Vec<(u64, u32)>,
}

impl Stabilizer {
    /// The number of pods after stabilisation, rate limits and bounds.
    pub fn apply(&mut self, behavior: &Behavior, now_ms: u64, current: u32, recommended: u32) -> u32 {
        self.recommended.push((now_ms, recommended));
        let longest_ms = behavior.up_window_ms.max(behavior.down_window_ms);
        self.recommended.retain(|&(at_ms, _)| at_ms + longest_ms >= now_ms);
        let within = |span_ms: u64| {
            self.recommended.iter().filter(move |&&(at_ms, _)| at_ms + span_ms >= now_ms).map(|&(_, n)| n)
        };
        let least = within(behavior.up_window_ms).min().unwrap_or(recommended);
        let most = within(behavior.down_window_ms).max().unwrap_or(recommended);
        let mut wanted = current;
        wanted = wanted.max(least);
        wanted = wanted.min(most);
        let up_limit = (current + UP_PODS).max(current * 2);
        wanted.min(up_limit).clamp(behavior.min.max(1), behavior.max)
    }
}

/// The HPA on the utilisation of the workers: `ceil(ready x mean utilisation / target)`.
#[derive(Debug, Clone)]
pub struct HpaPolicy {
    /// Target of the mean share of busy slots.
    pub target: f64,
    /// Bounds and behaviour.
    pub behavior: Behavior,
    stabilizer: Stabilizer,
}

impl HpaPolicy {
    /// The rule at its defaults.
    pub fn new(target: f64, behavior: Behavior) -> Self {
        Self { target, behavior, stabilizer: Stabilizer::default() }
    }
}

impl ScalingPolicy for HpaPolicy {
    fn name(&self) -> String {
        "hpa-default".into()
    }

    fn decide(&mut self, view: &PolicyView) -> (u32, Vec<u64>) {
        let current = view.replicas;
        if !view.now_ms.is_multiple_of(SYNC_MS) {
            return (current.max(self.behavior.min.max(1)), Vec::new());
        }
        let live: Vec<&SimWorker> = view.workers.iter().filter(|worker| !worker.draining).collect();
        let ready: Vec<&&SimWorker> = live.iter().filter(|worker| worker.ready_ms <= view.now_ms).collect();
        let busy: u32 = ready.iter().map(|worker| worker.held).sum();
        let mut recommended = current.max(1);
        if !ready.is_empty() {
            let usage = f64::from(busy) / f64::from(view.slots);
            let ratio = usage / ready.len() as f64 / self.target;
            // On the way up, pods that are not ready count as idle; on the way down they are left out.
            let counted = if ratio > 1.0 { live.len() } else { ready.len() };
            let ratio = usage / counted as f64 / self.target;
            if (ratio - 1.0).abs() > TOLERANCE {
                recommended = ((ratio * counted as f64).ceil() as u32).max(1);
            }
        }
        (self.stabilizer.apply(&self.behavior, view.now_ms, current.max(1), recommended), Vec::new())
    }
}
