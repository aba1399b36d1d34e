//! One job's way from its delivery to its end, in eight steps, and the loop that holds many of them.
//!
//! 1. read the headers: malformed ones make an outcome, not a retry;
//! 2. look up the outcome: a job that has one goes to step 8;
//! 3. count the attempt, in the job's ledger;
//! 4. get the body, from the message or from behind its claim check;
//! 5. encode the prompts;
//! 6. await the answer, while progress keeps the delivery alive, and put a large one into the object store;
//! 7. create the outcome, where there is none;
//! 8. acknowledge, by request; before that a dead job's copy is stored.
//!
//! A crash anywhere leads to a redelivery that finds what was stored and does only the rest.
//!
//! Kept: no ack before the outcome is stored; a job with an outcome never runs again; a keep-alive is only
//! sent if the engine stepped since the last one; the last attempt of a job that may have killed its process
//! runs alone, so that it is given up without the jobs that ran beside it; an answer that was computed is kept
//! while broker or object store are away.

mod attempt;
mod holds;
mod line;
mod naming;
mod pulse;

pub use line::{LineParts, ServingLine};

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millrace_crds::config::{ClassWeights, QueueConfig, ResultsConfig};
use millrace_crds::job::JobHeaders;
use millrace_crds::result::{ErrorCode, OutcomeKind};
use millrace_queue::broker::{BrokerError, Created};
use millrace_queue::claim::Claims;
use millrace_queue::delivery::{Delivery, Queue};
use millrace_queue::fault::{Disposition, Fault};
use millrace_queue::identity::{AnswerOf, body_digest};
use millrace_queue::results::{Known, Outcome, OutcomeEnvelope, StoredOutcome, reason};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::failpoint::reach;
use crate::run::Run;
use naming::{bare_headers, place_of};
use pulse::{HeldBy, Pulse, keep_alive};

/// Deliveries after which a job is given up whatever its ledger says, in multiples of its attempts: the bound
/// for a job that comes back again and again without an attempt that counts. The broker itself has none.
const DELIVERIES_PER_ATTEMPT_MAX: u32 = 10;
/// Bytes that the headers of an outcome may take beside its body: names, ids, digests and numbers, all bounded.
const OUTCOME_HEADER_BYTES_MAX: usize = 8 << 10;
/// Pause before a store that is away is asked again, and the end of its doubling.
const STORE_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// After the drain's end, how long handing back may take.
const HAND_BACK_TIMEOUT: Duration = Duration::from_secs(10);

/// Why serving ended other than by a drain.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The engine or the device is broken: the process must end.
    #[error("the engine has stopped")]
    EngineStopped,
    /// The connection is closed for good.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// What became of a delivery that did not fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// Its outcome was stored, now by this worker, and it was acknowledged.
    Finished(OutcomeKind),
    /// Its outcome was there already.
    AlreadyDone(OutcomeKind),
    /// Its outcome is stored and the ack was not confirmed: it comes again and is finished then.
    Unconfirmed(OutcomeKind),
}

/// Pulls and runs jobs until `drain` is cancelled; then finishes what it holds within `drain_timeout` and
/// hands the rest back.
///
/// # Errors
/// When the engine or the connection is gone for good. Nothing is lost then; the process must end.
pub async fn serve<R: Run>(
    line: &Arc<ServingLine<R>>,
    drain: &CancellationToken,
    drain_timeout: Duration,
) -> Result<(), ServeError> {
    let weights: &ClassWeights = &line.queue.weights;
    let mut queue =
        Queue::open(line.broker.clone(), line.model.clone(), weights, line.trouble.clone()).await?;
    line.cancels.listen(&line.broker, &line.model).await?;
    let jobs = TaskTracker::new();
    while !drain.is_cancelled() {
        queue.ask(line.free_slots()).await?;
        line.metrics.pulls.inc_by(std::mem::take(&mut queue.pulls));
        line.metrics.pull_errors.inc_by(std::mem::take(&mut queue.pull_errors));
        tokio::select! {
            biased;
            () = line.broken.cancelled() => return Err(ServeError::EngineStopped),
            () = drain.cancelled() => break,
            delivery = queue.next() => {
                if let Some(delivery) = delivery {
                    hold(line, &jobs, delivery);
                }
            }
            () = line.freed.notified() => {}
        }
    }
    finish_held(line, queue, jobs, drain_timeout).await
}

