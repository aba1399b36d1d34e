//! A worker among its neighbours: poison, cancellation, token streams, draining, bad configuration.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use millrace_crds::job::header;
use millrace_crds::result::{ErrorCode, OutcomeKind};
use millrace_tests::cluster::QueueHarness;
use millrace_tests::jobs::{NewJob, OutcomeLog};
use millrace_tests::process::Signal;
use millrace_tests::worker::Worker;
use millrace_tests::{nats, tools};
use millrace_worker::failpoint;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
/// The share of a whole job's run after which a cancelled one has ended: 0.01 to 0.16 were measured.
const SOON: f64 = 0.3;

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_loses_nothing_and_hands_back_at_once() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    // Far longer than the test: a job that is not handed back would not come again.
    cluster.set_ack_wait(Duration::from_secs(300));
    cluster.config.drain.timeout = "300ms".parse().map_err(anyhow::Error::msg)?;
    cluster.config.engine.max_sequences = Some(4);
    let mut first = cluster.worker()?;
    let queue = cluster.queue().await?;
    let jobs: Vec<NewJob> =
        (0..120).map(|i| NewJob::completion(&format!("drain-{i}"), "A long way to go", 1500)).collect();
    queue.publish_all(&jobs).await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    first.signal(Signal::Terminate)?;
    let status = first.wait(LIMIT)?;
    assert!(status.success(), "{status}\n{}", first.log_tail());
    assert!(queue.jobs_left().await? > 0, "everything was done before the signal: the test shows nothing");
    let second = cluster.worker()?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, jobs.len(), LIMIT).await.with_context(|| second.log_tail())?;
    record.check(&queue, &jobs).await?;
    assert_eq!(record.kinds(), [jobs.len(), 0, 0]);
    Ok(())
}

/// One that runs ends soon, measured by what a job takes that is not cancelled; one that waits never runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_ends_soon_and_alone() -> Result<()> {
    const RUNS: usize = 1;
    const WAITS: usize = 6;
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    cluster.config.engine.max_sequences = Some(2);
    let worker = cluster.worker()?;
    let queue = cluster.queue().await?;
    let body = json!({"prompt": "On and on", "max_tokens": 1900, "n": 6, "ignore_eos": true});
    let long = |i: usize| NewJob::new(&format!("job-{i}"), &body).with(header::STREAM, "true");
    let jobs: Vec<NewJob> = (0..8).map(long).collect();
    let mut ends = queue.client.subscribe(cluster.model().result_subject(&jobs[RUNS].id)).await?;
    let mut tokens = queue.client.subscribe(cluster.model().tokens_subject(&jobs[RUNS].id)).await?;
    queue.client.flush().await?;
    queue.publish_all(&jobs).await?;
    tokio::time::timeout(LIMIT, tokens.next()).await?.context("no tokens")?;
    let jetstream = async_nats::jetstream::new(queue.client.clone());
    let cancelled_at = Instant::now();
    for index in [RUNS, WAITS] {
        jetstream.publish(cluster.model().cancel_subject(&jobs[index].id), "".into()).await?.await?;
    }
    let end = tokio::time::timeout(LIMIT, ends.next()).await;
    end.with_context(|| worker.log_tail())?.context("no end")?;
    let took_ms = cancelled_at.elapsed().as_secs_f64() * 1e3;
    let mut record = OutcomeLog::default();
    record.wait(&queue, jobs.len(), LIMIT).await.with_context(|| worker.log_tail())?;
    record.check(&queue, &jobs).await?;
    let mut whole_ms = f64::INFINITY;
    for (index, job) in jobs.iter().enumerate() {
        let outcome = record.of(job.id.as_str())?;
        let ran_ms = outcome.number(header::RUN_MS).unwrap_or(0.0);
        if [RUNS, WAITS].contains(&index) {
            let code = outcome.lines()?[0].error.as_ref().map(|error| error.code);
            assert_eq!(
                (outcome.kind, code),
                (OutcomeKind::Rejected, Some(ErrorCode::Cancelled)),
                "{}",
                job.id
            );
            // Whoever waits is told apart before its first step.
            assert!(index == RUNS || ran_ms < 1.0, "{} ran for {ran_ms} ms", job.id);
        } else {
            assert_eq!(outcome.kind, OutcomeKind::Completed, "{}", job.id);
            whole_ms = whole_ms.min(ran_ms);
        }
    }
    println!("cancelled after {took_ms:.0} ms; a job takes at least {whole_ms:.0} ms");
    assert!(took_ms < whole_ms * SOON, "{took_ms:.0} ms of {whole_ms:.0} ms");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn streamed_tokens_are_numbered_and_spell_the_answer() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let cluster = QueueHarness::tiny()?;
    let worker = cluster.worker()?;
    let queue = cluster.queue().await?;
    let job = NewJob::completion("streamed", "Tell me", 40).with(header::STREAM, "true");
    let mut deltas = queue.client.subscribe(cluster.model().tokens_subject(&job.id)).await?;
    queue.client.flush().await?;
    queue.publish(&job).await?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, 1, LIMIT).await.with_context(|| worker.log_tail())?;
    let answer = record.of("streamed")?.answer()?;
    let text = answer["choices"][0]["text"].as_str().context("no text")?;
    let mut spelled = String::new();
    let mut expected = 0;
    while spelled != text {
        let next = tokio::time::timeout(Duration::from_secs(5), deltas.next()).await;
        let message = next.with_context(|| format!("the deltas end at {spelled:?} of {text:?}"))?;
        let message = message.context("the subscription ended")?;
        let delta: serde_json::Value = serde_json::from_slice(&message.payload)?;
        let number = delta["number"].as_u64().with_context(|| delta.to_string())?;
        assert_eq!(number, expected, "{delta}");
        expected += 1;
        spelled += delta["text"].as_str().unwrap_or_default();
        assert!(text.starts_with(&spelled), "{spelled:?} is not the beginning of {text:?}");
    }
    Ok(())
}

