//! Claim checks both ways, by a real worker over a real S3 server: a body that is fetched, an outcome that is
//! put away, and what becomes of a job whose object is not there, not allowed, or behind a store that is down.

use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use millrace_crds::config::ObjectStoreConfig;
use millrace_crds::job::{JSONL, header};
use millrace_crds::result::{ErrorCode, OutcomeKind, OutputReference};
use millrace_crds::units;
use millrace_queue::store::Store;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::jobs::{NewJob, OutcomeLog, Pipeline, Stored};
use millrace_tests::s3::{self, S3};
use millrace_tests::{nats, tools};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const LIMIT: Duration = Duration::from_secs(60);
/// Smaller than any answer of the long jobs, larger than those of the short ones.
const INLINE_BYTES_MAX: u64 = 700;
const BYTES_MAX: u64 = 1 << 20;
/// One byte more than a part of a name may have in SeaweedFS; it will never do, so that it is no outage.
const LONG_NAME: &str = concat!(
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
);
/// How long the store is away.
const AWAY: Duration = Duration::from_secs(10);

/// A job whose body is behind its header.
fn referring(id: &str, uri: &str) -> NewJob {
    NewJob { body: Bytes::new(), ..NewJob::new(id, &json!({})) }.with(header::INPUT, uri)
}