/// A delivery is held from here until its task ends.
fn hold<R: Run>(line: &Arc<ServingLine<R>>, jobs: &TaskTracker, delivery: Delivery) {
    reach("after_pull");
    line.metrics.deliveries.with_label_values(&[delivery.class.as_str()]).inc();
    if delivery.delivered > 1 {
        line.metrics.redeliveries.inc();
    }
    let Some(hold) = line.holds.take(&delivery) else {
        tracing::info!(
            sequence = delivery.stream_sequence,
            delivered = delivery.delivered,
            "held already; joined"
        );
        return;
    };
    line.metrics.held.inc();
    let line = line.clone();
    jobs.spawn(async move {
        serve_one(&line, &delivery).await;
        drop(hold);
        line.metrics.held.dec();
        line.freed.notify_one();
    });
}

/// The drain: what arrives on requests still in flight is handed back, what runs may finish in time.
async fn finish_held<R: Run>(
    line: &Arc<ServingLine<R>>,
    mut queue: Queue,
    jobs: TaskTracker,
    drain_timeout: Duration,
) -> Result<(), ServeError> {
    tracing::info!(held = line.metrics.held.get(), timeout_s = drain_timeout.as_secs_f64(), "draining");
    jobs.close();
    let timeout = tokio::time::sleep(drain_timeout);
    tokio::pin!(timeout);
    loop {
        tokio::select! {
            () = jobs.wait() => break,
            () = &mut timeout => break,
            () = line.broken.cancelled() => return Err(ServeError::EngineStopped),
            delivery = queue.next() => {
                // One that is held here is not given away: it runs, or is handed back by who holds it.
                if let Some(delivery) = delivery.filter(|delivery| !line.holds.has(delivery)) {
                    attempt::hand_back_unrun(line, &delivery).await;
                }
            }
        }
    }
    line.drain_over.cancel();
    if tokio::time::timeout(HAND_BACK_TIMEOUT, jobs.wait()).await.is_err() {
        tracing::warn!(
            held = line.metrics.held.get(),
            "not all jobs could be handed back; they will time out"
        );
    }
    let _ = tokio::time::timeout(HAND_BACK_TIMEOUT, line.broker.client().flush()).await;
    Ok(())
}

/// Takes one delivery to its end, whatever happens.
async fn serve_one<R: Run>(line: &ServingLine<R>, delivery: &Delivery) {
    let Some(place) = place_of(line, delivery).await else { return };
    let read = JobHeaders::parse(delivery.header_pairs(), place);
    // A job whose headers cannot be read still has an id, and gets its refusal under it.
    let (headers, malformed) = match read {
        Ok(headers) => (headers, None),
        Err(error) => (bare_headers(delivery, place), Some(Fault::Invalid { message: error.to_string() })),
    };
    let mut job = Held {
        line,
        delivery,
        cancel: line.cancels.hold(&headers.id),
        body_digest: body_digest(&delivery.body, headers.input.as_deref()),
        headers,
        marked: false,
        pulse: Pulse::default(),
        attempt: 1,
        start: None,
    };
    let pulse = job.pulse.clone();
    let (id, cancel) = (job.headers.id.clone(), line.cancels.hold(&job.headers.id));
    let ended = tokio::select! {
        ended = job.eight_steps(malformed) => ended,
        () = keep_alive(line, delivery, (&id, &cancel), &pulse) => unreachable!("it beats until dropped"),
    };
    match ended {
        Ok(ended) => {
            line.finished.fetch_add(1, Ordering::Relaxed);
            let trace = job.headers.trace_id();
            tracing::info!(job = %id, trace, attempt = job.attempt, delivered = delivery.delivered, ?ended, "done");
        }
        Err(fault) => job.hand_back(&fault).await,
    }
}

