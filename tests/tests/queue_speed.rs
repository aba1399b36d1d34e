//! What the queue costs: jobs that take no time, through a broker that fsyncs each write.
//!
//! The bars of the product are 10 ms at the 99th percentile for one job at a time and 400 jobs a second; they
//! hold on an idle machine of two cores, and `MILLRACE_BARS=1` checks them. Without it the figures are printed,
//! and only an order of magnitude is asserted, because tests share their machine.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use millrace_crds::names::Class;
use millrace_tests::scripted::Bench;

fn strict() -> bool {
    std::env::var_os("MILLRACE_BARS").is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_job_at_a_time() -> Result<()> {
    const JOBS: usize = 300;
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = bench.worker("w").await?;
    let mut outcomes = bench.client.subscribe(bench.model.results_wildcard()).await?;
    bench.client.flush().await?;
    let mut took = Vec::with_capacity(JOBS);
    for n in 0..JOBS {
        let began = Instant::now();
        bench.publish(&format!("j{n}"), "echo", &[]).await?;
        let outcome = tokio::time::timeout(Duration::from_secs(10), outcomes.next()).await?;
        outcome.context("no outcome")?;
        took.push(began.elapsed());
        // Users do not publish in lockstep with the broker's timers.
        tokio::time::sleep(Duration::from_micros(n as u64 * 37 % 5000)).await;
    }
    took.sort();
    let [p50, p99] = [took[JOBS / 2], took[JOBS * 99 / 100]];
    println!("one job at a time: p50 {p50:?}, p99 {p99:?}");
    assert!(p99 < Duration::from_millis(if strict() { 10 } else { 250 }), "p99 {p99:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_as_it_takes() -> Result<()> {
    const JOBS: usize = 2000;
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let mut outcomes = bench.client.subscribe(bench.model.results_wildcard()).await?;
    let worker = bench.worker("w").await?;
    let began = Instant::now();
    let publish = async {
        // A publisher keeps some acknowledgements outstanding, as the command line does.
        let mut outstanding = FuturesUnordered::new();
        for n in 0..JOBS {
            let class = Class::ALL[n % 3];
            outstanding.push({
                let bench = &bench;
                async move { bench.publish_as(class, &format!("j{n}"), "echo", &[]).await }
            });
            if outstanding.len() == 64 {
                outstanding.next().await.context("none outstanding")??;
            }
        }
        while let Some(published) = outstanding.next().await {
            published?;
        }
        anyhow::Ok(began.elapsed())
    };
    let answered = async {
        for _ in 0..JOBS {
            let outcome = tokio::time::timeout(Duration::from_secs(20), outcomes.next()).await?;
            outcome.context("no outcome")?;
        }
        bench.until_empty().await
    };
    let (published, answered) = tokio::join!(publish, answered);
    answered?;
    let rate = JOBS as f64 / began.elapsed().as_secs_f64();
    println!("{JOBS} jobs: published in {:?}, {rate:.0} jobs/s to the last ack", published?);
    let held = worker.runner.at_once_max.load(std::sync::atomic::Ordering::SeqCst);
    println!("at most {held} at once, {} pulls", worker.metrics.pulls.get());
    assert!(rate > if strict() { 400.0 } else { 40.0 }, "{rate:.0} jobs/s");
    Ok(())
}
