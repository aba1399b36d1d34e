//! Files, uploads and batches over HTTP: OpenAI's client, gateways that die, batches that end before they are done.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use millrace_tests::bulk::{self, BulkPlan};
use millrace_tests::chat::ChatWorker;
use millrace_tests::gateway::Gateway;
use millrace_tests::process::Signal;
use millrace_tests::s3::{self, S3};
use millrace_tests::scripted::{Bench, PATIENCE};
use millrace_tests::tools;
use serde_json::{Value, json};

/// The stamp of the client's folder in the tools' cache.
const CLIENT: &str = "openai/requirements.sha256";

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

fn key(bench: &Bench, words: &[&str]) -> Result<String> {
    let mut command = Command::new(tools::program("millrace")?);
    command.args(["--server", &bench.server.url(), "key", "create"]).args(words);
    let output = command.output()?;
    ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_works_unmodified() -> Result<()> {
    if !tools::have(&[CLIENT]) {
        return Ok(());
    }
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let (own, other) = (key(&bench, &["--tenant", "one"])?, key(&bench, &["--tenant", "two"])?);
    let lister = key(&bench, &["--tenant", "one", "--allow-verb", "models"])?;
    let options = ["--webhook-private", "--file-bytes", "3000000"];
    let mut gateway = Gateway::launch(&bench.server.url(), &options)?;
    gateway.wait_ready()?;
    let mut python = Command::new("python3");
    python
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai/batches.py"))
        .env("PYTHONPATH", tools::cache()?.join("openai"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("DOOR", format!("http://{}/v1", gateway.address()))
        .envs([("KEY", &own), ("OTHER", &other), ("LISTER", &lister)])
        .env_remove("OPENAI_API_KEY");
    let output = blocking(move || Ok(python.output()?)).await?;
    let told = String::from_utf8_lossy(&output.stderr);
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{told}\n{}", gateway.log());
    assert_eq!(said.lines().count(), 8, "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_line_comes_out_once_whatever_is_killed() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    let plan = BulkPlan { lines: 3000, gateway_kills: 4, worker_kills: 2, broker_kills: 1 };
    let report = bulk::run(&mut bench, plan).await?;
    println!("{report:?}");
    assert!(report.peak_bytes < 100 << 20, "{report:?}");
    Ok(())
}

/// The output and the errors of a batch, in one list.
fn results(gateway: &Gateway, batch: &Value) -> Result<Vec<Value>> {
    let mut results = Vec::new();
    for file in [&batch["output_file_id"], &batch["error_file_id"]] {
        if !file.is_null() {
            results.extend(bulk::lines(gateway, file)?);
        }
    }
    Ok(results)
}

fn line(number: usize, script: &str) -> String {
    let body = json!({"model": "m", "messages": [{"role": "user", "content": script}]});
    let (id, url) = (format!("c{number}"), "/v1/chat/completions");
    let line = json!({"custom_id": id, "method": "POST", "url": url, "body": body});
    format!("{line}\n")
}

fn codes(results: &[Value]) -> Vec<(String, String)> {
    let code = |line: &Value| match &line["error"]["code"] {
        Value::Null => line["response"]["status_code"].to_string(),
        code => code.as_str().unwrap_or_default().to_owned(),
    };
    results
        .iter()
        .map(|line| (line["custom_id"].as_str().unwrap_or_default().to_owned(), code(line)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_cancelled_or_late_gives_each_line_a_result() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let worker = ChatWorker::start(&bench, "w").await?;
    let gateway = Gateway::start(&bench.server, &[])?;
    blocking(move || {
        let input = [line(0, "say a"), line(1, "hang"), line(2, "refuse"), line(3, "say d"), line(4, "hang")]
            .concat();
        let file = bulk::upload(&gateway, &input)?;
        let id = bulk::create(&gateway, &file, "1h")?;
        // Its file cannot be deleted meanwhile.
        let kept = gateway.ask("DELETE", &format!("/v1/files/{file}"), &[], "")?.whole()?;
        ensure!(kept.error()?.1 == "file_in_use", "{kept:?}");
        let began = Instant::now();
        while bulk::look(&gateway, &id)?["request_counts"] != json!({"total": 5, "completed": 2, "failed": 1})
        {
            ensure!(began.elapsed() < PATIENCE, "{}", bulk::look(&gateway, &id)?);
            std::thread::sleep(Duration::from_millis(20));
        }
        let cancelling =
            gateway.ask("POST", &format!("/v1/batches/{id}/cancel"), &[], "")?.whole()?.json()?;
        ensure!(cancelling["status"] == "cancelling", "{cancelling}");
        let batch = bulk::ended(&gateway, &id)?;
        ensure!(batch["status"] == "cancelled" && batch["cancelled_at"].is_number(), "{batch}");
        let expected = [
            ("c0", "200"),
            ("c3", "200"),
            ("c1", "batch_cancelled"),
            ("c2", "400"),
            ("c4", "batch_cancelled"),
        ];
        let found = codes(&results(&gateway, &batch)?);
        ensure!(found == expected.map(|(a, b)| (a.to_owned(), b.to_owned())), "{found:?}");
        // What has ended is not cancelled, and its file may go.
        let again = gateway.ask("POST", &format!("/v1/batches/{id}/cancel"), &[], "")?.whole()?;
        ensure!(again.status == 200 && again.json()?["status"] == "cancelled", "{again:?}");
        let began = Instant::now();
        while gateway.ask("DELETE", &format!("/v1/files/{file}"), &[], "")?.whole()?.status != 200 {
            ensure!(began.elapsed() < PATIENCE, "the file stays in use");
            std::thread::sleep(Duration::from_millis(50));
        }
        // Nobody works, and its time is over.
        worker.kill();
        let file = bulk::upload(&gateway, &(0..3).map(|number| line(number, "say x")).collect::<String>())?;
        let late = bulk::ended(&gateway, &bulk::create(&gateway, &file, "60s")?)?;
        ensure!(late["status"] == "expired" && late["output_file_id"].is_null(), "{late}");
        let found = codes(&results(&gateway, &late)?);
        let expected = |number: usize| (format!("c{number}"), "batch_expired".to_owned());
        ensure!(found == (0..3).map(expected).collect::<Vec<_>>(), "{found:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_drains_hands_its_batches_over() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let mut first = Gateway::start(&bench.server, &[])?;
    let slow: String =
        (0..100).map(|number| line(number, "slow a b c d e f g h i j k l m n o p q r s t")).collect();
    let id = bulk::create(&first, &bulk::upload(&first, &slow)?, "1h")?;
    let began = Instant::now();
    while bulk::look(&first, &id)?["status"] != "in_progress" {
        ensure!(began.elapsed() < PATIENCE, "the batch does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    let second = Gateway::start(&bench.server, &[])?;
    first.signal(Signal::Terminate)?;
    ensure!(first.wait(PATIENCE)?.success(), "{}", first.log());
    ensure!(first.log().contains("a batch was given back"), "{}", first.log());
    let batch = blocking(move || bulk::ended(&second, &id)).await?;
    assert_eq!((&batch["status"], &batch["request_counts"]["completed"]), (&json!("completed"), &json!(100)));
    Ok(())
}

/// Sends 64 MiB in and out, and deletes them; how many bytes of memory that takes.
fn through(gateway: &Gateway) -> Result<u64> {
    let before = gateway.peak_bytes()?;
    let content = "0123456789abcde\n".repeat(4 << 20);
    let id = bulk::upload(gateway, &content)?;
    let back = gateway.get(&format!("/v1/files/{id}/content"))?;
    ensure!(back.body == content.as_bytes(), "{} bytes come back", back.body.len());
    let deleted = gateway.ask("DELETE", &format!("/v1/files/{id}"), &[], "")?.whole()?;
    ensure!(deleted.json()?["deleted"] == true, "{deleted:?}");
    ensure!(gateway.get(&format!("/v1/files/{id}"))?.status == 404, "it is still there");
    Ok(gateway.peak_bytes()?.saturating_sub(before))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_goes_through_without_being_held() -> Result<()> {
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let gateway = Gateway::start(&bench.server, &[])?;
    let grown = blocking(move || through(&gateway)).await?;
    println!("64 MiB in and out: {} KiB more memory", grown >> 10);
    assert!(grown < 32 << 20, "{grown} bytes more");
    let mut files = bench.context.get_stream("OBJ_MILLRACE_FILES").await?;
    assert_eq!(files.info().await?.state.messages, 0, "nothing of it is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn files_lie_in_an_object_store_where_there_is_one() -> Result<()> {
    if !tools::have(&[s3::PROGRAM]) {
        return Ok(());
    }
    let Some(bench) = Bench::start().await? else { return Ok(()) };
    let _worker = ChatWorker::start(&bench, "w").await?;
    let store = S3::start()?;
    store.create_bucket("files").await?;
    let (endpoint, keys) = (store.endpoint(), store.credentials_dir().display().to_string());
    let options =
        ["--object-store", "s3://files/door", "--s3-endpoint", &endpoint, "--s3-credentials-dir", &keys];
    let gateway = Gateway::start(&bench.server, &options)?;
    let grown = blocking(move || {
        let id = bulk::create(&gateway, &bulk::upload(&gateway, &bulk::input(300))?, "1h")?;
        let batch = bulk::ended(&gateway, &id)?;
        ensure!(batch["status"] == "completed", "{batch}");
        bulk::check(&bulk::lines(&gateway, &batch["output_file_id"])?, 300)?;
        through(&gateway)
    });
    let grown = grown.await?;
    println!("64 MiB in and out of S3: {} KiB more memory", grown >> 10);
    assert!(grown < 64 << 20, "{grown} bytes more");
    assert!(bench.context.get_stream("OBJ_MILLRACE_FILES").await.is_err(), "nothing lies in the broker");
    Ok(())
}
