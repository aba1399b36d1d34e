//! Cancellation of jobs that are held here.
//!
//! A cancellation is a message that the RESULTS stream stores as a marker, so that it outlives restarts,
//! and that running workers hear at once. The marker is read before a job starts, and again with each
//! keep-alive, because what is said while the connection is down is not heard.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_nats::Subscriber;
use futures::StreamExt;
use millrace_crds::names::{JobId, ModelRef};
use tokio_util::sync::CancellationToken;

use crate::broker::{Broker, BrokerError};

type Held = HashMap<String, (CancellationToken, usize)>;

/// The jobs held here that can be cancelled. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Cancels {
    held: Arc<Mutex<Held>>,
}

/// One held job; forgotten when dropped.
#[derive(Debug)]
pub struct Cancel {
    cancels: Cancels,
    job: String,
    token: CancellationToken,
}

impl Cancels {
    /// Listens to cancellations of the model's jobs, until the connection is closed for good.
    ///
    /// # Errors
    /// When the subscription cannot be made.
    pub async fn listen(&self, broker: &Broker, model: &ModelRef) -> Result<(), BrokerError> {
        let subject = model.cancel_wildcard();
        let subscriber = broker.client().subscribe(subject).await;
        let subscriber = subscriber
            .map_err(|error| BrokerError::Request { what: "subscribe", message: error.to_string() })?;
        tokio::spawn(self.clone().hear(subscriber));
        Ok(())
    }

    async fn hear(self, mut subscriber: Subscriber) {
        while let Some(message) = subscriber.next().await {
            if let Some(job) = message.subject.rsplit('.').next() {
                self.cancel(job);
            }
        }
    }

    /// Cancels a job if it is held here.
    pub fn cancel(&self, job: &str) {
        if let Some((token, _)) = self.lock().get(job) {
            token.cancel();
        }
    }

    /// Holds a job. Two deliveries of one job share its cancellation.
    pub fn hold(&self, job: &JobId) -> Cancel {
        let mut held = self.lock();
        let (token, count) = held.entry(job.to_string()).or_default();
        *count += 1;
        Cancel { cancels: self.clone(), job: job.to_string(), token: token.clone() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cancel {
    /// Says that a marker was found.
    pub fn set(&self) {
        self.token.cancel();
    }

    /// Waits until the job is cancelled.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        let mut held = self.cancels.lock();
        if let Some((_, count)) = held.get_mut(&self.job) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.job);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deliveries_of_one_job_share_and_forget() {
        let cancels = Cancels::default();
        let job: JobId = "a".parse().unwrap();
        let (first, second) = (cancels.hold(&job), cancels.hold(&job));
        cancels.cancel("b");
        assert!(!first.token.is_cancelled());
        drop(first);
        cancels.cancel("a");
        assert!(second.token.is_cancelled());
        drop(second);
        assert!(cancels.lock().is_empty());
        assert!(!cancels.hold(&job).token.is_cancelled(), "held anew: the marker is read again");
    }
}
