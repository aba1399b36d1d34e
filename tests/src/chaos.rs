//! Nothing lost: workers and the broker are killed at random while jobs run.
//!
//! What must hold afterwards: every job that the broker acknowledged has exactly one outcome, which never
//! changed since it was first seen, and the queue is empty. A run in which no job was delivered twice has
//! shown nothing; its report says so, and who reads it must fail then.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_crds::names::Class;
use serde_json::{Value, json};

use crate::cluster::QueueHarness;
use crate::jobs::{NewJob, OutcomeLog, Pipeline};
use crate::process::Signal;
use crate::random::Random;
use crate::worker::Worker;

/// A stop is longer than the ack wait of the cluster, so that the job is delivered elsewhere.
const STOP: Duration = Duration::from_secs(3);
/// From the last fault until every job has its outcome.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(180);

/// How much is done to how many.
#[derive(Debug, Clone, Copy)]
pub struct ChaosPlan {
    /// Jobs published.
    pub jobs: usize,
    /// Workers that run at once.
    pub workers: usize,
    /// SIGKILLs of a worker.
    pub worker_kills: usize,
    /// SIGKILLs of the broker.
    pub broker_kills: usize,
    /// SIGSTOPs of a worker, each longer than the ack wait.
    pub worker_stops: usize,
    /// Attempts that a job has; none for as many as users have who set nothing.
    pub max_deliver: Option<u32>,
}

/// The form that takes about a minute, with as many attempts as users have who set nothing.
pub const SHORT: ChaosPlan = ChaosPlan {
    jobs: 500,
    workers: 2,
    worker_kills: 20,
    broker_kills: 3,
    worker_stops: 2,
    max_deliver: None,
};
/// The long form: every job shall complete, however often its workers are killed.
pub const SOAK: ChaosPlan = ChaosPlan {
    jobs: 2000,
    workers: 3,
    worker_kills: 200,
    broker_kills: 20,
    worker_stops: 20,
    max_deliver: Some(100),
};

/// What was done, and what came of it.
#[derive(Debug)]
pub struct ChaosReport {
    /// Outcomes, each job's only one.
    pub record: OutcomeLog,
    /// SIGKILLs of workers that happened.
    pub worker_kills: usize,
    /// SIGKILLs of the broker that happened.
    pub broker_kills: usize,
    /// SIGSTOPs that happened.
    pub worker_stops: usize,
    /// From the first publish to the last outcome.
    pub elapsed: Duration,
}

impl ChaosReport {
    /// The numbers of it, as `figures::soak` reads them.
    pub fn numbers(&self, plan: &ChaosPlan) -> Value {
        json!({
            "jobs": plan.jobs,
            "outcomes": self.record.outcomes.len(),
            "redelivered": self.record.redelivered(),
            "worker_kills": self.worker_kills,
            "broker_kills": self.broker_kills,
            "elapsed_s": self.elapsed.as_secs_f64(),
        })
    }
}

/// Greedy and sampled jobs of many lengths and all classes; long enough to be caught in the middle.
pub fn jobs(count: usize) -> Vec<NewJob> {
    let job = |index: usize| {
        let body = json!({
            "prompt": format!("Job {index}: {}", "grist to the mill ".repeat(1 + index % 7)),
            "max_tokens": 100 + (index * 37) % 400,
            "temperature": if index.is_multiple_of(3) { 0.9 } else { 0.0 },
            "ignore_eos": true,
        });
        let mut job = NewJob::new(&format!("job-{index}"), &body);
        job.class = Class::ALL[index % 3];
        job
    };
    (0..count).map(job).collect()
}

/// A broker and a tiny model.
///
/// # Errors
/// When the broker does not come up.
pub fn cluster(plan: &ChaosPlan) -> Result<QueueHarness> {
    let mut cluster = QueueHarness::tiny()?;
    if let Some(attempts) = plan.max_deliver {
        cluster.config.queue.max_deliver = attempts;
    }
    Ok(cluster)
}

/// The processes, and what was done to them.
struct Chaos {
    cluster: QueueHarness,
    workers: Vec<Worker>,
    random: Random,
    plan: ChaosPlan,
    worker_kills: usize,
    broker_kills: usize,
    worker_stops: usize,
}

impl Chaos {
    fn victim(&mut self) -> usize {
        self.random.within(0..self.workers.len() as u64) as usize
    }

    /// Does one round's faults, and puts the processes back.
    fn fault(&mut self, round: usize) -> Result<()> {
        let kills = self.plan.worker_kills;
        let every = |count: usize| count > 0 && round.is_multiple_of((kills / count).max(1));
        if every(self.plan.broker_kills) && self.broker_kills < self.plan.broker_kills {
            self.cluster.nats.kill()?;
            std::thread::sleep(Duration::from_millis(self.random.within(0..500)));
            self.cluster.nats.restart()?;
            self.broker_kills += 1;
        }
        if every(self.plan.worker_stops) && self.worker_stops < self.plan.worker_stops {
            let victim = self.victim();
            self.workers[victim].signal(Signal::Stop)?;
            std::thread::sleep(STOP);
            self.workers[victim].signal(Signal::Continue)?;
            self.worker_stops += 1;
        }
        let victim = self.victim();
        let ended = self.workers[victim].ended()?;
        ensure!(ended.is_none(), "a worker ended by itself: {ended:?}\n{}", self.workers[victim].log_tail());
        self.workers[victim].kill()?;
        self.worker_kills += 1;
        self.workers[victim] = self.cluster.worker()?;
        Ok(())
    }

    /// Publishes the jobs in as many parts as there are kills, and kills after each part.
    async fn run(&mut self, queue: &Pipeline, jobs: &[NewJob]) -> Result<()> {
        let part = jobs.len().div_ceil(self.plan.worker_kills);
        for round in 0..self.plan.worker_kills {
            let start = (round * part).min(jobs.len());
            queue.publish_all(&jobs[start..(start + part).min(jobs.len())]).await?;
            tokio::time::sleep(Duration::from_millis(self.random.within(0..400))).await;
            self.fault(round)?;
        }
        Ok(())
    }
}

/// Runs the plan over [`jobs`] and checks what must hold.
///
/// # Errors
/// When a job has no outcome, or more than one, or a worker ended by itself.
pub async fn run(plan: ChaosPlan, random: Random) -> Result<ChaosReport> {
    let jobs = jobs(plan.jobs);
    let cluster = cluster(&plan)?;
    let workers = (0..plan.workers).map(|_| cluster.worker()).collect::<Result<Vec<_>>>()?;
    let queue = cluster.queue().await?;
    let mut chaos =
        Chaos { cluster, workers, random, plan, worker_kills: 0, broker_kills: 0, worker_stops: 0 };
    let began = Instant::now();
    chaos.run(&queue, &jobs).await?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, jobs.len(), SETTLE_LIMIT).await.with_context(|| chaos.workers[0].log_tail())?;
    let elapsed = began.elapsed();
    queue.wait_empty(SETTLE_LIMIT).await?;
    record.check(&queue, &jobs).await?;
    let Chaos { worker_kills, broker_kills, worker_stops, .. } = chaos;
    Ok(ChaosReport { record, worker_kills, broker_kills, worker_stops, elapsed })
}
