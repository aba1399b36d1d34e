//! What the queue costs: jobs of one token, one at a time and as fast as they go.
//!
//! The overhead of a job is the time from the call of publish until its outcome is on the broker's disk and
//! has reached a consumer, less the time that the worker says it ran.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, push};
use futures::StreamExt;
use millrace_crds::job::header;

use crate::cluster::QueueHarness;
use crate::figures::Figure;
use crate::jobs::{NewJob, OutcomeLog, Pipeline};

/// No job of one token takes longer, unless something hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub struct Overhead {
    /// Median overhead, one job at a time.
    pub p50_ms: f64,
    /// 99th percentile of it.
    pub p99_ms: f64,
    /// Jobs a second when the queue is full, from the first publish to the last outcome.
    pub jobs_per_s: f64,
}

impl Overhead {
    /// The figures of a release build, with their bars.
    pub fn figures(&self) -> Vec<Figure> {
        vec![
            Figure::new("overhead of a job of one token, p50", self.p50_ms, "ms"),
            Figure::new("overhead of a job of one token, p99", self.p99_ms, "ms").most(10.0),
            Figure::new("jobs of one token, sustained", self.jobs_per_s, "jobs/s").least(400.0),
        ]
    }
}

/// Measures on a cluster with a running worker: `single` jobs one at a time, then `many` at once.
///
/// # Errors
/// When a job has no outcome within 30 s.
pub async fn measure(cluster: &QueueHarness, single: usize, many: usize) -> Result<Overhead> {
    let queue = cluster.queue().await?;
    // Not measured: the connections, the caches and the averages of the worker warm up.
    one_at_a_time(cluster, &queue, "warm", single.min(50)).await?;
    let mut overheads = one_at_a_time(cluster, &queue, "single", single).await?;
    overheads.sort_by(f64::total_cmp);
    let before = outcomes(&queue).await?;
    let jobs: Vec<NewJob> = (0..many).map(|i| NewJob::completion(&format!("many-{i}"), "x", 1)).collect();
    let start = Instant::now();
    let mut record = OutcomeLog::default();
    let limit = LIMIT + Duration::from_millis(50) * u32::try_from(many)?;
    let (published, finished) =
        tokio::join!(queue.publish_all(&jobs), queue.wait_stored(before + many, limit));
    published?;
    finished?;
    let elapsed = start.elapsed();
    record.wait(&queue, before + many, LIMIT).await?;
    Ok(Overhead {
        p50_ms: percentile(&overheads, 50),
        p99_ms: percentile(&overheads, 99),
        jobs_per_s: many as f64 / elapsed.as_secs_f64(),
    })
}

async fn outcomes(queue: &Pipeline) -> Result<usize> {
    let mut record = OutcomeLog::default();
    record.follow(queue).await?;
    Ok(record.outcomes.len())
}

/// Milliseconds of overhead of each job.
async fn one_at_a_time(
    cluster: &QueueHarness,
    queue: &Pipeline,
    prefix: &str,
    count: usize,
) -> Result<Vec<f64>> {
    let jetstream = async_nats::jetstream::new(queue.client.clone());
    let stream = jetstream.get_stream(cluster.model().results_stream()).await?;
    let config = push::Config {
        deliver_subject: queue.client.new_inbox(),
        deliver_policy: DeliverPolicy::New,
        ack_policy: AckPolicy::None,
        filter_subject: cluster.model().results_wildcard(),
        ..push::Config::default()
    };
    let mut stored = stream.create_consumer(config).await?.messages().await?;
    let mut overheads = Vec::with_capacity(count);
    for index in 0..count {
        let job = NewJob::completion(&format!("{prefix}-{index}"), "x", 1);
        let start = Instant::now();
        queue.publish(&job).await?;
        let next = tokio::time::timeout(LIMIT, stored.next()).await;
        let message = next
            .with_context(|| format!("{prefix}-{index} has no outcome"))?
            .context("the consumer ended")??;
        let total_ms = start.elapsed().as_secs_f64() * 1e3;
        let ran = message.headers.as_ref().and_then(|headers| headers.get(header::RUN_MS));
        let ran_ms: f64 = ran.map_or(Ok(0.0), |value| value.as_str().parse())?;
        overheads.push(total_ms - ran_ms);
    }
    Ok(overheads)
}

/// The smallest value that at least `percent` of the sorted values do not exceed.
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn nearest_rank() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99)), (100.0, 198.0));
        assert_eq!(percentile(&[7.0], 99), 7.0);
        assert!(percentile(&[], 50).is_nan());
    }
}