fn request(max_tokens: u32) -> Value {
    json!({"prompt": "Tell me", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

/// The bytes that an outcome refers to, which must be those that it names.
async fn referred(store: &Store, stored: &Stored) -> Result<(OutputReference, Bytes)> {
    let reference: OutputReference = serde_json::from_slice(&stored.body)?;
    let bytes = store.get(&reference.output.parse()?, BYTES_MAX).await?;
    assert_eq!(reference.bytes, bytes.len() as u64);
    assert_eq!(reference.sha256, hex::encode(Sha256::digest(&bytes)));
    Ok((reference, bytes))
}

fn text(line: &[u8]) -> Result<String> {
    let line: Value = serde_json::from_slice(line)?;
    let text = line["response"]["body"]["choices"][0]["text"].as_str();
    Ok(text.with_context(|| line.to_string())?.to_owned())
}

fn custom_ids(lines: &[u8]) -> Result<Vec<String>> {
    let lines = lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let id = |line| {
        Ok(serde_json::from_slice::<Value>(line)?["custom_id"].as_str().unwrap_or_default().to_owned())
    };
    lines.map(id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_and_outcomes_travel_by_reference() -> Result<()> {
    if !tools::have(&[nats::PROGRAM, s3::PROGRAM]) {
        return Ok(());
    }
    let mut s3 = S3::start()?;
    s3.create_bucket("claims").await?;
    let store = Store::connect(&s3.store_config()).await?;
    let mut cluster = QueueHarness::tiny()?;
    cluster.config.queue.max_deliver = 2;
    cluster.config.results.inline_bytes_max = units::Bytes(INLINE_BYTES_MAX);
    let place = ObjectStoreConfig { uri: "s3://claims/m".into(), store: s3.store_config() };
    cluster.config.results.object_store = Some(place);
    let worker = cluster.worker()?;
    let queue = cluster.queue().await?;
    let put = async |name: &str, body: String| {
        store.put(&format!("s3://claims/{name}").parse()?, body.into()).await
    };
    put("m/short.json", request(4).to_string()).await?;
    put("m/long.json", request(300).to_string()).await?;
    let lines = (0..3).map(|n| {
        let (custom_id, body) = (format!("c{n}"), request(3 + n));
        let line = json!({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body});
        format!("{line}\n")
    });
    put("m/lines.jsonl", lines.collect()).await?;
    put("elsewhere/short.json", request(4).to_string()).await?;
    let jobs = [
        NewJob::new("direct", &request(300)),
        NewJob::new("short", &request(4)),
        referring("short-in", "s3://claims/m/short.json"),
        referring("long-in", "s3://claims/m/long.json"),
        referring("lines-in", "s3://claims/m/lines.jsonl").with(header::CONTENT_TYPE, JSONL),
        NewJob::new("to-place", &request(4)).with(header::OUTPUT, "s3://claims/m/answers/mine.jsonl"),
        NewJob::new("unnameable", &request(4)).with(header::OUTPUT, format!("s3://claims/m/{LONG_NAME}")),
        referring("outside", "s3://claims/elsewhere/short.json"),
        referring("absent", "s3://claims/m/absent.json"),
    ];
    queue.publish_all(&jobs).await?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, jobs.len(), LIMIT).await.with_context(|| worker.log_tail())?;
    record.check(&queue, &jobs).await?;

    let (place, direct) = referred(&store, record.of("direct")?).await?;
    assert!(place.output.starts_with("s3://claims/m/direct/"), "{place:?}");
    let (_, long) = referred(&store, record.of("long-in")?).await?;
    assert_eq!(text(&long)?, text(&direct)?, "the same request, however it came");
    let short = record.of("short")?;
    assert_eq!(text(&record.of("short-in")?.body)?, text(&short.body)?);
    let (place, mine) = referred(&store, record.of("to-place")?).await?;
    assert_eq!(place.output, "s3://claims/m/answers/mine.jsonl");
    assert_eq!(text(&mine)?, text(&short.body)?);
    let (_, answers) = referred(&store, record.of("lines-in")?).await?;
    assert_eq!(custom_ids(&answers)?, ["c0", "c1", "c2"]);
    for (id, word) in [
        ("outside", "s3://claims/elsewhere/short.json"),
        ("absent", "s3://claims/m/absent.json"),
        ("unnameable", "KeyTooLongError"),
    ] {
        let error = record.of(id)?.lines()?[0].error.clone().context("an answer")?;
        assert_eq!(error.code, ErrorCode::InvalidRequest);
        assert!(error.message.contains(word), "{}", error.message);
    }

    a_taken_place(&queue, &store, &mut record).await?;
    without_the_store(&mut s3, &queue, record).await.with_context(|| worker.log_tail())
}

/// A second job that asks for the first one's address gets a place beside it.
async fn a_taken_place(queue: &Pipeline, store: &Store, record: &mut OutcomeLog) -> Result<()> {
    let before = record.outcomes.len();
    let address = "s3://claims/m/answers/mine.jsonl";
    queue.publish_all(&[NewJob::new("to-place-too", &request(5)).with(header::OUTPUT, address)]).await?;
    record.wait(queue, before + 1, LIMIT).await?;
    let (place, theirs) = referred(store, record.of("to-place-too")?).await?;
    assert!(place.output.starts_with(&format!("{address}.to-place-too-")), "{place:?}");
    let (place, mine) = referred(store, record.of("to-place")?).await?;
    assert!(place.output == address && mine != theirs, "the first answer is as it was");
    Ok(())
}

/// While the store is away a job that needs it waits and the others go on; when it is back the job has its answer, of
/// its first attempt.
async fn without_the_store(s3: &mut S3, queue: &Pipeline, mut record: OutcomeLog) -> Result<()> {
    let before = record.outcomes.len();
    s3.kill()?;
    queue
        .publish_all(&[referring("down", "s3://claims/m/short.json"), NewJob::new("fine", &request(4))])
        .await?;
    record.wait(queue, before + 1, LIMIT).await?;
    assert_eq!(record.of("fine")?.kind, OutcomeKind::Completed);
    // Longer than two attempts with their backoff took, when an outage counted as one.
    tokio::time::sleep(AWAY).await;
    tokio::task::block_in_place(|| s3.restart())?;
    record.wait(queue, before + 2, LIMIT).await?;
    let down = record.of("down")?;
    assert_eq!((down.kind, down.attempt), (OutcomeKind::Completed, 1));
    Ok(())
}
