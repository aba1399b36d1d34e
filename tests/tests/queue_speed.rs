//! What the queue costs: jobs that take no time, through a broker that fsyncs each write.
//!
//! The bars of the product stand in `make bench`, which measures an idle machine. Tests share theirs, so here each
//! figure is compared with what the same broker did at the same time: bare messages, stored one after another, or as
//! fast as it takes them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use millrace_crds::names::{Class, JobId};
use millrace_tests::overhead::percentile;
use millrace_tests::scripted::Bench;

/// A job is a message stored and taken out, a look at what is known of it, an outcome stored and taken out, and an ack,
/// one after another. So many bare messages, each stored and acknowledged, does it cost: 2.5 to 3.2 were measured.
const MESSAGES_PER_JOB: f64 = 6.0;
/// Of the bare messages that a broker stores at full speed, so many go by for each job: 1.4 to 2.6 were measured.
const MESSAGES_PER_JOB_AT_ONCE: f64 = 5.0;

/// Stores one bare message beside the outcomes.
async fn store(bench: &Bench, number: usize) -> Result<()> {
    let subject = bench.model.cancel_subject(&format!("bare-{number}").parse::<JobId>()?);
    bench.context.publish(subject, "echo".into()).await?.await?;
    Ok(())
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_job_at_a_time() -> Result<()> {
    const JOBS: usize = 300;
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = bench.worker("w").await?;
    let mut outcomes = bench.client.subscribe(bench.model.results_wildcard()).await?;
    bench.client.flush().await?;
    let (mut jobs_ms, mut stores_ms) = (Vec::with_capacity(JOBS), Vec::with_capacity(JOBS));
    for n in 0..JOBS {
        // One after the other, so that whatever slows the machine down slows down both.
        let began = Instant::now();
        bench.publish(&format!("j{n}"), "echo", &[]).await?;
        loop {
            let outcome = tokio::time::timeout(Duration::from_secs(10), outcomes.next()).await?;
            if outcome.context("no outcome")?.payload.as_ref() == b"echo" {
                break;
            }
        }
        jobs_ms.push(millis(began));
        // Users do not publish in lockstep with the broker's timers.
        tokio::time::sleep(Duration::from_micros(n as u64 * 37 % 5000)).await;
        let began = Instant::now();
        store(&bench, n).await?;
        stores_ms.push(millis(began));
    }
    jobs_ms.sort_by(f64::total_cmp);
    stores_ms.sort_by(f64::total_cmp);
    for percent in [50, 90] {
        let (job_ms, store_ms) = (percentile(&jobs_ms, percent), percentile(&stores_ms, percent));
        let messages = job_ms / store_ms;
        println!("p{percent}: a job {job_ms:.2} ms, a bare message {store_ms:.2} ms: {messages:.1} of them");
        assert!(messages < MESSAGES_PER_JOB, "p{percent}: {job_ms} ms, {messages:.1} bare messages");
    }
    Ok(())
}

/// Does it for all numbers, some at once, and returns how many a second.
async fn at_once<F: Future<Output = Result<()>>>(count: usize, run: impl Fn(usize) -> F) -> Result<f64> {
    const OUTSTANDING: usize = 64;
    let began = Instant::now();
    let mut outstanding = FuturesUnordered::new();
    for number in 0..count {
        outstanding.push(run(number));
        if outstanding.len() == OUTSTANDING {
            outstanding.next().await.context("none outstanding")??;
        }
    }
    while let Some(done) = outstanding.next().await {
        done?;
    }
    Ok(count as f64 / began.elapsed().as_secs_f64())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_as_it_takes() -> Result<()> {
    const JOBS: usize = 2000;
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let before = at_once(JOBS, |n| store(&bench, n)).await?;
    let mut outcomes = bench.client.subscribe(bench.model.results_wildcard()).await?;
    let worker = bench.worker("w").await?;
    let began = Instant::now();
    let publish = at_once(JOBS, |n| {
        let (bench, class) = (&bench, Class::ALL[n % 3]);
        async move { bench.publish_as(class, &format!("j{n}"), "echo", &[]).await }
    });
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
    println!("{JOBS} jobs: {:.0} published a second, {rate:.0} jobs/s to the last ack", published?);
    let held = worker.runner.at_once_max.load(std::sync::atomic::Ordering::SeqCst);
    println!("at most {held} at once, {} pulls", worker.metrics.pulls.get());
    // Before and after, so that a machine that became busier or idler in between does not decide.
    let after = at_once(JOBS, |n| store(&bench, JOBS + n)).await?;
    let messages = before.min(after) / rate;
    println!("{before:.0} and {after:.0} bare messages/s: {messages:.1} of them a job");
    assert!(
        messages < MESSAGES_PER_JOB_AT_ONCE,
        "{rate:.0} jobs/s, {before:.0} and {after:.0} bare messages/s"
    );
    Ok(())
}
