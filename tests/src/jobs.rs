//! The pipeline's side of a test: publishes jobs until the broker has acknowledged each, and keeps a record
//! of every outcome ever stored.
//!
//! It goes through broker crashes: a publish is repeated under its job id until its acknowledgement came, a
//! failed read is repeated later. What it never does is to forget an outcome that it has seen, so that one
//! that changes or vanishes is found.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use async_nats::HeaderMap;
use async_nats::jetstream::context::Context;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{DirectGetErrorKind, Stream};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use millrace_crds::job::header;
use millrace_crds::names::{Class, JobId, ModelRef};
use millrace_crds::result::{OutcomeKind, OutputLine};
use serde_json::{Value, json};

use crate::nats::NatsServer;

/// How long one request to the broker may take; a killed broker answers none.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);
/// How long a publisher goes on trying.
const PUBLISH_LIMIT: Duration = Duration::from_secs(120);
/// Publishes that await their acknowledgements at once.
const PUBLISHES_MAX: usize = 64;
/// Between two looks at the broker.
const POLL: Duration = Duration::from_millis(20);

/// A job to publish.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// Its id.
    pub id: JobId,
    /// Its class.
    pub class: Class,
    /// Headers besides the id.
    pub headers: Vec<(&'static str, String)>,
    /// Its body.
    pub body: Bytes,
}

impl NewJob {
    /// A job of class `normal` with a JSON body.
    ///
    /// # Panics
    /// When `id` is no job id.
    pub fn new(id: &str, body: &Value) -> Self {
        let id = id.parse().expect("a test's job id");
        Self { id, class: Class::Normal, headers: Vec::new(), body: body.to_string().into() }
    }

    /// A completion of exactly `max_tokens` tokens.
    pub fn completion(id: &str, prompt: &str, max_tokens: u32) -> Self {
        Self::new(id, &json!({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true}))
    }

    /// The same job with one header more.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A stored outcome.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its place in the RESULTS stream.
    pub sequence: u64,
    /// How the job ended.
    pub kind: OutcomeKind,
    /// Which attempt wrote it.
    pub attempt: u64,
    /// All headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Stored {
    fn read(message: StreamMessage) -> Result<Self> {
        let text = |name: &str| message.headers.get(name).map(|value| value.as_str());
        let kind = match text(header::OUTCOME) {
            Some("completed") => OutcomeKind::Completed,
            Some("rejected") => OutcomeKind::Rejected,
            Some("dead") => OutcomeKind::Dead,
            other => bail!("{}: header {} is {other:?}", message.subject, header::OUTCOME),
        };
        let attempt = text(header::ATTEMPT).and_then(|value| value.parse().ok());
        let attempt = attempt.with_context(|| format!("{}: no {}", message.subject, header::ATTEMPT))?;
        Ok(Self {
            sequence: message.sequence,
            kind,
            attempt,
            headers: message.headers,
            body: message.payload,
        })
    }

    /// A header's value as a number.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.headers.get(name)?.as_str().parse().ok()
    }

    /// The lines of the body.
    ///
    /// # Errors
    /// When a line is not an output line.
    pub fn lines(&self) -> Result<Vec<OutputLine>> {
        let text = std::str::from_utf8(&self.body)?;
        text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }

    /// The OpenAI response object of a job of one request.
    ///
    /// # Errors
    /// When the job has no answer; the message holds the error that it has.
    pub fn answer(&self) -> Result<Value> {
        let line = self.lines()?.into_iter().next().context("the outcome is empty")?;
        match line.response {
            Some(response) => Ok(response.body),
            None => bail!("no answer but {:?}", line.error),
        }
    }

    /// The lines without `created`, the one field that tells when the job was published.
    ///
    /// # Errors
    /// As [`Self::lines`].
    pub fn timeless(&self) -> Result<Vec<Value>> {
        let strip = |line: OutputLine| -> Result<Value> {
            let mut value = serde_json::to_value(line)?;
            if let Some(body) = value.pointer_mut("/response/body").and_then(Value::as_object_mut) {
                body.remove("created");
            }
            Ok(value)
        };
        self.lines()?.into_iter().map(strip).collect()
    }
}

