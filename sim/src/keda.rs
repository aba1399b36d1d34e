//! KEDA's `nats-jetstream` scaler, with the HPA that KEDA drives.
//!
//! Lag is pending plus unacked. Between zero and one KEDA itself acts, each `pollingInterval`: up when the
//! lag exceeds `activationLagThreshold` (0), down when it has not for `cooldownPeriod`. Above, the HPA asks
//! for `ceil(lag / lagThreshold)` pods at each of its syncs, with the tolerance on the lag a pod
//! (`pkg/scalers/nats_jetstream_scaler.go`, `pkg/scaling/executor/scale_executor.go` of kedacore/keda).

use super::cluster::{PolicyView, ScalingPolicy};
use super::hpa::{Behavior, SYNC_MS, Stabilizer, TOLERANCE};
use super::load::{Speed, Traffic};

/// The knobs of a ScaledObject.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KedaSettings {
    /// Lag that one pod is to have.
    pub lag_threshold: u32,
    /// Time between two looks at the lag, at zero.
    pub polling_ms: u64,
    /// How long the lag must have been zero before the last pod goes.
    pub cooldown_ms: u64,
    /// Bounds and the HPA's behaviour.
    pub behavior: Behavior,
}

impl KedaSettings {
    /// What one gets without tuning.
    pub fn defaults(max: u32) -> Self {
        let behavior = Behavior { min: 0, max, up_window_ms: 0, down_window_ms: 300_000 };
        Self { lag_threshold: 10, polling_ms: 30_000, cooldown_ms: 300_000, behavior }
    }

    /// What a careful user sets without knowing the load to come, only the size of its jobs: a pod's lag is
    /// what it finishes within the wait target less the time that it takes to start; windows of a minute.
    pub fn sized(load: &Traffic, speed: &Speed, max: u32) -> Self {
        let target_s = load.queue_wait_s as f64;
        let usable_s = (target_s - speed.cold_start_s).max(target_s / 4.0);
        let lag_threshold = (load.worker_rate(speed) * usable_s).round().max(1.0) as u32;
        let behavior = Behavior { min: 0, max, up_window_ms: 0, down_window_ms: 60_000 };
        Self { lag_threshold, polling_ms: 5_000, cooldown_ms: 60_000, behavior }
    }
}

/// The rule at some settings.
#[derive(Debug, Clone)]
pub struct Keda {
    name: String,
    settings: KedaSettings,
    stabilizer: Stabilizer,
    active_ms: u64,
}

impl Keda {
    /// A fresh ScaledObject.
    pub fn new(name: &str, settings: KedaSettings) -> Self {
        Self { name: name.into(), settings, stabilizer: Stabilizer::default(), active_ms: 0 }
    }

    /// What the HPA recommends for a lag: the tolerance is on the lag a pod, relative to the threshold.
    pub fn recommend(&self, lag: u64, current: u32) -> u32 {
        let threshold = f64::from(self.settings.lag_threshold);
        let ratio = lag as f64 / (threshold * f64::from(current.max(1)));
        if (ratio - 1.0).abs() <= TOLERANCE { current } else { (lag as f64 / threshold).ceil() as u32 }
    }
}

impl ScalingPolicy for Keda {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn decide(&mut self, view: &PolicyView) -> (u32, Vec<u64>) {
        let KedaSettings { polling_ms, cooldown_ms, behavior, .. } = self.settings;
        let lag = view.pending + view.unacked;
        let mut replicas = view.replicas.max(behavior.min);
        if view.now_ms.is_multiple_of(polling_ms) {
            if lag > 0 {
                self.active_ms = view.now_ms;
                replicas = replicas.max(1);
            } else if behavior.min == 0 && view.now_ms >= self.active_ms + cooldown_ms {
                replicas = 0;
            }
        }
        // The HPA rests while its target has no pods.
        if replicas > 0 && view.replicas > 0 && view.now_ms.is_multiple_of(SYNC_MS) {
            let recommended = self.recommend(lag, replicas);
            replicas = self.stabilizer.apply(&behavior, view.now_ms, replicas, recommended);
        }
        (replicas, Vec::new())
    }
}