/// Every worker of this test aborts on the job that it begins first; the poisoned job alone is given up.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_kills_its_workers_is_given_up_and_its_neighbours_complete() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    cluster.config.queue.max_deliver = 3;
    cluster.set_ack_wait(Duration::from_secs(2));
    drop(cluster.worker()?);
    let queue = cluster.queue().await?;
    let poison = NewJob::completion("poison", "Kill", 20);
    queue.publish(&poison).await?;
    let mut deaths = 0;
    let mut record = OutcomeLog::default();
    let start = Instant::now();
    while record.outcomes.is_empty() {
        anyhow::ensure!(start.elapsed() < LIMIT, "the poison is still at work after {deaths} deaths");
        let mut worker = Worker::start(&cluster.config, &[(failpoint::VARIABLE, "while_running")])?;
        while worker.ended()?.is_none() && record.outcomes.is_empty() {
            record.follow(&queue).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
            anyhow::ensure!(start.elapsed() < LIMIT, "after {deaths} deaths\n{}", worker.log_tail());
        }
        deaths += usize::from(worker.ended()?.is_some());
    }
    let outcome = record.of("poison")?;
    assert_eq!(outcome.kind, OutcomeKind::Dead);
    assert_eq!(outcome.lines()?[0].error.as_ref().map(|e| e.code), Some(ErrorCode::WorkerLost));
    assert!((1..=4).contains(&deaths), "{deaths} deaths; 3 attempts are allowed");
    let letter = queue.dead_letter(&poison.id).await?;
    assert_eq!(letter.payload, poison.body);
    assert!(letter.headers.get(header::REASON).is_some_and(|reason| !reason.as_str().is_empty()));

    let neighbours: Vec<NewJob> =
        (0..10).map(|i| NewJob::completion(&format!("well-{i}"), "Live", 10)).collect();
    queue.publish_all(&neighbours).await?;
    let worker = cluster.worker()?;
    record.wait(&queue, 11, LIMIT).await.with_context(|| worker.log_tail())?;
    assert_eq!(record.kinds(), [10, 0, 1]);
    Ok(())
}

/// Deaths until a job is given up that kills each process in which it runs, among others that all complete. `how` is
/// the failpoint.
async fn hunt(how: &str, others: usize, deaths_max: usize) -> Result<(String, Duration)> {
    let mut cluster = QueueHarness::tiny()?;
    cluster.config.queue.max_deliver = 3;
    cluster.config.engine.max_sequences = Some(64);
    cluster.set_ack_wait(Duration::from_secs(2));
    drop(cluster.worker()?);
    let queue = cluster.queue().await?;
    let mut jobs: Vec<NewJob> =
        (0..others).map(|i| NewJob::completion(&format!("well-{i}"), "Live", 400)).collect();
    jobs.insert(others / 3, NewJob::completion("poison", "Kill", 400));
    queue.publish_all(&jobs).await?;
    let (mut deaths, mut record, start) = (0, OutcomeLog::default(), Instant::now());
    while record.outcomes.len() < jobs.len() {
        let mut worker = Worker::start(&cluster.config, &[(failpoint::VARIABLE, how)])?;
        while worker.ended()?.is_none() && record.outcomes.len() < jobs.len() {
            record.follow(&queue).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
            anyhow::ensure!(start.elapsed() < 2 * LIMIT, "after {deaths} deaths\n{}", worker.log_tail());
        }
        deaths += usize::from(worker.ended()?.is_some());
    }
    println!("{how}: {deaths} deaths, {:.1} s", start.elapsed().as_secs_f64());
    assert_eq!(record.kinds(), [others, 0, 1]);
    anyhow::ensure!(deaths > 1 && deaths <= deaths_max, "{deaths} deaths of at most {deaths_max}");
    let poison = &record.of("poison")?.lines()?[0];
    let error = poison.error.as_ref().context("an error")?;
    assert_eq!(error.code, ErrorCode::WorkerLost);
    Ok((error.message.clone(), start.elapsed()))
}

/// Among 33 jobs the killer is alone after 6 halvings. Killed without a word it then has the attempts that a job has;
/// where the process says twice of what it died, that is enough, and nobody waits for a lease to run out.
#[tokio::test(flavor = "multi_thread")]
async fn a_killer_is_found_by_halves_and_the_others_complete() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let (silent, said) =
        tokio::join!(hunt("while_running@poison", 32, 9), hunt("while_running@poison!panic", 32, 8));
    let (silent, _) = silent?;
    assert!(silent.contains("alone): no last word"), "{silent}");
    let (said, _) = said?;
    assert!(said.contains("alone): a panic at"), "{said}");
    Ok(())
}

#[test]
fn a_bad_configuration_is_refused_with_field_and_value() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let cluster = QueueHarness::tiny()?;
    let mut config = cluster.config.clone();
    config.model.uri = "ftp://models/tiny".into();
    let mut worker = Worker::start(&config, &[])?;
    let status = worker.wait(LIMIT)?;
    assert!(!status.success());
    assert!(worker.log().contains("ftp://models/tiny"), "{}", worker.log_tail());
    let mut config = cluster.config.clone();
    config.model.digest = Some(format!("sha256:{}", "0".repeat(64)));
    let mut worker = Worker::start(&config, &[])?;
    assert!(!worker.wait(LIMIT)?.success());
    assert!(worker.log().contains("sha256:0000"), "{}", worker.log_tail());
    Ok(())
}
