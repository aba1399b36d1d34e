//! What an outage costs: an idle worker while the broker is away, and the jobs of a worker that is killed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use millrace_crds::job::header;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::jobs::NewJob;
use millrace_tests::{nats, tools};
use serde_json::json;

/// The bars.
const SHARE_MAX: f64 = 0.02;
const RESUMED_MAX: Duration = Duration::from_secs(3);
const LATE_MAX: Duration = Duration::from_secs(2);

/// How long the broker is away: a minute in the long run.
fn away() -> Duration {
    Duration::from_secs(if std::env::var_os("MILLRACE_SOAK").is_some() { 60 } else { 20 })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_rests_while_the_broker_is_away() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    let worker = cluster.worker()?;
    let queue = cluster.queue().await?;
    queue.publish(&NewJob::completion("before", "warm", 2)).await?;
    queue.wait_stored(1, Duration::from_secs(30)).await?;
    cluster.nats.kill()?;
    // What the loss itself costs is none of the rest.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (used, start) = (worker.processor_s()?, Instant::now());
    tokio::time::sleep(away()).await;
    let share = (worker.processor_s()? - used) / start.elapsed().as_secs_f64();
    cluster.nats.restart()?;
    let back = Instant::now();
    let queue = cluster.queue().await?;
    queue.publish(&NewJob::completion("after", "go on", 2)).await?;
    queue.wait_stored(2, Duration::from_secs(30)).await.with_context(|| worker.log_tail())?;
    let resumed = back.elapsed();
    eprintln!(
        "broker away for {:?}: {:.2} % of a core; an outcome {resumed:?} after it was back",
        away(),
        share * 100.0
    );
    ensure!(share <= SHARE_MAX, "{share} of a core while the broker is away");
    ensure!(resumed <= RESUMED_MAX, "the first outcome came {resumed:?} after the broker was back");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_a_killed_worker_begins_again_within_the_ack_wait() -> Result<()> {
    const KILLS: usize = 4;
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    cluster.config.queue.max_deliver = 10;
    let ack_wait = cluster.config.queue.ack_wait.0;
    let mut workers = vec![cluster.worker()?];
    let queue = cluster.queue().await?;
    let client = cluster.nats.connect().await?;
    let mut late = Vec::new();
    for kill in 0..KILLS {
        let id = format!("long-{kill}");
        let mut deltas = client.subscribe(cluster.model().tokens_subject(&id.parse()?)).await?;
        client.flush().await?;
        let body = json!({"prompt": "long", "max_tokens": 1900, "n": 6, "ignore_eos": true});
        queue.publish(&NewJob::new(&id, &body).with(header::STREAM, "true")).await?;
        let mut first_of = async |attempt: u32| -> Result<Instant> {
            loop {
                let message = tokio::time::timeout(Duration::from_secs(60), deltas.next()).await?;
                let headers = message.context("the end of deltas")?.headers.context("headers")?;
                let of = headers.get(header::ATTEMPT).context("an attempt")?.as_str().parse::<u32>()?;
                if of >= attempt {
                    return Ok(Instant::now());
                }
            }
        };
        first_of(1).await?;
        workers.push(cluster.worker()?);
        let mut victim = workers.remove(0);
        victim.kill()?;
        let killed = Instant::now();
        late.push(first_of(2).await?.duration_since(killed).saturating_sub(ack_wait));
        client.publish(cluster.model().cancel_subject(&id.parse()?), "".into()).await?;
        queue.wait_stored(kill + 1, Duration::from_secs(30)).await?;
    }
    late.sort_unstable();
    eprintln!("{KILLS} kills, ack wait {ack_wait:?}: begun again at most {:?} after it", late[KILLS - 1]);
    ensure!(late[KILLS - 1] <= LATE_MAX, "{late:?} after the ack wait");
    Ok(())
}
