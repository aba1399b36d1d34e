//! The queue's protocol against a real broker, with a runner that does as each job says.
//!
//! Every job here ends with exactly one outcome and an empty queue, whatever happens on the way.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use async_nats::jetstream::{self, Message};
use futures::StreamExt;
use millrace_crds::config::{ClassWeights, QueueConfig, ResultsConfig};
use millrace_crds::job::header;
use millrace_crds::names::{Class, JobId, ModelRef};
use millrace_crds::result::ErrorCode;
use millrace_crds::tokens::TokenDelta;
use millrace_crds::units::Span;
use millrace_queue::provision::{Mode, Provisioned, provision};
use millrace_tests::scripted::{Bench, PATIENCE, text, until};

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_each_kind_end_with_one_outcome() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut copies = bench.client.subscribe("replies.a").await?;
    bench
        .publish(
            "a",
            "echo",
            &[
                (header::TRACEPARENT, trace),
                (header::TRACESTATE, "v=1"),
                (header::REPLY_SUBJECT, "replies.a"),
            ],
        )
        .await?;
    bench.publish("b", "once", &[]).await?;
    bench.publish("c", "fail", &[]).await?;
    bench.publish("d", "refuse", &[]).await?;
    bench.publish("e", "echo", &[(header::DEADLINE, "2020-01-01T00:00:00Z")]).await?;
    bench.publish("f", "echo", &[(header::STREAM, "maybe")]).await?;
    bench.publish_as(Class::Low, "g", "echo", &[]).await?;
    let a = bench.outcome("a").await?;
    assert_eq!((text(&a, header::OUTCOME).as_str(), a.payload.as_ref()), ("completed", &b"echo"[..]));
    assert_eq!(
        (text(&a, header::TRACEPARENT).as_str(), text(&a, header::TRACESTATE).as_str()),
        (trace, "v=1")
    );
    assert_eq!((text(&a, header::WORKER).as_str(), text(&a, header::ATTEMPT).as_str()), ("w", "1"));
    assert!(text(&a, header::QUEUE_WAIT_MS).parse::<f64>()? >= 0.0);
    let copy = tokio::time::timeout(PATIENCE, copies.next()).await?.context("no copy")?;
    assert_eq!(copy.payload.as_ref(), b"echo");
    assert_eq!(text(&bench.outcome("b").await?, header::ATTEMPT), "2");
    let (kind, code, message) = bench.failure("c").await?;
    assert_eq!((kind.as_str(), code), ("dead", ErrorCode::InferenceError));
    assert!(message.contains("attempt 3"), "{message}");
    assert_eq!(bench.failure("d").await?.1, ErrorCode::InvalidRequest);
    let (kind, code, message) = bench.failure("e").await?;
    assert_eq!((kind.as_str(), code), ("rejected", ErrorCode::DeadlineExceeded));
    assert!(message.contains("2020-01-01T00:00:00Z"), "{message}");
    let (_, code, message) = bench.failure("f").await?;
    assert_eq!(code, ErrorCode::InvalidRequest);
    assert!(message.contains("Millrace-Stream") && message.contains("maybe"), "{message}");
    bench.outcome("g").await?;
    bench.until_empty().await?;
    let dead = bench.context.get_stream(bench.model.dead_stream()).await?;
    let letter = dead.direct_get_last_for_subject(bench.model.dead_subject(&"c".parse()?)).await?;
    assert_eq!(letter.payload.as_ref(), b"fail");
    assert!(text(&letter, header::REASON).starts_with("INFERENCE_ERROR: attempt 3"));
    assert_eq!(text(&letter, header::CLASS), "normal");
    // A job that has an outcome is only acknowledged. The broker drops duplicates by the exact header name;
    // written otherwise it stands for one whose window is over, or whose ids the broker forgot.
    let runs = worker.runner.runs.load(Ordering::SeqCst);
    let mut map = HeaderMap::new();
    map.insert("nats-msg-id", "a");
    let subject = bench.model.jobs_subject(Class::High);
    bench.context.publish_with_headers(subject, map, "echo".into()).await?.await?;
    bench.until_empty().await?;
    assert_eq!(worker.metrics.already_done.get(), 1);
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), runs);
    worker.drain.cancel();
    worker.task.await?.map_err(anyhow::Error::msg)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_outcome_is_only_acknowledged_and_a_dead_one_gets_its_copy() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    // As a worker leaves it that died between the outcome and the rest.
    let mut map = HeaderMap::new();
    map.insert(header::OUTCOME, "dead");
    map.insert(header::ATTEMPT, "3");
    let line =
        r#"{"id":"x","custom_id":"x","response":null,"error":{"code":"WORKER_LOST","message":"lost"}}"#;
    let subject = bench.model.result_subject(&"x".parse()?);
    bench.context.publish_with_headers(subject, map, line.into()).await?.await?;
    bench.publish("x", "echo", &[]).await?;
    let worker = bench.worker("w").await?;
    bench.until_empty().await?;
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 0);
    assert_eq!(worker.metrics.already_done.get(), 1);
    let dead = bench.context.get_stream(bench.model.dead_stream()).await?;
    let letter = dead.direct_get_last_for_subject(bench.model.dead_subject(&"x".parse()?)).await?;
    assert_eq!(text(&letter, header::REASON), "WORKER_LOST: lost");
    assert_eq!(text(&letter, header::ATTEMPT), "3");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_holders_of_one_job_make_one_outcome() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("j", "late", &[]).await?;
    until("it runs", || worker.runner.runs.load(Ordering::SeqCst) == 1).await;
    // Another holder is first.
    let mut map = HeaderMap::new();
    map.insert(header::OUTCOME, "completed");
    let subject = bench.model.result_subject(&"j".parse()?);
    bench.context.publish_with_headers(subject, map, "theirs".into()).await?.await?;
    bench.until_empty().await?;
    assert_eq!(bench.outcome("j").await?.payload.as_ref(), b"theirs");
    assert_eq!(worker.metrics.create_races_lost.get(), 1);
    assert_eq!(worker.metrics.stored_total(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_and_while_running() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let cancel = |id: &str| {
        let subject = bench.model.cancel_subject(&id.parse::<JobId>().expect("an id"));
        let context = bench.context.clone();
        async move { context.publish(subject, "".into()).await?.await.map_err(anyhow::Error::from) }
    };
    cancel("before").await?;
    bench.publish("before", "hang", &[]).await?;
    bench.publish("while", "hang", &[]).await?;
    let soon = time::OffsetDateTime::now_utc() + Duration::from_secs(2);
    let soon = soon.format(&time::format_description::well_known::Rfc3339)?;
    bench.publish("deadline", "hang", &[(header::DEADLINE, &soon)]).await?;
    let worker = bench.worker("w").await?;
    assert_eq!(bench.failure("before").await?.1, ErrorCode::Cancelled);
    until("both run", || worker.runner.runs.load(Ordering::SeqCst) == 2).await;
    let asked = Instant::now();
    cancel("while").await?;
    assert_eq!(bench.failure("while").await?.1, ErrorCode::Cancelled);
    assert!(asked.elapsed() < Duration::from_millis(500), "it is heard at once: {:?}", asked.elapsed());
    let (kind, code, _) = bench.failure("deadline").await?;
    assert_eq!((kind.as_str(), code), ("rejected", ErrorCode::DeadlineExceeded));
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_engine_loses_its_jobs_and_a_moving_one_keeps_them() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let first = bench.worker("w1").await?;
    bench.publish("moving", "hang", &[]).await?;
    until("it runs", || first.runner.runs.load(Ordering::SeqCst) == 1).await;
    let second = bench.worker("w2").await?;
    tokio::time::sleep(bench.queue.ack_wait.0 * 2).await;
    assert_eq!(second.runner.runs.load(Ordering::SeqCst), 0, "two ack waits long it stayed where it moves");
    assert_eq!(first.metrics.keep_alives_withheld.get(), 0);
    first.task.abort();
    first.line.broker.client().drain().await?;
    drop(first);
    // The second one stalls: its job comes again, to the same worker, which is the only one.
    bench.publish("stalled", "stall", &[]).await?;
    until("it came again", || second.metrics.redeliveries.get() >= 1).await;
    until("keep-alives are withheld", || second.metrics.keep_alives_withheld.get() >= 1).await;
    Ok(())
}

/// Of jobs that ran. One that arrives during the drain is handed back too, but counts as begun; no test says otherwise
/// until it does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_finishes_what_it_can_and_hands_back_the_rest_uncounted() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let first = bench.worker("w1").await?;
    bench.publish("short", "late", &[]).await?;
    bench.publish("long", "hang", &[]).await?;
    until("both run", || first.runner.runs.load(Ordering::SeqCst) == 2).await;
    first.drain.cancel();
    first.task.await?.map_err(anyhow::Error::msg)?;
    assert_eq!(text(&bench.outcome("short").await?, header::WORKER), "w1");
    let second = bench.worker("w2").await?;
    let back = Instant::now();
    until("the rest runs elsewhere", || second.runner.runs.load(Ordering::SeqCst) == 1).await;
    assert!(back.elapsed() < bench.queue.ack_wait.0, "handed back, not timed out: {:?}", back.elapsed());
    bench.context.publish(bench.model.cancel_subject(&"long".parse()?), "".into()).await?.await?;
    let outcome = bench.outcome("long").await?;
    assert_eq!(text(&outcome, header::ATTEMPT), "1", "a drain is no attempt");
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_consumer_makes_the_ack_fail_honestly() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("j", "late", &[]).await?;
    until("it runs", || worker.runner.runs.load(Ordering::SeqCst) == 1).await;
    let jobs = bench.context.get_stream(bench.model.jobs_stream()).await?;
    jobs.delete_consumer(&bench.model.consumer(Class::Normal)).await?;
    bench.outcome("j").await?;
    until("the ack failed", || worker.metrics.ack_failures.get() == 1).await;
    assert_eq!(bench.jobs_left().await?, 1, "the job is still there");
    // With the consumer back, it is finished without running again.
    provision(&bench.context, &bench.model, &bench.queue, &ResultsConfig::default(), Mode::Create).await?;
    bench.until_empty().await?;
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_is_waited_for() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("before", "echo", &[]).await?;
    bench.outcome("before").await?;
    bench.publish("over", "hang", &[]).await?;
    until("it runs", || worker.runner.runs.load(Ordering::SeqCst) == 2).await;
    bench.server.kill()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    bench.server.restart()?;
    bench.client = bench.server.connect().await?;
    bench.context = jetstream::new(bench.client.clone());
    let back = Instant::now();
    // Said before the worker is back, so that it only finds the marker.
    bench.context.publish(bench.model.cancel_subject(&"over".parse()?), "".into()).await?.await?;
    bench.publish("after", "echo", &[]).await?;
    bench.outcome("after").await?;
    assert!(back.elapsed() < Duration::from_secs(5), "resumed after {:?}", back.elapsed());
    assert!(!worker.task.is_finished());
    assert_eq!(bench.failure("over").await?.1, ErrorCode::Cancelled);
    bench.until_empty().await
}

