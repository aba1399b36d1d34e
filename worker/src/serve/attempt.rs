//! One attempt: its body fetched, run under its limits, and its answer put away.

use std::time::{Duration, Instant};

use millrace_crds::attempts::AttemptRecord;
use millrace_crds::job::JobHeaders;
use millrace_queue::delivery::Delivery;
use millrace_queue::fault::Fault;
use millrace_queue::results::Outcome;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{
    HAND_BACK_TIMEOUT, Held, HeldBy, OUTCOME_HEADER_BYTES_MAX, STORE_PAUSE, ServingLine, place_of, reach,
};
use crate::capacity::Taken;
use crate::failpoint::reach_with;
use crate::run::{Answer, Run, Work};

/// The pauses between the tries of one transfer, and their end.
struct StoreWaits {
    over_at: Instant,
    pause: Duration,
}

impl<R: Run> Held<'_, R> {
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
            () = self.line.broken.declared() => Err(Fault::EngineStopped { cause: self.line.broken.cause() }),
            () = self.line.drain_over.cancelled() => Err(Fault::Draining),
        }
    }

    /// Gets the body, runs the attempt and puts a large answer away.
    pub(super) async fn run_attempt(&self) -> Result<Outcome, Fault> {
        self.pulse.set(HeldBy::Settling);
        let mut waits = self.store_waits();
        let Delivery { class, published, .. } = *self.delivery;
        let body = loop {
            let redeemed = self.line.claims.redeem(class, &self.headers, &self.delivery.body);
            match self.unless_over(redeemed).await? {
                Err(fault) => self.rest(&mut waits, fault).await?,
                Ok(body) => break body,
            }
        };
        let place = body.place;
        let work = Work { class, headers: self.headers.clone(), published, body: body.bytes };
        self.pulse.set(HeldBy::Engine);
        reach("before_run");
        let limit = self.line.queue.attempt_timeout.0;
        let began = Instant::now();
        let running = async {
            let _busy = self.line.watch.enter();
            let deltas =
                self.headers.stream.then(|| self.line.tokens.publish(&self.headers.id, self.state.attempt));
            tokio::join!(self.line.run.run(work, deltas), async {
                reach_with("while_running", &self.headers.id)
            })
            .0
        };
        let answer = self
            .unless_over(tokio::time::timeout(limit, running))
            .await?
            .map_err(|_| Fault::Overrun { limit_s: limit.as_secs() })??;
        reach("after_run");
        drop(place);
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
        let unstarted = AttemptRecord::unstarted(line.results.worker().clone());
        (delivery.delivered == 1).then_some(line.results.record(&headers.id, &unstarted, 0))?.await.ok()
    })
    .await;
    let _ = delivery.retry(Duration::from_millis(1)).await;
}

fn late(deadline: OffsetDateTime) -> Fault {
    Fault::Late { deadline: deadline.format(&Rfc3339).unwrap_or_else(|_| deadline.to_string()) }
}
