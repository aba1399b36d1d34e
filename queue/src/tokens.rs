//! Token deltas of a running job, published on core NATS: best effort, numbered, tagged with the attempt.
//!
//! The engine's side sends into a bounded channel and never waits; what does not fit there is dropped and
//! counted by the sender's side as a longer next delta. The stored outcome stays the truth.

use async_nats::HeaderMap;
use millrace_crds::job::header;
use millrace_crds::names::{JobId, ModelRef};
use millrace_crds::tokens::TokenDelta;
use tokio::sync::mpsc;

use crate::broker::Broker;

/// Deltas of one job that may wait for the connection. At a thousand tokens a second, half a second's.
const DELTAS_MAX: usize = 512;

/// Where deltas go.
#[derive(Debug, Clone)]
pub struct Tokens {
    broker: Broker,
    model: ModelRef,
}

impl Tokens {
    /// For the jobs of this model.
    pub fn new(broker: Broker, model: ModelRef) -> Self {
        Self { broker, model }
    }

    /// A channel whose deltas are published for this job, until its sender is dropped.
    pub fn publish(&self, job: &JobId, attempt: u32) -> mpsc::Sender<TokenDelta> {
        let (sender, receiver) = mpsc::channel(DELTAS_MAX);
        let subject = self.model.tokens_subject(job);
        let mut headers = HeaderMap::new();
        headers.insert(header::RESULT_JOB_ID, job.as_str());
        headers.insert(header::ATTEMPT, attempt.to_string().as_str());
        tokio::spawn(forward(self.broker.clone(), subject, headers, receiver));
        sender
    }
}

async fn forward(
    broker: Broker,
    subject: String,
    headers: HeaderMap,
    mut deltas: mpsc::Receiver<TokenDelta>,
) {
    while let Some(delta) = deltas.recv().await {
        let body = serde_json::to_vec(&delta).expect("numbers and strings serialise");
        let sent = broker.client().publish_with_headers(subject.clone(), headers.clone(), body.into()).await;
        if sent.is_err() {
            return;
        }
    }
}
