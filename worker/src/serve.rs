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
//! What follows what is decided in [`state`], which is pure and has the table; here it is carried out. A crash anywhere
//! leads to a redelivery that finds what was stored and does only the rest. A keep-alive is only sent if the engine
//! stepped since the last one, and an answer that was computed is kept while broker or object store are away.

mod attempt;
mod cohorts;
mod holds;
mod line;
mod naming;
mod pulse;
mod state;

pub use line::{LineParts, ServingLine};

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millrace_crds::config::{ClassWeights, QueueConfig, ResultsConfig};
use millrace_crds::job::JobHeaders;
use millrace_queue::broker::{BrokerError, Created};
use millrace_queue::claim::Claims;
use millrace_queue::delivery::{Delivery, Queue};
use millrace_queue::fault::{Disposition, Fault};
use millrace_queue::identity::body_digest;
use millrace_queue::results::{Outcome, OutcomeEnvelope};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::broken::LAST_WORDS;
use crate::failpoint::reach;
use crate::run::Run;
use cohorts::Place;
use naming::{bare_headers, place_of};
use pulse::{HeldBy, Pulse, keep_alive};
use state::{Action, JobEnd, JobEvent, JobFacts, JobState, JobVerdict};

/// Bytes that the headers of an outcome may take beside its body: names, ids, digests and numbers, all bounded.
const OUTCOME_HEADER_BYTES_MAX: usize = 8 << 10;
/// Pause before a store that is away is asked again, and the end of its doubling.
const STORE_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// After the drain's end, how long handing back may take.
const HAND_BACK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long giving a job back may take a process that must end, and after what it may come again.
const LAST_HAND_BACK: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));

