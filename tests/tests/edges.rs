//! The queue at its edges: sizes that meet the broker's limit, hand-backs in a drain, attempts that fail beside others,
//! a store that takes no writes, logins; lifetimes, and ids that come again.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::stream::{Config, DirectGetErrorKind, DiscardPolicy};
use futures::StreamExt;
use millrace_crds::config::NatsConfig;
use millrace_crds::job::header;
use millrace_crds::names::{Class, ModelRef};
use millrace_crds::result::ErrorCode;
use millrace_crds::streams;
use millrace_crds::units::Span;
use millrace_queue::broker::Broker;
use millrace_queue::provision::{Mode, provision};
use millrace_tests::nats::{self, NatsServer};
use millrace_tests::scripted::{Bench, PATIENCE, text, until};
use millrace_tests::tools;
use time::OffsetDateTime;
use tokio::io::AsyncWriteExt;

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

/// A header of the last message on a subject; `None` without a message, empty without the header.
async fn header_of(bench: &Bench, stream: String, subject: String, name: &str) -> Result<Option<String>> {
    match bench.context.get_stream(stream).await?.direct_get_last_for_subject(subject).await {
        Ok(message) => Ok(Some(text(&message, name))),
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Outcomes age by `results.ttl`, which they carry; what speaks of a job ages with its outcome, and not while there is
/// none.
#[tokio::test(flavor = "multi_thread")]
async fn marks_live_as_long_as_what_they_speak_of() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    bench.results.ttl = Span(Duration::from_millis(1500));
    let lifetime = async |subject: String| -> Result<Option<String>> {
        header_of(&bench, bench.model.results_stream(), subject, "Nats-TTL").await
    };
    let (job, waits) = ("cancelled".parse()?, "waits".parse()?);
    for id in [&job, &waits] {
        bench.context.publish(bench.model.cancel_subject(id), "".into()).await?.await?;
        let ledger = r#"{"starts":1,"worker":"w-dead"}"#;
        bench.context.publish(bench.model.attempts_subject(id), ledger.into()).await?.await?;
    }
    bench.publish("cancelled", "echo", &[]).await?;
    let worker = bench.worker("w").await?;
    bench.outcome("cancelled").await?;
    bench.until_empty().await?;
    let (marker, ledger) = (bench.model.cancel_subject(&job), bench.model.attempts_subject(&job));
    for subject in [bench.model.result_subject(&job), marker.clone(), ledger.clone()] {
        assert_eq!(lifetime(subject.clone()).await?.as_deref(), Some("2s"), "{subject}");
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    for subject in [bench.model.result_subject(&job), marker, ledger] {
        assert_eq!(lifetime(subject.clone()).await?, None, "{subject} has aged away");
    }
    for subject in [bench.model.cancel_subject(&waits), bench.model.attempts_subject(&waits)] {
        assert_eq!(lifetime(subject.clone()).await?.as_deref(), Some(""), "{subject} waits for its job");
    }
    // After its outcome the id is free: nothing of the former job cancels the new one.
    let mut map = HeaderMap::new();
    map.insert(header::RESULT_JOB_ID, "cancelled");
    let subject = bench.model.jobs_subject(Class::Normal);
    bench.context.publish_with_headers(subject, map, "echo".into()).await?.await?;
    assert_eq!(text(&bench.outcome("cancelled").await?, header::OUTCOME), "completed");
    assert!(!worker.task.is_finished());
    Ok(())
}

/// A RESULTS stream that was made before its messages had lifetimes still takes outcomes.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_lifetimes_takes_outcomes() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    bench.context.delete_stream(bench.model.results_stream()).await?;
    let old =
        Config { allow_message_ttl: false, ..streams::results(&bench.model, &bench.queue, &bench.results) };
    bench.context.create_stream(old).await?;
    let _worker = bench.worker("w").await?;
    bench.publish("j", "echo", &[]).await?;
    let outcome = bench.outcome("j").await?;
    assert_eq!((text(&outcome, "Nats-TTL").as_str(), outcome.payload.as_ref()), ("", &b"echo"[..]));
    bench.until_empty().await
}

/// What the broker leaves where an outcome aged away is no outcome.
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_marker_is_absence() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let marked = Config {
        subject_delete_marker_ttl: Some(Duration::from_secs(60)),
        allow_rollup: true,
        ..streams::results(&bench.model, &bench.queue, &bench.results)
    };
    bench.context.update_stream(marked).await?;
    let drift = provision(&bench.context, &bench.model, &bench.queue, &bench.results, Mode::Check).await?;
    let named = drift.iter().any(|item| format!("{item:?}").contains("subject_delete_marker_ttl"));
    assert!(named, "the setting is drift: {drift:?}");
    let subject = bench.model.result_subject(&"again".parse()?);
    let mut map = HeaderMap::new();
    map.insert(header::OUTCOME, "completed");
    map.insert("Nats-TTL", "1s");
    bench.context.publish_with_headers(subject.clone(), map, "old".into()).await?.await?;
    let began = Instant::now();
    let stream = bench.model.results_stream();
    while header_of(&bench, stream.clone(), subject.clone(), "Nats-Marker-Reason").await?.as_deref()
        != Some("MaxAge")
    {
        assert!(began.elapsed() < PATIENCE, "no delete marker came");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bench.publish("again", "echo", &[]).await?;
    let worker = bench.worker("w").await?;
    bench.until_empty().await?;
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1);
    assert_eq!(bench.outcome("again").await?.payload.as_ref(), b"echo");
    Ok(())
}

