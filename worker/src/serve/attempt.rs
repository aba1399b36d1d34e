//! One attempt: counted before it begins, run under its limits, and taken back if it was not one.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Held, HeldBy, reach};
use crate::capacity::Taken;
use crate::run::{Answer, Run, Work};
use millrace_queue::broker::Created;
use millrace_queue::fault::Fault;
use millrace_queue::results::{Known, Outcome};

/// A begun attempt, as the ledger has it.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// Sequence of the ledger's last record; 0 if there is none.
    ledger_sequence: u64,
}

impl<R: Run> Held<'_, R> {
    /// How many attempts were begun before this delivery.
    pub(super) async fn starts_before(&mut self, known: &Known) -> Result<u32, Fault> {
        let delivered_before = self.delivery.delivered.saturating_sub(1);
        match &known.ledger {
            Some((record, sequence)) => {
                self.start = Some(Start { ledger_sequence: *sequence });
                Ok(record.starts)
            }
            None if delivered_before == 0 => {
                self.start = Some(Start { ledger_sequence: 0 });
                Ok(0)
            }
            // Its first delivery is taken to have been begun. From here on the ledger counts, so that
            // deliveries that are only held beside a killer do not.
            None => {
                let opened = self.line.results.record(&self.headers.id, 1, 0).await?;
                let Created::Stored(sequence) = opened else { return Err(Fault::Contended) };
                self.start = Some(Start { ledger_sequence: sequence });
                Ok(1)
            }
        }
    }

    /// Writes the ledger unless this is the first attempt, which the delivery count shows well enough.
    async fn begin(&mut self, known: &Known) -> Result<(), Fault> {
        let sequence = self.start.map_or(0, |start| start.ledger_sequence);
        if self.attempt == 1 && known.ledger.is_none() {
            return Ok(());
        }
        reach("before_start_record");
        let written = self.line.results.record(&self.headers.id, self.attempt, sequence).await?;
        let Created::Stored(sequence) = written else {
            self.start = None;
            return Err(Fault::Contended);
        };
        self.start = Some(Start { ledger_sequence: sequence });
        reach("after_start_record");
        Ok(())
    }

    /// The attempt was handed back without fault of the job: it does not count.
    pub(super) async fn take_back_start(&self) {
        let Some(start) = self.start else { return };
        let written =
            self.line.results.record(&self.headers.id, self.attempt - 1, start.ledger_sequence).await;
        if let Err(error) = written {
            tracing::debug!(job = %self.headers.id, %error, "the attempt could not be taken back");
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
        let body = self.unless_over(self.line.claims.redeem(&self.headers, &self.delivery.body)).await??;
        let work = Work { headers: self.headers.clone(), published: self.delivery.published, body };
        self.pulse.set(HeldBy::Engine);
        reach("before_run");
        let limit = self.line.queue.attempt_timeout.0;
        let began = std::time::Instant::now();
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
        let body = self.line.claims.deposit(&self.headers, answer.body).await?;
        Ok(Outcome::completed(body, answer.ignored_fields))
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

fn late(deadline: OffsetDateTime) -> Fault {
    Fault::Late { deadline: deadline.format(&Rfc3339).unwrap_or_else(|_| deadline.to_string()) }
}
