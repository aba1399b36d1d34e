//! Outcomes as they are stored: a reader that keeps its place itself.
//!
//! When few jobs are missing it asks for exactly these; otherwise it reads on through the stream. Neither
//! needs a consumer, so a restarted broker is only a pause.

use std::time::{Duration, Instant};

use millrace_crds::names::JobId;

use crate::collect::Collector;
use crate::connect::Connection;
use crate::direct::{self, Ask, SUBJECTS_MAX};
use crate::failure::Failure;
use crate::outcome::CollectedOutcome;

/// Pause after a look that found nothing; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest pause: what a waiting person does not notice.
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// With more jobs missing than this, the stream is read on instead of asked for each of them.
const ASKED_MAX: usize = 64;

/// A place in the RESULTS stream.
#[derive(Debug)]
pub struct Follower<'a> {
    broker: &'a Connection,
    stream: String,
    next_sequence: u64,
    pause: Duration,
}

impl<'a> Follower<'a> {
    /// From this stream sequence on.
    pub fn from(broker: &'a Connection, next_sequence: u64) -> Self {
        Self { broker, stream: broker.model.results_stream(), next_sequence, pause: PAUSE_MIN }
    }

    /// Behind all that is stored now.
    ///
    /// # Errors
    /// [`Failure::NotProvisioned`] when there is no stream.
    pub async fn from_now(broker: &'a Connection) -> Result<Self, Failure> {
        let stream = broker.stream(broker.model.results_stream()).await?;
        Ok(Self::from(broker, stream.cached_info().state.last_sequence + 1))
    }

    /// The next outcomes of the stream; none when its end is reached.
    ///
    /// # Errors
    /// [`Failure::Refused`] when the broker cannot be read.
    pub async fn next(&mut self) -> Result<Vec<CollectedOutcome>, Failure> {
        let subject = self.broker.model.results_wildcard();
        let ask = Ask::From { subject: &subject, sequence: self.next_sequence };
        let batch = direct::read(self.broker, &self.stream, ask).await?;
        let mut outcomes = Vec::with_capacity(batch.messages.len());
        for message in batch.messages {
            self.next_sequence = self.next_sequence.max(message.sequence + 1);
            outcomes.extend(CollectedOutcome::read(&self.broker.model, message));
        }
        Ok(outcomes)
    }

    /// Looks once for jobs that the collector misses.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn look(&mut self, collector: &Collector) -> Result<Vec<CollectedOutcome>, Failure> {
        let mut outcomes = if collector.missing_count() > ASKED_MAX {
            self.next().await?
        } else {
            let missing: Vec<JobId> = collector.missing(ASKED_MAX).into_iter().cloned().collect();
            stored(self.broker, &missing).await?
        };
        outcomes.retain(|outcome| collector.misses(&outcome.job));
        Ok(outcomes)
    }

    /// Waits a little: longer, the longer nothing was found.
    pub async fn rest(&mut self, found: bool) {
        self.pause = if found { PAUSE_MIN } else { (self.pause * 2).min(PAUSE_MAX) };
        tokio::time::sleep(self.pause).await;
    }
}

/// The outcomes that are stored for these jobs.
///
/// # Errors
/// As [`Follower::next`].
pub async fn stored(broker: &Connection, jobs: &[JobId]) -> Result<Vec<CollectedOutcome>, Failure> {
    let stream = broker.model.results_stream();
    let mut outcomes = Vec::new();
    for chunk in jobs.chunks(SUBJECTS_MAX) {
        let subjects: Vec<String> = chunk.iter().map(|job| broker.model.result_subject(job)).collect();
        direct::last_of(broker, &stream, &subjects, |message| {
            outcomes.extend(CollectedOutcome::read(&broker.model, message));
            Ok(())
        })
        .await?;
    }
    Ok(outcomes)
}

/// A clock that is wound up by progress.
#[derive(Debug)]
pub struct StallClock {
    limit: Duration,
    last: Instant,
}

impl StallClock {
    /// Runs out when nothing progresses for `limit`.
    pub fn new(limit: Duration) -> Self {
        Self { limit, last: Instant::now() }
    }

    /// Something progressed.
    pub fn renew(&mut self) {
        self.last = Instant::now();
    }

    /// Whether it has run out.
    pub fn is_over(&self) -> bool {
        self.last.elapsed() >= self.limit
    }

    /// The limit in words.
    pub fn limit(&self) -> String {
        millrace_crds::units::Span(self.limit).to_string()
    }
}
