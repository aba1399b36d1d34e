//! What a worker tells about itself: the pages of one that runs, and why one is not ready.
//!
//! Whoever is on call reads `/readyz` first; so each outage here must be named there, and must end by itself
//! when its cause does, without a restart.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_queue::provision::{Mode, provision};
use millrace_tests::cluster::QueueHarness;
use millrace_tests::jobs::{NewJob, OutcomeLog};
use millrace_tests::process::Signal;
use millrace_tests::s3::{self, S3};
use millrace_tests::worker::Worker;
use millrace_tests::{http, nats, tools};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
/// The names and types on `/metrics`: dashboards and alerts stand on them.
const GOLDEN: &str = "tests/golden/metrics.txt";
/// Writes the golden file anew.
const UPDATE: &str = "MILLRACE_UPDATE_GOLDEN";

/// Waits until `/readyz` refuses with all of these words.
fn wait_refusal(worker: &mut Worker, words: &[&str]) -> Result<String> {
    let start = Instant::now();
    loop {
        let said = http::get(worker.health_address(), "/readyz");
        if let Ok((503, text)) = &said
            && words.iter().all(|word| text.contains(word))
        {
            return Ok(text.clone());
        }
        let ended = worker.ended()?;
        ensure!(ended.is_none(), "it ended with {ended:?}\n{}", worker.log_tail());
        ensure!(
            start.elapsed() < LIMIT,
            "/readyz does not say {words:?} but {said:?}\n{}",
            worker.log_tail()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The `# TYPE` lines of a metrics page, without the words `# TYPE`.
fn types(page: &str) -> String {
    let lines: BTreeSet<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    lines.into_iter().map(|line| format!("{line}\n")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_workers_pages_have_fixed_names_and_no_ids() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let cluster = QueueHarness::tiny()?;
    let worker = cluster.worker()?;
    let queue = cluster.queue().await?;
    let refused = NewJob::new("secretive-bad", &json!({"prompt": "x", "temperature": -1}));
    let jobs: Vec<NewJob> =
        (0..3).map(|n| NewJob::completion(&format!("secretive-{n}"), "Tell me", 12)).collect();
    queue.publish_all(&jobs).await?;
    queue.publish(&refused).await?;
    OutcomeLog::default().wait(&queue, 4, LIMIT).await.with_context(|| worker.log_tail())?;
    queue.wait_empty(LIMIT).await?;

    let address = worker.health_address();
    assert_eq!(http::get(address, "/healthz")?, (200, "ok\n".to_owned()));
    assert_eq!(http::get(address, "/readyz")?, (200, "ready\n".to_owned()));
    assert_eq!(http::get(address, "/")?.0, 404);
    let (status, page) = http::get(address, "/metrics")?;
    assert_eq!(status, 200);
    let names = types(&page);
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join(GOLDEN);
    if std::env::var_os(UPDATE).is_some() {
        fs::write(&golden, &names)?;
    }
    assert_eq!(names, fs::read_to_string(&golden)?, "write {GOLDEN} anew with {UPDATE}=1 if this is meant");
    let counted = [
        ("vllm:request_success_total", 3.0),
        ("vllm:generation_tokens_total", 36.0),
        ("vllm:request_generation_tokens_sum", 36.0),
        ("vllm:e2e_request_latency_seconds_count", 4.0),
        ("vllm:time_to_first_token_seconds_count", 3.0),
        ("vllm:inter_token_latency_seconds_count", 33.0),
        ("vllm:cache_config_info", 1.0),
        ("millrace_jobs_total", 4.0),
        ("millrace_jobs_held", 0.0),
    ];
    for (name, expected) in counted {
        // The warm-up's tokens count as the engine's too.
        let found = worker.metric(name)?;
        let exact = name != "vllm:generation_tokens_total";
        assert!(if exact { found == expected } else { found > expected }, "{name} is {found}\n{page}");
    }
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        assert!(line.contains("model_name=\"tiny\"") && !line.contains("secretive"), "{line}");
    }
    Ok(())
}

#[test]
fn a_broker_that_is_away_at_the_start_is_waited_for() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    cluster.nats.kill()?;
    let mut worker = Worker::start(&cluster.config, &[])?;
    wait_refusal(&mut worker, &["the broker is not connected"])?;
    cluster.nats.restart()?;
    worker.wait_ready()?;
    cluster.nats.kill()?;
    wait_refusal(&mut worker, &["the broker is not connected"])?;
    cluster.nats.restart()?;
    worker.wait_ready()?;
    worker.signal(Signal::Terminate)?;
    assert!(worker.wait(LIMIT)?.success(), "{}", worker.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_is_not_there_makes_the_worker_unready() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    cluster.config.nats.provision = false;
    let mut worker = Worker::start(&cluster.config, &[])?;
    wait_refusal(&mut worker, &["no job can be pulled", "JOBS_default_tiny/workers-low", "503"])?;
    let context = async_nats::jetstream::new(cluster.nats.connect().await?);
    let (queue, results) = (&cluster.config.queue, &cluster.config.results);
    provision(&context, &cluster.model(), queue, results, Mode::Create).await?;
    worker.wait_ready()?;
    assert!(worker.log().contains("pulling again"), "{}", worker.log_tail());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_the_model_is_waited_for_and_named() -> Result<()> {
    if !tools::have(&[nats::PROGRAM, s3::PROGRAM]) {
        return Ok(());
    }
    let mut cluster = QueueHarness::tiny()?;
    let s3 = S3::start()?;
    cluster.config.model.uri = "s3://later/tiny".into();
    cluster.config.model.store = s3.store_config();
    let mut worker = Worker::start(&cluster.config, &[])?;
    wait_refusal(&mut worker, &["the weights are not loaded: s3://later/tiny"])?;
    // It stands still meanwhile: a bucket with half of the files is a fault of the model.
    worker.signal(Signal::Stop)?;
    s3.create_bucket("later").await?;
    s3.put_folder(&cluster.model_folder(), "later", "tiny").await?;
    worker.signal(Signal::Continue)?;
    worker.wait_ready()?;
    // A store that answers and does not hold the model is not waited for.
    cluster.config.model.uri = "s3://later/other".into();
    let mut worker = Worker::start(&cluster.config, &[])?;
    assert!(!worker.wait(LIMIT)?.success(), "{}", worker.log_tail());
    let log = worker.log();
    assert!(
        log.contains("s3://later/other") && log.contains("holds no config.json"),
        "{}",
        worker.log_tail()
    );
    Ok(())
}

#[test]
fn a_model_that_cannot_be_used_ends_the_start_with_its_name() -> Result<()> {
    if !tools::have(&[nats::PROGRAM, s3::PROGRAM]) {
        return Ok(());
    }
    // Nobody listens there: the start waits, and a signal ends it at once.
    let mut cluster = QueueHarness::tiny()?;
    cluster.config.model.uri = "s3://models/tiny".into();
    cluster.config.model.store.endpoint = Some("http://127.0.0.1:1".into());
    let keys =
        [("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "canary-key"), ("AWS_REGION", "us-east-1")];
    let mut worker = Worker::start(&cluster.config, &keys)?;
    let said = wait_refusal(&mut worker, &["the weights are not loaded: s3://models/tiny"])?;
    assert!(!said.contains("canary-key") && !worker.log().contains("canary-key"), "{said}");
    worker.signal(Signal::Terminate)?;
    assert!(worker.wait(Duration::from_secs(5))?.success(), "{}", worker.log_tail());

    // Half of the weights.
    let cluster = QueueHarness::tiny()?;
    let tensors = cluster.model_folder().join("model.safetensors");
    let bytes = fs::read(&tensors)?;
    fs::write(&tensors, &bytes[..bytes.len() / 2])?;
    let mut worker = Worker::start(&cluster.config, &[])?;
    assert!(!worker.wait(LIMIT)?.success());
    assert!(worker.log().contains("model.safetensors"), "{}", worker.log_tail());

    // No configuration.
    let cluster = QueueHarness::tiny()?;
    fs::remove_file(cluster.model_folder().join("config.json"))?;
    let mut worker = Worker::start(&cluster.config, &[])?;
    assert!(!worker.wait(LIMIT)?.success());
    assert!(worker.log().contains("config.json"), "{}", worker.log_tail());
    Ok(())
}
