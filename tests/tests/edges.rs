//! The queue at its edges: sizes that meet the broker's limit, hand-backs in a drain, attempts that fail beside others,
//! a store that takes no writes, logins.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use async_nats::jetstream::stream::{Config, DiscardPolicy};
use millrace_crds::config::NatsConfig;
use millrace_crds::job::header;
use millrace_crds::result::ErrorCode;
use millrace_queue::broker::Broker;
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::scripted::{Bench, text, until};
use millrace_tests::tools;

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

/// While RESULTS takes no writes a computed answer is kept, not computed again.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_kept_until_results_takes_it() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let mut stream = bench.context.get_stream(bench.model.results_stream()).await?;
    let open = stream.info().await?.config.clone();
    // One message, which is there already, and no room for another.
    bench.context.publish(bench.model.cancel_subject(&"other".parse()?), "".into()).await?.await?;
    let full = Config { max_messages: 1, discard: DiscardPolicy::New, ..open.clone() };
    bench.context.update_stream(full).await?;
    let worker = bench.worker("w").await?;
    bench.publish("kept", "echo", &[]).await?;
    until("the job ran", || worker.runner.runs.load(Ordering::SeqCst) == 1).await;
    // Longer than an ack wait and its backoff, after which it would come again.
    tokio::time::sleep(bench.queue.ack_wait.0 * 2).await;
    bench.context.update_stream(open).await?;
    assert_eq!(bench.outcome("kept").await?.payload.as_ref(), b"echo");
    bench.until_empty().await?;
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1);
    Ok(())
}

/// The client library parses user and password of an address and does not use them; the worker's connection does.
#[tokio::test(flavor = "multi_thread")]
async fn user_and_password_in_the_address_get_in() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let server = NatsServer::start_with("authorization { user: me, password: \"a@b\" }")?;
    let connected = async |login: &str| -> Result<bool> {
        let config = NatsConfig {
            servers: vec![server.url().replace("://", &format!("://{login}@"))],
            credentials_file: None,
            ca_file: None,
            monitor: None,
            provision: false,
        };
        let broker = Broker::connect(&config, &"w".parse()?).await?;
        Ok(tokio::time::timeout(Duration::from_secs(2), broker.ready()).await.is_ok())
    };
    assert!(connected("me:a%40b").await?);
    assert!(!connected("me:wrong").await?);
    Ok(())
}