/// A JOBS stream that was made anew numbers its messages from 1 again; its jobs do not get the answers of old ones.
#[tokio::test(flavor = "multi_thread")]
async fn bare_jobs_of_a_stream_made_anew_have_other_ids() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    let mut ids = Vec::new();
    for body in ["echo first", "echo second"] {
        let created = bench.context.get_stream(bench.model.jobs_stream()).await?.cached_info().created;
        let subject = bench.model.jobs_subject(Class::Normal);
        let ack = bench.context.publish(subject, body.into()).await?.await?;
        let id = format!("seq-{}-{}", created.unix_timestamp_nanos() / 1_000_000, ack.sequence);
        assert_eq!(bench.outcome(&id).await?.payload.as_ref(), body.as_bytes(), "{id}");
        assert_eq!(ack.sequence, 1);
        bench.until_empty().await?;
        ids.push(id);
        bench.context.delete_stream(bench.model.jobs_stream()).await?;
        provision(&bench.context, &bench.model, &bench.queue, &bench.results, Mode::Create).await?;
    }
    assert_ne!(ids[0], ids[1]);
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 2);
    Ok(())
}

/// A status line that a publisher writes into a job's headers is no status of a pull: the job runs as any other.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_with_a_status_line_is_a_job() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = bench.worker("w").await?;
    let address = bench.server.url();
    let mut raw = tokio::net::TcpStream::connect(address.trim_start_matches("nats://")).await?;
    for status in
        ["404 No Messages", "408 Request Timeout", "409 Consumer Deleted", "100 Idle Heartbeat", "503"]
    {
        let id = format!("job-{}", &status[..3]);
        let head = format!("NATS/1.0 {status}\r\nNats-Msg-Id: {id}\r\n\r\n");
        let (subject, body) = (bench.model.jobs_subject(Class::Normal), "echo status");
        let sizes = format!("{} {}", head.len(), head.len() + body.len());
        let text = format!(
            "CONNECT {{\"headers\":true,\"verbose\":false}}\r\nHPUB {subject} {sizes}\r\n{head}{body}\r\nPING\r\n"
        );
        raw.write_all(text.as_bytes()).await?;
        assert_eq!(bench.outcome(&id).await?.payload.as_ref(), body.as_bytes(), "{status}");
    }
    bench.until_empty().await
}

/// An id that is used again with another body keeps its outcome; the second job ends as a dead letter of its own, and
/// its publisher hears so.
#[tokio::test(flavor = "multi_thread")]
async fn a_reused_id_is_a_dead_letter_with_its_own_reason() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    bench.publish("a", "echo 1", &[]).await?;
    let first = bench.outcome("a").await?;
    assert!(text(&first, header::BODY_DIGEST).starts_with("sha256:"));
    let mut copies = bench.client.subscribe("replies.a").await?;
    bench.client.flush().await?;
    let again = |body: &'static str| {
        let mut map = HeaderMap::new();
        map.insert(header::RESULT_JOB_ID, "a");
        map.insert(header::REPLY_SUBJECT, "replies.a");
        let subject = bench.model.jobs_subject(Class::Normal);
        let context = bench.context.clone();
        async move {
            context.publish_with_headers(subject, map, body.into()).await?.await.map_err(anyhow::Error::from)
        }
    };
    again("echo 1").await?;
    bench.until_empty().await?;
    assert_eq!(worker.metrics.already_done.get(), 1, "the same body is the same job");
    let ack = again("echo 2").await?;
    bench.until_empty().await?;
    assert_eq!(bench.outcome("a").await?.payload, first.payload);
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1);
    let copy = tokio::time::timeout(PATIENCE, copies.next()).await?.context("no copy")?;
    let own =
        copy.headers.as_ref().and_then(|map| map.get(header::RESULT_JOB_ID)).context("no id")?.to_string();
    assert!(own.starts_with("a-dup-") && own.ends_with(&format!("-{}", ack.sequence)), "{own}");
    let (kind, code, message) = bench.failure(&own).await?;
    assert_eq!((kind.as_str(), code), ("dead", ErrorCode::IdReused));
    assert!(message.contains("job id a was used before"), "{message}");
    let dead = bench.context.get_stream(bench.model.dead_stream()).await?;
    let letter = dead.direct_get_last_for_subject(bench.model.dead_subject(&own.parse()?)).await?;
    assert!(text(&letter, header::REASON).starts_with("ID_REUSED"));
    assert_eq!(letter.payload.as_ref(), b"echo 2");
    Ok(())
}