/// The answer is there while the broker is not: it is kept and stored when the broker is back, and not computed again.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_outlives_the_broker() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("j", "late", &[]).await?;
    until("it runs", || worker.runner.runs.load(Ordering::SeqCst) == 1).await;
    bench.server.kill()?;
    until("it is answered", || worker.runner.at_once.load(Ordering::SeqCst) == 0).await;
    assert_eq!(worker.metrics.stored_total(), 0);
    // Several tries fail, and the delivery is still this worker's when the broker is back.
    tokio::time::sleep(bench.queue.ack_wait.0 / 2).await;
    bench.server.restart()?;
    bench.client = bench.server.connect().await?;
    bench.context = jetstream::new(bench.client.clone());
    let outcome = bench.outcome("j").await?;
    assert_eq!((text(&outcome, header::ATTEMPT).as_str(), outcome.payload.as_ref()), ("1", &b"late"[..]));
    bench.until_empty().await?;
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1, "it was computed twice");
    assert_eq!(worker.metrics.stored_total(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn deltas_are_numbered_and_tagged() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let mut deltas = bench.client.subscribe(bench.model.tokens_subject(&"s".parse()?)).await?;
    bench.client.flush().await?;
    let _worker = bench.worker("w").await?;
    bench.publish("s", "stream", &[(header::STREAM, "true")]).await?;
    for number in 0..3 {
        let message = tokio::time::timeout(PATIENCE, deltas.next()).await?.context("no delta")?;
        let delta: TokenDelta = serde_json::from_slice(&message.payload)?;
        assert_eq!((delta.number, delta.text.as_str()), (number, "x"));
        let headers = message.headers.context("no headers")?;
        assert_eq!(headers.get(header::ATTEMPT).map(ToString::to_string).as_deref(), Some("1"));
    }
    bench.outcome("s").await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn provisioning_is_idempotent_and_names_drift() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let results = ResultsConfig::default();
    let same = provision(&bench.context, &bench.model, &bench.queue, &results, Mode::Check).await?;
    assert!(same.iter().all(|item| item.state == Provisioned::Same) && same.len() == 6, "{same:?}");
    let other = QueueConfig { max_jobs: 5, ack_wait: Span(Duration::from_secs(4)), ..bench.queue.clone() };
    let drift = provision(&bench.context, &bench.model, &other, &results, Mode::Create).await?;
    let differ = drift.iter().filter(|item| matches!(item.state, Provisioned::Differs(_))).count();
    assert_eq!(differ, 4, "the stream and three consumers: {drift:?}");
    let applied = provision(&bench.context, &bench.model, &other, &results, Mode::Apply).await?;
    assert_eq!(applied.iter().filter(|item| matches!(item.state, Provisioned::Updated(_))).count(), 4);
    let same = provision(&bench.context, &bench.model, &other, &results, Mode::Check).await?;
    assert!(same.iter().all(|item| item.state == Provisioned::Same), "{same:?}");
    let missing = ModelRef::new("default", "other")?;
    let missing = provision(&bench.context, &missing, &other, &results, Mode::Check).await?;
    assert!(missing.iter().all(|item| item.state == Provisioned::Missing), "{missing:?}");
    Ok(())
}

/// A delivery as a process leaves it that was killed while it held the job.
async fn take_and_forget(bench: &Bench) -> Result<Message> {
    let jobs = bench.context.get_stream(bench.model.jobs_stream()).await?;
    let name = bench.model.consumer(Class::Normal);
    let consumer: jetstream::consumer::PullConsumer =
        jobs.get_consumer(&name).await.map_err(anyhow::Error::msg)?;
    let mut batch = consumer.fetch().max_messages(1).expires(PATIENCE).messages().await?;
    batch.next().await.context("nothing to take")?.map_err(anyhow::Error::msg)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_processes_die_is_given_up_and_held_neighbours_are_not() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    bench.publish("poison", "echo", &[]).await?;
    let message = take_and_forget(&bench).await?;
    message.ack_with(jetstream::AckKind::Nak(None)).await.map_err(anyhow::Error::msg)?;
    // Three begun attempts in the ledger, and none ended.
    let subject = bench.model.attempts_subject(&"poison".parse()?);
    bench.context.publish(subject, r#"{"starts":3,"worker":"w-dead"}"#.into()).await?.await?;
    // Delivered five times and begun once: its neighbours died, it did not.
    bench.publish("neighbour", "echo", &[]).await?;
    let subject = bench.model.attempts_subject(&"neighbour".parse()?);
    bench.context.publish(subject, r#"{"starts":1,"worker":"w-dead"}"#.into()).await?.await?;
    let worker = bench.worker("w").await?;
    let (kind, code, message) = bench.failure("poison").await?;
    assert_eq!((kind.as_str(), code), ("dead", ErrorCode::WorkerLost));
    assert!(message.contains("3 attempts of 3") && message.contains("w-dead"), "{message}");
    let neighbour = bench.outcome("neighbour").await?;
    assert_eq!(text(&neighbour, header::OUTCOME), "completed");
    assert_eq!(text(&neighbour, header::ATTEMPT), "2");
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1, "the poison did not run again");
    bench.until_empty().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_last_attempt_runs_alone() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let subject = bench.model.attempts_subject(&"last".parse()?);
    bench.context.publish(subject, r#"{"starts":2,"worker":"w-dead"}"#.into()).await?.await?;
    for n in 0..4 {
        bench.publish(&format!("before-{n}"), "late", &[]).await?;
    }
    bench.publish("last", "alone", &[]).await?;
    for n in 0..4 {
        bench.publish(&format!("after-{n}"), "late", &[]).await?;
    }
    let worker = bench.worker("w").await?;
    bench.until_empty().await?;
    assert_eq!(text(&bench.outcome("last").await?, header::ATTEMPT), "3");
    assert_eq!(worker.runner.beside_alone_max.load(Ordering::SeqCst), 0, "a neighbour could have died of it");
    assert!(worker.runner.at_once_max.load(Ordering::SeqCst) >= 4, "the others run together");
    Ok(())
}

/// In the order in which they are pulled; what is pulled runs in the order of its coming.
#[tokio::test(flavor = "multi_thread")]
async fn classes_are_served_by_weight_and_none_starves() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    bench.queue.weights = ClassWeights { high: 4, normal: 2, low: 1 };
    for n in 0..70 {
        for class in Class::ALL {
            bench.publish_as(class, &format!("{class}-{n}"), "brief", &[]).await?;
        }
    }
    let worker = bench.worker("w").await?;
    bench.until_empty().await?;
    assert_eq!(worker.metrics.stored_total(), 210);
    // While all three classes have jobs left, their shares are those of their weights: 30 and 15 beside 60.
    // Each class's first pull comes in whole before the weights can tell, hence the margin.
    let order = worker.runner.order.lock().expect("no writer panics").clone();
    let mut begun = [0; 3];
    for id in order {
        let class: Class = id.split('-').next().unwrap_or_default().parse()?;
        begun[class as usize] += 1;
        if begun[0] == 60 {
            break;
        }
    }
    let [_, normal, low] = begun;
    assert!((24..=40).contains(&normal) && (10..=26).contains(&low), "normal {normal}, low {low} of high 60");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_held_than_the_engine_can_run() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    for n in 0..300 {
        bench.publish(&format!("j{n}"), "brief", &[]).await?;
    }
    let worker = bench.worker("w").await?;
    bench.until_empty().await?;
    // 64 sequences, an eighth in reserve, and one job of each class that was watched.
    let most = worker.runner.at_once_max.load(Ordering::SeqCst);
    assert!((30..=75).contains(&most), "{most} at once");
    Ok(())
}
