//! No prompt, answer or secret in the logs, even with everything turned up.
//!
//! The whole queue side runs here with the most talkative filter that an operator can ask for, over jobs that
//! end in every way; a canary word stands in their bodies, answers, headers and in what fails.

use std::io::Write;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use millrace_crds::job::header;
use millrace_tests::cluster::QueueHarness;
use millrace_tests::jobs::{NewJob, OutcomeLog};
use millrace_tests::scripted::{Bench, PATIENCE};
use millrace_tests::worker::Worker;
use millrace_tests::{nats, tools};
use millrace_worker::telemetry;
use serde_json::json;
use tracing_subscriber::fmt::MakeWriter;

const CANARY: &str = "canary-7f3a";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no writer panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Log;
    fn make_writer(&self) -> Log {
        self.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_canary_is_never_logged() -> Result<()> {
    let log = Log::default();
    let filter = millrace_worker::telemetry::filter("trace").map_err(anyhow::Error::msg)?;
    tracing_subscriber::fmt().json().with_writer(log.clone()).with_env_filter(filter).init();
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = bench.worker("w").await?;
    for (id, word) in [("a", "echo"), ("b", "once"), ("c", "fail"), ("d", "refuse")] {
        bench.publish(id, &format!("{word} {CANARY}"), &[("X-Private", CANARY)]).await?;
    }
    bench.publish("e", CANARY, &[(header::DEADLINE, "2020-01-01T00:00:00Z")]).await?;
    for id in ["a", "b", "c", "d", "e"] {
        bench.outcome(id).await?;
    }
    bench.until_empty().await?;
    worker.drain.cancel();
    worker.task.await?.map_err(anyhow::Error::msg)?;
    let text = String::from_utf8_lossy(&log.0.lock().expect("no writer panics")).into_owned();
    for id in ["a", "b", "c", "d", "e"] {
        assert!(text.contains(&format!("\"job\":\"{id}\"")), "job {id} is not in the log:\n{text}");
    }
    assert!(text.contains("\"category\":\"inference\""), "the fault is not in the log:\n{text}");
    let leak = text.lines().find(|line| line.contains(CANARY));
    assert_eq!(leak, None);
    Ok(())
}

/// The same from outside: a worker process with its log turned up, over jobs that are answered, refused for a
/// value and refused for a field.
#[tokio::test(flavor = "multi_thread")]
async fn a_workers_own_log_never_holds_it_either() -> Result<()> {
    if !tools::have(&[nats::PROGRAM]) {
        return Ok(());
    }
    let cluster = QueueHarness::tiny()?;
    let mut worker = Worker::start(&cluster.config, &[(telemetry::VARIABLE, "trace")])?;
    worker.wait_ready()?;
    let queue = cluster.queue().await?;
    let jobs = [
        NewJob::completion("answered", CANARY, 8).with(header::STREAM, "true").with("X-Private", CANARY),
        NewJob::new("value", &json!({"prompt": CANARY, "temperature": CANARY})),
        NewJob::new("field", &json!({"prompt": CANARY, CANARY: 1})),
        NewJob::new("stop", &json!({"prompt": "x", "stop": [CANARY], "max_tokens": 4})),
        NewJob::completion("header", "x", 4).with(header::REPLY_SUBJECT, format!("$SYS.{CANARY}")),
    ];
    queue.publish_all(&jobs).await?;
    let mut record = OutcomeLog::default();
    record.wait(&queue, jobs.len(), PATIENCE).await?;
    queue.wait_empty(PATIENCE).await?;
    let log = worker.log();
    for job in &jobs {
        assert!(log.contains(&format!("\"job\":\"{}\"", job.id)), "job {} is not in the log", job.id);
    }
    assert_eq!(log.lines().find(|line| line.contains(CANARY)), None);
    Ok(())
}
