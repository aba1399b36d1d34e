//! One attempt: counted before it begins, run under its limits, and taken back if it was not one.

use std::time::{Duration, Instant};

use millrace_crds::job::JobHeaders;
use millrace_queue::broker::Created;
use millrace_queue::delivery::Delivery;
use millrace_queue::fault::Fault;
use millrace_queue::results::{Known, Outcome};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{
    HAND_BACK_TIMEOUT, Held, HeldBy, OUTCOME_HEADER_BYTES_MAX, STORE_PAUSE, ServingLine, place_of, reach,
};
use crate::capacity::Taken;
use crate::run::{Answer, Run, Work};

/// A begun attempt, as the ledger has it.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// Sequence of the ledger's last record; 0 if there is none.
    ledger_sequence: u64,
    /// Attempts before this one of which the end is known.
    pub(super) ended: u32,
}

impl Start {
    /// Whether there is a ledger.
    pub(super) fn is_written(self) -> bool {
        self.ledger_sequence > 0
    }
}

/// The pauses between the tries of one transfer, and their end.
struct StoreWaits {
    over_at: Instant,
    pause: Duration,
}

impl<R: Run> Held<'_, R> {
    /// How many attempts were begun before this delivery.
    pub(super) async fn starts_before(&mut self, known: &Known) -> Result<u32, Fault> {
        let delivered_before = self.delivery.delivered.saturating_sub(1);
        match &known.ledger {
            Some((record, sequence)) => {
                self.start = Some(Start { ledger_sequence: *sequence, ended: record.ended });
                Ok(record.starts)
            }
            None if delivered_before == 0 => {
                self.start = Some(Start { ledger_sequence: 0, ended: 0 });
                Ok(0)
            }
            // Its first delivery is taken to have been begun. From here on the ledger counts, so that
            // deliveries that are only held beside a killer do not.
            None => {
                let opened = self.line.results.record(&self.headers.id, (1, 0), 0).await?;
                let Created::Stored(sequence) = opened else { return Err(Fault::Contended) };
                self.start = Some(Start { ledger_sequence: sequence, ended: 0 });
                Ok(1)
            }
        }
    }

    /// Writes the ledger unless this is the first attempt, which the delivery count shows well enough.
    async fn begin(&mut self, known: &Known) -> Result<(), Fault> {
        let Start { ledger_sequence: sequence, ended } =
            self.start.unwrap_or(Start { ledger_sequence: 0, ended: 0 });
        if self.attempt == 1 && known.ledger.is_none() {
            return Ok(());
        }
        reach("before_start_record");
        let written = self.line.results.record(&self.headers.id, (self.attempt, ended), sequence).await?;
        let Created::Stored(sequence) = written else {
            self.start = None;
            return Err(Fault::Contended);
        };
        self.start = Some(Start { ledger_sequence: sequence, ended });
        reach("after_start_record");
        Ok(())
    }

    /// The attempt was handed back without fault of the job: it does not count.
    pub(super) async fn take_back_start(&self) {
        let starts = (self.attempt - 1, self.start.map_or(0, |start| start.ended));
        match self.start {
            Some(start) => self.note(starts, start.ledger_sequence).await,
            // It faulted before its ledger was read: without one, its next delivery would count as a second attempt.
            None if self.delivery.delivered == 1 => self.note((0, 0), 0).await,
            None => {}
        }
    }

    /// The attempt ended with a fault that counts, and its worker lives.
    pub(super) async fn end_start(&self) {
        if let Some(start) = self.start {
            self.note((self.attempt, start.ended + 1), start.ledger_sequence).await;
        }
    }

    /// Replaces the ledger, if it is still the one that was read.
    async fn note(&self, starts: (u32, u32), sequence: u64) {
        if let Err(error) = self.line.results.record(&self.headers.id, starts, sequence).await {
            tracing::debug!(job = %self.headers.id, %error, "the ledger could not be replaced");
        }
    }

    pub(super) fn check_deadline(&self) -> Result<(), Fault> {
        match self.headers.deadline {
            Some(deadline) if deadline <= OffsetDateTime::now_utc() => Err(late(deadline)),
            _ => Ok(()),
        }
    }

    /// Waits for its turn, unless the job is over before.
    pub(super) async fn unless_over<T>(&self, turn: impl Future<Output = T>) -> Result<T, Fault> {
        let deadline = async {
            match self.headers.deadline {
                Some(deadline) => {
                    let left = deadline - OffsetDateTime::now_utc();
                    tokio::time::sleep(left.try_into().unwrap_or(Duration::ZERO)).await;
                    late(deadline)
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            turn = turn => Ok(turn),
            () = self.cancel.cancelled() => Err(Fault::Cancelled),
            fault = deadline => Err(fault),
            () = self.line.drain_over.cancelled() => Err(Fault::Draining),
        }
    }

    /// Begins the attempt, gets the body, runs it and puts a large answer away.
    pub(super) async fn attempt_once(&mut self, known: &Known) -> Result<Outcome, Fault> {
        self.begin(known).await?;
        self.pulse.set(HeldBy::Settling);
        let mut waits = self.store_waits();
        let body = loop {
            match self.unless_over(self.line.claims.redeem(&self.headers, &self.delivery.body)).await? {
                Err(fault) => self.rest(&mut waits, fault).await?,
                Ok(body) => break body,
            }
        };
        let Delivery { class, published, .. } = *self.delivery;
        let work = Work { class, headers: self.headers.clone(), published, body };
        self.pulse.set(HeldBy::Engine);
        reach("before_run");
        let limit = self.line.queue.attempt_timeout.0;
        let began = Instant::now();
        let running = async {
            let _busy = self.line.watch.enter();
            let deltas =
                self.headers.stream.then(|| self.line.tokens.publish(&self.headers.id, self.attempt));
            tokio::join!(self.line.run.run(work, deltas), async { reach("while_running") }).0
        };
        let answer = self
            .unless_over(tokio::time::timeout(limit, running))
            .await?
            .map_err(|_| Fault::Overrun { limit_s: limit.as_secs() })??;
        reach("after_run");
        self.observe(&answer, began.elapsed());
        self.pulse.set(HeldBy::Settling);
        reach("before_output_put");
        let room = self.line.broker.client().max_payload().saturating_sub(OUTCOME_HEADER_BYTES_MAX) as u64;
        let mut waits = self.store_waits();
        loop {
            let deposit = self.line.claims.deposit(&self.headers, answer.body.clone(), room);
            match self.unless_over(deposit).await? {
                Err(fault) => self.rest(&mut waits, fault).await?,
                Ok(body) => return Ok(Outcome::completed(body, answer.ignored_fields)),
            }
        }
    }

    /// Waits before the object store is asked again. Its outage is nobody's attempt, and an answer that was computed is
    /// kept; both for as long as an attempt may last.
    async fn rest(&self, waits: &mut StoreWaits, fault: Fault) -> Result<(), Fault> {
        if !matches!(fault, Fault::Store { .. }) || waits.over_at <= Instant::now() {
            return Err(fault);
        }
        self.line.metrics.fault(&fault);
        tracing::warn!(job = %self.headers.id, %fault, "waiting for the object store");
        self.unless_over(tokio::time::sleep(waits.pause)).await?;
        waits.pause = (waits.pause * 2).min(STORE_PAUSE.1);
        Ok(())
    }

    fn store_waits(&self) -> StoreWaits {
        StoreWaits { over_at: Instant::now() + self.line.queue.attempt_timeout.0, pause: STORE_PAUSE.0 }
    }

    fn observe(&self, answer: &Answer, run: Duration) {
        let metrics = &self.line.metrics;
        metrics.answered(answer, run);
        if let Some(deadline) = self.headers.deadline {
            metrics.deadline_margin.observe((deadline - OffsetDateTime::now_utc()).as_seconds_f64());
        }
        let taken =
            Taken { tokens: answer.prompt_tokens + answer.output_tokens, sequences: answer.sequences };
        self.line.capacity.lock().unwrap_or_else(std::sync::PoisonError::into_inner).learn(taken);
    }
}

/// Hands back what arrived in a drain. Without a ledger a second delivery would count as a second attempt.
pub(super) async fn hand_back_unrun<R: Run>(line: &ServingLine<R>, delivery: &Delivery) {
    // A broker that does not answer must not hold the drain up.
    let _ = tokio::time::timeout(HAND_BACK_TIMEOUT, async {
        let place = place_of(line, delivery).await?;
        let headers = JobHeaders::parse(delivery.header_pairs(), place).ok()?;
        (delivery.delivered == 1).then_some(line.results.record(&headers.id, (0, 0), 0))?.await.ok()
    })
    .await;
    let _ = delivery.retry(Duration::from_millis(1)).await;
}

fn late(deadline: OffsetDateTime) -> Fault {
    Fault::Late { deadline: deadline.format(&Rfc3339).unwrap_or_else(|_| deadline.to_string()) }
}
