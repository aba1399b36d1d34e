//! Nothing lost: workers are killed at random while jobs run, and the broker too; every job ends with exactly
//! one outcome, and it is the very one of an undisturbed run.
//!
//! A worker that ends at any named place of a job's way leaves nothing that the next one does not finish.
//!
//! The short form runs in each test run; `MILLRACE_SOAK=1` runs the long one. A run in which no job was
//! delivered twice has shown nothing and fails.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use millrace_crds::names::JobId;
use millrace_tests::chaos::{self, SETTLE_LIMIT, SHORT, SOAK};
use millrace_tests::jobs::{NewJob, OutcomeLog};
use millrace_tests::random::Random;
use millrace_tests::worker::Worker;
use millrace_tests::{nats, tools};
use millrace_worker::failpoint;
use serde_json::Value;

/// A job comes again after the ack wait, and the place is then passed at once.
const CRASH_LIMIT: Duration = Duration::from_secs(30);

/// The outcomes of the same jobs when nothing happens to anybody.
async fn undisturbed(jobs: &[NewJob]) -> Result<BTreeMap<String, Vec<Value>>> {
    let cluster = chaos::cluster(&SHORT)?;
    let _worker = cluster.worker()?;
    let queue = cluster.queue().await?;
    queue.publish_all(jobs).await?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, jobs.len(), SETTLE_LIMIT).await?;
    record.outcomes.iter().map(|(id, outcome)| Ok((id.to_string(), outcome.timeless()?))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_and_nothing_is_done_twice() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let plan = if std::env::var_os("MILLRACE_SOAK").is_some() { SOAK } else { SHORT };
    let report = chaos::run(plan, Random::from_environment("crash", 20_261_123)).await?;
    let (redelivered, kinds) = (report.record.redelivered(), report.record.kinds());
    eprintln!("{}", report.numbers(&plan));
    let attempts = report.record.outcomes.values().map(|outcome| outcome.attempt).max().unwrap_or(0);
    eprintln!(
        "{} worker stops, {kinds:?} completed, rejected and dead, {attempts} attempts at most",
        report.worker_stops
    );
    let done = [report.worker_kills, report.broker_kills, report.worker_stops];
    let planned = [plan.worker_kills, plan.broker_kills, plan.worker_stops];
    assert_eq!(done, planned, "faults that really happened");
    assert_eq!(kinds, [plan.jobs, 0, 0]);
    assert!(redelivered > 0, "no job was delivered twice: the run has shown nothing");

    let expected = undisturbed(&chaos::jobs(plan.jobs)).await?;
    for (id, outcome) in &report.record.outcomes {
        assert_eq!(expected.get(id.as_str()), Some(&outcome.timeless()?), "{id} after a crash");
    }
    Ok(())
}

/// One worker after another ends at each place that a job passes, with the jobs of all before it in the queue;
/// one that may live then finishes them all.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_place_is_made_good() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = chaos::cluster(&SOAK)?;
    cluster.set_ack_wait(Duration::from_secs(2));
    drop(cluster.worker()?);
    let queue = cluster.queue().await?;
    let mut jobs = Vec::new();
    for place in failpoint::NAMES {
        let job = NewJob::completion(&place.replace('_', "-"), "Come what may", 20);
        if place == "after_dead_copy" {
            // All of its attempts were begun and none ended.
            let ledger = format!(r#"{{"starts":{},"worker":"w-dead"}}"#, cluster.config.queue.max_deliver);
            let subject = cluster.model().attempts_subject(&job.id);
            let jetstream = async_nats::jetstream::new(queue.client.clone());
            jetstream.publish(subject, ledger.into()).await?.await?;
        }
        queue.publish(&job).await?;
        jobs.push(job);
        let mut worker = Worker::start(&cluster.config, &[(failpoint::VARIABLE, place)])?;
        let status = worker.wait(CRASH_LIMIT).with_context(|| format!("{place} is never reached"))?;
        assert!(!status.success(), "{place}: {status}");
    }
    let worker = cluster.worker()?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, jobs.len(), SETTLE_LIMIT).await.with_context(|| worker.log_tail())?;
    queue.wait_empty(SETTLE_LIMIT).await?;
    record.check(&queue, &jobs).await?;
    assert_eq!(record.kinds(), [jobs.len() - 1, 0, 1]);
    let dead: JobId = "after-dead-copy".parse()?;
    assert_eq!(queue.dead_letter(&dead).await?.payload, jobs[0].body, "all bodies are alike");
    Ok(())
}
