//! Which files a model's workers have, as their load reports say.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Client;
use futures::StreamExt;
use millrace_crds::load::Phase;
use millrace_crds::names::ModelRef;
use serde::Deserialize;

/// How long a worker's word counts; it speaks each second.
const HEARD_TIME: Duration = Duration::from_secs(5);
/// Most workers that are remembered, of all models.
const WORKERS_MAX: usize = 20_000;

/// What is read of a load report.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    phase: Phase,
    #[serde(default)]
    model_digest: Option<String>,
}

/// When a worker of a model was last heard, and the digest that it said.
type Heard = HashMap<(ModelRef, String), (Instant, Option<String>)>;

/// What workers said last.
#[derive(Debug, Default)]
pub struct ModelDigests {
    workers: Mutex<Heard>,
}

impl ModelDigests {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears load reports until the connection is closed for good.
    ///
    /// # Errors
    /// When the subscription cannot be made.
    pub async fn listen(self: Arc<Self>, client: &Client) -> Result<(), async_nats::SubscribeError> {
        let mut reports = client.subscribe("millrace.load.*.*.*").await?;
        tokio::spawn(async move {
            while let Some(message) = reports.next().await {
                self.hear(&message.subject, &message.payload, Instant::now());
            }
        });
        Ok(())
    }

    fn hear(&self, subject: &str, report: &[u8], now: Instant) {
        let mut parts = subject.split('.').skip(2);
        let (Some(namespace), Some(name), Some(worker)) = (parts.next(), parts.next(), parts.next()) else {
            return;
        };
        let report: Option<Report> = serde_json::from_slice(report).ok();
        let (Ok(model), Some(report)) = (ModelRef::new(namespace, name), report) else { return };
        let mut workers = self.lock();
        if workers.len() >= WORKERS_MAX {
            workers.retain(|_, (at, _)| now.duration_since(*at) < HEARD_TIME);
        }
        // One that loads still, or ends, takes no jobs.
        if report.phase == Phase::Ready && workers.len() < WORKERS_MAX {
            workers.insert((model, worker.to_owned()), (now, report.model_digest));
        } else {
            workers.remove(&(model, worker.to_owned()));
        }
    }

    /// The digest of a model's files, where its workers say the same.
    pub fn current(&self, model: &ModelRef) -> Option<String> {
        self.at(model, Instant::now())
    }

    fn at(&self, model: &ModelRef, now: Instant) -> Option<String> {
        let workers = self.lock();
        let of_model = workers.iter().filter(|((of, _), _)| of == model);
        let mut said = of_model.filter(|(_, (at, _))| now.duration_since(*at) < HEARD_TIME);
        let (_, (_, first)) = said.next()?;
        said.all(|(_, (_, other))| other == first).then(|| first.clone()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_must_say_the_same() {
        let (digests, now) = (ModelDigests::default(), Instant::now());
        let model = ModelRef::new("a", "m").unwrap();
        let say = |worker: &str, phase: &str, digest: &str, at| {
            let report =
                format!(r#"{{"worker":"{worker}","phase":"{phase}","modelDigest":{digest},"new":1}}"#);
            digests.hear(&format!("millrace.load.a.m.{worker}"), report.as_bytes(), at);
        };
        assert_eq!(digests.at(&model, now), None);
        say("w1", "ready", "\"sha256:1\"", now);
        say("w2", "loading", "\"sha256:2\"", now);
        assert_eq!(digests.at(&model, now).as_deref(), Some("sha256:1"));
        say("w2", "ready", "\"sha256:2\"", now);
        assert_eq!(digests.at(&model, now), None, "a roll-out");
        say("w1", "draining", "\"sha256:1\"", now);
        assert_eq!(digests.at(&model, now).as_deref(), Some("sha256:2"));
        assert_eq!(digests.at(&model, now + HEARD_TIME), None, "nobody speaks");
        assert_eq!(digests.at(&ModelRef::new("a", "n").unwrap(), now), None);
        say("w1", "ready", "null", now);
        assert_eq!(digests.at(&model, now), None, "an older worker does not say it");
    }
}
