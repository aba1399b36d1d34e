//! What is submitted again: `millrace submit` against a broker that forgot a job, a model that was replaced, an id
//! that was used before.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use millrace_crds::job::header;
use millrace_crds::names::JobId;
use millrace_tests::scripted::Bench;
use millrace_tests::tools;
use serde_json::{Value, json};

/// Runs the program off the runtime's thread, with JSON on standard output.
async fn millrace(bench: &Bench, words: &[&str]) -> Result<Output> {
    let mut command = Command::new(tools::program("millrace")?);
    command.args(words).arg("--json").stdin(Stdio::null());
    for name in ["NATS_CREDS", "NATS_CA", "MILLRACE_NAMESPACE", "MILLRACE_INBOX_PREFIX"] {
        command.env_remove(name);
    }
    command.env("NATS_URL", bench.server.url()).env("MILLRACE_MODEL", "m");
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

/// The counts of a submit that ends well.
async fn counts(bench: &Bench, words: &[&str]) -> Result<[u64; 3]> {
    let output = millrace(bench, words).await?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words:?}: {told}");
    let text = String::from_utf8(output.stdout)?;
    let last: Value = serde_json::from_str(text.lines().last().context("nothing printed")?)?;
    Ok(["published", "duplicate", "done_before"].map(|name| last[name].as_u64().unwrap_or(u64::MAX)))
}

/// What a submit that is refused with this code says.
async fn refusal(bench: &Bench, code: i32, words: &[&str]) -> Result<String> {
    let output = millrace(bench, words).await?;
    let told =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code() == Some(code), "{words:?}: {}, not {code}: {told}", output.status);
    Ok(told)
}

async fn id_of(bench: &Bench, words: &[&str]) -> Result<JobId> {
    let output = millrace(bench, &[words, &["--dry-run"]].concat()).await?;
    let line: Value = serde_json::from_slice(&output.stdout)?;
    Ok(line["job"].as_str().context("no id")?.parse()?)
}

/// Stores an outcome as a worker does, with one header more.
async fn store(bench: &Bench, job: &JobId, (name, value): (&str, &str)) -> Result<()> {
    let mut map = HeaderMap::new();
    map.insert(header::OUTCOME, "completed");
    map.insert(name, value);
    let body = json!({"choices": [{"index": 0, "text": "old"}]});
    let response = json!({"status_code": 200, "request_id": job, "body": body});
    let line = json!({"id": job, "custom_id": job, "response": response, "error": null}).to_string();
    bench.context.publish_with_headers(bench.model.result_subject(job), map, line.into()).await?.await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duplicate_counts_only_while_the_job_or_its_outcome_is_there() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let submit = ["submit", "--prompt", "x"];
    let job = id_of(&bench, &submit).await?;
    assert_eq!(counts(&bench, &submit).await?, [1, 0, 0]);
    assert_eq!(counts(&bench, &submit).await?, [0, 1, 0], "it lies in the queue");
    // The broker remembers the id of a job that was purged.
    bench.context.get_stream(bench.model.jobs_stream()).await?.purge().await?;
    assert_eq!(counts(&bench, &submit).await?, [1, 0, 0]);
    assert_eq!(bench.jobs_left().await?, 1);
    let worker = bench.worker("w").await?;
    bench.outcome(job.as_str()).await?;
    bench.until_empty().await?;
    // And of one whose outcome has aged away.
    bench.context.get_stream(bench.model.results_stream()).await?.purge().await?;
    assert_eq!(counts(&bench, &submit).await?, [1, 0, 0]);
    bench.outcome(job.as_str()).await?;
    bench.until_empty().await?;
    assert_eq!(worker.metrics.stored_total(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_another_model_do_not_count_as_done() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let submit = ["submit", "--prompt", "x"];
    let job = id_of(&bench, &submit).await?;
    store(&bench, &job, (header::MODEL_DIGEST, "sha256:old")).await?;
    assert_eq!(counts(&bench, &submit).await?, [0, 0, 1], "nobody says what is served");
    let report = json!({"worker": "w-1", "phase": "ready", "uptimeS": 1.0, "kvBlocksUsed": 1,
        "kvBlocksTotal": 2, "sequencesRunning": 0, "sequencesWaiting": 0, "jobsHeld": 0, "promptTokensPerS": 0.0,
        "outputTokensPerS": 0.0, "jobsFinished": 0, "modelDigest": "sha256:new"});
    let (client, subject) = (bench.client.clone(), bench.model.load_subject(&"w-1".parse()?));
    let reports = tokio::spawn(async move {
        loop {
            let _ = client.publish(subject.clone(), report.to_string().into()).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    let told = refusal(&bench, 2, &submit).await?;
    assert!(
        told.contains("1 of 1 job") && told.contains("sha256:old") && told.contains("sha256:new"),
        "{told}"
    );
    assert_eq!(counts(&bench, &["submit", "--prompt", "x", "--any-model"]).await?, [0, 0, 1]);
    assert_eq!(counts(&bench, &["submit", "--prompt", "x", "--id-prefix", "new-"]).await?, [1, 0, 0]);
    reports.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_was_used_with_another_body_is_refused() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let submit = |prompt: &'static str, prefix: &'static str| {
        ["submit", "--id-from", "custom-id", "--prompt", prompt, "--id-prefix", prefix]
    };
    assert_eq!(counts(&bench, &submit("x", "a-")).await?, [1, 0, 0]);
    assert_eq!(counts(&bench, &submit("x", "a-")).await?, [0, 1, 0]);
    let told = refusal(&bench, 6, &submit("y", "a-")).await?;
    assert!(told.contains("job id a-prompt") && told.contains("another body"), "{told}");
    let job = id_of(&bench, &submit("x", "b-")).await?;
    store(&bench, &job, (header::BODY_DIGEST, "sha256:0")).await?;
    let told = refusal(&bench, 2, &submit("x", "b-")).await?;
    assert!(told.contains("job id b-prompt") && told.contains("another body"), "{told}");
    assert_eq!(bench.jobs_left().await?, 1, "nothing else was published");
    Ok(())
}
