//! Load reports: what each worker says once a second, kept until it is stale.
//!
//! One subscription for all models. A report that cannot be read is dropped and counted: it is not a report
//! of zero load. The book has a bound for each model.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Client;
use futures::StreamExt;
use millrace_crds::load::LoadReport;
use millrace_crds::names::ModelRef;
use millrace_crds::scaling::REPLICAS_LIMIT;

/// A report older than this says nothing about now.
const STALE: Duration = Duration::from_secs(5);
/// A worker that was silent for this long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Entry {
    report: LoadReport,
    heard: Instant,
}

/// The last report of each worker. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct LoadBook(Arc<Mutex<HashMap<ModelRef, HashMap<String, Entry>>>>);

impl LoadBook {
    /// Takes a message in. Returns false where it is not a report.
    pub fn take(&self, subject: &str, body: &[u8], now: Instant) -> bool {
        let parts: Vec<&str> = subject.split('.').collect();
        let ["millrace", "load", namespace, name, worker] = parts.as_slice() else { return false };
        let Ok(model) = ModelRef::new(namespace, name) else { return false };
        let Ok(report) = serde_json::from_slice::<LoadReport>(body) else { return false };
        if report.worker.as_str() != *worker {
            return false;
        }
        let mut book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let workers = book.entry(model).or_default();
        workers.retain(|_, entry| now.saturating_duration_since(entry.heard) < FORGOTTEN);
        if workers.len() < REPLICAS_LIMIT as usize || workers.contains_key(*worker) {
            workers.insert((*worker).to_owned(), Entry { report, heard: now });
        }
        true
    }

    /// The reports of a model's workers that are not stale.
    pub fn of(&self, model: &ModelRef, now: Instant) -> HashMap<String, LoadReport> {
        let book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let workers = book.get(model).into_iter().flatten();
        workers
            .filter(|(_, entry)| now.saturating_duration_since(entry.heard) < STALE)
            .map(|(worker, entry)| (worker.clone(), entry.report.clone()))
            .collect()
    }

    /// Forgets a model.
    pub fn forget(&self, model: &ModelRef) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(model);
    }

    /// Listens until the client is closed.
    ///
    /// # Errors
    /// When the subscription cannot be made or ends.
    pub async fn listen(self, client: Client, namespace: Option<String>) -> anyhow::Result<()> {
        let subject = format!("millrace.load.{}.>", namespace.as_deref().unwrap_or("*"));
        let mut messages = client.subscribe(subject).await?;
        while let Some(message) = messages.next().await {
            if !self.take(&message.subject, &message.payload, Instant::now()) {
                tracing::debug!(subject = %message.subject, "not a load report");
            }
        }
        anyhow::bail!("the subscription to load reports ended")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_kept_until_they_are_stale() {
        let book = LoadBook::default();
        let now = Instant::now();
        let body = br#"{"worker":"w-1","phase":"ready","uptimeS":1.0,"kvBlocksUsed":3,"kvBlocksTotal":10,
            "sequencesRunning":1,"sequencesWaiting":0,"jobsHeld":1,"promptTokensPerS":0.0,
            "outputTokensPerS":0.0,"jobsFinished":7}"#;
        assert!(book.take("millrace.load.team.m.w-1", body, now));
        assert!(!book.take("millrace.load.team.m.w-2", body, now), "another worker's report");
        assert!(!book.take("millrace.load.team.m", body, now));
        assert!(!book.take("millrace.load.team.m.w-1", b"{}", now));
        let model = ModelRef::new("team", "m").unwrap();
        assert_eq!(book.of(&model, now).get("w-1").map(|report| report.jobs_finished), Some(7));
        assert!(book.of(&model, now + STALE).is_empty());
        book.forget(&model);
        assert!(book.of(&model, now).is_empty());
    }
}