/// A delivery that comes again while the job is held here joins the first one, and so does another message of its id.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_job_that_comes_again_joins_the_first() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    // The worker's keep-alives are too slow for the consumer, as those of a worker whose steps are slow.
    bench.queue.ack_wait = Span(Duration::from_secs(60));
    let worker = bench.worker("w").await?;
    bench.publish("held", "hang", &[]).await?;
    until("it came again twice", || worker.metrics.redeliveries.get() >= 2).await;
    assert_eq!(worker.runner.runs.load(Ordering::SeqCst), 1, "it runs once");
    bench.context.publish(bench.model.cancel_subject(&"held".parse()?), "".into()).await?.await?;
    assert_eq!(text(&bench.outcome("held").await?, header::ATTEMPT), "1");
    bench.until_empty().await?;
    for _ in 0..2 {
        let mut map = HeaderMap::new();
        map.insert(header::RESULT_JOB_ID, "twice");
        let subject = bench.model.jobs_subject(Class::Normal);
        bench.context.publish_with_headers(subject, map, "late".into()).await?.await?;
    }
    bench.until_empty().await?;
    assert_eq!(
        worker.runner.runs.load(Ordering::SeqCst),
        2,
        "the second message waited for the first one's outcome"
    );
    assert_eq!(worker.metrics.already_done.get(), 1);
    Ok(())
}

/// A consumer that was limited by hand leaves jobs behind, which no counter of it shows; the repair brings them back.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_a_limited_consumer_gave_up_are_seen_and_come_back() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let stream = bench.context.get_stream(bench.model.jobs_stream()).await?;
    let wanted = streams::consumer(&bench.model, Class::Normal, &bench.queue);
    stream.create_consumer(pull::Config { max_deliver: 1, ..wanted }).await?;
    bench.publish("given-up", "echo", &[]).await?;
    let consumer: PullConsumer = stream
        .get_consumer(&bench.model.consumer(Class::Normal))
        .await
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut taken = consumer.fetch().max_messages(1).messages().await?;
    taken.next().await.context("nothing to take")?.map_err(|error| anyhow::anyhow!("{error}"))?;
    tokio::time::sleep(bench.queue.ack_wait.0 + Duration::from_millis(500)).await;
    let doctor = millrace(&bench, &["doctor"]).await?;
    assert!(doctor.contains("1 jobs that no consumer will deliver"), "{doctor}");
    let queue = millrace(&bench, &["queue"]).await?;
    assert!(queue.contains("1 jobs that no consumer will deliver"), "{queue}");
    provision(&bench.context, &bench.model, &bench.queue, &bench.results, Mode::Apply).await?;
    let _worker = bench.worker("w").await?;
    assert_eq!(bench.outcome("given-up").await?.payload.as_ref(), b"echo");
    bench.until_empty().await?;
    stream.pause_consumer(&bench.model.consumer(Class::High), OffsetDateTime::now_utc() + PATIENCE).await?;
    let doctor = millrace(&bench, &["doctor"]).await?;
    assert!(doctor.contains("class high is paused") && doctor.contains("nats consumer resume"), "{doctor}");
    Ok(())
}

/// What the command line prints, for people.
async fn millrace(bench: &Bench, words: &[&str]) -> Result<String> {
    let mut command = std::process::Command::new(tools::program("millrace")?);
    command.args(words).env("NATS_URL", bench.server.url()).env("MILLRACE_MODEL", "m");
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    Ok(String::from_utf8(output.stdout)?)
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
            ..NatsConfig::default()
        };
        let model = ModelRef::new("default", "m")?;
        let broker = Broker::connect(&config, &model, &"w".parse()?).await?;
        Ok(tokio::time::timeout(Duration::from_secs(2), broker.ready()).await.is_ok())
    };
    assert!(connected("me:a%40b").await?);
    assert!(!connected("me:wrong").await?);
    Ok(())
}
