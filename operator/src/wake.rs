//! Waking from zero: the first job of a sleeping model reaches the operator as it reaches the stream.
//!
//! While a model has neither workers nor work, the operator subscribes to the subjects of its jobs, and the
//! server is told to end the subscription after one message. So a busy model costs nothing here, and a sleeping
//! one is woken in the time of a message. The subscription is made before the queue is read, so no job falls
//! between the two; a message that is lost all the same is found by the slow look at the queue.
//!
//! The message may be faster than the stream, which still looks empty then: a model that was just woken is looked
//! at again after a moment.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Client;
use futures::StreamExt;
use millrace_crds::names::ModelRef;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// For so long after a message, an empty stream is looked at again soon.
const JUST: Duration = Duration::from_secs(3);
/// Models that may wait to be woken; a sender waits beyond it.
pub const WAKES_MAX: usize = 1024;

/// The subscriptions of sleeping models.
#[derive(Debug)]
pub struct Wakes {
    client: Client,
    woken: mpsc::Sender<ModelRef>,
    armed: Mutex<HashMap<ModelRef, JoinHandle<()>>>,
    heard: Mutex<HashMap<ModelRef, Instant>>,
}

impl Wakes {
    /// Without any subscription. Woken models come out of the receiver.
    pub fn new(client: Client) -> (Self, mpsc::Receiver<ModelRef>) {
        let (woken, receiver) = mpsc::channel(WAKES_MAX);
        (Self { client, woken, armed: Mutex::default(), heard: Mutex::default() }, receiver)
    }

    /// Subscribes to the jobs of a model, unless that was done and nothing came since.
    pub async fn arm(&self, model: &ModelRef) {
        let armed =
            |map: &HashMap<ModelRef, JoinHandle<()>>| map.get(model).is_some_and(|t| !t.is_finished());
        if armed(&self.armed.lock().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        let subject = format!("millrace.jobs.{}.{}.*", model.namespace, model.name);
        let mut jobs = match self.client.subscribe(subject).await {
            Ok(jobs) => jobs,
            Err(error) => {
                tracing::warn!(%model, %error, "jobs cannot be listened for; the queue is looked at every --poll-idle");
                return;
            }
        };
        if let Err(error) = jobs.unsubscribe_after(1).await {
            tracing::debug!(%model, %error, "the subscription ends by itself later");
        }
        let (woken, name) = (self.woken.clone(), model.clone());
        let task = tokio::spawn(async move {
            if jobs.next().await.is_some() {
                // The receiver lives as long as the operator.
                let _ = woken.send(name).await;
            }
        });
        let mut map = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = map.insert(model.clone(), task) {
            old.abort();
        }
    }

    /// A message of a model has come.
    pub fn hear(&self, model: &ModelRef) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.insert(model.clone(), Instant::now());
    }

    /// Whether a message of a model has just come.
    pub fn just_heard(&self, model: &ModelRef) -> bool {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get(model).is_some_and(|at| at.elapsed() < JUST)
    }

    /// Ends the subscription of a model.
    pub fn disarm(&self, model: &ModelRef) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).remove(model);
        let task = self.armed.lock().unwrap_or_else(PoisonError::into_inner).remove(model);
        if let Some(task) = task {
            task.abort();
        }
    }
}
