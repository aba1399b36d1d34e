//! The watchdog: ends a process whose engine hangs, because a hung call cannot be cancelled.
//!
//! It runs on a thread of its own, so that a stuck async runtime does not stop it. While jobs run and no
//! step ends for longer than the limit, the process aborts; the broker then hands its jobs to others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::broken::Broken;

/// What the watchdog looks at, and what `/healthz` answers.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    busy: Arc<AtomicU64>,
    hung: Arc<AtomicBool>,
}

/// A job in the engine, until dropped.
#[derive(Debug)]
pub struct Busy(Arc<AtomicU64>);

impl Watch {
    /// Says that the engine has one more job to move on with.
    pub fn enter(&self) -> Busy {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy(self.busy.clone())
    }

    /// Jobs in the engine.
    pub fn busy(&self) -> u64 {
        self.busy.load(Ordering::Relaxed)
    }

    /// Whether the engine was found to hang.
    pub fn hung(&self) -> bool {
        self.hung.load(Ordering::Relaxed)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells a hang from work and from idleness. Pure.
#[derive(Debug)]
struct Judge {
    limit: Duration,
    steps: u64,
    moved_at: Instant,
}

impl Judge {
    /// Whether the engine hangs, seen at `now` with these many steps done and jobs in it.
    fn hangs(&mut self, now: Instant, steps: u64, busy: u64) -> bool {
        if steps != self.steps || busy == 0 {
            self.steps = steps;
            self.moved_at = now;
        }
        now.duration_since(self.moved_at) > self.limit
    }
}

/// Starts the watchdog's thread. `steps` reads the engine's step counter; `limit` is the longest step.
///
/// # Errors
/// When the thread cannot be started.
pub fn start(
    watch: Watch,
    broken: Broken,
    limit: Duration,
    steps: impl Fn() -> u64 + Send + 'static,
) -> std::io::Result<()> {
    // Four looks a limit: the process is gone within a quarter of the limit after it.
    let pause = (limit / 4).clamp(Duration::from_millis(10), Duration::from_secs(1));
    let body = move || {
        let mut judge = Judge { limit, steps: steps(), moved_at: Instant::now() };
        loop {
            std::thread::sleep(pause);
            if judge.hangs(Instant::now(), steps(), watch.busy()) {
                watch.hung.store(true, Ordering::Relaxed);
                tracing::error!(
                    category = "engine_hung",
                    steps = judge.steps,
                    limit_s = limit.as_secs_f64(),
                    "no step ended within engine.stepTimeout; aborting"
                );
                broken.abort(format!("no step ended within {} s", limit.as_secs_f64()));
            }
        }
    };
    std::thread::Builder::new().name("watchdog".into()).spawn(body).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hangs_only_with_work_and_without_steps() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut judge = Judge { limit: Duration::from_secs(5), steps: 0, moved_at: start };
        assert!(!judge.hangs(at(100), 0, 0), "idle for long");
        assert!(!judge.hangs(at(104), 0, 1), "work, but only for a moment");
        assert!(!judge.hangs(at(108), 1, 1), "it steps");
        assert!(!judge.hangs(at(113), 1, 1), "exactly the limit");
        assert!(judge.hangs(at(114), 1, 1));
        assert!(!judge.hangs(at(115), 1, 0), "the work went away");
        let watch = Watch::default();
        let (a, b) = (watch.enter(), watch.enter());
        assert_eq!(watch.busy(), 2);
        drop((a, b));
        assert_eq!((watch.busy(), watch.hung()), (0, false));
    }
}
