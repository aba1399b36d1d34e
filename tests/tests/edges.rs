//! The queue at its edges: sizes that meet the broker's limit, hand-backs in a drain, attempts that fail beside others.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use millrace_crds::job::header;
use millrace_crds::result::ErrorCode;
use millrace_tests::scripted::{Bench, text, until};

/// A body that begins with a word and fills a message of the broker but for `room` bytes.
fn body(bench: &Bench, word: &str, room: usize) -> String {
    let bytes = bench.client.max_payload() - room;
    format!("{word} {}", "x".repeat(bytes - word.len() - 1))
}

/// A dead job whose copy does not fit beside its reason is kept by its headers, and its worker lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_job_as_large_as_a_message_does_not_end_its_worker() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    let large = body(&bench, "fail", 100);
    bench.publish("large", &large, &[]).await?;
    assert_eq!(bench.failure("large").await?.0, "dead");
    bench.publish("small", "echo", &[]).await?;
    assert_eq!(bench.outcome("small").await?.payload.as_ref(), b"echo");
    bench.until_empty().await?;
    let dead = bench.context.get_stream(bench.model.dead_stream()).await?;
    let letter = dead.direct_get_last_for_subject(bench.model.dead_subject(&"large".parse()?)).await?;
    assert_eq!(text(&letter, header::BODY_DROPPED), large.len().to_string());
    assert!(letter.payload.is_empty() && text(&letter, header::REASON).starts_with("INFERENCE_ERROR"));
    assert!(!worker.task.is_finished());
    Ok(())
}

/// An answer that the broker does not take in one message is refused with both numbers, and its worker lives.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_larger_than_a_message_is_refused() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    let large = body(&bench, "echo", 100);
    bench.publish("large", &large, &[]).await?;
    let (kind, code, message) = bench.failure("large").await?;
    assert_eq!((kind.as_str(), code), ("rejected", ErrorCode::InvalidRequest));
    assert!(message.contains(&large.len().to_string()) && message.contains("the broker takes"), "{message}");
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1, "it is not computed again");
    bench.until_empty().await?;
    assert!(!worker.task.is_finished());
    Ok(())
}

/// What a draining worker hands back has not begun: the only attempt is left to the next worker.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_arrives_in_a_drain_keeps_its_attempt() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    bench.queue.max_deliver = 1;
    let first = bench.worker("first").await?;
    bench.publish("held", "hang", &[]).await?;
    until("the job runs", || first.runner.runs.load(Ordering::SeqCst) == 1).await;
    first.drain.cancel();
    bench.publish("arrives", "echo", &[]).await?;
    first.task.await?.map_err(anyhow::Error::msg)?;
    assert_eq!(first.runner.runs.load(Ordering::SeqCst), 1, "it did not run in the drain");
    let results = bench.context.get_stream(bench.model.results_stream()).await?;
    let ledger = bench.model.attempts_subject(&"arrives".parse()?);
    results.direct_get_last_for_subject(ledger).await.expect("it arrived in the drain and was handed back");
    let _second = bench.worker("second").await?;
    let outcome = bench.outcome("arrives").await?;
    assert_eq!(
        (text(&outcome, header::OUTCOME), text(&outcome, header::ATTEMPT)),
        ("completed".into(), "1".into())
    );
    Ok(())
}

/// Attempts that fail while their worker lives kill nobody: the last one waits for no neighbour.
#[tokio::test(flavor = "multi_thread")]
async fn a_last_attempt_runs_beside_others_unless_a_process_died() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("neighbour", "hang", &[]).await?;
    until("the neighbour runs", || worker.runner.runs.load(Ordering::SeqCst) == 1).await;
    bench.publish("fails", "fail", &[]).await?;
    let (kind, _, message) = tokio::time::timeout(Duration::from_secs(10), bench.failure("fails")).await??;
    assert_eq!(kind, "dead");
    assert!(message.contains("attempt 3"), "{message}");
    assert_eq!(worker.runner.at_once.load(Ordering::SeqCst), 1, "the neighbour still runs");
    Ok(())
}