/// The queue of one model, from the pipeline's side.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// The connection.
    pub client: async_nats::Client,
    jetstream: Context,
    model: ModelRef,
}

impl Pipeline {
    /// Connects, for good: the client reconnects for ever.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn connect(nats: &NatsServer, model: &ModelRef) -> Result<Self> {
        let options = nats
            .options()
            .await?
            .request_timeout(Some(REQUEST_LIMIT))
            .reconnect_delay_callback(|_| Duration::from_millis(50));
        let client = options.connect(nats.url()).await?;
        let mut jetstream = async_nats::jetstream::new(client.clone());
        jetstream.set_timeout(REQUEST_LIMIT);
        Ok(Self { client, jetstream, model: model.clone() })
    }

    /// Publishes a job until the broker has acknowledged it.
    ///
    /// # Errors
    /// When there was no acknowledgement for two minutes.
    pub async fn publish(&self, job: &NewJob) -> Result<()> {
        let start = Instant::now();
        loop {
            let error = match self.publish_once(job).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if start.elapsed() > PUBLISH_LIMIT {
                return Err(error.context(format!("job {} was not accepted", job.id)));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn publish_once(&self, job: &NewJob) -> Result<()> {
        let mut headers = HeaderMap::new();
        headers.insert(header::JOB_ID, job.id.as_str());
        for (name, value) in &job.headers {
            headers.insert(*name, value.as_str());
        }
        let subject = self.model.jobs_subject(job.class);
        let acknowledged = self.jetstream.publish_with_headers(subject, headers, job.body.clone()).await?;
        acknowledged.await?;
        Ok(())
    }

    /// Publishes jobs, many at once.
    ///
    /// # Errors
    /// When one was not accepted.
    pub async fn publish_all(&self, jobs: &[NewJob]) -> Result<()> {
        let publishes = futures::stream::iter(jobs).map(|job| self.publish(job));
        publishes.buffer_unordered(PUBLISHES_MAX).try_collect::<Vec<()>>().await?;
        Ok(())
    }

    /// Jobs that are in the queue, running ones among them.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn jobs_left(&self) -> Result<u64> {
        let stream = self.jetstream.get_stream(self.model.jobs_stream()).await?;
        Ok(stream.cached_info().state.messages)
    }

    /// Waits until the queue is empty: every job is acknowledged.
    ///
    /// # Errors
    /// When it is not within `limit`.
    pub async fn wait_empty(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let left = self.jobs_left().await;
            if matches!(left, Ok(0)) {
                return Ok(());
            }
            if start.elapsed() > limit {
                bail!("after {limit:?} the queue still holds {left:?} jobs");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until `count` outcomes are stored, without reading them.
    ///
    /// # Errors
    /// When there are fewer after `limit`.
    pub async fn wait_stored(&self, count: usize, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let mut subjects =
                self.results().await?.info_with_subjects(self.model.results_wildcard()).await?;
            let mut stored = 0;
            while let Some((_, messages)) = subjects.try_next().await? {
                stored += messages;
            }
            if stored >= count {
                return Ok(());
            }
            if start.elapsed() > limit {
                bail!("{stored} of {count} outcomes after {limit:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The dead letter of a job.
    ///
    /// # Errors
    /// When there is none.
    pub async fn dead_letter(&self, job: &JobId) -> Result<StreamMessage> {
        let stream = self.jetstream.get_stream(self.model.dead_stream()).await?;
        let subject = self.model.dead_subject(job);
        stream.direct_get_last_for_subject(subject).await.with_context(|| format!("dead letter of {job}"))
    }

    async fn results(&self) -> Result<Stream> {
        Ok(self.jetstream.get_stream(self.model.results_stream()).await?)
    }
}

/// Every outcome seen since its start.
#[derive(Debug, Default)]
pub struct OutcomeLog {
    next: u64,
    /// By job.
    pub outcomes: BTreeMap<JobId, Stored>,
    /// Jobs that got a second outcome: there must be none.
    pub rewritten: Vec<JobId>,
}

impl OutcomeLog {
    /// Reads what was stored since the last call; a broker that does not answer is asked again next time.
    ///
    /// # Errors
    /// When an outcome is malformed.
    pub async fn follow(&mut self, queue: &Pipeline) -> Result<()> {
        let Ok(stream) = queue.results().await else { return Ok(()) };
        loop {
            let wildcard = queue.model.results_wildcard();
            let message = match stream.direct_get_next_for_subject(wildcard, Some(self.next.max(1))).await {
                Ok(message) => message,
                Err(error) if error.kind() == DirectGetErrorKind::NotFound => return Ok(()),
                Err(_) => return Ok(()),
            };
            self.next = message.sequence + 1;
            let job: JobId = message.subject.rsplit('.').next().unwrap_or_default().parse()?;
            if self.outcomes.insert(job.clone(), Stored::read(message)?).is_some() {
                self.rewritten.push(job);
            }
        }
    }

    /// Follows until there are `count` outcomes.
    ///
    /// # Errors
    /// When there are fewer after `limit`; the message says how many.
    pub async fn wait(&mut self, queue: &Pipeline, count: usize, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            self.follow(queue).await?;
            if self.outcomes.len() >= count {
                return Ok(());
            }
            if start.elapsed() > limit {
                bail!("{} of {count} outcomes after {limit:?}", self.outcomes.len());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The outcome of a job.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(&self, job: &str) -> Result<&Stored> {
        self.outcomes.get(&job.parse::<JobId>()?).with_context(|| format!("job {job} has no outcome"))
    }

    /// Checks that each of `jobs` has exactly one outcome that never changed, and nobody else has one.
    ///
    /// # Errors
    /// Naming the first few jobs for which that is not so.
    pub async fn check(&self, queue: &Pipeline, jobs: &[NewJob]) -> Result<()> {
        let missing: Vec<_> =
            jobs.iter().map(|job| &job.id).filter(|id| !self.outcomes.contains_key(id)).collect();
        let shown = |ids: &[&JobId]| format!("{} jobs, such as {:?}", ids.len(), &ids[..ids.len().min(5)]);
        anyhow::ensure!(missing.is_empty(), "no outcome: {}", shown(&missing));
        anyhow::ensure!(
            self.rewritten.is_empty(),
            "two outcomes: {}",
            shown(&self.rewritten.iter().collect::<Vec<_>>())
        );
        anyhow::ensure!(
            self.outcomes.len() == jobs.len(),
            "{} outcomes of {} jobs",
            self.outcomes.len(),
            jobs.len()
        );
        let mut again = OutcomeLog::default();
        again.wait(queue, jobs.len(), PUBLISH_LIMIT).await?;
        for (id, first) in &self.outcomes {
            let now = again.of(id.as_str())?;
            let same = now.sequence == first.sequence && now.body == first.body;
            anyhow::ensure!(same, "the outcome of {id} changed after it was stored");
        }
        Ok(())
    }

    /// Outcomes that a later attempt than the first wrote.
    pub fn redelivered(&self) -> usize {
        self.outcomes.values().filter(|outcome| outcome.attempt > 1).count()
    }

    /// How many ended in each way: completed, rejected, dead.
    pub fn kinds(&self) -> [usize; 3] {
        [OutcomeKind::Completed, OutcomeKind::Rejected, OutcomeKind::Dead]
            .map(|kind| self.outcomes.values().filter(|outcome| outcome.kind == kind).count())
    }
}
