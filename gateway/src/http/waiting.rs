//! Outcomes that requests wait for.
//!
//! Each job asks for a copy of its outcome on a subject of this gateway's own, so that all waiters share one
//! subscription and hear nothing of others. The copy is best effort: what is not heard is looked up in the stream, for
//! all waiters together.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::{Client, HeaderMap};
use futures::StreamExt;
use millrace_crds::names::{JobId, ModelRef};
use tokio::sync::oneshot;

use crate::connect::Connection;
use crate::follow;
use crate::http::memory::MemoryBudget;
use crate::outcome::CollectedOutcome;

/// Pause between two look-ups.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);
/// Models whose outcomes are looked up at once.
const SWEEP_MODELS_MAX: usize = 16;
/// How long the look-ups of one model may take.
const SWEEP_TIMEOUT: Duration = Duration::from_secs(5);
/// Who waits for less than this is not looked up: most outcomes come sooner.
const SWEEP_AGE_MIN: Duration = Duration::from_millis(900);

#[derive(Debug)]
struct Waiter {
    model: ModelRef,
    since: Instant,
    heard: oneshot::Sender<CollectedOutcome>,
}

/// Everybody who waits at this gateway.
#[derive(Debug)]
pub struct Waiters {
    prefix: String,
    memory: MemoryBudget,
    waiting: Mutex<HashMap<JobId, Waiter>>,
}

/// The wait for one outcome; given up when dropped.
#[derive(Debug)]
pub struct Pending {
    waiters: Arc<Waiters>,
    job: JobId,
    heard: oneshot::Receiver<CollectedOutcome>,
}

impl Waiters {
    /// `prefix` is a subject that nobody else listens to; outcomes count as held until nobody has them any more.
    pub fn new(prefix: String, memory: MemoryBudget) -> Arc<Self> {
        Arc::new(Self { prefix, memory, waiting: Mutex::default() })
    }

    /// Where the copy of a job's outcome shall go.
    pub fn reply_subject(&self, job: &JobId) -> String {
        format!("{}.{job}", self.prefix)
    }

    /// Waits for a job's outcome; to be called before the job is published.
    pub fn wait(self: &Arc<Self>, model: &ModelRef, job: &JobId) -> Pending {
        let (sender, heard) = oneshot::channel();
        let waiter = Waiter { model: model.clone(), since: Instant::now(), heard: sender };
        self.lock().insert(job.clone(), waiter);
        Pending { waiters: self.clone(), job: job.clone(), heard }
    }

    /// How many wait.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, Waiter>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where there is no memory for an outcome, its waiter goes on waiting: it is looked up again.
    fn deliver(&self, outcome: CollectedOutcome) {
        let mut waiting = self.lock();
        if !waiting.contains_key(&outcome.job) {
            return;
        }
        let Some(body) = self.memory.keep(outcome.body) else { return };
        let outcome = CollectedOutcome { body, ..outcome };
        if let Some(waiter) = waiting.remove(&outcome.job) {
            // Who has just left needs no outcome.
            let _ = waiter.heard.send(outcome);
        }
    }

    /// Hears copies of outcomes until the connection is closed for good.
    ///
    /// # Errors
    /// When the subscription cannot be made.
    pub async fn listen(self: Arc<Self>, client: Client) -> Result<(), async_nats::SubscribeError> {
        let mut copies = client.subscribe(format!("{}.*", self.prefix)).await?;
        tokio::spawn(async move {
            while let Some(message) = copies.next().await {
                let job = message.subject.rsplit('.').next().and_then(|token| token.parse().ok());
                let Some(job) = job else { continue };
                let none = HeaderMap::new();
                let headers = message.headers.as_ref().unwrap_or(&none);
                self.deliver(CollectedOutcome::from_parts(job, headers, message.payload));
            }
        });
        Ok(())
    }

    /// Looks up what was not heard, for as long as the process lives.
    pub async fn sweep(self: Arc<Self>, connection: impl Fn(ModelRef) -> Connection) {
        loop {
            tokio::time::sleep(SWEEP_PAUSE).await;
            let unheard = self.unheard().into_iter();
            let looks: Vec<_> =
                unheard.map(|(model, jobs)| self.clone().look_up(connection(model), jobs)).collect();
            side_by_side(looks).await;
        }
    }

    async fn look_up(self: Arc<Self>, broker: Connection, jobs: Vec<JobId>) {
        let model = &broker.model;
        match tokio::time::timeout(SWEEP_TIMEOUT, follow::stored(&broker, &jobs)).await {
            Ok(Ok(outcomes)) => outcomes.into_iter().for_each(|outcome| self.deliver(outcome)),
            Ok(Err(error)) => tracing::warn!(%model, %error, "outcomes cannot be looked up"),
            Err(_) => tracing::warn!(%model, "outcomes cannot be looked up: the broker does not answer"),
        }
    }

    fn unheard(&self) -> HashMap<ModelRef, Vec<JobId>> {
        let mut jobs: HashMap<ModelRef, Vec<JobId>> = HashMap::new();
        for (job, waiter) in self.lock().iter() {
            if waiter.since.elapsed() >= SWEEP_AGE_MIN {
                jobs.entry(waiter.model.clone()).or_default().push(job.clone());
            }
        }
        jobs
    }
}

/// Some of these at once: one that hangs keeps the others waiting only where many do.
async fn side_by_side<L: Future<Output = ()>>(looks: impl IntoIterator<Item = L>) {
    futures::stream::iter(looks).for_each_concurrent(SWEEP_MODELS_MAX, |look| look).await;
}

impl Pending {
    /// The outcome. The call may be given up and made again.
    pub async fn outcome(&mut self) -> CollectedOutcome {
        match (&mut self.heard).await {
            Ok(outcome) => outcome,
            // Only a second wait for the same id takes the place of the first: its own limit of time ends this one.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.waiters.lock().remove(&self.job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(job: &str) -> CollectedOutcome {
        let mut headers = HeaderMap::new();
        headers.insert("Millrace-Outcome", "completed");
        CollectedOutcome::from_parts(job.parse().unwrap(), &headers, bytes::Bytes::from_static(b"x"))
    }

    #[tokio::test]
    async fn a_look_up_that_hangs_keeps_no_other_waiting() {
        let done = std::sync::atomic::AtomicUsize::new(0);
        let looks = (0..40).map(|i| {
            let done = &done;
            async move {
                if i < SWEEP_MODELS_MAX - 1 {
                    std::future::pending::<()>().await;
                }
                done.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        });
        let hangs = tokio::time::timeout(Duration::from_millis(200), side_by_side(looks)).await;
        assert!(hangs.is_err());
        assert_eq!(done.into_inner(), 40 - (SWEEP_MODELS_MAX - 1));
    }

    #[tokio::test]
    async fn each_hears_its_own_and_is_forgotten() {
        let waiters = Waiters::new("_INBOX.g".into(), MemoryBudget::new(1 << 20));
        let model = ModelRef::new("default", "m").unwrap();
        let (one, two): (JobId, JobId) = ("one".parse().unwrap(), "two".parse().unwrap());
        assert_eq!(waiters.reply_subject(&one), "_INBOX.g.one");
        let (mut first, second) = (waiters.wait(&model, &one), waiters.wait(&model, &two));
        waiters.deliver(outcome("three"));
        waiters.deliver(outcome("one"));
        assert_eq!(first.outcome().await.job, one);
        assert_eq!(waiters.count(), 1);
        assert!(waiters.unheard().is_empty(), "too young to be looked up");
        drop(second);
        assert_eq!(waiters.count(), 0);
    }
}
