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
use crate::outcome::CollectedOutcome;

/// Pause between two look-ups.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);
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
    /// `prefix` is a subject that nobody else listens to.
    pub fn new(prefix: String) -> Arc<Self> {
        Arc::new(Self { prefix, waiting: Mutex::default() })
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

    fn deliver(&self, outcome: CollectedOutcome) {
        if let Some(waiter) = self.lock().remove(&outcome.job) {
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
            for (model, jobs) in self.unheard() {
                match follow::stored(&connection(model.clone()), &jobs).await {
                    Ok(outcomes) => outcomes.into_iter().for_each(|outcome| self.deliver(outcome)),
                    Err(error) => tracing::warn!(%model, %error, "outcomes cannot be looked up"),
                }
            }
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
    async fn each_hears_its_own_and_is_forgotten() {
        let waiters = Waiters::new("_INBOX.g".into());
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
