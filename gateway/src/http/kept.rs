//! What is read from elsewhere and kept: by one reader at a time, and not more often than it helps.
//!
//! While the other side does not answer nobody waits for longer than one reading takes: who came during it gets what it
//! brought, and so does everybody within [`ReadingLimits::pause`] after it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

/// How often and how long.
#[derive(Debug, Clone, Copy)]
pub struct ReadingLimits {
    /// Longest reading.
    pub timeout: Duration,
    /// Shortest time between two readings.
    pub pause: Duration,
    /// How long a value is used while no reading succeeds.
    pub stale: Duration,
}

#[derive(Debug)]
struct LastReading<T> {
    /// When the last reading began or, once it has ended, when it ended.
    tried_at: Option<Instant>,
    /// What the last one brought that succeeded, and when.
    read: Option<(Instant, Arc<T>)>,
}

/// A value that is kept.
#[derive(Debug)]
pub struct Kept<T> {
    what: &'static str,
    limits: ReadingLimits,
    last: Mutex<LastReading<T>>,
}

/// The value as it is known.
#[derive(Debug)]
pub struct KeptValue<T> {
    /// What was read.
    pub value: Arc<T>,
    /// Whether no later reading failed.
    pub is_current: bool,
}

impl<T> Kept<T> {
    /// Nothing yet; `what` is its name in the log.
    pub fn new(what: &'static str, limits: ReadingLimits) -> Self {
        Self { what, limits, last: Mutex::new(LastReading { tried_at: None, read: None }) }
    }

    /// The value, read again unless it is younger than `age` or a reading was tried just now; `None` where there is
    /// none that may still be used. A reading that is given up counts as one that was tried.
    pub async fn get(
        &self,
        age: Duration,
        read: impl Future<Output = Result<T, String>>,
    ) -> Option<KeptValue<T>> {
        let mut last = self.last.lock().await;
        let young = |at: Option<Instant>, limit: Duration| at.is_some_and(|at| at.elapsed() < limit);
        let read_at = last.read.as_ref().map(|(at, _)| *at);
        if !young(read_at, age) && !young(last.tried_at, self.limits.pause) {
            last.tried_at = Some(Instant::now());
            let late = |_| Err(format!("no answer within {} ms", self.limits.timeout.as_millis()));
            let brought = tokio::time::timeout(self.limits.timeout, read).await.unwrap_or_else(late);
            let now = Instant::now();
            last.tried_at = Some(now);
            match brought {
                Ok(value) => last.read = Some((now, Arc::new(value))),
                Err(reason) => tracing::warn!(what = self.what, %reason, "it cannot be read"),
            }
        }
        let (at, value) = last.read.as_ref().filter(|(at, _)| at.elapsed() < self.limits.stale)?;
        Some(KeptValue { value: value.clone(), is_current: last.tried_at.is_none_or(|tried| tried <= *at) })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const LONG: Duration = Duration::from_secs(600);
    const LIMITS: ReadingLimits = ReadingLimits { timeout: LONG, pause: LONG, stale: LONG };

    #[tokio::test]
    async fn who_waits_for_a_reading_that_fails_does_not_read_again() {
        let timeout = Duration::from_millis(50);
        let kept: Kept<u32> = Kept::new("x", ReadingLimits { timeout, ..LIMITS });
        let readings = AtomicUsize::new(0);
        let silent = || async {
            readings.fetch_add(1, Ordering::SeqCst);
            std::future::pending().await
        };
        let all = futures::future::join_all((0..20).map(|_| kept.get(LONG, silent()))).await;
        assert!(all.iter().all(Option::is_none));
        assert_eq!(readings.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_reading_that_is_given_up_was_tried() {
        let kept: Kept<u32> = Kept::new("x", LIMITS);
        let given_up = kept.get(LONG, std::future::pending());
        assert!(tokio::time::timeout(Duration::from_millis(20), given_up).await.is_err());
        let next = kept.get(LONG, async { panic!("read again") });
        assert!(next.await.is_none());
    }

    #[tokio::test]
    async fn a_value_is_used_for_a_while_after_readings_fail() {
        for (stale, used) in [(LONG, true), (Duration::ZERO, false)] {
            let kept = Kept::new("x", ReadingLimits { pause: Duration::ZERO, stale, ..LIMITS });
            let first = kept.get(LONG, async { Ok(7) }).await;
            assert_eq!(first.map(|seen| (*seen.value, seen.is_current)), used.then_some((7, true)));
            tokio::time::sleep(Duration::from_millis(1)).await;
            let later = kept.get(Duration::ZERO, async { Err("away".to_owned()) }).await;
            assert_eq!(later.map(|seen| (*seen.value, seen.is_current)), used.then_some((7, false)));
        }
        let kept = Kept::new("x", ReadingLimits { pause: Duration::ZERO, ..LIMITS });
        for (age, expected) in [(LONG, 1), (LONG, 1), (Duration::ZERO, 3)] {
            let next = expected;
            assert_eq!(*kept.get(age, async move { Ok(next) }).await.unwrap().value, expected);
        }
    }
}