/// One held job: what the steps hand to each other.
struct Held<'a, R> {
    line: &'a ServingLine<R>,
    delivery: &'a Delivery,
    headers: JobHeaders,
    body_digest: String,
    cancel: millrace_queue::cancel::Cancel,
    /// There is a cancel marker or a ledger.
    marked: bool,
    pulse: Pulse,
    attempt: u32,
    start: Option<attempt::Start>,
}

impl<R: Run> Held<'_, R> {
    async fn eight_steps(&mut self, malformed: Option<Fault>) -> Result<Ended, Fault> {
        let _turn = match self.unless_over(self.line.holds.turn(&self.headers.id)).await {
            Err(Fault::Draining) => return Err(Fault::Draining),
            // Cancelled or late while it waited: its outcome says so below.
            turn => turn.ok(),
        };
        let known = self.line.results.look_up(&self.headers.id).await?;
        reach("after_lookup");
        self.marked = known.cancelled || known.ledger.is_some();
        match &known.outcome {
            Some(stored) if stored.of.is_of_body(&self.body_digest) => {
                self.line.metrics.already_done.inc();
                return self.finish(stored, Ended::AlreadyDone(stored.kind)).await;
            }
            Some(_) => return self.refuse_reused().await,
            None => {}
        }
        let times = (Instant::now(), OffsetDateTime::now_utc());
        let outcome = match self.settle(malformed, &known).await {
            Ok(outcome) => outcome,
            Err(fault) => self.outcome_of(fault)?,
        };
        match self.conclude(outcome, times).await? {
            Some(ended) => Ok(ended),
            None => self.refuse_reused().await,
        }
    }

    /// The job's id has the outcome of another body. This one ends under an id of its own: with an outcome, which its
    /// publisher hears where it asked for a copy, and a dead letter, which can be published again.
    async fn refuse_reused(&mut self) -> Result<Ended, Fault> {
        let published_ms = self.delivery.published.unix_timestamp_nanos() / 1_000_000;
        let published_ms = i64::try_from(published_ms).unwrap_or_default();
        let own = self.headers.id.reused(published_ms, self.delivery.stream_sequence);
        let used = std::mem::replace(&mut self.headers.id, own);
        // What is written under the id that was used before speaks of the other job.
        (self.marked, self.start) = (false, None);
        let known = self.line.results.look_up(&self.headers.id).await?;
        if let Some(stored) = &known.outcome {
            return self.finish(stored, Ended::AlreadyDone(stored.kind)).await;
        }
        let message = format!(
            "job id {used} was used before with another body, and keeps that outcome; this job is {}",
            self.headers.id
        );
        tracing::warn!(job = %used, refused_as = %self.headers.id, "a job id was used again with another body");
        let outcome = Outcome::failed(OutcomeKind::Dead, &self.headers.id, ErrorCode::IdReused, &message);
        let times = (Instant::now(), OffsetDateTime::now_utc());
        self.conclude(outcome, times).await?.ok_or(Fault::Contended)
    }

    /// Steps 7 and 8. `None` if the outcome that is stored is that of another body.
    async fn conclude(
        &mut self,
        outcome: Outcome,
        (began, began_utc): (Instant, OffsetDateTime),
    ) -> Result<Option<Ended>, Fault> {
        let queue_wait = (began_utc - self.delivery.published).max(time::Duration::ZERO);
        let envelope = OutcomeEnvelope {
            headers: &self.headers,
            body_digest: &self.body_digest,
            attempt: self.attempt,
            queue_wait_ms: queue_wait.as_seconds_f64() * 1000.0,
            run_ms: began.elapsed().as_secs_f64() * 1000.0,
        };
        self.pulse.set(HeldBy::Settling);
        let answered = Instant::now();
        reach("before_publish");
        let (created, outcome) = self.store(outcome, envelope).await?;
        reach("after_publish");
        let stored = match created {
            Created::Stored(_) => {
                self.line.metrics.stored(outcome.kind);
                self.line.metrics.queue_wait.observe(queue_wait.as_seconds_f64());
                self.line.results.copy(&outcome, envelope).await;
                let reason = outcome.error.as_ref().map(reason).unwrap_or_default();
                let of = AnswerOf { body: Some(self.body_digest.clone()), model: None };
                StoredOutcome { kind: outcome.kind, attempt: self.attempt, reason, of }
            }
            // Somebody else's outcome counts, and it may be of another kind.
            Created::Lost => {
                self.line.metrics.create_races_lost.inc();
                let known = self.line.results.look_up(&self.headers.id).await?;
                self.marked |= known.cancelled || known.ledger.is_some();
                known.outcome.ok_or(Fault::Contended)?
            }
        };
        if !stored.of.is_of_body(&self.body_digest) {
            return Ok(None);
        }
        let ended = self.finish(&stored, Ended::Finished(stored.kind)).await?;
        self.line.metrics.settle.observe(answered.elapsed().as_secs_f64());
        let total = OffsetDateTime::now_utc() - self.delivery.published;
        self.line.metrics.end_to_end.observe(total.as_seconds_f64());
        Ok(Some(ended))
    }

    /// Creates the outcome, for as long as the broker takes no writes and one attempt may last: what was computed is
    /// not thrown away. An outcome that the broker refuses for its size is replaced by one that says so.
    async fn store(
        &self,
        mut outcome: Outcome,
        envelope: OutcomeEnvelope<'_>,
    ) -> Result<(Created, Outcome), Fault> {
        let over_at = Instant::now() + self.line.queue.attempt_timeout.0;
        loop {
            let tried = tokio::select! {
                tried = self.line.results.create(&outcome, envelope) => tried,
                () = self.line.drain_over.cancelled() => return Err(Fault::Draining),
            };
            match tried {
                Ok(created) => return Ok((created, outcome)),
                Err(error @ BrokerError::TooLarge { .. }) if outcome.kind == OutcomeKind::Completed => {
                    let (job, message) = (&self.headers.id, format!("the outcome: {error}"));
                    outcome =
                        Outcome::failed(OutcomeKind::Rejected, job, ErrorCode::InvalidRequest, &message);
                }
                Err(error @ BrokerError::Request { .. }) if Instant::now() < over_at => {
                    tracing::warn!(job = %self.headers.id, %error, "the outcome is kept until the broker takes it");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Steps 3 to 6: the job's outcome, or why it has none yet.
    async fn settle(&mut self, malformed: Option<Fault>, known: &Known) -> Result<Outcome, Fault> {
        if let Some(fault) = malformed {
            return Err(fault);
        }
        if known.cancelled {
            return Err(Fault::Cancelled);
        }
        self.check_deadline()?;
        self.line.claims.check_output(&self.headers)?;
        let limit = self.line.queue.max_deliver;
        let starts = self.starts_before(known).await?;
        if starts >= limit || self.delivery.delivered > limit.saturating_mul(DELIVERIES_PER_ATTEMPT_MAX) {
            self.attempt = starts.max(1);
            let worker = known.ledger.as_ref().map_or("unknown", |(record, _)| record.worker.as_str());
            let unended = known.ledger.as_ref().map_or(starts, |(record, _)| record.unended());
            let message = format!(
                "{starts} attempts of {limit} were begun in {} deliveries, {unended} of them without an end; the \
                 last one on worker {worker}",
                self.delivery.delivered
            );
            let job = &self.headers.id;
            return Ok(Outcome::failed(OutcomeKind::Dead, job, ErrorCode::WorkerLost, &message));
        }
        self.attempt = starts + 1;
        self.pulse.set(HeldBy::Engine);
        // Only a job during which a process died can be a killer. With one attempt in all there is nothing to
        // tell it from its neighbours by.
        let suspect = starts > self.start.map_or(0, |start| start.ended);
        if suspect && self.attempt == limit && limit > 1 {
            let _alone = self.unless_over(self.line.alone.write()).await?;
            self.attempt_once(known).await
        } else {
            let _company = self.unless_over(self.line.alone.read()).await?;
            self.attempt_once(known).await
        }
    }

    /// What a fault of this attempt amounts to: an outcome, or the fault itself.
    fn outcome_of(&mut self, fault: Fault) -> Result<Outcome, Fault> {
        let job = &self.headers.id;
        match fault.disposition() {
            Disposition::Reject(code) => {
                self.line.metrics.fault(&fault);
                self.marked |= code == ErrorCode::Cancelled;
                Ok(Outcome::failed(OutcomeKind::Rejected, job, code, &fault.to_string()))
            }
            Disposition::Retry { counts: true, .. } if self.attempt >= self.line.queue.max_deliver => {
                self.line.metrics.fault(&fault);
                let message = format!("attempt {} was the last one: {fault}", self.attempt);
                Ok(Outcome::failed(OutcomeKind::Dead, job, ErrorCode::InferenceError, &message))
            }
            Disposition::Retry { .. } | Disposition::Exit => Err(fault),
        }
    }

    /// The outcome is stored: what is left is the copy of a dead job, the marks that shall not outlive the outcome,
    /// and the ack.
    async fn finish(&self, stored: &StoredOutcome, ended: Ended) -> Result<Ended, Fault> {
        self.pulse.set(HeldBy::Settling);
        if stored.kind == OutcomeKind::Dead {
            self.line.results.bury(self.delivery, &self.headers.id, stored).await?;
            reach("after_dead_copy");
        }
        if self.marked || self.start.is_some_and(|start| start.is_written()) {
            self.line.results.release(&self.headers.id).await;
        }
        reach("before_ack");
        if let Err(error) = self.delivery.finish().await {
            self.line.metrics.ack_failures.inc();
            tracing::warn!(job = %self.headers.id, %error, "the ack was not confirmed");
            return Ok(Ended::Unconfirmed(stored.kind));
        }
        reach("after_ack");
        Ok(ended)
    }

    async fn hand_back(&self, fault: &Fault) {
        let line = self.line;
        line.metrics.fault(fault);
        let (after, counts) = match fault.disposition() {
            Disposition::Retry { after, counts } => (after, counts),
            // What cannot be refused by an outcome comes again: no message is a reason to end the process.
            Disposition::Reject(_) => (None, false),
            Disposition::Exit => {
                tracing::error!(job = %self.headers.id, category = fault.category(), %fault, "ending the process");
                line.broken.cancel();
                return;
            }
        };
        if counts {
            self.end_start().await;
        } else {
            self.take_back_start().await;
        }
        // What does not count as an attempt is paced by the deliveries, or an outage would use them all up.
        let step = if counts { self.attempt } else { self.delivery.delivered };
        let pause = after.unwrap_or_else(|| backoff(&line.queue, step));
        let handed = self.delivery.retry(pause).await;
        tracing::warn!(
            job = %self.headers.id, trace = self.headers.trace_id(), attempt = self.attempt,
            category = fault.category(), %fault, pause_ms = pause.as_millis() as u64,
            confirmed = handed.is_ok(), "handed back"
        );
    }
}

/// Pause before the attempt after this one.
fn backoff(queue: &QueueConfig, attempt: u32) -> Duration {
    let last = queue.backoff.len().saturating_sub(1);
    let index = (attempt.max(1) as usize - 1).min(last);
    queue.backoff.get(index).map_or(Duration::from_secs(1), |span| span.0)
}

/// Claim checks as a configuration without an object store allows them.
pub fn claims_without_store(results: &ResultsConfig) -> Claims {
    Claims::without_store(results.inline_bytes_max.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoffs_last_step_repeats() {
        let queue = QueueConfig::default();
        let seconds: Vec<u64> = (1..6).map(|attempt| backoff(&queue, attempt).as_secs()).collect();
        assert_eq!(seconds, [1, 5, 30, 30, 30]);
        let none = QueueConfig { backoff: Vec::new(), ..queue };
        assert_eq!(backoff(&none, 1).as_secs(), 1);
    }
}
