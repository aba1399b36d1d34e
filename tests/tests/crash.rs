//! Nothing lost: workers are killed at random while jobs run, and the broker too; every job ends with exactly
//! one outcome, and it is the very one of an undisturbed run.
//!
//! The short form runs in each test run; `MILLRACE_SOAK=1` runs the long one. A run in which no job was
//! delivered twice has shown nothing and fails.

use std::collections::BTreeMap;

use anyhow::Result;
use millrace_tests::chaos::{self, SETTLE_LIMIT, SHORT, SOAK};
use millrace_tests::jobs::{Job, Record};
use millrace_tests::random::Random;
use millrace_tests::{nats, tools};
use serde_json::Value;

/// The outcomes of the same jobs when nothing happens to anybody.
async fn undisturbed(jobs: &[Job]) -> Result<BTreeMap<String, Vec<Value>>> {
    let cluster = chaos::cluster()?;
    let _worker = cluster.worker()?;
    let queue = cluster.queue().await?;
    queue.publish_all(jobs).await?;
    let mut record = Record::default();
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
    eprintln!(
        "{} jobs, {} worker kills, {} broker kills, {} worker stops: {redelivered} redelivered, \
         {kinds:?} completed, rejected and dead, {:.1} s",
        plan.jobs,
        report.worker_kills,
        report.broker_kills,
        report.worker_stops,
        report.elapsed.as_secs_f64(),
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