/// Why serving ended other than by a drain.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The engine or the device is broken: the process must end.
    #[error("{0}")]
    Broken(String),
    /// The connection is closed for good.
    #[error(transparent)]
    Broker(#[from] BrokerError),
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
    line.broken.await_words();
    let jobs = TaskTracker::new();
    while !drain.is_cancelled() {
        queue.ask(line.free_slots()).await?;
        line.metrics.pulls.inc_by(std::mem::take(&mut queue.pulls));
        line.metrics.pull_errors.inc_by(std::mem::take(&mut queue.pull_errors));
        tokio::select! {
            biased;
            () = line.broken.declared() => return Err(last_words(line, &jobs).await),
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
            biased;
            () = line.broken.declared() => return Err(last_words(line, &jobs).await),
            () = &mut timeout => break,
            delivery = queue.next() => {
                // One that is held here is not given away: it runs, or is handed back by who holds it.
                if let Some(delivery) = delivery.filter(|delivery| !line.holds.has(delivery)) {
                    let line = line.clone();
                    jobs.spawn(async move { attempt::hand_back_unrun(&line, &delivery).await });
                }
            }
            () = jobs.wait() => break,
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

/// The process must end: what runs in it is written into the ledgers first.
async fn last_words<R: Run>(line: &ServingLine<R>, jobs: &TaskTracker) -> ServeError {
    jobs.close();
    let _ = tokio::time::timeout(LAST_WORDS, jobs.wait()).await;
    line.broken.all_written();
    ServeError::Broken(line.broken.cause())
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
    let id = headers.id.clone();
    let facts = JobFacts {
        id: id.clone(),
        worker: line.results.worker().clone(),
        delivered: delivery.delivered,
        max_deliver: line.queue.max_deliver,
        body_digest: body_digest(&delivery.body, headers.input.as_deref()),
    };
    let (state, action) = JobState::begin();
    let cancel = Arc::new(line.cancels.hold(&id));
    let pulse = Pulse::default();
    let mut job = Held {
        line,
        delivery,
        cancel: cancel.clone(),
        malformed,
        headers,
        facts,
        state,
        pulse: pulse.clone(),
        turn: None,
        began: (Instant::now(), OffsetDateTime::now_utc()),
    };
    let action = tokio::select! {
        action = job.until_given_back(action) => action,
        () = keep_alive(line, delivery, (&id, &*cancel), &pulse) => unreachable!("it beats until dropped"),
    };
    // No keep-alive goes out any more: one behind the hand-back would hold the job up.
    let mut next = action;
    while !matches!(next, Action::End) {
        next = job.step(next).await;
    }
    job.tell();
}

/// One held job: its state, and what carries it out.
struct Held<'a, R> {
    line: &'a ServingLine<R>,
    delivery: &'a Delivery,
    cancel: Arc<millrace_queue::cancel::Cancel>,
    malformed: Option<Fault>,
    headers: JobHeaders,
    facts: JobFacts,
    state: JobState,
    pulse: Pulse,
    turn: Option<Place<'a>>,
    /// When the attempt began, or what was decided instead of one.
    began: (Instant, OffsetDateTime),
}

impl<'a, R: Run> Held<'a, R> {
    /// Carries actions out until the delivery is to be given back, or nothing is left to do.
    async fn until_given_back(&mut self, mut action: Action) -> Action {
        // A deadline does not end this wait: what has its turn is of the same id, and may have its answer soon.
        let _turn = tokio::select! {
            turn = self.line.holds.turn(&self.headers.id) => Some(turn),
            () = self.cancel.cancelled() => None,
            () = self.line.drain_over.cancelled() => None,
        };
        while !matches!(action, Action::HandBack(_) | Action::End) {
            action = self.step(action).await;
        }
        action
    }

    /// Carries one action out. Returns what its event asks for.
    async fn step(&mut self, action: Action) -> Action {
        let metrics = self.line.metrics.clone();
        let event = self.perform(action).await.unwrap_or_else(JobEvent::Failed);
        let fault = match &event {
            JobEvent::Failed(fault) | JobEvent::Known(_, Some(fault)) => Some(fault.clone()),
            _ => None,
        };
        let known = matches!(event, JobEvent::Known(..));
        let (state, next) = self.state.clone().next(&self.facts, event);
        self.state = state;
        if known && self.state.is_repetition() {
            metrics.already_done.inc();
        }
        if let (Some(fault), Action::Store(JobVerdict::Failed(..))) = (&fault, &next) {
            metrics.fault(fault);
        }
        next
    }

    async fn perform(&mut self, action: Action) -> Result<JobEvent, Fault> {
        self.pulse.set(match action {
            Action::Turn(_) | Action::Run | Action::Start { .. } => HeldBy::Engine,
            _ => HeldBy::Settling,
        });
        // Others need not wait for what is left once the attempt is over.
        if matches!(action, Action::Store(_) | Action::Record { .. } | Action::HandBack(_)) {
            self.give_up_turn();
        }
        let (results, id) = (&self.line.results, &self.headers.id);
        match action {
            Action::LookUp => self.look_up().await,
            Action::Rename => {
                self.rename();
                self.look_up().await
            }
            Action::Record { record, after } => {
                Ok(JobEvent::Recorded(results.record(id, &record, after).await?))
            }
            Action::Start { record, after } => {
                reach("before_start_record");
                let recorded = results.record(id, &record, after).await?;
                reach("after_start_record");
                Ok(JobEvent::Recorded(recorded))
            }
            Action::Turn(suspicion) => {
                let line: &'a ServingLine<R> = self.line;
                let turn = self.unless_over(line.cohorts.enter(suspicion)).await?;
                if line.broken.is_declared() {
                    return Err(Fault::Draining);
                }
                let company = turn.company;
                self.turn = Some(turn);
                Ok(JobEvent::Turn(company))
            }
            Action::Run => {
                let answer = self.run_attempt().await;
                self.give_up_turn();
                Ok(JobEvent::Answered(answer?))
            }
            Action::Store(verdict) => self.store(verdict).await,
            Action::Bury(stored) => {
                results.bury(self.delivery, id, &stored).await?;
                reach("after_dead_copy");
                Ok(JobEvent::Done)
            }
            Action::Release => {
                results.release(id).await;
                Ok(JobEvent::Done)
            }
            Action::Ack => self.acknowledge().await,
            Action::HandBack(fault) => self.hand_back(&fault).await,
            Action::End => Ok(JobEvent::Done),
        }
    }

    /// Lets others have their turns; not in a process that dies, for they would be taken for its killers.
    fn give_up_turn(&mut self) {
        if !self.line.broken.is_declared() {
            self.turn = None;
        }
    }

    async fn look_up(&mut self) -> Result<JobEvent, Fault> {
        let known = self.line.results.look_up(&self.headers.id).await?;
        reach("after_lookup");
        self.began = (Instant::now(), OffsetDateTime::now_utc());
        let refused = match &self.malformed {
            Some(fault) => Err(fault.clone()),
            None if known.cancelled => Err(Fault::Cancelled),
            None => self.check_deadline().and_then(|()| self.line.claims.check_output(&self.headers)),
        };
        Ok(JobEvent::Known(known, refused.err()))
    }

    /// The job's id has the outcome of another body. This one ends under an id of its own: with an outcome, which its
    /// publisher hears where it asked for a copy, and a dead letter, which can be published again.
    fn rename(&mut self) {
        let published_ms = self.delivery.published.unix_timestamp_nanos() / 1_000_000;
        let published_ms = i64::try_from(published_ms).unwrap_or_default();
        self.headers.id = self.facts.id.reused(published_ms, self.delivery.stream_sequence);
        let (used, own) = (&self.facts.id, &self.headers.id);
        tracing::warn!(job = %used, refused_as = %own, "a job id was used again with another body");
    }

    /// Creates the outcome, for as long as the broker takes no writes and one attempt may last: what was computed is
    /// not thrown away.
    async fn store(&self, verdict: JobVerdict) -> Result<JobEvent, Fault> {
        let outcome = match verdict {
            JobVerdict::Answer(outcome) => outcome,
            JobVerdict::Failed(kind, code, message) => {
                Outcome::failed(kind, &self.headers.id, code, &message)
            }
        };
        let queue_wait = (self.began.1 - self.delivery.published).max(time::Duration::ZERO);
        let envelope = OutcomeEnvelope {
            headers: &self.headers,
            body_digest: &self.facts.body_digest,
            attempt: self.state.attempt,
            queue_wait_ms: queue_wait.as_seconds_f64() * 1000.0,
            run_ms: self.began.0.elapsed().as_secs_f64() * 1000.0,
        };
        let (line, answered) = (self.line, Instant::now());
        let over_at = answered + line.queue.attempt_timeout.0;
        reach("before_publish");
        let created = loop {
            let tried = tokio::select! {
                tried = line.results.create(&outcome, envelope) => tried,
                () = line.drain_over.cancelled() => return Err(Fault::Draining),
            };
            match tried {
                Err(error @ BrokerError::Request { .. }) if Instant::now() < over_at => {
                    tracing::warn!(job = %self.headers.id, %error, "the outcome is kept until the broker takes it");
                }
                created => break created?,
            }
        };
        reach("after_publish");
        match created {
            Created::Stored(_) => {
                line.metrics.stored(outcome.kind);
                line.metrics.queue_wait.observe(queue_wait.as_seconds_f64());
                line.results.copy(&outcome, envelope).await;
            }
            Created::Lost => line.metrics.create_races_lost.inc(),
        }
        line.metrics.settle.observe(answered.elapsed().as_secs_f64());
        let total = OffsetDateTime::now_utc() - self.delivery.published;
        line.metrics.end_to_end.observe(total.as_seconds_f64());
        Ok(JobEvent::Created(created))
    }

    async fn acknowledge(&self) -> Result<JobEvent, Fault> {
        reach("before_ack");
        if let Err(error) = self.delivery.finish().await {
            self.line.metrics.ack_failures.inc();
            tracing::warn!(job = %self.headers.id, %error, "the ack was not confirmed");
            return Err(error.into());
        }
        reach("after_ack");
        Ok(JobEvent::Done)
    }

    async fn hand_back(&self, fault: &Fault) -> Result<JobEvent, Fault> {
        let line = self.line;
        line.metrics.fault(fault);
        let after = match fault.disposition() {
            Disposition::Retry { after, .. } => after,
            // What cannot be refused by an outcome comes again: no message is a reason to end the process.
            Disposition::Reject(_) => None,
            Disposition::Exit => {
                tracing::error!(job = %self.headers.id, category = fault.category(), %fault, "ending the process");
                // Its death is in the ledger: it need not wait until its lease runs out.
                let (patience, pause) = LAST_HAND_BACK;
                let _ = tokio::time::timeout(patience, self.delivery.retry(pause)).await;
                line.broken.declare(fault.to_string());
                return Ok(JobEvent::Done);
            }
        };
        // What does not count as an attempt is paced by the deliveries, or an outage would use them all up.
        let step = if state::counts(fault) { self.state.attempt } else { self.delivery.delivered };
        let pause = after.unwrap_or_else(|| backoff(&line.queue, step));
        let handed = self.delivery.retry(pause).await;
        tracing::warn!(
            job = %self.headers.id, trace = self.headers.trace_id(), attempt = self.state.attempt,
            category = fault.category(), %fault, pause_ms = pause.as_millis() as u64,
            confirmed = handed.is_ok(), "handed back"
        );
        Ok(JobEvent::Done)
    }

    /// Says how it ended, unless that was said when it was given back.
    fn tell(&self) {
        let Some(ended) = self.state.end().filter(|end| !matches!(end, JobEnd::HandedBack(_))) else {
            return;
        };
        self.line.finished.fetch_add(1, Ordering::Relaxed);
        let (trace, attempt) = (self.headers.trace_id(), self.state.attempt);
        let (job, delivered) = (&self.headers.id, self.delivery.delivered);
        tracing::info!(%job, trace, attempt, delivered, ?ended, "done");
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
