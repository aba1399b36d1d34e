//! Nothing lost: workers are killed at random while jobs run, and the broker too; every job ends with exactly
//! one outcome, and it is the very one of an undisturbed run.
//!
//! The short form runs in each test run; `MILLRACE_SOAK=1` runs the long one. A run in which no job was
//! delivered twice has shown nothing and fails.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_crds::names::Class;
use millrace_tests::cluster::Cluster;
use millrace_tests::jobs::{Job, Queue, Record};
use millrace_tests::process::Signal;
use millrace_tests::random::Random;
use millrace_tests::worker::Worker;
use millrace_tests::{nats, tools};
use serde_json::{Value, json};

/// How much of it.
struct Plan {
    jobs: usize,
    workers: usize,
    worker_kills: usize,
    broker_kills: usize,
    worker_stops: usize,
}

const SHORT: Plan = Plan { jobs: 500, workers: 1, worker_kills: 20, broker_kills: 3, worker_stops: 0 };
const SOAK: Plan = Plan { jobs: 2000, workers: 3, worker_kills: 200, broker_kills: 20, worker_stops: 20 };

/// A stop is longer than the ack wait of the test's cluster, so that the job is delivered elsewhere.
const STOP: Duration = Duration::from_secs(3);
/// From the last fault until every job has its outcome.
const SETTLE_LIMIT: Duration = Duration::from_secs(180);

/// What was done to the processes.
#[derive(Debug, Default)]
struct Faults {
    worker_kills: usize,
    broker_kills: usize,
    worker_stops: usize,
}

/// Greedy and sampled jobs of many lengths and all classes; long enough to be caught in the middle.
fn jobs(count: usize) -> Vec<Job> {
    let job = |index: usize| {
        let body = json!({
            "prompt": format!("Job {index}: {}", "grist to the mill ".repeat(1 + index % 7)),
            "max_tokens": 100 + (index * 37) % 400,
            "temperature": if index % 3 == 0 { 0.9 } else { 0.0 },
            "ignore_eos": true,
        });
        let mut job = Job::new(&format!("job-{index}"), &body);
        job.class = Class::ALL[index % 3];
        job
    };
    (0..count).map(job).collect()
}

fn cluster() -> Result<Cluster> {
    let mut cluster = Cluster::tiny()?;
    // Every job shall complete, however often its workers are killed.
    cluster.config.queue.max_deliver = 100;
    Ok(cluster)
}

struct Chaos {
    cluster: Cluster,
    workers: Vec<Worker>,
    random: Random,
    faults: Faults,
}

impl Chaos {
    /// Does one fault of the plan, and puts the process back.
    fn fault(&mut self, round: usize, plan: &Plan) -> Result<()> {
        let every = |count: usize| count > 0 && round % (plan.worker_kills / count).max(1) == 0;
        if every(plan.broker_kills) && self.faults.broker_kills < plan.broker_kills {
            self.cluster.nats.kill()?;
            std::thread::sleep(Duration::from_millis(self.random.within(0..500)));
            self.cluster.nats.restart()?;
            self.faults.broker_kills += 1;
        }
        let victim = self.random.within(0..self.workers.len() as u64) as usize;
        if every(plan.worker_stops) && self.faults.worker_stops < plan.worker_stops {
            self.workers[victim].signal(Signal::Stop)?;
            std::thread::sleep(STOP);
            self.workers[victim].signal(Signal::Continue)?;
            self.faults.worker_stops += 1;
        }
        let victim = self.random.within(0..self.workers.len() as u64) as usize;
        let ended = self.workers[victim].ended()?;
        ensure!(ended.is_none(), "a worker ended by itself: {ended:?}\n{}", self.workers[victim].log_tail());
        self.workers[victim].kill()?;
        self.faults.worker_kills += 1;
        self.workers[victim] = self.cluster.worker()?;
        Ok(())
    }

    /// Publishes the jobs in as many parts as there are kills, and kills after each part.
    async fn run(&mut self, queue: &Queue, jobs: &[Job], plan: &Plan) -> Result<()> {
        let part = jobs.len().div_ceil(plan.worker_kills);
        for round in 0..plan.worker_kills {
            let start = (round * part).min(jobs.len());
            queue.publish_all(&jobs[start..(start + part).min(jobs.len())]).await?;
            tokio::time::sleep(Duration::from_millis(self.random.within(0..400))).await;
            self.fault(round, plan)?;
        }
        Ok(())
    }
}

/// The outcomes of the same jobs when nothing happens to anybody.
async fn undisturbed(jobs: &[Job]) -> Result<BTreeMap<String, Vec<Value>>> {
    let cluster = cluster()?;
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
    let random = Random::from_environment("crash", 20_261_123);
    let started = Instant::now();
    let jobs = jobs(plan.jobs);
    let cluster = cluster()?;
    let workers = (0..plan.workers).map(|_| cluster.worker()).collect::<Result<Vec<_>>>()?;
    let queue = cluster.queue().await?;
    let mut chaos = Chaos { cluster, workers, random, faults: Faults::default() };
    chaos.run(&queue, &jobs, &plan).await?;
    let mut record = Record::default();
    record.wait(&queue, jobs.len(), SETTLE_LIMIT).await.with_context(|| chaos.workers[0].log_tail())?;
    queue.wait_empty(SETTLE_LIMIT).await?;
    record.check(&queue, &jobs).await?;

    let (redelivered, kinds) = (record.redelivered(), record.kinds());
    eprintln!(
        "{} jobs, {:?}: {redelivered} redelivered, {kinds:?} completed, rejected and dead, {:.1} s",
        plan.jobs,
        chaos.faults,
        started.elapsed().as_secs_f64(),
    );
    let Faults { worker_kills, broker_kills, worker_stops } = chaos.faults;
    let done = [worker_kills, broker_kills, worker_stops];
    assert_eq!(
        done,
        [plan.worker_kills, plan.broker_kills, plan.worker_stops],
        "faults that really happened"
    );
    assert_eq!(kinds, [plan.jobs, 0, 0]);
    assert!(redelivered > 0, "no job was delivered twice: the run has shown nothing");
    drop(chaos);

    let expected = undisturbed(&jobs).await?;
    for (id, outcome) in &record.outcomes {
        assert_eq!(expected.get(id.as_str()), Some(&outcome.timeless()?), "{id} after a crash");
    }
    Ok(())
}
